from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from rba_compress import Budget, Config, Plan, PlanError, compress, profile, splice, supports
from rba_compress.core.batch import as_batch
from rba_compress.core.plan import Branch, LayerRefit, Site
from rba_compress.graph.activations import run_with_streams
from rba_compress.graph.rewrite import copy_model
from rba_compress.linalg.maps import correction
from rba_compress.linalg.moments import PairMoments
from rba_compress.planning.context import SearchContext
from rba_compress.planning.fit_statistics import Rows, RowSums, _lacking, batch_statistics
from rba_compress.planning.refinement import statistics
from rba_compress.planning.sites import sites
from rba_compress.planning.state import with_candidate
from tests.networks import LIGHT, Block, Chain, images, loader, seeded


def pairs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64) + 2
    return x, torch.randn(n, 3, generator=generator, dtype=torch.float64) - 1


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 50))
def test_pair_moments_add_up_and_are_weighted(a: int, b: int, weight: float) -> None:
    x, y = pairs(a + b)
    parts = PairMoments.from_rows(x[:a], y[:a]) + PairMoments.from_rows(x[a:], y[a:])
    whole = PairMoments.from_rows(x, y)
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9)
    w = np.r_[np.ones(a), np.full(b, weight)]
    mixed = PairMoments.from_rows(x[:a], y[:a]) + PairMoments.from_rows(x[a:], y[a:]).weighted(weight)
    mean = np.average(x.numpy(), axis=0, weights=w)
    expected = (x.numpy() - mean).T * w @ (x.numpy() - mean)
    np.testing.assert_allclose(mixed.xx, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_a_correction_is_ridge_regression_of_the_gap(bias: bool) -> None:
    x, y = pairs(40)
    change, shift = correction(PairMoments.from_rows(x, y), 0.5, bias=bias)
    a, b = x.numpy(), y.numpy()
    if bias:
        a, b = a - a.mean(0), b - b.mean(0)
    gram = a.T @ a
    ridge = 0.5 * np.diag(gram).mean()
    expected = np.linalg.solve(gram + ridge * np.eye(6), a.T @ b)
    np.testing.assert_allclose(change.T, expected, rtol=1e-9)
    offset = y.numpy().mean(0) - x.numpy().mean(0) @ expected if bias else np.zeros(3)
    np.testing.assert_allclose(shift, offset, rtol=1e-9)


def small_vit() -> tuple[nn.Module, list[torch.Tensor]]:
    arguments: dict[str, Any] = {"img_size": 32, "depth": 5, "embed_dim": 48, "num_heads": 3}
    model = seeded(timm.create_model, "deit3_small_patch16_224", **arguments)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # a layer scale as a trained network has it
            nn.init.constant_(parameter, 0.3)
    return model, list(images(30).split(10))


@pytest.mark.parametrize(
    "form",
    [lambda m: m, pytest.param(fx.symbolic_trace, marks=pytest.mark.slow)],
    ids=["module", "graph"],
)
def test_a_candidate_run_from_where_it_differs_is_judged_as_a_whole_run(form: Any) -> None:
    model, data = small_vit()
    model = form(model)
    run = SearchContext.read(model, profile(model, data, config=LIGHT), data, Budget(macs=0.5))
    (*_, first) = run.fitter.candidates(run.start, [Site(0, 1, 2, "span")])
    draft = run.state(with_candidate(run.start.solution, first), run.start.cost - first.saving)
    for move in run.fitter.candidates(draft, sites(run, draft.solution.plan)):
        at = move.chain, move.boundary
        resumed = run.divergences(draft, with_candidate(draft.solution, move), at)
        whole = run.evaluator(run.fitter.compressed(with_candidate(draft.solution, move)))
        torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-9)


class Towers(nn.Module):
    """Two chains side by side, both read by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Chain(), Chain()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], 1))


def t5() -> tuple[nn.Module, list[Any]]:
    """A decoder whose every block reads the encoder."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 3}
    model = seeded(transformers.T5Model, transformers.T5Config(vocab_size=50, **sizes))
    ids = torch.randint(1, 50, (20, 6), generator=torch.Generator().manual_seed(0))
    return model, [{"input_ids": part, "decoder_input_ids": part} for part in ids.split(10)]


