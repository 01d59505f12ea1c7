from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

from rba_compress import ModelError, Plan, PlanError, splice, supports
from rba_compress.core.call_signature import Signature
from rba_compress.core.map_spec import Kind, MapSpec
from rba_compress.core.plan import Chain as FoundChain
from rba_compress.core.plan import Healed, LayerRefit, NormRefit, Replacement
from rba_compress.graph.rewrite import Spliced
from rba_compress.linalg.maps import build_map
from rba_compress.units.splice import splice_shared
from tests.networks import BRIEF, Block, Chain, images, rows, seeded


def replacement(chain: FoundChain, start: int, stop: int, kind: Kind = "affine") -> Replacement:
    return Replacement(
        chain=chain.name,
        start=start,
        stop=stop,
        blocks=chain.blocks[start:stop],
        map=MapSpec(kind=kind, shrink=0.5 if kind == "shrunk" else None),
        width=chain.width,
        ndim=chain.ndim,
        axis=chain.axis,
    )


def tensors_for(plan: Plan, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for r in plan.replacements:
        for name, value in build_map(r.map, r.width, ndim=2, axis=-1).state_dict().items():
            found[r.key + name] = torch.randn(value.shape, generator=generator) * 0.2
    return found


def two_spans(model: nn.Module, example: Any) -> Plan:
    """Two spans that touch, in the first chain that is long enough, and one in another chain."""
    chains = supports(model, example).chains
    long = max(chains, key=len)
    middle = len(long) // 2
    spans = [replacement(long, 0, middle), replacement(long, middle, middle + 1, "identity")]
    spans += [replacement(c, 0, 1) for c in chains if c is not long][:1]
    return Plan(replacements=tuple(spans))


NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("deit_tiny_patch16_224", {"img_size": 32, "depth": 5}),
    ("convnext_atto", {"depths": (2, 2, 4, 2), "dims": (8, 16, 24, 32)}),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (2, 2, 4, 2)},
    ),
    ("resnet18", {}),
]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(*row, id=row[0], marks=pytest.mark.slow if k else ())
        for k, row in enumerate(NETWORKS)
    ],
)
def test_module_tree_and_graph_are_rewritten_to_equal_networks(
    name: str, arguments: dict[str, Any]
) -> None:
    model = seeded(timm.create_model, name, **arguments)
    traced = fx.symbolic_trace(model)
    x = images(3, arguments.get("img_size", 64))
    plan = two_spans(model, x)
    tensors = tensors_for(plan)
    compressed = splice(model, plan, tensors)
    slim_graph = splice(traced, two_spans(traced, x), tensors)
    assert type(compressed) is type(model)
    assert isinstance(slim_graph, fx.GraphModule)
    assert torch.equal(compressed(x), slim_graph(x))
    assert not torch.equal(compressed(x), model(x))
    constants = "_tensor_constant"  # what the tracer calls a tensor that is no parameter
    assert set(compressed.state_dict()) == {k for k in slim_graph.state_dict() if constants not in k}
    kept = set(compressed.state_dict()) & set(model.state_dict())
    assert all(torch.equal(compressed.state_dict()[k], model.state_dict()[k]) for k in kept)


def test_the_rewritten_network_equals_a_hand_written_forward_pass() -> None:
    model = seeded(Chain, depth=5)
    (chain,) = supports(model, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 1, 3), replacement(chain, 4, 5, "scale")))
    tensors = tensors_for(plan)
    x, blocks = rows(6), model.blocks
    h = blocks[0](model.stem(x))
    h = torch.nn.functional.linear(h, tensors["blocks.1.map.weight"], tensors["blocks.1.map.bias"])
    h = blocks[3](h) * tensors["blocks.4.map.weight"]
    expected = model.head(h)
    assert torch.equal(splice(model, plan, tensors)(x), expected)
    assert torch.equal(splice(fx.symbolic_trace(model), graph_plan(model, plan), tensors)(x), expected)


def graph_plan(model: nn.Module, plan: Plan) -> Plan:
    (chain,) = supports(fx.symbolic_trace(model), rows(4)).chains
    spans = [r.model_copy(update={"blocks": chain.blocks[r.start : r.stop]}) for r in plan.replacements]
    return plan.model_copy(update={"replacements": tuple(spans)})


