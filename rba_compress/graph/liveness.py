"""Backward liveness analysis: which positions of each tensor reach the output.

A head that reads one token leaves most of the last blocks unread. This pass goes backwards from the
output of an aten graph and determines, for each value, the part that is read: all of it, or the first
`count` positions along one dimension. With P the selection of the first positions of x (n, ..):

    P f(x) = f(P x)                 for every f that acts on each position separately and alike:
                                    activations, norms over other dimensions, x W + b, sums, products,
                                    scales
    P softmax(q k^T + m) v = softmax((P q) k^T + P m) v     attention reads all keys and values
    P view(x) = view'(P x)          where the positions are a dimension before and after
    P cat(x, y) = P x               where x has enough of them

Each operation's rule is one entry of `_RULES`; an operation without a rule reads everything, and is
named as the reader. The rewrite that applies the analysis is in `slice_propagation`.

Nodes carry `meta["shape"]`, integers; where a graph is traced for several sizes, the shape is that of
the example.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from rba_compress.graph.few_query_attention import attend

_aten = torch.ops.aten


@dataclass(frozen=True)
class Need:
    """Part of a value that is read: the first `count` positions along `dim`; by default all of it."""

    dim: int = -1
    count: int = 0


ALL = Need()


@dataclass(frozen=True)
class Want:
    """Operand of a rewritten operation: a node, and the part of it that is needed."""

    node: fx.Node
    need: Need = ALL


Operands = tuple[tuple[Any, ...], dict[str, Any]]
"""args and kwargs with a `Want` in place of every node."""

Rule = Callable[[fx.Node, Need], Operands | None]
"""Function that returns the operands for just the needed part of a node; None where that part cannot be
computed alone."""


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node], Any]:
    """Return a copy without its output node, its nodes by the old ones, and the output's value."""
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, values)
    for old, new in values.items():
        new.meta = dict(old.meta)
    return copy, values, output


def packet_of(node: fx.Node) -> Any:
    """Return the operation of a node, whatever its overload."""
    return getattr(node.target, "_overloadpacket", node.target)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def wanted(tree: Any, need: Callable[[fx.Node], Need] = lambda _: ALL) -> Any:
    return pytree.tree_map(lambda x: Want(x, need(x)) if isinstance(x, fx.Node) else x, tree)


def _with(node: fx.Node, changes: dict[int, Any]) -> Operands:
    """Return the node's operands, some positional ones changed."""
    args = [*node.args, *[None] * (max(changes) + 1 - len(node.args))]
    for index, value in changes.items():
        args[index] = value
    return tuple(wanted(a) for a in args), wanted(node.kwargs)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


# --- rules


def _pointwise(node: fx.Node, need: Need) -> Operands | None:
    """Rule of pointwise operations: operands are broadcast from the right, and one without the needed
    dimension is read whole."""
    ndim = len(shape_of(node))

    def of(operand: fx.Node) -> Need:
        shape = operand.meta["shape"]
        dim = need.dim - ndim + len(shape or ())
        return Need(dim, need.count) if shape and dim >= 0 and shape[dim] > 1 else ALL

    return wanted(node.args, of), wanted(node.kwargs, of)


def _first_operand(node: fx.Node, need: Need) -> Operands:
    return _with(node, {0: Want(node.args[0], need)})  # type: ignore[arg-type]


def _cast_like(node: fx.Node, need: Need) -> Operands:
    """Rule of casts to another tensor's dtype, of which one position is enough."""
    x, other = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(other, fx.Node)
    little = Need(len(shape_of(other)) - 2, 1) if len(shape_of(other)) > 1 else ALL
    return _with(node, {0: Want(x, need), 1: Want(other, little)})


def _layer_norm(node: fx.Node, need: Need) -> Operands | None:
    normalised = len(node.args[1])  # type: ignore[arg-type]
    ndim = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    return _first_operand(node, need) if need.dim < ndim - normalised else None


