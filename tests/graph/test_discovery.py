from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

from rba_compress import LoaderError, ModelError, NoChainError, profile, supports
from tests.networks import Block, Chain, images, loader, rows, seeded

# name, arguments, [(chain, blocks, channel axis)]
FAST = ("vit_tiny_patch16_224",)
TIMM: list[tuple[str, dict[str, Any], list[tuple[str, int, int]]]] = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3}, [("blocks", 3, 2)]),
    ("deit_tiny_patch16_224", {"img_size": 32, "depth": 3}, [("blocks", 3, 2)]),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 3}, [("blocks", 3, 2)]),
    (
        "beit_base_patch16_224",
        {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3},
        [("blocks", 3, 2)],
    ),
    (
        "convnext_atto",
        {"depths": (2, 2, 3, 2), "dims": (8, 16, 24, 32)},
        [(f"stages.{i}.blocks", n, 1) for i, n in enumerate((2, 2, 3, 2))],
    ),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (2, 2, 3, 2)},
        [(f"layers.{i}.blocks", n, 3) for i, n in enumerate((2, 2, 3, 2))],
    ),
    ("resnet18", {}, [("layer1", 2, 1), ("layer2", 1, 1), ("layer3", 1, 1), ("layer4", 1, 1)]),
    ("resnet26", {}, [("layer1", 1, 1), ("layer2", 1, 1), ("layer3", 1, 1), ("layer4", 1, 1)]),
]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [pytest.param(*row, id=row[0], marks=() if row[0] in FAST else pytest.mark.slow) for row in TIMM],
)
def test_timm_chains_are_found_in_modules_and_in_graph_modules(
    name: str, arguments: dict[str, Any], expected: list[tuple[str, int, int]]
) -> None:
    model = seeded(timm.create_model, name, **arguments)
    example = images(4, arguments.get("img_size", 64))
    macs = []
    for form in (model, fx.symbolic_trace(model)):
        chains = supports(form, example).chains
        assert [(c.name, len(c), c.axis) for c in chains] == expected
        macs.append([c.macs for c in chains])
    assert macs[0] == macs[1]


def test_the_class_tokens_that_the_head_reads() -> None:
    tokens = {}
    for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        model = seeded(timm.create_model, name, img_size=32, depth=2)
        (chain,) = supports(model, images(2)).chains
        tokens[name] = chain.class_tokens
    pooled = seeded(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=2, global_pool="avg")
    assert list(tokens.values()) == [(0,), (0, 1)]
    assert supports(pooled, images(2)).chains[0].class_tokens == ()


@pytest.mark.parametrize(
    "row",
    [TIMM[0], *(pytest.param(TIMM[k], marks=pytest.mark.slow) for k in (4, 6))],
    ids=["vit", "convnext", "resnet"],
)
def test_an_exported_program(row: tuple[str, dict[str, Any], list[tuple[str, int, int]]]) -> None:
    name, arguments, expected = row
    model = seeded(timm.create_model, name, **arguments)
    x = images(4, arguments.get("img_size", 64))
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},), strict=False)
    chains = supports(program.module(), x).chains
    assert [(c.name, len(c), c.axis) for c in chains] == expected
    with pytest.raises(ModelError, match=r"the model is a ExportedProgram: pass its .module\(\)"):
        supports(program, images(4))  # type: ignore[arg-type]


def test_a_transformers_encoder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = seeded(transformers.BertModel, config)
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (chain,) = supports(model, example).chains
    assert (chain.name, len(chain), chain.width, chain.axis) == ("encoder.layer", 3, 32, 2)
    assert chain.class_tokens == (0,)  # the pooler's
    hidden = supports(model, {**example, "output_hidden_states": True})
    assert not hidden.chains
    assert "read outside" in str(hidden) or "not read by one next module" in str(hidden)


