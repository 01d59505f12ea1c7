"""hidden_width: fewer channels inside blocks, by the network that they make."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from rba_compress import (
    Budget,
    Config,
    PlanError,
    Result,
    compress,
    export_onnx,
    load,
    profile,
    supports,
)
from rba_compress.core.plan import Plan, Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.stages import stage
from rba_compress.planning.state import Candidate, undone, with_candidate, without_unread
from rba_compress.profiling.cost import cost
from rba_compress.units.splice import splice
from tests.networks import Block, Chain, images, loader, seeded

CONFIG = Config(units=("hidden_width",), multiple=1, refit=False)


def vit(**kwargs: object) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return seeded(timm.create_model, "vit_tiny_patch16_224", **(size | {"num_classes": 5} | kwargs))


def fitted(
    model: nn.Module, data: list[Tensor], config: Config = CONFIG
) -> tuple[SearchContext, list[Candidate]]:
    """A search at its start, and every option inside the blocks."""
    seen = profile(model, data, config=config)
    run = SearchContext.read(model, seen, data, Budget(macs=0.99))
    sites = [
        Site(c, b, b + 1, "hidden_width")
        for c, chain in enumerate(run.chains)
        for b, block in enumerate(chain.blocks)
        if block.width("hidden_width")
    ]
    return run, run.fitter.candidates(run.start, sites)


NETWORKS = {
    "mlp": lambda: (seeded(Chain), loader()),
    "ViT": lambda: (vit(), list(images(40, 32).split(10))),
    "gated": lambda: (
        seeded(
            timm.create_model,
            "eva02_tiny_patch14_224",
            img_size=28,
            embed_dim=24,
            depth=3,
            num_heads=2,
            num_classes=5,
        ),
        list(images(40, 28).split(10)),
    ),
    "ResNet": lambda: (
        seeded(
            timm.create_model, "resnet18", channels=(8, 8, 8, 8), num_classes=5, zero_init_last=False
        ),
        list(images(40, 32).split(10)),
    ),
    "bottleneck": lambda: (
        seeded(
            timm.create_model, "resnet26", channels=(8, 8, 8, 8), num_classes=5, zero_init_last=False
        ),
        list(images(40, 32).split(10)),
    ),
    "ConvNeXt": lambda: (
        seeded(
            timm.create_model, "convnext_atto", dims=(8, 8, 8, 8), depths=(2, 2, 2, 2), num_classes=5
        ),
        list(images(40, 32).split(10)),
    ),
    "inverted bottleneck": lambda: (
        seeded(timm.create_model, "mobilenetv2_035", num_classes=5),
        list(images(40, 32).split(10)),
    ),
    "mixer": lambda: (
        seeded(MlpMixer, num_classes=5, img_size=64, patch_size=16, num_blocks=3, embed_dim=16),
        list(images(40, 64).split(10)),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_narrower_network_costs_what_is_counted_and_reloads(name: str, tmp_path: Path) -> None:
    """Real layers of other sizes, in a network that is spliced anew to the same bits."""
    model, data = NETWORKS[name]()
    run, options = fitted(model, data)
    assert options, "nothing was found"
    solution = run.start.solution
    for site in dict.fromkeys(each.site for each in options):
        of_site = [each for each in options if each.site == site]
        assert len({each.replacement.kept for each in of_site}) == len(of_site)
        solution = with_candidate(solution, of_site[len(of_site) // 2])
    solution = without_unread(solution, run.profile)
    compressed = splice(model, solution.plan, solution.tensors)
    with torch.no_grad():
        assert torch.isfinite(compressed(data[0])).all()
    counted, expected = cost(compressed, run.profile.example), run.fitter.cost(solution.plan)
    assert (counted.macs, counted.params) == (expected.macs, expected.params)
    assert type(compressed) is type(model)
    sizes = {name: tuple(tensor.shape) for name, tensor in compressed.state_dict().items()}
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sizes.keys() == before.keys()
    assert sizes != before
    for layer in compressed.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)


@pytest.mark.parametrize("name", ["ResNet", "bottleneck"])
def test_readers_that_are_solved_anew_come_closer_to_the_originals_sum(name: str) -> None:
    """Convolutions behind narrowed blocks, also where the channels on both of their sides are narrowed."""
    model, data = NETWORKS[name]()
    run, options = fitted(model, data)
    before = run.start.solution
    for option in options:
        if option.replacement.kept == 4:
            before = with_candidate(before, option)
    after = before
    for c in range(len(run.chains)):
        after = run.fitter.narrowed_again(after, c)

    def sums(network: nn.Module) -> Tensor:
        found: list[Tensor] = []
        last = network.get_submodule("layer2.1.act2" if name == "ResNet" else "layer2.1.act3")
        last.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
        with torch.no_grad():
            for batch in data:
                network(batch)
        return torch.cat(found)

    compressed = [splice(model, each.plan, each.tensors) for each in (before, after)]
    wanted = sums(model)
    first, solved = (float((sums(each) - wanted).square().sum()) for each in compressed)
    assert solved < 0.96 * first


def planted(width: int = 8) -> nn.Module:
    """A chain in which some hidden channels of each block are copies, multiples or constants."""
    model = seeded(Chain, 3, width)
    for k, block in enumerate(model.blocks):  # type: ignore[union-attr, arg-type]
        up, down = block.up, block.down
        with torch.no_grad():
            up.weight[3], up.bias[3] = up.weight[1], up.bias[1]  # a copy
            up.weight[5], up.bias[5] = 2 * up.weight[2], 2 * up.bias[2]  # a multiple
            up.weight[7], up.bias[7] = 0, 1.5  # a constant
            up.weight[9], up.bias[9] = 0, -1.0  # never active
            if k == 1:
                down.weight[:, 11] = 0  # never read
    return model


def test_planted_redundancy_is_found_to_the_last_channel_and_costs_nothing() -> None:
    model, data = planted(), loader(200)
    run, options = fitted(model, data)
    solution = run.start.solution
    fit = torch.cat([batch.args[0] for batch in run.fitter.batches])
    for b, block in enumerate(model.blocks):  # type: ignore[arg-type]
        with torch.no_grad():
            x = nn.Sequential(model.stem, *model.blocks[:b])(fit)  # type: ignore[index, misc, arg-type]
            hidden = torch.relu(block.up(x)).double()
        rank = np.linalg.matrix_rank((hidden - hidden.mean(0)).numpy(), tol=1e-4)
        free = next(o for o in options if o.replacement.start == b and o.replacement.level == 0)
        assert free.replacement.kept == rank - (b == 1) <= 12
        solution = with_candidate(solution, free)
    compressed = splice(model, solution.plan, solution.tensors)
    with torch.no_grad():
        torch.testing.assert_close(compressed(fit), model(fit), rtol=1e-5, atol=1e-5)


def test_a_narrowing_that_is_undone_leaves_the_original() -> None:
    model = seeded(Chain)
    run, options = fitted(model, loader())
    solution = with_candidate(run.start.solution, options[0])
    again = undone(solution, solution.plan.replacements[0])
    assert again.plan.replacements == ()
    assert again.tensors == {}
    x = loader()[0]
    assert torch.equal(splice(model, again.plan, again.tensors)(x), model(x))


def test_a_narrower_block_is_narrowed_further_from_what_it_is() -> None:
    """The levels above the present one, of the channels that are left."""
    model, data = seeded(Chain), loader()
    run, options = fitted(model, data)
    first = next(o for o in options if o.replacement.kept == 12)
    state = run.state(with_candidate(run.start.solution, first), run.start.cost)
    further = run.fitter.candidates(state, [first.site])
    assert {o.replacement.kept for o in further} == {
        o.replacement.kept for o in options if o.site == first.site and o.replacement.kept < 12
    }
    new = with_candidate(state.solution, further[-1])
    assert [r.kept for r in new.plan.replacements] == [further[-1].replacement.kept]
    compressed = splice(model, new.plan, new.tensors)
    block = model.get_submodule(first.replacement.blocks[0].path)
    narrow = compressed.get_submodule(first.replacement.blocks[0].path)
    kept = {tuple(row.tolist()) for row in block.up.weight}  # type: ignore[union-attr]
    assert all(tuple(row.tolist()) in kept for row in narrow.up.weight)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def searched() -> Result:
    model, data = vit(), list(images(40, 32).split(10))
    config = Config(units=("hidden_width", "token_merge"), multiple=1, effort="quick")
    return compress(model, data, budget=Budget(macs=0.7), config=config)


@pytest.mark.parametrize("delta", [False, True])
def test_a_narrower_network_is_searched_saved_and_reloaded(
    searched: Result, delta: bool, tmp_path: Path
) -> None:
    assert {r.unit for r in searched.plan.replacements} >= {"hidden_width"}
    assert searched.report.compressed.macs <= 0.7 * searched.report.original.macs
    searched.save(tmp_path / "narrow", delta=delta)
    again = load(tmp_path / "narrow", original=vit() if delta else None)
    x = images(10, 32)
    with torch.no_grad():
        assert torch.equal(again(x), searched.model(x))


@pytest.mark.slow
def test_a_narrower_network_is_exported(searched: Result, tmp_path: Path) -> None:
    certificate = export_onnx(searched.model, tmp_path / "narrow.onnx", images(10, 32))
    assert all(parity.max_rel <= certificate.tolerance for parity in certificate.parity)


def test_a_stock_plan_removes_blocks_and_narrows_all_others_alike() -> None:
    """Planted: a block that adds nothing, and half of the channels of all others."""
    model, data = seeded(Chain, 5), loader(200)
    with torch.no_grad():
        for b, block in enumerate(model.blocks):  # type: ignore[arg-type]
            block.down.weight[:, 8:] = 0.0
            block.up.weight[8:], block.up.bias[8:] = block.up.weight[:8], block.up.bias[:8]
            if b == 2:
                block.down.weight.zero_()
                block.down.bias.zero_()
    config = Config(stock=True, multiple=1, units=("span", "hidden_width"), maps=("identity",))
    found = compress(model, data, budget=Budget(macs=0.5), config=config)
    run = SearchContext.read(model, profile(model, data, config=config), data, Budget(macs=0.5))
    plans = [v.state.solution.plan.replacements for v in stage(run, run.start, 0.5)]
    assert any({r.inner for r in plan} == {False, True} for plan in plans)
    assert [(r.start, r.stop) for r in found.plan.replacements if not r.inner] == [(2, 3)]
    assert [(r.start, r.kept) for r in found.plan.in_order if r.inner] == [(b, 8) for b in (0, 1, 3, 4)]
    with torch.no_grad():
        torch.testing.assert_close(found.model(data[0]), model(data[0]), rtol=1e-5, atol=1e-5)


def test_a_graph_is_narrowed_as_its_module_is() -> None:
    data = loader()
    graph = torch.fx.symbolic_trace(seeded(Chain))
    outputs = []
    for model in (seeded(Chain), graph):
        run, options = fitted(model, data)
        solution = with_candidate(run.start.solution, options[3])
        compressed = splice(model, solution.plan, solution.tensors)
        with torch.no_grad():
            outputs.append(compressed(data[0]))
    assert torch.equal(*outputs)
    assert isinstance(compressed, torch.fx.GraphModule)


class Twice(Block):
    """A block that reads its hidden channels twice."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        return x + self.down(hidden) * hidden.mean(-1, keepdim=True)