def test_the_graph_after_surgery_is_the_one_written_by_hand() -> None:
    model = seeded(Chain, depth=3)
    traced = fx.symbolic_trace(model)
    (chain,) = supports(traced, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 1, 2),))
    compressed = splice(traced, plan, tensors_for(plan))
    assert isinstance(compressed, fx.GraphModule)
    expected = fx.Graph()
    x = expected.placeholder("x")
    x = expected.call_module("stem", (x,))
    for block in ("blocks.0", "map", "blocks.2"):
        if block == "map":
            x = expected.call_module("blocks.1", (x,))
            continue
        h = expected.call_module(f"{block}.up", (x,))
        h = expected.call_function(torch.relu, (h,))
        h = expected.call_module(f"{block}.down", (h,))
        x = expected.call_function(torch.add, (x, h))
    expected.output(expected.call_module("head", (x,)))

    def shape(graph: fx.Graph) -> list[tuple[str, str, list[int]]]:
        order = {n: i for i, n in enumerate(graph.nodes)}
        names = {"relu": "relu", "add": "add"}
        return [
            (
                n.op,
                names.get(getattr(n.target, "__name__", ""), str(n.target)),
                [order[a] for a in n.all_input_nodes],
            )
            for n in graph.nodes
        ]

    assert shape(compressed.graph) == shape(expected)
    assert isinstance(compressed.get_submodule("blocks.1"), Spliced)
    assert "blocks.1.up.weight" not in compressed.state_dict()


@pytest.mark.parametrize("form", [lambda m: m, fx.symbolic_trace], ids=["module", "graph"])
def test_an_empty_plan_is_the_identity(form: Any) -> None:
    model = form(seeded(Chain))
    same = splice(model, Plan(), {})
    assert same is not model
    assert torch.equal(same(rows(5)), model(rows(5)))
    assert list(same.state_dict()) == list(model.state_dict())


def test_the_original_is_untouched() -> None:
    model = seeded(Chain).train()
    model.blocks[0].eval()
    model.stem.weight.requires_grad_(False)
    calls: list[int] = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    types = [type(m) for m in model.modules()]
    (chain,) = supports(model, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 1, 3),))
    calls.clear()
    compressed = splice(model, plan, tensors_for(plan))
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.stem.weight.requires_grad
    assert model.head.weight.requires_grad
    assert not calls
    compressed(rows(2))
    assert calls == [1]  # the user's hooks live on in the copy
    assert not compressed.stem.weight.requires_grad
    assert compressed.training
    assert not {p.data_ptr() for p in compressed.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


def test_inplace_rewrites_the_model_itself() -> None:
    model = seeded(Chain)
    (chain,) = supports(model, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 0, 4, "identity"),))
    expected = model.head(model.stem(rows(3)))
    assert splice(model, plan, {}, inplace=True) is model
    assert torch.equal(model(rows(3)), expected)
    assert sum(p.numel() for p in model.parameters()) == 4 * 8 + 8 + 8 * 3 + 3


def test_a_map_takes_dtype_and_place_of_its_block() -> None:
    model = seeded(Chain).to(torch.bfloat16)
    (chain,) = supports(model, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 1, 2),))
    compressed = splice(model, plan, tensors_for(plan))
    assert compressed.blocks[1].map.weight.dtype == torch.bfloat16


def test_a_slim_model_is_copied_trained_and_compiled_like_any_other() -> None:
    model = seeded(Chain)
    (chain,) = supports(model, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 1, 3),))
    compressed = splice(model, plan, tensors_for(plan))
    assert torch.equal(copy.deepcopy(compressed)(rows(3)), compressed(rows(3)))
    compressed(rows(3)).sum().backward()
    assert compressed.blocks[1].map.weight.grad is not None
    exported = torch.export.export(compressed, (rows(3),)).module()
    torch.testing.assert_close(exported(rows(3)), compressed(rows(3)))