@pytest.mark.parametrize("networks", [lambda: (seeded(Towers), loader()), t5], ids=["towers", "t5"])
def test_later_chains_are_judged_and_walked_with_the_earlier_ones_in_place(networks: Any) -> None:
    model, data = networks()
    run = SearchContext.read(model, profile(model, data, config=LIGHT), data, Budget(macs=0.5))
    assert len(run.chains) == 2
    first = next(m for m in run.fitter.candidates(run.start, [Site(0, 0, 1, "span")]))
    draft = run.state(with_candidate(run.start.solution, first), run.start.cost - first.saving)
    spans: list[Site] = [Site(1, start, stop, "span") for start, stop in run.chains[1].spans()]
    for move in run.fitter.candidates(draft, spans):
        at = move.chain, move.boundary
        resumed = run.divergences(draft, with_candidate(draft.solution, move), at)
        whole = run.evaluator(run.fitter.compressed(with_candidate(draft.solution, move)))
        torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=1e-9)
    walk = run.fitter.walk(1, draft.solution.plan)
    compressed = run.fitter.compressed(draft.solution)
    for boundary in (1, 2):
        walk.to(compressed, boundary)
        with torch.no_grad():
            for k, batch in enumerate(run.fitter.batches):
                for network, held in ((model, walk._now.original), (compressed, walk._now.compressed)):
                    expected = run_with_streams(network, run.chains, batch)[1][1][boundary]
                    torch.testing.assert_close(held[k][1][boundary], expected)


def test_a_scale_that_is_no_parameter_is_no_layer_scale() -> None:
    class Scaled(Block):
        def __init__(self, width: int = 8) -> None:
            super().__init__(width)
            self.alpha = torch.full((width,), 0.5)  # in no state dict

        def forward(self, x: Tensor) -> Tensor:
            return x + self.alpha * self.down(torch.relu(self.up(x)))

    model = seeded(Chain, block=Scaled)
    compressed = compress(model, loader(), budget=Budget(macs=0.6))
    assert compressed.plan.replacements
    assert not any(b.branches for b in compressed.profile.chains[0].chain.blocks)


def test_a_span_folded_into_a_block_that_goes_is_skipped() -> None:
    model, data = small_vit()
    run = SearchContext.read(model, profile(model, data, config=LIGHT), data, Budget(macs=0.3))
    moves = run.fitter.candidates(run.start, [Site(0, 3, 4, "span")])
    folded = next(m for m in moves if m.replacement.map.kind == "folded")
    draft = run.state(with_candidate(run.start.solution, folded), run.start.cost - folded.saving)
    taken = next(iter(run.fitter.candidates(draft, [Site(0, 2, 3, "span")])))
    plan = with_candidate(draft.solution, taken).plan
    assert {(r.start, r.map.kind) for r in plan.replacements} == {(2, "identity"), (3, "identity")}
    assert not plan.refits
    splice(model, plan, with_candidate(draft.solution, taken).tensors)


def test_a_layer_that_is_resolved_again_is_listed_once() -> None:
    model, data = small_vit()
    run = SearchContext.read(model, profile(model, data, config=LIGHT), data, Budget(macs=0.9))
    solution = run.start.solution
    for _ in range(2):
        walk = run.fitter.walk(0, solution.plan)
        _, solution = run.fitter.corrected(walk, solution, (2, 1), damping=1.0, step=0.5)
    assert [r.path for r in solution.plan.refits] == ["blocks.2.mlp.fc2"]


def summed(chain: Any, x: Tensor, y: Tensor, mask: Tensor | None) -> Rows:
    sums = RowSums()
    sums.add(chain, x, y, mask)
    return sums.rows()


def test_class_tokens_are_told_apart_behind_a_mask() -> None:
    model, data = small_vit()
    chain = profile(model, data, config=LIGHT).chains[0].chain
    x, y = images(4)[:, :2, :5, :17].mT.flatten(2), images(4, seed=1)[:, :2, :5, :17].mT.flatten(2)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    plain, masked = summed(chain, x, y, None), summed(chain, x, y, mask)
    assert masked.class_tokens is not None
    torch.testing.assert_close(plain.weighted(9.0).xx, masked.weighted(9.0).xx)
    mask[:, 1] = False
    assert summed(chain, x, y, mask).others.n == masked.others.n - 4