class Fixed(Block):
    """A block whose code knows the number of its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)).view(len(x), 16))


class Added(Block):
    """A block whose code adds a number to each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)) + torch.arange(16.0))


def test_channels_that_cannot_be_taken_are_refused_with_the_reason() -> None:
    x = loader()[0]
    tied = seeded(Chain, 4)
    tied.blocks[1].up.weight = tied.blocks[2].up.weight  # type: ignore[union-attr, index]
    assert "refused blocks.1 (Block): it shares up.weight with blocks.2.up.weight" in str(
        supports(tied, x)
    )
    text = str(supports(seeded(Chain, 4, 8, Twice), x))
    assert "hidden_width of down: its input is read elsewhere" in text
    text = str(supports(seeded(Chain, 4, 8, Fixed), x))
    assert "hidden_width of its code takes no other number of channels: RuntimeError" in text
    text = str(supports(seeded(Chain, 4, 8, Added), x))
    assert "hidden_width of down: its code has a number of its own for each channel" in text
    computed = seeded(Chain, 4)
    torch.nn.utils.parametrizations.weight_norm(computed.blocks[2].up)  # type: ignore[union-attr, index]
    assert "hidden_width of down: the weight of up is computed from other tensors" in str(
        supports(computed, x)
    )


def test_a_plan_of_another_network_is_refused_before_anything_is_changed() -> None:
    run, options = fitted(seeded(Chain), loader())
    solution = with_candidate(run.start.solution, options[0])
    other = seeded(Chain, 4, 6)
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(PlanError, match="the plan is of another architecture"):
        splice(other, solution.plan, solution.tensors, inplace=True)
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())
    name = next(iter(solution.tensors))
    with pytest.raises(PlanError, match=f"its tensor '{name}' is missing"):
        splice(seeded(Chain), solution.plan, {})
    lost = Plan.model_validate_json(solution.plan.model_dump_json())
    assert lost == solution.plan
    text = solution.plan.model_dump_json().replace("[16,8]", "[0,8]").replace("[15,8]", "[0,8]")
    with pytest.raises(ValueError, match="leaves nothing of"):
        Plan.model_validate_json(text)