def test_side_inputs_keywords_and_tuple_outputs_pass_by() -> None:
    class Sided(Block):
        def forward(self, scale: Tensor, *, x: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
            return super().forward(x) * scale + x, scale, None

    class Net(Chain):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.ones(1)
            x = self.stem(x)
            for block in self.blocks:
                x, scale, _ = block(scale, x=x)
            return self.head(x)

    (chain,) = supports(seeded(Net, block=Sided), rows(4)).chains
    assert len(chain) == 4
    signature = chain.blocks[0].signature
    assert signature is not None
    assert signature.stream == ("kwargs", "x")
    assert signature.output == {"tuple": ["stream", ["args", 0], None]}


class Twice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return self.head(x)


class Collecting(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, kept = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return self.head(x), torch.stack(kept)


class Leaking(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = torch.relu(self.up(x))
        return x + self.down(hidden), hidden


class LeakingNet(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), 0.0
        for block in self.blocks:
            x, hidden = block(x)
            total = total + hidden.mean()
        return self.head(x) + total


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Writing(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.down(torch.relu(self.up(x))))


class Asking(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) * block.up.weight.shape[0] / 16
        return self.head(x)


class AskingOnce(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.blocks[1].up.weight.shape[0] / 16)


class Windowed(Block):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.attn = nn.Linear(width, width)
        self.attn.window_size = (2, 2)  # type: ignore[assignment]


class AskingWindows(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.blocks[1].attn.window_size[0]


class RandomNet(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand(1))


class Branching(Chain):
    def forward(self, x: Tensor) -> Tensor:
        blocks = self.blocks if x.sum() > 0 else self.blocks[:2]
        x = self.stem(x)
        for block in blocks:
            x = block(x)
        return self.head(x)


def shared_weight() -> nn.Module:
    model = seeded(Chain)
    model.blocks[2].up.weight = model.blocks[0].up.weight
    return model


def shared_with_head() -> nn.Module:
    model = seeded(Chain)
    model.extra = model.blocks[1].down
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (seeded(Twice), r"blocks.1 \(Block\): it is called 2 times"),
        (shared_weight(), r"blocks.0, blocks.2 \(Block\)|blocks.0 \(Block\): it shares up.weight with "
                          r"blocks.2.up.weight"),
        (shared_with_head(), r"blocks.1 \(Block\): it shares down.weight with extra.weight"),
        (seeded(Collecting), r"blocks.0, .* \(Block\): its output is not read by one next module of its"),
        (seeded(LeakingNet, block=Leaking), r"2 of its values are read outside of it, by .*model itself"),
        (seeded(Chain, block=Plain), "no addition inside it has two operands that come from the stream"),
        (seeded(Chain, block=Writing), "changes its input in place"),
        (seeded(AskingOnce), "the code around it reads its attribute 'up'"),
        (seeded(AskingWindows, block=Windowed), r"\(Windowed\): the code around it reads .* 'attn'"),
        (seeded(RandomNet), "two runs on the same batch differ: is it random in eval mode"),
    ],
)  # fmt: skip
def test_each_refusal_carries_its_reason(model: nn.Module, reason: str) -> None:
    found = supports(model, rows(4))
    listed = "\n".join(map(str, found.refusals))
    assert re.search(reason, listed), listed


def test_a_block_that_is_refused_parts_the_chain() -> None:
    found = supports(shared_with_head(), rows(4))
    assert [[b.path for b in c.blocks] for c in found.chains] == [["blocks.2", "blocks.3"]]


class First(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.blocks[0].up.weight.shape[0] / 16)


def test_a_first_block_that_its_parent_asks_is_left_out() -> None:
    found = supports(seeded(First), rows(4))
    assert [[b.path for b in c.blocks] for c in found.chains] == [["blocks.1", "blocks.2", "blocks.3"]]
    assert "blocks.0 (Block): the code around it reads its attribute 'up'" in str(found)


class Other(Block):
    pass


def test_pairs_of_blocks_in_containers_of_the_containers_class() -> None:
    def pair() -> nn.Module:
        return nn.Sequential(Block(8), Other(8))

    model = seeded(
        nn.Sequential, nn.Linear(4, 8), nn.Sequential(pair(), pair(), pair()), nn.Linear(8, 3)
    )
    (chain,) = supports(model, rows(4)).chains
    assert [b.path for b in chain.blocks] == ["1.0", "1.1", "1.2"]


class Sized(Block):
    def forward(self, x: Tensor, size: list[int]) -> tuple[Tensor, list[int], str]:  # type: ignore[override]
        return super().forward(x), [size[0], size[1]], "kept"


class SizedNet(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x, size, word = self.stem(x), [x.shape[0], x.shape[0]], ""
        for block in self.blocks:
            x, size, word = block(x, size)
        return self.head(x).reshape(size[0], -1)[:, : len(word)]


def test_sizes_and_constants_are_handed_on() -> None:
    (chain,) = supports(seeded(SizedNet, block=Sized), rows(4)).chains
    assert len(chain) == 4
    signature = chain.blocks[0].signature
    assert signature is not None
    assert signature.output == {
        "tuple": ["stream", {"list": [["args", 1, 0], ["args", 1, 1]]}, {"value": "kept"}]
    }


class Halves(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([half.tanh() for half in x.chunk(2, dim=-1)], -1) + super().forward(x)


def test_the_channel_axis_is_followed_through_a_split() -> None:
    (chain,) = supports(seeded(Chain, block=Halves), rows(4)).chains
    assert chain.axis == 1


def test_compiled_in_place_is_refused_by_name_and_inference_mode_is_handled() -> None:
    model = seeded(Chain)
    with torch.inference_mode():
        assert len(supports(model, rows(4)).chains[0]) == 4
    model.compile(backend="eager")
    with pytest.raises(ModelError, match=r"compiled in place by its compile\(\) method: pass a copy"):
        supports(model, rows(4))


def test_control_flow_that_differs_between_batches() -> None:
    example = torch.cat([rows(2).abs(), -rows(2).abs()])
    found = supports(seeded(Branching), example)
    assert not found.chains
    assert "its control flow differs between two batches" in str(found)


def test_no_chain_lists_what_was_refused_and_why() -> None:
    with pytest.raises(
        NoChainError, match=r"(?s)nothing of a Chain can be replaced: .*no addition inside it has two"
    ):
        profile(seeded(Chain, block=Plain), loader())
    with pytest.raises(NoChainError, match="no module maps a tensor to one of the same shape"):
        profile(nn.Linear(4, 4), loader())


def test_what_is_no_model_or_no_example_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases deprecate it
        traced = torch.jit.trace(seeded(Chain), rows(2))
    with pytest.raises(ModelError, match="the model is a str: pass an nn.Module"):
        supports("resnet", rows(2))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="a ScriptModule, which cannot be rewritten"):
        supports(traced, rows(2))
    with pytest.raises(LoaderError, match="a batch is a int"):
        supports(seeded(Chain), 3)


def test_supports_leaves_the_model_as_it_was() -> None:
    model = seeded(Chain).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    supports(model, rows(4))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