def test_a_plan_that_does_not_fit_is_refused_before_anything_changes() -> None:
    model = seeded(Chain)
    (chain,) = supports(model, rows(4)).chains
    good = replacement(chain, 1, 3)
    plan = Plan(replacements=(good,))
    tensors = tensors_for(plan)
    far = replacement(supports(seeded(Chain, depth=9), rows(4)).chains[0], 7, 9)
    cases: list[tuple[Plan, dict[str, Tensor], str]] = [
        (Plan(replacements=(far,)), tensors, "Chain has no block 'blocks.7'; the plan is of another"),
        (plan, {}, r"blocks.1, blocks.2 -> affine: its tensor 'blocks.1.map.weight' is missing"),
        (plan, tensors | {"x": torch.ones(1)}, r"the tensors \['x'\] belong to no replacement"),
        (
            plan,
            tensors | {"blocks.1.map.weight": torch.ones(2, 2)},
            r"'blocks.1.map.weight' has shape \(2, 2\), wanted \(8, 8\)",
        ),
        (
            Plan(replacements=(good, replacement(chain, 2, 4))),
            tensors,
            f"{replacement(chain, 2, 4)} and {good} share the block blocks.2",
        ),
    ]
    for bad, given, message in cases:
        with pytest.raises(PlanError, match=message):
            splice(model, bad, given, inplace=True)
    other = seeded(Chain, block=OtherBlock)
    with pytest.raises(PlanError, match="blocks.1 is a OtherBlock, the plan replaces a Block"):
        splice(other, plan, tensors)
    with pytest.raises(PlanError, match="made for a plain module: this is a GraphModule"):
        splice(fx.symbolic_trace(model), plan, tensors)
    assert all(isinstance(block, Block) for block in model.blocks)


class OtherBlock(Block):
    pass


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = seeded(Chain)
    model.cache = model.stem.weight * 2  # a tensor with history
    with pytest.raises(ModelError, match="Chain cannot be copied .* splice it with inplace=True"):
        splice(model, Plan(), {})