def test_the_gap_of_a_layer_by_hand() -> None:
    """With a layer scale: what `mlp.fc2` lacks is (h - g) / gamma behind its block."""
    model, data = small_vit()
    seen = profile(model, data, config=LIGHT)
    run = SearchContext.read(model, seen, data, Budget(macs=0.5))
    (*_, move) = run.fitter.candidates(run.start, [Site(0, 1, 2, "span")])
    compressed, chain, b = (
        run.fitter.compressed(with_candidate(run.start.solution, move)),
        run.chains[0],
        3,
    )
    walk = run.fitter.walk(0, run.start.solution.plan)
    walk.to(compressed, b)
    found = walk.gaps(compressed, chain.blocks[b].branches)[-1].weighted(1.0)
    assert torch.is_grad_enabled()
    gaps = []
    with torch.no_grad():
        for batch in run.fitter.batches:
            (h,), (g,) = (run_with_streams(m, run.chains, batch)[1] for m in (model, compressed))
            gamma = model.blocks[b].ls2.gamma
            gaps.append(((h[b + 1] - g[b + 1]) / gamma).flatten(0, 1))
    expected = torch.cat(gaps).double().mean(0)
    torch.testing.assert_close(found.mean_y, expected, rtol=1e-3, atol=1e-4)


def test_refits_are_spliced_and_checked() -> None:
    model, data = small_vit()
    layer = model.blocks[1].mlp.fc2
    refit = LayerRefit(chain="blocks", block=1, path="blocks.1.mlp.fc2", damping=1.0, step=0.5)
    plan = Plan(refits=(refit,))
    tensors = {f"{refit.key}weight": layer.weight * 2, f"{refit.key}bias": layer.bias + 1}
    before = layer.weight.clone()
    compressed = splice(model, plan, {k: v.detach() for k, v in tensors.items()})
    assert torch.equal(compressed.blocks[1].mlp.fc2.weight, before * 2)
    assert torch.equal(layer.weight, before)
    assert not torch.equal(compressed(data[0]), model(data[0]))
    with pytest.raises(PlanError, match=r"refitted \(1, 0.5\): its tensor 'weight' is missing"):
        splice(model, plan, {})
    far = Plan(refits=(refit.model_copy(update={"path": "blocks.9.mlp.fc2"}),))
    with pytest.raises(PlanError, match="has no layer 'blocks.9.mlp.fc2' to refit"):
        splice(model, far, tensors)