@pytest.mark.slow
def test_redundancy_that_is_planted_in_a_wide_network_is_found_to_the_last_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 of 3,072 neurons of blocks as wide as those of a ViT-B/16: copies, constants, unread ones."""
    model, planted = seeded(timm.create_model, "vit_base_patch16_224", depth=2), 100
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:  # type: ignore[union-attr]
        up, down = block.mlp.fc1, block.mlp.fc2
        places = torch.randperm(3072, generator=generator)
        copies, constants, unread, others = places.split(
            [planted, planted, planted, 3072 - 3 * planted]
        )
        with torch.no_grad():
            up.weight[copies], up.bias[copies] = up.weight[others[:planted]], up.bias[others[:planted]]
            up.weight[constants] = 0
            up.bias[constants] = torch.randn(planted, generator=generator)
            down.weight[:, unread] = 0
    monkeypatch.setattr("rba_compress.planning.candidates.SHARES", (0.0,))
    run, options = fitted(model, list(images(160, 224).split(8)))
    solution = run.start.solution
    for b in range(2):
        free = next(o for o in options if o.replacement.start == b and o.replacement.level == 0)
        assert free.replacement.kept == 3072 - 3 * planted
        solution = with_candidate(solution, free)
    compressed = splice(model, solution.plan, solution.tensors)
    x = images(4, 224, seed=1)
    with torch.no_grad():
        expected, found = model(x), compressed(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