class Normed(Chain):
    """Chain with a BatchNorm behind the stem, and a head that shares the stem's weight."""

    def __init__(self) -> None:
        super().__init__(depth=3, width=4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


STATISTICS = NormRefit(path="norm", step=1.0)


@pytest.mark.parametrize("share", [False, True])
def test_refitted_layers_take_their_tensors_and_the_original_keeps_its_own(share: bool) -> None:
    model = seeded(Normed)
    model.blocks[0].down.bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = Plan(refits=(STATISTICS, LayerRefit(path="blocks.0.down", step=1.0)))
    generator = torch.Generator().manual_seed(0)
    new = {
        key: torch.rand(before[key].shape, generator=generator, dtype=torch.float64)
        for key in (
            "norm.running_mean",
            "norm.running_var",
            "blocks.0.down.weight",
            "blocks.0.down.bias",
        )
    }
    compressed = (splice_shared if share else splice)(model, plan, new)
    expected = seeded(Normed)
    expected.load_state_dict(before | new)
    assert torch.equal(compressed(rows(5)), expected(rows(5)))
    assert compressed.state_dict().keys() == before.keys()
    assert {v.dtype for k, v in compressed.state_dict().items() if k in new} == {torch.float32}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not compressed.blocks[0].down.bias.requires_grad
    assert compressed.blocks[0].down.weight.requires_grad
    assert (compressed.head.weight.data_ptr() == model.head.weight.data_ptr()) is share
    assert compressed.head.weight is compressed.stem.weight


def test_trained_tensors_are_taken_wherever_the_model_holds_them() -> None:
    model = seeded(Normed)
    model.stem.weight.requires_grad_(False)
    (chain,) = supports(model, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 1, 2),))
    tensors = tensors_for(plan)
    trained = {"stem.weight": torch.ones(4, 4, dtype=torch.float64), "head.bias": torch.ones(4)}
    plan = plan.model_copy(update={"healed": healed(*trained, "blocks.1.map.weight")})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compressed = splice_shared(model, plan, tensors | trained)
    assert compressed.head.weight is compressed.stem.weight
    assert torch.equal(compressed.head.weight, torch.ones(4, 4))
    assert torch.equal(compressed.head.bias, torch.ones(4))
    assert not compressed.head.weight.requires_grad
    assert compressed.head.bias.requires_grad
    assert torch.equal(compressed.blocks[1].map.weight, tensors["blocks.1.map.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    compressed.head.bias.data.zero_()
    assert trained["head.bias"].all()


def healed(*keys: str) -> Healed:
    return Healed(healing=BRIEF, data="", samples=1, steps=1, before=1.0, after=0.5, keys=keys)


@pytest.mark.parametrize(
    ("plan", "given", "message"),
    [
        (Plan(refits=(STATISTICS,)), {"norm.running_mean": (4,)}, "'running_var' is missing or of an"),
        (
            Plan(refits=(STATISTICS,)),
            {"norm.running_mean": (4,), "norm.running_var": (1,)},
            "'running_var' is missing or of an",
        ),
        (
            Plan(refits=(STATISTICS.model_copy(update={"path": "stem"}),)),
            {},
            "no layer 'stem' to refit",
        ),
        (Plan(refits=(LayerRefit(path="blocks", step=1.0),)), {}, "no layer 'blocks' to refit"),
        (Plan(refits=(LayerRefit(path="far", step=1.0),)), {}, "no layer 'far' to refit"),
        (
            Plan(refits=(LayerRefit(path="stem", step=1.0),)),
            {"stem.weight": (4, 4), "stem.bias": (4,), "norm.weight": (4,)},
            r"\['norm.weight'\] belong to no",
        ),
        (
            Plan(healed=healed("stem.bias")),
            {"stem.bias": (3,)},
            "the trained tensor 'stem.bias' is mis",
        ),
        (
            Plan(healed=healed("stem.bias")),
            {},
            "the trained tensor 'stem.bias' is missing, or is not of",
        ),
        (
            Plan(healed=healed("far.bias")),
            {"far.bias": (4,)},
            "the trained tensor 'far.bias' is missing",
        ),
    ],
)
def test_other_tensors_that_do_not_fit_are_refused(
    plan: Plan, given: dict[str, tuple[int, ...]], message: str
) -> None:
    model = seeded(Normed)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PlanError, match=message):
        splice(model, plan, {k: torch.ones(shape) for k, shape in given.items()}, inplace=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("path", ["blocks.1.down", "blocks.1", "blocks"])
def test_what_is_refitted_or_replaced_is_not_inside_of_what_is_gone(path: str) -> None:
    model = seeded(Normed)
    (chain,) = supports(model, rows(4)).chains
    gone = replacement(chain, 1, 2)
    tensors = tensors_for(Plan(replacements=(gone,)))
    with pytest.raises(PlanError, match="it is inside of a block that is|has no layer 'blocks'"):
        splice(model, Plan(replacements=(gone,), refits=(LayerRefit(path=path, step=1.0),)), tensors)
    (block,) = gone.blocks
    inner = gone.model_copy(update={"blocks": (block.model_copy(update={"path": path}),)})
    with pytest.raises(PlanError, match=f"share the block {path}"):
        splice(model, Plan(replacements=(gone, inner)), tensors)
    far = LayerRefit(path="blocks.2.down", step=1.0)
    given = {"blocks.2.down.weight": torch.zeros(4, 8), "blocks.2.down.bias": torch.zeros(4)}
    compressed = splice(model, Plan(replacements=(gone,), refits=(far,)), tensors | given)
    assert not compressed.blocks[2].down.weight.any()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.ModuleList((Chain(), Chain()))

    def forward(self, x: Tensor) -> Tensor:
        return self.both[0](x) + self.both[1](x)


@pytest.mark.parametrize(
    ("kinds", "gone", "left"),
    [
        (None, [(0, 1)], [None, 0, 2, 3]),
        (None, [(0, 2)], [None, None, 0, 3]),
        (None, [(1, 3)], [0, None, None, 3]),
        (None, [(0, 4)], [None, None, None, None]),
        (("full", "near", "full", "near"), [(0, 1)], [None, 1, 0, 3]),
        (("full", "near", "full", "near"), [(0, 2)], [None, None, 0, 1]),
        (("full", "near", "near", "near"), [(0, 2)], [None, None, 1, 3]),
        (("near", "near", "full", "full"), [(2, 3)], [0, 1, None, 2]),
    ],
)
def test_a_kept_layer_takes_the_cache_of_the_first_of_its_kind(
    kinds: tuple[str, ...] | None, gone: list[tuple[int, int]], left: list[int | None]
) -> None:
    model = seeded(Two)
    chain = next(c for c in supports(model, rows(4)).chains if c.name == "both.0.blocks")
    for part in model.both:
        for index, block in enumerate(part.blocks):
            block.layer_idx = block.down.layer_idx = index
            block.up.layer_idx = None
    model.head = nn.Linear(1, 1)
    model.head.layer_idx = 0
    if kinds is not None:
        model.config = SimpleNamespace(layer_types=kinds)
    plan = Plan(replacements=tuple(replacement(chain, *span, "identity") for span in gone))
    compressed = splice(model, plan, {})
    for part, expected in zip(compressed.both, (left, [0, 1, 2, 3]), strict=True):
        assert [getattr(b, "layer_idx", None) for b in part.blocks] == expected
        kept = [b for b in part.blocks if isinstance(b, Block)]
        assert [b.down.layer_idx for b in kept] == [index for index in expected if index is not None]
    assert compressed.head.layer_idx == 0
    assert [b.layer_idx for b in model.both[0].blocks] == [0, 1, 2, 3]


def test_a_spliced_module_passes_side_inputs_by() -> None:
    double = nn.Linear(2, 2, bias=False)
    nn.init.eye_(double.weight.data.mul_(0)).mul_(2)
    x, side = torch.ones(3, 2), torch.zeros(1)
    assert torch.equal(Spliced(double)(x, side), 2 * x)
    output = {"tuple": ["stream", ["kwargs", "side"], None]}
    named = Spliced(double, Signature(stream=("kwargs", "x"), output=output))
    stream, passed, nothing = named(side=side, x=x)
    assert torch.equal(stream, 2 * x)
    assert passed is side
    assert nothing is None


def test_a_map_takes_the_mode_of_its_block() -> None:
    model = seeded(Chain).double()
    (chain,) = supports(model, rows(4).double()).chains
    model.train()
    model.blocks[1].eval()
    plan = Plan(replacements=(replacement(chain, 0, 1, "identity"), replacement(chain, 1, 3)))
    compressed = splice(model, plan, tensors_for(plan))
    assert [b.training for b in compressed.blocks] == [True, False, True, True]
    assert not compressed.blocks[1].map.training
    assert compressed.blocks[1].map.weight.dtype == torch.float64
    assert isinstance(compressed.blocks[2].map, nn.Identity)


class Tabled(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.table = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) * (self.table + 1)


def test_nothing_of_a_span_is_left_in_a_graph() -> None:
    model = seeded(Chain, block=Tabled)
    batch = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(model, (rows(4),), dynamic_shapes=batch).module()
    for graph in (fx.symbolic_trace(model), exported):
        (chain,) = supports(graph, rows(4)).chains
        plan = Plan(replacements=(replacement(chain, 1, 3),))
        tensors = tensors_for(plan)
        after = chain.blocks[2].nodes[1]
        compressed = splice(graph, plan, tensors)
        assert not [
            n for n in compressed.graph.nodes if str(n.target).startswith(("blocks.1.", "blocks.2"))
        ]
        (node,) = (n for n in compressed.graph.nodes if n.target == "blocks.1")
        assert node.name == after
        assert node.meta["nn_module_stack"]["blocks.1"] == ("blocks.1", Spliced)
        assert {k for k in compressed.state_dict() if k.startswith(("blocks.1", "blocks.2"))} == set(
            tensors
        )
        plain_chain = supports(model, rows(4)).chains[0]
        plain = splice(model, Plan(replacements=(replacement(plain_chain, 1, 3),)), tensors)
        assert torch.equal(compressed(rows(4)), plain(rows(4)))


class Bare(nn.Module):
    """Residual block without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.tanh()


def test_blocks_without_floating_point_parameters_are_replaced() -> None:
    """A search finds no such blocks unless they are quantised, but a plan may name them."""
    model = seeded(Chain)
    (chain,) = supports(model, rows(5)).chains
    plan = Plan(replacements=(replacement(chain, 1, 2),))
    parent, _, name = chain.blocks[1].path.rpartition(".")
    bare = type("Block", (Bare,), {})  # the name that the plan has
    model.get_submodule(parent).register_module(name, bare())
    tensors, key, x = tensors_for(plan), plan.replacements[0].key, torch.randn(3, chain.width)
    found = splice(model, plan, tensors).get_submodule(chain.blocks[1].path)(x)
    torch.testing.assert_close(found, x @ tensors[f"{key}weight"].T + tensors[f"{key}bias"])