def _along(node: fx.Node, need: Need) -> Operands | None:
    """Rule of softmax and similar operations, which act along one dimension only."""
    dim = int(argument(node, 1, "dim")) % len(shape_of(node))
    return _first_operand(node, need) if need.dim != dim else None


def _reduction(node: fx.Node, need: Need) -> Operands | None:
    """Rule of mean, sum and norm over `dim`."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    ndim = len(shape_of(x))
    index = 2 if packet_of(node) is _aten.linalg_vector_norm else 1
    dims = argument(node, index, "dim")
    if dims is None:
        return None
    reduced = {int(d) % ndim for d in (dims if isinstance(dims, Sequence) else [dims])}
    kept = (
        list(range(ndim))
        if len(shape_of(node)) == ndim
        else [d for d in range(ndim) if d not in reduced]
    )
    dim = kept[need.dim]
    return None if dim in reduced else _first_operand(node, Need(dim, need.count))


def _linear(node: fx.Node, need: Need) -> Operands | None:
    return _first_operand(node, need) if need.dim != len(shape_of(node)) - 1 else None


def _matmul(node: fx.Node, need: Need) -> Operands | None:
    a = node.args[0]
    assert isinstance(a, fx.Node)
    ndim = len(shape_of(node))
    if need.dim != ndim - 2 or len(shape_of(a)) < 2:
        return None
    return _first_operand(node, Need(len(shape_of(a)) - 2, need.count))


def _mask_rows(mask: fx.Node, count: int) -> Want:
    """Return the rows of an attention mask for the first queries; a single row applies to all."""
    rows = len(shape_of(mask)) - 2
    return Want(mask, Need(rows, count) if shape_of(mask)[rows] > 1 else ALL)


def _attention(node: fx.Node, need: Need) -> Operands | None:
    """Rule of attention: the queries and the mask's rows. A causal mask counts from the first query and
    the first key."""
    ndim = len(shape_of(node))
    if need.dim != ndim - 2:
        return None
    args, kwargs = _first_operand(node, need)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        rows = _mask_rows(mask, need.count)
        if len(args) > 3:
            args = (*args[:3], rows, *args[4:])
        else:
            kwargs = {**kwargs, "attn_mask": rows}
    return args, kwargs


def _attend(node: fx.Node, need: Need) -> Operands | None:
    if need.dim != 2:
        return None
    q, _, _, mask, _ = node.args
    assert isinstance(q, fx.Node)
    changes: dict[int, Any] = {0: Want(q, need)}
    if isinstance(mask, fx.Node):
        changes[3] = _mask_rows(mask, need.count)
    return _with(node, changes)


def _view(node: fx.Node, need: Need) -> Operands | None:
    """Rule of views: the positions must be a dimension of their own before the view, too."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    before, after = shape_of(x), shape_of(node)
    inner = math.prod(after[need.dim + 1 :])
    dim = next(
        (
            d
            for d, size in enumerate(before)
            if size == after[need.dim] and math.prod(before[d + 1 :]) == inner
        ),
        None,
    )
    if dim is None:
        return None
    want = Want(x, Need(dim, need.count))
    if packet_of(node) not in SIZED:
        return _with(node, {0: want})
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[need.dim] = need.count
    return _with(node, {0: want, 1: sizes})


def _permute(node: fx.Node, need: Need) -> Operands | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    order = permuted(node)
    return _first_operand(node, Need(order[need.dim], need.count))


