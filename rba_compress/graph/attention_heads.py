"""Attention of a traced block as projections, heads and an output layer, and the same with other sizes.

In one of many layouts, a block computes q, k and v (N, heads, T, d) from linear layers, then attention,
then a linear layer of all heads. Views and permutations between are not interpreted: they are run on a
tensor that numbers the layer's outputs, which shows the row of each head's channels. With other sizes
the block runs in one layout: each part has a layer of its own, with its heads one after the other.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rba_compress.core.errors import ModelError
from rba_compress.core.offload import hold
from rba_compress.core.plan import Attention, HeadRows
from rba_compress.graph.liveness import (
    COPIES,
    PERMUTATIONS,
    SIZED,
    SPLITS,
    argument,
    packet_of,
    shape_of,
)
from rba_compress.graph.rewrite import tensor_of

_aten = torch.ops.aten
_RESHAPED = {*SIZED, _aten.flatten, _aten.unflatten, _aten.unsqueeze, _aten.squeeze}
PARTS = ("query", "key", "value")
_LAYOUT = {*_RESHAPED, *PERMUTATIONS, *COPIES, *SPLITS, _aten.select, _aten.slice, _aten.expand}


class NoAttentionError(ModelError):
    """A block has no attention."""


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of attention: heads of queries, heads of keys and values, and the channels of a head."""

    heads: int
    groups: int
    """Heads of keys and values, each of which serves as many heads of queries."""
    rank: int
    """Channels of a head's queries and keys."""
    width: int
    """Channels of a head's values."""

    @classmethod
    def of(cls, attention: Attention) -> HeadSizes:
        """Return the sizes in the original block."""
        value = attention.value
        return cls(value.heads * attention.repeated, value.heads, attention.rank, value.width)


@dataclass(frozen=True)
class _Projection:
    """Heads (N, heads, T, d) that are rows of a linear layer's output, one head after the other."""

    layer: fx.Node
    first: int
    heads: int
    width: int
    repeated: int
    positions_first: bool


@dataclass(frozen=True)
class _Heads:
    """Nodes of a block's attention."""

    node: fx.Node
    parts: dict[str, _Projection | None]
    """Queries, keys and values."""
    output: fx.Node
    """Linear layer that reads all heads."""
    positions_first: bool
    """True where the positions are outermost in that layer's input."""


def attention_of(graph: fx.Graph, names: Sequence[str]) -> Attention:
    """Return the attention of a block's graph.

    Args:
        names: of the parameters that are the graph's first inputs.

    Raises:
        ModelError: it has none that is understood, with the reason.
    """
    found = _heads(graph)
    named = dict(zip(graph.nodes, names, strict=False))

    def rows(part: str) -> HeadRows | None:
        seen = found.parts[part]
        if seen is None:
            return None
        weight, bias = seen.layer.args[1], argument(seen.layer, 2, "bias")
        source = named[weight]
        whole = shape_of(seen.layer)[-1] == seen.heads * seen.width
        layer = source.removesuffix("weight").rstrip("._")
        return HeadRows(
            layer=layer if whole and source.endswith(".weight") else f"{layer}.{part}",
            source=source,
            bias="" if bias is None or part == "key" else named[bias],
            first=seen.first,
            heads=seen.heads,
            width=seen.width,
            positions_first=seen.positions_first,
        )

    query, key, value = map(rows, PARTS)
    assert value is not None
    if value.part and (query is None or key is None):
        raise ModelError(
            "the layer of its values makes its queries and keys, too, and norms or rotary embeddings "
            "lie between"
        )
    return Attention(
        query=query,
        key=key,
        value=value,
        output=named[found.output.args[1]].removesuffix(".weight"),
        bias=argument(found.output, 2, "bias") is not None,
        repeated=shape_of(found.node)[1] // value.heads,
        rank=shape_of(found.node.args[0])[-1],  # type: ignore[arg-type]
    )


def _heads(graph: fx.Graph) -> _Heads:
    nodes = [n for n in graph.nodes if packet_of(n) is _aten.scaled_dot_product_attention]
    softmax = any(packet_of(n) in (_aten.softmax, _aten._softmax) for n in graph.nodes)
    if not nodes and not softmax:
        raise NoAttentionError("it has no attention")
    if len(nodes) != 1:
        raise ModelError(f"it has {len(nodes)} calls of scaled_dot_product_attention, not one")
    (node,) = nodes
    parts = dict(zip(PARTS, (_projection(each) for each in node.args[:3]), strict=True))
    if parts["value"] is None:
        raise ModelError("its values are not heads of a linear layer, one after the other")
    output, positions_first = _output(node)
    for layer in (output, *(part.layer for part in parts.values() if part is not None)):
        if any(isinstance(n, fx.Node) and n.op != "placeholder" for n in layer.args[1:]):
            raise ModelError("a weight of its attention is computed from other tensors")
    return _Heads(node, parts, output, positions_first)


