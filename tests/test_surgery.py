from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

from rba_compress import ModelError, Plan, PlanError, splice, supports
from rba_compress.maps import Kind, MapSpec, build_map
from rba_compress.plan import Chain as FoundChain
from rba_compress.plan import Replacement
from rba_compress.surgery import Spliced
from tests.networks import Block, Chain, images, rows, seeded


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


@pytest.mark.parametrize(("name", "arguments"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_module_tree_and_graph_are_rewritten_to_equal_networks(
    name: str, arguments: dict[str, Any]
) -> None:
    model = seeded(timm.create_model, name, **arguments)
    traced = fx.symbolic_trace(model)
    x = images(3, arguments.get("img_size", 64))
    plan = two_spans(model, x)
    tensors = tensors_for(plan)
    slim = splice(model, plan, tensors)
    slim_graph = splice(traced, two_spans(traced, x), tensors)
    assert type(slim) is type(model)
    assert isinstance(slim_graph, fx.GraphModule)
    assert torch.equal(slim(x), slim_graph(x))
    assert not torch.equal(slim(x), model(x))
    constants = "_tensor_constant"  # what the tracer calls a tensor that is no parameter
    assert set(slim.state_dict()) == {k for k in slim_graph.state_dict() if constants not in k}
    kept = set(slim.state_dict()) & set(model.state_dict())
    assert all(torch.equal(slim.state_dict()[k], model.state_dict()[k]) for k in kept)


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
    slim = splice(traced, plan, tensors_for(plan))
    assert isinstance(slim, fx.GraphModule)
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

    assert shape(slim.graph) == shape(expected)
    assert isinstance(slim.get_submodule("blocks.1"), Spliced)
    assert "blocks.1.up.weight" not in slim.state_dict()


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
    slim = splice(model, plan, tensors_for(plan))
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.stem.weight.requires_grad
    assert model.head.weight.requires_grad
    assert not calls
    slim(rows(2))
    assert calls == [1]  # the user's hooks live on in the copy
    assert not slim.stem.weight.requires_grad
    assert slim.training
    assert not {p.data_ptr() for p in slim.parameters()} & {p.data_ptr() for p in model.parameters()}


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
    slim = splice(model, plan, tensors_for(plan))
    assert slim.blocks[1].map.weight.dtype == torch.bfloat16


def test_a_slim_model_is_copied_trained_and_compiled_like_any_other() -> None:
    model = seeded(Chain)
    (chain,) = supports(model, rows(4)).chains
    plan = Plan(replacements=(replacement(chain, 1, 3),))
    slim = splice(model, plan, tensors_for(plan))
    assert torch.equal(copy.deepcopy(slim)(rows(3)), slim(rows(3)))
    slim(rows(3)).sum().backward()
    assert slim.blocks[1].map.weight.grad is not None
    exported = torch.export.export(slim, (rows(3),)).module()
    torch.testing.assert_close(exported(rows(3)), slim(rows(3)))


def test_a_plan_that_does_not_fit_is_refused_before_anything_changes() -> None:
    model = seeded(Chain)
    (chain,) = supports(model, rows(4)).chains
    good = replacement(chain, 1, 3)
    plan = Plan(replacements=(good,))
    tensors = tensors_for(plan)
    far = replacement(supports(seeded(Chain, depth=9), rows(4)).chains[0], 7, 9)
    cases: list[tuple[Plan, dict[str, Tensor], str]] = [
        (Plan(replacements=(far,)), tensors, "Chain has no block 'blocks.7'; the plan is of another"),
        (plan, {}, r"blocks\[1:3\] -> affine: its tensor 'blocks.1.map.weight' is missing"),
        (plan, tensors | {"x": torch.ones(1)}, r"the tensors \['x'\] belong to no replacement"),
        (
            plan,
            tensors | {"blocks.1.map.weight": torch.ones(2, 2)},
            r"'blocks.1.map.weight' has shape \(2, 2\), wanted \(8, 8\)",
        ),
        (Plan(replacements=(good, replacement(chain, 2, 4))), tensors, "share the block blocks.2"),
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
