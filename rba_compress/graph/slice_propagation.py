"""Propagate slices upstream through the graph.

The rewrite applies the analysis of `liveness`: each operation of the new graph computes only the
part of its value that is read. A joint projection to queries, keys and values is first split between
its rows, so that queries can be computed for fewer positions than keys: [P x W_q, x W_k, x W_v]
(weights are sliced, not copied). Where fewer positions are read than a head has channels, `attend`
replaces attention and needs no keys and values.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rba_compress.graph.few_query_attention import attend
from rba_compress.graph.liveness import (
    ALL,
    COPIES,
    PERMUTATIONS,
    SIZED,
    SPLITS,
    Need,
    Operands,
    Want,
    argument,
    copy_graph,
    liveness,
    operands_of,
    packet_of,
    shape_of,
    wanted,
)

_aten = torch.ops.aten


def narrow(graph: fx.Graph) -> fx.Graph:
    """Return a new graph with the same output that computes only what is read."""
    split, _, output = copy_graph(graph)
    split.output(output)
    _move_projections(split, liveness(split).needs)
    _split_projections(split, liveness(split).needs)
    needs = liveness(split).needs
    compressed = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    parts: dict[tuple[fx.Node, Need], fx.Node] = {}

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, Want):
            return leaf
        node, need = leaf.node, leaf.need
        shape = node.meta.get("shape")
        have = ALL if node.op == "placeholder" else needs[node]
        if need == have or shape is None or (need != ALL and need.count >= shape[need.dim]):
            return made[node]
        if (node, need) not in parts:
            part = compressed.call_function(_aten.slice.Tensor, (made[node], need.dim, 0, need.count))
            parts[node, need] = part
        return parts[node, need]

    for node in split.nodes:
        if node.op == "placeholder":
            made[node] = compressed.node_copy(node)
            continue
        if node not in needs:
            continue
        operands = operands_of(node, needs[node]) or (wanted(node.args), wanted(node.kwargs))
        args, kwargs = pytree.tree_map(fetch, operands, is_leaf=lambda leaf: isinstance(leaf, Want))
        if packet_of(node) is _aten.slice and _takes_nothing_away(node, operands):
            made[node] = args[0]
            continue
        # A part of a tensor may not be viewed as another shape without a copy.
        target = _aten.reshape.default if packet_of(node) in SIZED else node.target
        made[node] = compressed.create_node(node.op, target, args, kwargs, name=node.name)
        if node.target is operator.getitem and needs[node.args[0]] != needs[node]:
            # Another result of the operation is read whole.
            part = (made[node], needs[node].dim, 0, needs[node].count)
            made[node] = compressed.call_function(_aten.slice.Tensor, part)
    compressed.lint()
    return compressed


def _move_projections(graph: fx.Graph, needs: dict[fx.Node, Need]) -> None:
    """Replace attention of few queries by `attend`, which projects no keys and values, in place."""
    for node in list(graph.nodes):
        if packet_of(node) is not _aten.scaled_dot_product_attention or node not in needs:
            continue
        q, k, v = node.args[:3]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        shape, need = shape_of(q), needs[node]
        few = need.dim == 2 and need.count < shape[-1] and len(shape) == 4
        plain = not any(
            argument(node, i, name)
            for i, name in ((4, "dropout_p"), (5, "is_causal"), (7, "enable_gqa"))
        )
        if not few or not plain or shape_of(k)[1] != shape[1]:
            continue
        scale = argument(node, 6, "scale")
        with graph.inserting_before(node):
            keys, values = _projected(graph, k), _projected(graph, v)
            if keys is None and values is None:
                continue
            arguments = (
                q,
                k if keys is None else keys[:2],
                v if values is None else values,
                argument(node, 3, "attn_mask"),
                shape[-1] ** -0.5 if scale is None else scale,
            )
            moved = graph.call_function(attend, arguments)
        moved.meta = dict(node.meta)
        node.replace_all_uses_with(moved)
        graph.erase_node(node)


_PARTS = {operator.getitem, _aten.select, _aten.slice, _aten.unflatten}


def _projected(graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return x, weight and bias where heads (N, heads, T, d) are rows of a linear layer of x (N, T, w).

    The views between are verified on a tensor that numbers the layer's outputs.
    """
    path, linear = [], node
    while packet_of(linear) is not _aten.linear:
        known = PERMUTATIONS | COPIES | SIZED | SPLITS | _PARTS
        if packet_of(linear) not in known or not isinstance(linear.args[0], fx.Node):
            return None
        path.append(linear)
        linear = linear.args[0]
    if len(shape_of(linear)) != 3:
        return None
    n, positions, channels = shape_of(linear)
    value: Any = torch.arange(n * positions * channels).reshape(n, positions, channels)
    for step in reversed(path):
        if packet_of(step) in SIZED:
            value = value.reshape(shape_of(step))
        else:
            value = step.target(value, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    _, heads, _, d = shape_of(node)
    first = int(value[0, 0, 0, 0])
    rows = first + torch.arange(heads * d).reshape(heads, 1, d)
    places = torch.arange(n * positions).reshape(n, 1, positions, 1) * channels
    if first + heads * d > channels or not torch.equal(value, places + rows):
        return None
    x, weight, bias = linear.args[0], linear.args[1], argument(linear, 2, "bias")

    def part(of: fx.Node) -> fx.Node:
        shape = (heads * d, *shape_of(of)[1:])
        return _call(graph, _aten.slice.Tensor, (of, 0, first, first + heads * d), shape)

    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    return x, part(weight), part(bias) if isinstance(bias, fx.Node) else None


def _takes_nothing_away(node: fx.Node, operands: Operands) -> bool:
    """Return True if a slice takes all of its operand, or of what the operand is narrowed to."""
    want: Want = operands[0][0]
    if argument(node, 2, "start") or argument(node, 4, "step", 1) != 1:
        return False
    if argument(node, 3, "end") in (None, sys.maxsize):
        return True  # torch < 2.7 records x[:, 0] with one of dimension 0
    dim = int(argument(node, 1, "dim", 0)) % len(shape_of(want.node))
    return want.need != ALL and want.need.dim == dim


def _split_projections(graph: fx.Graph, needs: dict[fx.Node, Need]) -> None:
    """Give each part of a joint projection its own linear layer, where reads of the parts differ."""
    for node in list(graph.nodes):
        if packet_of(node) not in SPLITS or len({needs.get(part) for part in node.users}) < 2:
            continue
        for part in [user for user in node.users if user in needs]:
            if part.target is not operator.getitem or len(shape_of(part)) != 4:
                continue
            with graph.inserting_before(part):
                projected = _projected(graph, part)
                if projected is None:
                    continue
                x, heads, d = projected[0], *shape_of(part)[1::2]
                shape = (*shape_of(x)[:2], heads, d)
                sizes = [_call(graph, _aten.sym_size.int, (x, dim), None) for dim in (0, 1)]
                flat = _call(graph, _aten.linear.default, projected, (*shape[:2], heads * d))
                view = _call(graph, _aten.reshape.default, (flat, [*sizes, heads, d]), shape)
                new = _call(graph, _aten.transpose.int, (view, 1, 2), shape_of(part))
            part.replace_all_uses_with(new)


def _call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], shape: tuple[int, ...] | None
) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["shape"] = shape
    return node