def _applied(step: fx.Node, value: Tensor) -> Tensor:
    """Run a view, a permutation or a split on a tensor of numbers."""
    if step.target is operator.getitem:
        return value[step.args[1]]  # type: ignore[index]
    packet = packet_of(step)
    if packet in _RESHAPED:
        return value.reshape(shape_of(step))
    if packet is _aten.expand:
        return value.expand(shape_of(step))
    found: Tensor = step.target(value, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    return found


def _projection(node: Any) -> _Projection | None:
    """Return the linear layer of which heads (N, heads, T, d) are rows; None where they are none."""
    path, layer = [], node
    while packet_of(layer) is not _aten.linear:
        known = packet_of(layer) in _LAYOUT or layer.target is operator.getitem
        if not known or not isinstance(layer.args[0], fx.Node):
            return None
        path.append(layer)
        layer = layer.args[0]
    shape, (n, heads, positions, width) = shape_of(layer), shape_of(node)
    if len(shape) != 3:
        return None
    value: Any = torch.arange(math.prod(shape)).reshape(shape)
    for step in reversed(path):
        value = _applied(step, value)
    rows = value[0, :, 0, :]
    first = int(rows[0, 0])
    distinct = torch.unique(rows[:, 0])
    repeated = heads // len(distinct)
    expected = first + torch.arange(len(distinct) * width).reshape(-1, width)
    if not torch.equal(rows, expected.repeat_interleave(repeated, 0)):
        return None
    for positions_first in (False, True):
        at = torch.arange(n * positions)
        at = at.reshape(positions, n).T if positions_first else at.reshape(n, positions)
        if torch.equal(value, at[:, None, :, None] * shape[-1] + rows[None, :, None]):
            return _Projection(layer, first, len(distinct), width, repeated, positions_first)
    return None


def _output(node: fx.Node) -> tuple[fx.Node, bool]:
    """Return the linear layer that reads all heads, and True where its input has positions outermost.

    Raises:
        ModelError: there is none.
    """
    n, heads, positions, width = shape_of(node)
    numbers = torch.arange(n * heads * positions * width).reshape(n, heads, positions, width)
    value, layer = numbers, node
    while True:
        if len(layer.users) != 1:
            raise ModelError("what its attention computes is read by more than one layer")
        (layer,) = layer.users
        if packet_of(layer) is _aten.linear:
            break
        if packet_of(layer) not in _LAYOUT:
            raise ModelError("something else than a linear layer reads what its attention computes")
        value = _applied(layer, value)
    for positions_first in (False, True):
        order = (2, 0, 1, 3) if positions_first else (0, 2, 1, 3)
        expected = numbers.permute(order).reshape(-1, heads * width)
        if value.shape[-1] == heads * width and torch.equal(value.reshape(expected.shape), expected):
            return layer, positions_first
    raise ModelError("its output layer does not read the heads one after the other")


def part_layers(model: nn.Module, path: str, attention: Attention) -> None:
    """Give each part of a block's attention its own linear layer, where one layer computes several.

    Args:
        path: of the block.
    """
    parts = [rows for rows in (attention.query, attention.key, attention.value) if rows is not None]
    made = {}
    for rows in (rows for rows in parts if rows.part):
        hold(model, f"{path}.{rows.source}".rpartition(".")[0])
        weight = tensor_of(model, f"{path}.{rows.source}")[rows.rows]
        bias = tensor_of(model, f"{path}.{rows.bias}")[rows.rows] if rows.bias else None
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
        layer.weight = nn.Parameter(weight.clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone())
        made[rows.layer] = layer
    for name, layer in made.items():
        parent, _, part = f"{path}.{name}".rpartition(".")
        above, _, at = parent.rpartition(".")
        holder = model.get_submodule(above)
        if not isinstance(getattr(holder, at, None), _Parts):
            holder.add_module(at, _Parts())
        getattr(holder, at).add_module(part, layer)


class _Parts(nn.Module):
    """Holder of the layers that a fused layer was divided into; a graph runs them."""


def resize_heads(graph: fx.Graph, names: Sequence[str], sizes: HeadSizes) -> list[str]:
    """Give a block's attention other sizes, and each of its parts a linear layer of its own.

    Args:
        names: of the parameters that are the graph's first inputs.

    Returns:
        The names, with those of new inputs, in the order of the inputs.

    Raises:
        ModelError: as `attention_of`; queries or keys would have to change, and cannot.
    """
    attention, found = attention_of(graph, names), _heads(graph)
    before = HeadSizes.of(attention)
    own = {
        "query": (sizes.heads, sizes.rank),
        "key": (sizes.groups, sizes.rank),
        "value": (sizes.groups, sizes.width),
    }
    operands = list(found.node.args[:3])
    named = dict(zip(graph.nodes, names, strict=False))
    first = next(iter(graph.nodes))
    for k, name in enumerate(PARTS):
        part, rows = found.parts[name], getattr(attention, name)
        if part is None:
            if (sizes.heads, sizes.groups, sizes.rank) != (before.heads, before.groups, before.rank):
                raise ModelError("its queries and keys are not heads of a linear layer alone")
            continue
        layer = part.layer
        if rows.part:
            given = {"weight": rows.source, "bias": rows.bias}
            arguments = []
            for tensor in (each for each, source in given.items() if source):
                with graph.inserting_before(first):
                    arguments.append(graph.placeholder(f"{name}_{tensor}"))
                named[arguments[-1]] = f"{rows.layer}.{tensor}"
                source = next(n for n, known in named.items() if known == given[tensor])
                arguments[-1].meta["shape"] = (own[name][0] * own[name][1], *shape_of(source)[1:])
            with graph.inserting_before(layer):
                shape = (*shape_of(layer)[:-1], own[name][0] * own[name][1])
                layer = _call(graph, _aten.linear.default, (layer.args[0], *arguments), shape)
        elif name == "key":
            layer.args = layer.args[:2]
        layer.meta["shape"] = (*shape_of(layer)[:-1], own[name][0] * own[name][1])
        with graph.inserting_before(found.node):
            split = _split(graph, layer, part.positions_first, *own[name])
            operands[k] = _repeated(graph, split, part.repeated)
    node = found.node
    node.args = (*operands, *node.args[3:])
    scale = node.kwargs.get("scale")
    node.kwargs = {**node.kwargs, "scale": before.rank**-0.5 if scale is None else scale}
    n, _, positions, _ = shape_of(node)
    node.meta["shape"] = (n, sizes.heads, positions, sizes.width)
    given_to = found.output.args[0]
    assert isinstance(given_to, fx.Node)
    with graph.inserting_before(found.output):
        flat = _flat(graph, found, shape_of(given_to))
    found.output.replace_input_with(given_to, flat)
    return [named[each] for each in graph.nodes if each in named]


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["shape"] = tuple(shape)
    return node


def _split(graph: fx.Graph, layer: fx.Node, positions_first: bool, heads: int, width: int) -> fx.Node:
    """Return the heads (N, heads, T, d) of a layer's output."""
    a, b, _ = shape_of(layer)
    split = _call(graph, _aten.unflatten.int, (layer, -1, [heads, width]), (a, b, heads, width))
    if positions_first:
        return _call(graph, _aten.permute.default, (split, [1, 2, 0, 3]), (b, heads, a, width))
    return _call(graph, _aten.transpose.int, (split, 1, 2), (a, heads, b, width))


def _repeated(graph: fx.Graph, node: fx.Node, times: int) -> fx.Node:
    """Return heads, each as often as heads of queries read it."""
    if times == 1:
        return node
    n, heads, positions, width = shape_of(node)
    shape = (n, heads * times, positions, width)
    return _call(graph, _aten.repeat_interleave.self_int, (node, times, 1), shape)


def _flat(graph: fx.Graph, found: _Heads, like: Sequence[int]) -> fx.Node:
    """Return all heads side by side, in the shape of the output layer's input."""
    n, heads, positions, width = shape_of(found.node)
    if found.positions_first:
        order, rows = [2, 0, 1, 3], (positions, n)
    else:
        order, rows = [0, 2, 1, 3], (n, positions)
    turned = _call(graph, _aten.permute.default, (found.node, order), (*rows, heads, width))
    flat = _call(graph, _aten.flatten.using_ints, (turned, 2, 3), (*rows, heads * width))
    if len(like) == 3:
        return flat
    return _call(graph, _aten.flatten.using_ints, (flat, 0, 1), (math.prod(rows), heads * width))