class ConvBlock(nn.Module):
    """relu(x + bn(conv(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


def norm_net() -> nn.Sequential:
    blocks = (ConvBlock() for _ in range(4))
    return nn.Sequential(nn.Conv2d(3, 6, 3), *blocks, nn.Flatten(), nn.Linear(216, 4))


def test_batch_statistics_are_those_of_training_mode_and_of_numpy() -> None:
    model = seeded(norm_net)
    whole = as_batch(images(12, 8))
    found = batch_statistics(copy_model(model), "1", [whole])
    trained = copy_model(model)
    for layer in trained.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
            layer.train()
    whole.run(trained)
    assert list(found) == ["2.bn", "3.bn", "4.bn"]  # behind the block, not in it
    # From the first on, all is as in training mode.
    every = batch_statistics(copy_model(model), "0", [whole])
    n = 12 * 36
    for name, seen in every.items():
        layer = trained.get_submodule(name)
        torch.testing.assert_close(seen.mean.float(), layer.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            seen.variance.float() * n / (n - 1), layer.running_var, rtol=1e-4, atol=1e-5
        )
    # Over several batches: what reaches the first one, by numpy.
    parts = [as_batch(part) for part in images(12, 8).split(5)]
    found = batch_statistics(copy_model(model), "0", parts)["1.bn"]
    with torch.no_grad():
        rows = model[1].conv(model[0](images(12, 8))).double().numpy()
    np.testing.assert_allclose(found.mean, rows.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.variance, rows.var((0, 2, 3)), rtol=1e-6)


def test_statistics_are_a_step_of_the_search_that_must_help() -> None:
    model = seeded(norm_net)
    for layer in model.modules():  # a network whose statistics are true, as a trained one's
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.constant_(layer.bias, 1.0)  # each block moves the mean of what reaches the next
    data = list(images(120, 8).split(20))
    for name, spread in batch_statistics(copy_model(model), "0", map(as_batch, data)).items():
        layer = model.get_submodule(name)
        layer.running_mean, layer.running_var = spread.mean.float(), spread.variance.float()
    how = Config(maps=("identity",), units=("span",), refit_steps=(1.0,))
    seen = profile(model, data, config=how)
    search = SearchContext.read(model, seen, data, Budget(macs=0.5))
    (move,) = search.fitter.candidates(search.start, [Site(0, 0, 1, "span")])
    draft = search.state(with_candidate(search.start.solution, move), search.start.cost - move.saving)
    better = statistics(search, draft)
    assert better.mean < 0.9 * draft.mean
    assert search.log.steps[-1].action == "statistics"
    plan = better.solution.plan
    assert [r.path for r in plan.refits] == ["2.bn", "3.bn", "4.bn"]
    assert str(plan).endswith("BatchNorms re-estimated: 3")
    # The tensors alone rebuild the network, and the original keeps its own.
    compressed = splice(
        model, Plan.model_validate_json(plan.model_dump_json()), better.solution.tensors
    )
    assert torch.equal(search.fitter.compressed(better.solution)(data[0]), compressed(data[0]))
    assert not torch.equal(compressed.get_submodule("2.bn").running_mean, model[2].bn.running_mean)
    # Re-estimated again, they are as good: what does not help is not taken.
    assert statistics(search, better) is better
    # A span takes the statistics of the blocks that it replaces with it.
    (further,) = search.fitter.candidates(better, [Site(0, 2, 3, "span")])
    left = with_candidate(better.solution, further)
    assert [r.path for r in left.plan.refits] == ["2.bn", "4.bn"]
    assert not any(key.startswith("3.bn.") for key in left.tensors)
    without = replace(better.solution, tensors={})
    with pytest.raises(PlanError, match="2.bn re-estimated .*is missing"):
        splice(model, without.plan, without.tensors)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    return seeded(transformers.BertModel, config)


def texts() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 50, (20, 7), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids.split(5)]


def test_branches_under_a_layer_norm_behind_the_sum() -> None:
    (chain,) = supports(bert(), texts()[0]).chains
    found = [(b.path, b.norm) for b in chain.blocks[1].branches]
    layer = "encoder.layer.1"
    assert found == [
        (f"{layer}.attention.output.dense", f"{layer}.attention.output.LayerNorm"),
        (f"{layer}.output.dense", f"{layer}.output.LayerNorm"),
    ]


def test_a_small_gap_behind_a_layer_norm_is_closed() -> None:
    norm = seeded(nn.LayerNorm, 16).double()
    nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(0))
    x = 3 * torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    there = x + 1e-4 * torch.randn(
        5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    gap = norm(there) - norm(x)
    holder = nn.ModuleDict({"norm": norm})
    change = _lacking(holder, Branch(path="layer", norm="norm"), {"norm": (x, norm(x))}, gap)
    missed = norm(there) - norm(x + change)
    assert missed.norm() < 1e-3 * gap.norm()


def test_a_post_norm_network_folds_into_a_stock_one(tmp_path: Any) -> None:
    model = bert()
    how = Config(maps=("identity", "folded"), units=("span",), keep_features=True)
    result = compress(model, texts(), budget=Budget(macs=0.7), config=how)
    result.save(tmp_path / "compressed", fold=True, hub=True)
    again = transformers.AutoModel.from_pretrained(tmp_path / "compressed").eval()
    with torch.no_grad():
        a, b = (m(**texts()[0]).last_hidden_state for m in (result.model, again))
    assert again.config.num_hidden_layers == 2
    torch.testing.assert_close(a, b)


class HalfNormed(Block):
    """LN(x) + W2 relu(W1 x): the stream is normed before the sum, and no branch can be told apart."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.down(torch.relu(self.up(x)))


def test_a_stream_that_is_normed_before_the_sum_has_no_branches() -> None:
    (chain,) = supports(seeded(Chain, block=HalfNormed), loader()[0]).chains
    assert [b.branches for b in chain.blocks] == [()] * 4