def permuted(node: fx.Node) -> list[int]:
    """Return the input's dimension for each dimension of a permutation."""
    ndim = len(shape_of(node))
    if packet_of(node) is _aten.permute:
        return [int(d) % ndim for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(ndim))
    a, b = (0, ndim - 1) if packet_of(node) is _aten.t else (int(d) % ndim for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


def _expand(node: fx.Node, need: Need) -> Operands | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    dim = need.dim - len(shape_of(node)) + len(shape_of(x))
    whole = dim < 0 or shape_of(x)[dim] == 1
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[need.dim] = need.count
    return _with(node, {0: Want(x, ALL if whole else Need(dim, need.count)), 1: sizes})


def _select(node: fx.Node, need: Need) -> Operands | None:
    x, dim, index = node.args[:3]
    assert isinstance(x, fx.Node)
    if not isinstance(index, int):
        return None
    dim = int(dim) % len(shape_of(x))  # type: ignore[arg-type]
    if need == ALL:
        return _first_operand(node, Need(dim, index + 1)) if index >= 0 else None
    return _first_operand(node, Need(need.dim + (need.dim >= dim), need.count))


def _slice(node: fx.Node, need: Need) -> Operands | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    dim = int(argument(node, 1, "dim", 0)) % len(shape_of(x))
    start, end = argument(node, 2, "start") or 0, argument(node, 3, "end")
    if need not in (ALL, Need(dim, need.count)):
        return _first_operand(node, need)
    plain = isinstance(start, int) and start >= 0 and argument(node, 4, "step", 1) == 1
    if need == ALL:
        ends = isinstance(end, int) and 0 <= end < shape_of(x)[dim]
        return _first_operand(node, Need(dim, end)) if plain and ends else None
    if not plain:
        return None
    last = start + need.count
    return _with(node, {0: Want(x, Need(dim, last)), 1: dim, 2: start, 3: last})


def _cat(node: fx.Node, need: Need) -> Operands | None:
    tensors, dim = node.args[0], int(argument(node, 1, "dim", 0)) % len(shape_of(node))
    if need.dim != dim:
        return _with(node, {0: [Want(t, need) for t in tensors]})  # type: ignore[union-attr, arg-type]
    wants, left = [], need.count
    for tensor in tensors:  # type: ignore[union-attr]
        assert isinstance(tensor, fx.Node)
        value = tensor.meta.get("val")
        if value is not None and not isinstance(value.shape[dim], int):
            return None  # its size depends on the inputs
        size = shape_of(tensor)[dim]
        wants.append(Want(tensor, Need(dim, left) if left < size else ALL))
        left -= size
        if left <= 0:
            return _with(node, {0: wants})
    return None


def _stack(node: fx.Node, need: Need) -> Operands | None:
    dim = int(argument(node, 1, "dim", 0)) % len(shape_of(node))
    if need.dim == dim:
        return None
    below = Need(need.dim - (need.dim > dim), need.count)
    return _with(node, {0: [Want(t, below) for t in node.args[0]]})  # type: ignore[union-attr, arg-type]


def _parts(node: fx.Node, need: Need) -> Operands | None:
    """Rule of unbind, split and chunk: `need` is of every part."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    unbound = packet_of(node) is _aten.unbind
    dim = int(argument(node, 1 if unbound else 2, "dim", 0)) % len(shape_of(x))
    if not unbound and need.dim == dim:
        return None
    return _first_operand(node, Need(need.dim + (unbound and need.dim >= dim), need.count))


def _convolution(node: fx.Node, need: Need) -> Operands | None:
    """Rule of convolutions: a 1x1 one without stride or padding is a linear layer over positions."""
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    same = shape_of(x)[2:] == shape_of(node)[2:]
    if need.dim < 2 or not same or any(size != 1 for size in shape_of(weight)[2:]):
        return None
    return _first_operand(node, need)


SIZED = {_aten.view, _aten._unsafe_view, _aten.reshape}
_VIEWS = {*SIZED, _aten.flatten, _aten.unflatten, _aten.unsqueeze, _aten.squeeze}
PERMUTATIONS = {_aten.permute, _aten.transpose, _aten.t}
COPIES = {_aten.contiguous, _aten.clone, _aten.alias, _aten.detach}
SPLITS = {_aten.unbind, _aten.split, _aten.split_with_sizes, _aten.chunk}

_RULES: dict[Any, Rule] = {
    _aten.layer_norm: _layer_norm,
    _aten.native_layer_norm: _layer_norm,
    _aten.rms_norm: _layer_norm,
    _aten.softmax: _along,
    _aten._softmax: _along,
    _aten.mean: _reduction,
    _aten.sum: _reduction,
    _aten.var: _reduction,
    _aten.linalg_vector_norm: _reduction,
    _aten.linear: _linear,
    _aten.matmul: _matmul,
    _aten.bmm: _matmul,
    _aten.scaled_dot_product_attention: _attention,
    attend: _attend,
    _aten.expand: _expand,
    _aten.select: _select,
    _aten.slice: _slice,
    _aten.cat: _cat,
    _aten.stack: _stack,
    _aten.convolution: _convolution,
    _aten.conv1d: _convolution,
    _aten.conv2d: _convolution,
    _aten.dropout: _first_operand,
    _aten.to: _first_operand,
    _aten._to_copy: _first_operand,
    _aten.type_as: _cast_like,
    _aten.expand_as: _pointwise,
    **dict.fromkeys(COPIES, _first_operand),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(PERMUTATIONS, _permute),
    **dict.fromkeys(SPLITS, _parts),
}


def _rule(node: fx.Node) -> Rule | None:
    if node.target is operator.getitem or (node.op == "call_module"):
        return _first_operand  # a result of a split or norm; a map of each position
    rule = _RULES.get(packet_of(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return rule


def operands_of(node: fx.Node, need: Need) -> Operands | None:
    """Return the operands for the needed part of a node; None where the node reads everything."""
    rule = _rule(node)
    if rule is None or (need == ALL and rule not in (_select, _slice, _cast_like)):
        return None
    return rule(node, need)


def leaves(operands: Operands) -> Iterator[Want]:
    return (leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, Want))


@dataclass(frozen=True)
class Liveness:
    """Result of the liveness analysis: the part of each node that is read."""

    needs: dict[fx.Node, Need]
    """Needed part of each node; nodes that nothing reads are absent."""

    def reader(self, node: fx.Node, dim: int) -> str:
        """Return, in words, what reads every position of a value along a dimension."""
        seen, frontier = {node}, [(node, dim)]
        while frontier:
            value, dim = frontier.pop()
            for user in (u for u in value.users if u in self.needs and u not in seen):
                seen.add(user)
                if user.op == "output":
                    return "it is an output of the model"
                taken = operands_of(user, ALL)
                if taken is not None and all(w.need != ALL for w in leaves(taken)):
                    continue  # it selects some positions
                moved = _moved(user, value, dim)
                if moved is None:
                    calls = user.meta.get("calls") or ()
                    where = f" in {calls[-1].path}" if calls else ""
                    return f"{packet_of(user)}{where} reads all of it"
                frontier.append((user, moved))
        return "all of it is read"


def _moved(user: fx.Node, value: fx.Node, dim: int) -> int | None:
    """Return the dimension of `user` that its operand's positions become; None if they are lost."""
    rule = _rule(user)
    shape = user.meta["shape"] or shape_of(value)  # several results are read one by one
    for out in range(len(shape) if rule is not None else 0):
        operands = rule(user, Need(out, 1))  # type: ignore[misc]
        if operands is not None and any(
            w.node is value and w.need != ALL and w.need.dim == dim for w in leaves(operands)
        ):
            return out
    return None


def liveness(graph: fx.Graph) -> Liveness:
    """Determine the part of each node that is read, backwards from the graph's outputs."""
    needs: dict[fx.Node, Need] = {}

    def join(node: fx.Node, need: Need) -> None:
        shape = node.meta.get("shape")
        # A tensor written through a view has the view's shape, whatever the shape it is read in.
        if need != ALL and shape and (need.dim >= len(shape) or need.count >= shape[need.dim]):
            need = ALL
        known = needs.get(node, need)
        more = Need(need.dim, max(known.count, need.count))
        needs[node] = more if known.dim == need.dim else ALL

    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            needs[node] = ALL
        need = needs.get(node)
        if need is None or not node.all_input_nodes:
            continue
        operands = operands_of(node, need)
        if operands is None:
            needs[node] = ALL
            operands = wanted(node.args), wanted(node.kwargs)
        for want in leaves(operands):
            join(want.node, want.need)
    return Liveness(needs)
