"""What of a graph is read: slices moved up to where they save the most.

A head that reads one token leaves most of the last blocks unread. This pass goes backwards from the
output of an aten graph and works out, for each value, the part that somebody reads: all of it, or the
first `count` positions along one dimension. With P the selection of the first positions of x (n, ..):

    P f(x) = f(P x)                 for every f that treats positions alike and apart: activations,
                                    norms over other dimensions, x W + b, sums, products, scales
    P softmax(q k^T + m) v = softmax((P q) k^T + P m) v     attention reads all keys and values
    P view(x) = view'(P x)          where the positions are a dimension before and after
    P cat(x, y) = P x               where x has enough of them

Each operation's rule is one entry of `_RULES`; what has none reads everything, and says so.
A projection to queries, keys and values in one is split between its rows first, so that queries can be
computed for fewer positions than keys: [P x W_q, x W_kv] (weights are sliced, not copied). Where fewer
positions are asked than a head has channels, not even keys and values are computed (`attend`): with
k = x W_k + b_k and v = x W_v + b_v

    softmax(q k^T + m) v = softmax((q W_k^T) x^T + m) x W_v + b_v

for q b_k^T is the same for every key, and the rows of a softmax sum to one.

Nodes carry `meta["shape"]`, integers; where a graph is traced for several sizes, those of its example.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

_aten = torch.ops.aten


@dataclass(frozen=True)
class Need:
    """The first `count` positions along `dim`; by default all there is."""

    dim: int = -1
    count: int = 0


ALL = Need()


@dataclass(frozen=True)
class _Want:
    """An operand of a rewritten operation: what of a node it is."""

    node: fx.Node
    need: Need = ALL


Operands = tuple[tuple[Any, ...], dict[str, Any]]
"""args and kwargs with a `_Want` in place of every node."""

Rule = Callable[[fx.Node, Need], Operands | None]
"""The operands that give just the needed part of a node; None where that cannot be had apart."""


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node], Any]:
    """A copy without its output node, its nodes by the old ones, and what was put out."""
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, values)
    for old, new in values.items():
        new.meta = dict(old.meta)
    return copy, values, output


def packet_of(node: fx.Node) -> Any:
    """The operation of a node, whatever its overload."""
    return getattr(node.target, "_overloadpacket", node.target)


def _shape(node: fx.Node) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def _wanted(tree: Any, need: Callable[[fx.Node], Need] = lambda _: ALL) -> Any:
    return pytree.tree_map(lambda x: _Want(x, need(x)) if isinstance(x, fx.Node) else x, tree)


def _with(node: fx.Node, changes: dict[int, Any]) -> Operands:
    """The node's operands, some positional ones changed."""
    args = [*node.args, *[None] * (max(changes) + 1 - len(node.args))]
    for index, value in changes.items():
        args[index] = value
    return tuple(_wanted(a) for a in args), _wanted(node.kwargs)


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def attend(
    q: Tensor,
    keys: Tensor | tuple[Tensor, Tensor],
    values: Tensor | tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of few queries, in which the projections change sides.

    Args:
        q: (N, heads, queries, d).
        keys: (N, heads, T, d), or (x, weight) with x (N, T, width) and weight (heads * d, width).
        values: likewise, with a bias (heads * d,) or None behind the weight.
        mask: boolean (true where a key counts) or additive, broadcast to (N, heads, queries, T).
        scale: of the products.

    Returns:
        (N, heads, queries, d).
    """
    n, heads, queries, d = q.shape
    if isinstance(keys, tuple):
        x, weight = keys
        moved = torch.matmul(q, weight.reshape(heads, d, -1))  # (N, heads, queries, width)
        products = torch.matmul(moved.reshape(n, heads * queries, -1), x.transpose(1, 2))
        scores = products.reshape(n, heads, queries, -1) * scale
    else:
        scores = torch.matmul(q, keys.transpose(-1, -2)) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    shares = torch.softmax(scores, -1)
    if not isinstance(values, tuple):
        return torch.matmul(shares, values)
    x, weight, bias = values
    means = torch.matmul(shares.reshape(n, heads * queries, -1), x)  # (N, heads * queries, width)
    means = means.reshape(n, heads, queries, -1)
    read = torch.matmul(means, weight.reshape(heads, d, -1).transpose(1, 2))
    return read if bias is None else read + bias.reshape(heads, 1, d)


# --- rules


def _pointwise(node: fx.Node, need: Need) -> Operands | None:
    """Operands are broadcast from the right; one that has no such dimension is read whole."""
    ndim = len(_shape(node))

    def of(operand: fx.Node) -> Need:
        shape = operand.meta["shape"]
        dim = need.dim - ndim + len(shape or ())
        return Need(dim, need.count) if shape and dim >= 0 and shape[dim] > 1 else ALL

    return _wanted(node.args, of), _wanted(node.kwargs, of)


def _first_operand(node: fx.Node, need: Need) -> Operands:
    return _with(node, {0: _Want(node.args[0], need)})  # type: ignore[arg-type]


def _cast_like(node: fx.Node, need: Need) -> Operands:
    """Of the other tensor just the dtype counts: one position of it does."""
    x, other = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(other, fx.Node)
    little = Need(len(_shape(other)) - 2, 1) if len(_shape(other)) > 1 else ALL
    return _with(node, {0: _Want(x, need), 1: _Want(other, little)})


def _layer_norm(node: fx.Node, need: Need) -> Operands | None:
    normalised = len(node.args[1])  # type: ignore[arg-type]
    ndim = len(_shape(node.args[0]))  # type: ignore[arg-type]
    return _first_operand(node, need) if need.dim < ndim - normalised else None


def _along(node: fx.Node, need: Need) -> Operands | None:
    """Softmax and its like: apart but for their own dimension."""
    dim = int(_argument(node, 1, "dim")) % len(_shape(node))
    return _first_operand(node, need) if need.dim != dim else None


def _reduction(node: fx.Node, need: Need) -> Operands | None:
    """Mean, sum, norm over `dim`."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    ndim = len(_shape(x))
    index = 2 if packet_of(node) is _aten.linalg_vector_norm else 1
    dims = _argument(node, index, "dim")
    if dims is None:
        return None
    reduced = {int(d) % ndim for d in (dims if isinstance(dims, Sequence) else [dims])}
    kept = (
        list(range(ndim)) if len(_shape(node)) == ndim else [d for d in range(ndim) if d not in reduced]
    )
    dim = kept[need.dim]
    return None if dim in reduced else _first_operand(node, Need(dim, need.count))


def _linear(node: fx.Node, need: Need) -> Operands | None:
    return _first_operand(node, need) if need.dim != len(_shape(node)) - 1 else None


def _matmul(node: fx.Node, need: Need) -> Operands | None:
    a = node.args[0]
    assert isinstance(a, fx.Node)
    ndim = len(_shape(node))
    if need.dim != ndim - 2 or len(_shape(a)) < 2:
        return None
    return _first_operand(node, Need(len(_shape(a)) - 2, need.count))


def _attention(node: fx.Node, need: Need) -> Operands | None:
    """Queries and the rows of the mask. A causal one counts from the first query and the first key."""
    ndim = len(_shape(node))
    if need.dim != ndim - 2:
        return None
    args, kwargs = _first_operand(node, need)
    mask = _argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        rows = len(_shape(mask)) - 2
        want = _Want(mask, Need(rows, need.count) if _shape(mask)[rows] > 1 else ALL)
        if len(args) > 3:
            args = (*args[:3], want, *args[4:])
        else:
            kwargs = {**kwargs, "attn_mask": want}
    return args, kwargs


def _attend(node: fx.Node, need: Need) -> Operands | None:
    if need.dim != 2:
        return None
    q, _, _, mask, _ = node.args
    assert isinstance(q, fx.Node)
    changes: dict[int, Any] = {0: _Want(q, need)}
    if isinstance(mask, fx.Node) and _shape(mask)[-2] > 1:
        changes[3] = _Want(mask, Need(len(_shape(mask)) - 2, need.count))
    return _with(node, changes)


def _view(node: fx.Node, need: Need) -> Operands | None:
    """The positions must be a dimension of their own before the view, too."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    before, after = _shape(x), _shape(node)
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
    want = _Want(x, Need(dim, need.count))
    if packet_of(node) not in _SIZED:
        return _with(node, {0: want})
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[need.dim] = need.count
    return _with(node, {0: want, 1: sizes})


def _permute(node: fx.Node, need: Need) -> Operands | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    order = _order(node, len(_shape(x)))
    return None if order is None else _first_operand(node, Need(order[need.dim], need.count))


def _order(node: fx.Node, ndim: int) -> list[int] | None:
    """Which dimension of its input each dimension of a permutation is."""
    if packet_of(node) is _aten.permute:
        return [int(d) % ndim for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(ndim))
    a, b = (0, ndim - 1) if packet_of(node) is _aten.t else (int(d) % ndim for d in node.args[1:3])  # type: ignore[arg-type]
    order[a], order[b] = order[b], order[a]
    return order


def _expand(node: fx.Node, need: Need) -> Operands | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    dim = need.dim - len(_shape(node)) + len(_shape(x))
    whole = dim < 0 or _shape(x)[dim] == 1
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[need.dim] = need.count
    return _with(node, {0: _Want(x, ALL if whole else Need(dim, need.count)), 1: sizes})


def _select(node: fx.Node, need: Need) -> Operands | None:
    x, dim, index = node.args[:3]
    assert isinstance(x, fx.Node)
    if not isinstance(index, int):
        return None
    dim = int(dim) % len(_shape(x))  # type: ignore[arg-type]
    if need == ALL:
        return _first_operand(node, Need(dim, index + 1)) if index >= 0 else None
    return _first_operand(node, Need(need.dim + (need.dim >= dim), need.count))


def _slice(node: fx.Node, need: Need) -> Operands | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    dim = int(_argument(node, 1, "dim", 0)) % len(_shape(x))
    start, end = _argument(node, 2, "start") or 0, _argument(node, 3, "end")
    if need not in (ALL, Need(dim, need.count)):
        return _first_operand(node, need)
    plain = isinstance(start, int) and start >= 0 and _argument(node, 4, "step", 1) == 1
    if need == ALL:
        ends = isinstance(end, int) and 0 <= end < _shape(x)[dim]
        return _first_operand(node, Need(dim, end)) if plain and ends else None
    if not plain:
        return None
    last = start + need.count
    return _with(node, {0: _Want(x, Need(dim, last)), 1: dim, 2: start, 3: last})


def _cat(node: fx.Node, need: Need) -> Operands | None:
    tensors, dim = node.args[0], int(_argument(node, 1, "dim", 0)) % len(_shape(node))
    if need.dim != dim:
        return _with(node, {0: [_Want(t, need) for t in tensors]})  # type: ignore[union-attr, arg-type]
    wants, left = [], need.count
    for tensor in tensors:  # type: ignore[union-attr]
        assert isinstance(tensor, fx.Node)
        value = tensor.meta.get("val")
        if value is not None and not isinstance(value.shape[dim], int):
            return None  # of another size with other inputs
        size = _shape(tensor)[dim]
        wants.append(_Want(tensor, Need(dim, left) if left < size else ALL))
        left -= size
        if left <= 0:
            return _with(node, {0: wants})
    return None


def _stack(node: fx.Node, need: Need) -> Operands | None:
    dim = int(_argument(node, 1, "dim", 0)) % len(_shape(node))
    if need.dim == dim:
        return None
    below = Need(need.dim - (need.dim > dim), need.count)
    return _with(node, {0: [_Want(t, below) for t in node.args[0]]})  # type: ignore[union-attr, arg-type]


def _parts(node: fx.Node, need: Need) -> Operands | None:
    """Unbind, split, chunk: `need` is of every part."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    unbound = packet_of(node) is _aten.unbind
    dim = int(_argument(node, 1 if unbound else 2, "dim", 0)) % len(_shape(x))
    if not unbound and need.dim == dim:
        return None
    return _first_operand(node, Need(need.dim + (unbound and need.dim >= dim), need.count))


def _convolution(node: fx.Node, need: Need) -> Operands | None:
    """A 1x1 convolution without stride or padding is a linear layer over positions."""
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    same = _shape(x)[2:] == _shape(node)[2:]
    if need.dim < 2 or not same or any(size != 1 for size in _shape(weight)[2:]):
        return None
    return _first_operand(node, need)


_SIZED = {_aten.view, _aten._unsafe_view, _aten.reshape}
_VIEWS = {*_SIZED, _aten.flatten, _aten.unflatten, _aten.unsqueeze, _aten.squeeze}
_PERMUTATIONS = {_aten.permute, _aten.transpose, _aten.t}
_COPIES = {_aten.contiguous, _aten.clone, _aten.alias, _aten.detach}
_SPLITS = {_aten.unbind, _aten.split, _aten.split_with_sizes, _aten.chunk}

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
    **dict.fromkeys(_COPIES, _first_operand),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_PERMUTATIONS, _permute),
    **dict.fromkeys(_SPLITS, _parts),
}


def _rule(node: fx.Node) -> Rule | None:
    if node.target is operator.getitem or (node.op == "call_module"):
        return _first_operand  # a part of a split or norm; a map over positions
    rule = _RULES.get(packet_of(node))
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return rule


def _operands(node: fx.Node, need: Need) -> Operands | None:
    """The operands behind the needed part of a node; None where it reads everything."""
    rule = _rule(node)
    if rule is None or (need == ALL and rule not in (_select, _slice, _cast_like)):
        return None
    return rule(node, need)


def _leaves(operands: Operands) -> Iterator[_Want]:
    return (leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, _Want))


@dataclass(frozen=True)
class Demand:
    """What of each node of a graph is read."""

    needs: dict[fx.Node, Need]
    """Nodes that nothing reads are not in it."""

    def reader(self, node: fx.Node, dim: int) -> str:
        """What reads every position of a value along a dimension, in words."""
        seen, frontier = {node}, [(node, dim)]
        while frontier:
            value, dim = frontier.pop()
            for user in (u for u in value.users if u in self.needs and u not in seen):
                seen.add(user)
                if user.op == "output":
                    return "it is an output of the model"
                taken = _operands(user, ALL)
                if taken is not None and all(w.need != ALL for w in _leaves(taken)):
                    continue  # a selection of some of them
                moved = _moved(user, value, dim)
                if moved is None:
                    calls = user.meta.get("calls") or ()
                    where = f" in {calls[-1].path}" if calls else ""
                    return f"{packet_of(user)}{where} reads all of it"
                frontier.append((user, moved))
        return "all of it is read"


def _moved(user: fx.Node, value: fx.Node, dim: int) -> int | None:
    """Which dimension of what `user` gives the positions of its operand are; None if they are lost."""
    shape = user.meta["shape"] or _shape(value)  # several results are read one by one
    for out in range(len(shape)):
        operands = (_rule(user) or (lambda *_: None))(user, Need(out, 1))
        if operands is not None and any(
            w.node is value and w.need != ALL and w.need.dim == dim for w in _leaves(operands)
        ):
            return out
    return None


def demand(graph: fx.Graph) -> Demand:
    """Work backwards from the graph's outputs."""
    needs: dict[fx.Node, Need] = {}

    def join(node: fx.Node, need: Need) -> None:
        shape = node.meta.get("shape")
        if need != ALL and shape and need.count >= shape[need.dim]:
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
        operands = _operands(node, need)
        if operands is None:
            needs[node] = ALL
            operands = _wanted(node.args), _wanted(node.kwargs)
        for want in _leaves(operands):
            join(want.node, want.need)
    return Demand(needs)


# --- the rewrite


def narrow(graph: fx.Graph) -> fx.Graph:
    """A new graph with the same output that computes what is read, and no more."""
    split, _, output = copy_graph(graph)
    split.output(output)
    _move_projections(split, demand(split).needs)
    _split_projections(split, demand(split).needs)
    needs = demand(split).needs
    slim = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    parts: dict[tuple[fx.Node, Need], fx.Node] = {}

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, _Want):
            return leaf
        node, need = leaf.node, leaf.need
        shape = node.meta.get("shape")
        have = ALL if node.op == "placeholder" else needs[node]
        if need == have or shape is None or (need != ALL and need.count >= shape[need.dim]):
            return made[node]
        if (node, need) not in parts:
            part = slim.call_function(_aten.slice.Tensor, (made[node], need.dim, 0, need.count))
            parts[node, need] = part
        return parts[node, need]

    for node in split.nodes:
        if node.op == "placeholder":
            made[node] = slim.node_copy(node, lambda n: made[n])
        if node.op == "placeholder" or node not in needs:
            continue
        operands = _operands(node, needs[node]) or (_wanted(node.args), _wanted(node.kwargs))
        args, kwargs = pytree.tree_map(fetch, operands, is_leaf=lambda leaf: isinstance(leaf, _Want))
        if packet_of(node) is _aten.slice and _takes_nothing_away(node, operands):
            made[node] = args[0]
            continue
        # A part of a tensor may not be viewed as another shape without a copy.
        target = _aten.reshape.default if packet_of(node) in _SIZED else node.target
        made[node] = slim.create_node(node.op, target, args, kwargs, name=node.name)
        if node.target is operator.getitem and needs[node.args[0]] != needs[node]:
            # Another of the results is read whole.
            part = (made[node], needs[node].dim, 0, needs[node].count)
            made[node] = slim.call_function(_aten.slice.Tensor, part)
    slim.lint()
    return slim


def _move_projections(graph: fx.Graph, needs: dict[fx.Node, Need]) -> None:
    """Let attention of few queries project them instead of the keys and values, in place."""
    for node in list(graph.nodes):
        if packet_of(node) is not _aten.scaled_dot_product_attention or node not in needs:
            continue
        q, k, v = node.args[:3]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        shape, need = _shape(q), needs[node]
        few = need.dim == 2 and need.count < shape[-1] and len(shape) == 4
        plain = not any(
            _argument(node, i, name)
            for i, name in ((4, "dropout_p"), (5, "is_causal"), (7, "enable_gqa"))
        )
        if not few or not plain or _shape(k)[1] != shape[1]:
            continue
        scale = _argument(node, 6, "scale")
        with graph.inserting_before(node):
            keys, values = _projected(graph, k), _projected(graph, v)
            if keys is None and values is None:
                continue
            arguments = (
                q,
                k if keys is None else keys[:2],
                v if values is None else values,
                _argument(node, 3, "attn_mask"),
                shape[-1] ** -0.5 if scale is None else scale,
            )
            moved = graph.call_function(attend, arguments)
        moved.meta = dict(node.meta)
        node.replace_all_uses_with(moved)
        graph.erase_node(node)


def _projected(graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """x, weight and bias where heads (N, heads, T, d) are rows of a linear layer of x (N, T, width).

    The views on the way are tried on the numbers of the layer's outputs.
    """
    path, linear = [], node
    while packet_of(linear) is not _aten.linear:
        known = _PERMUTATIONS | _COPIES | _SIZED | _SPLITS | {operator.getitem, _aten.select}
        if packet_of(linear) not in known or not isinstance(linear.args[0], fx.Node):
            return None
        path.append(linear)
        linear = linear.args[0]
    if len(_shape(linear)) != 3:
        return None
    n, positions, channels = _shape(linear)
    value: Any = torch.arange(n * positions * channels).reshape(n, positions, channels)
    for step in reversed(path):
        if packet_of(step) in _SIZED:
            value = value.reshape(_shape(step))
        else:
            value = step.target(value, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    _, heads, _, d = _shape(node)
    first = int(value[0, 0, 0, 0])
    rows = first + torch.arange(heads * d).reshape(heads, 1, d)
    places = torch.arange(n * positions).reshape(n, 1, positions, 1) * channels
    if first + heads * d > channels or not torch.equal(value, places + rows):
        return None
    x, weight, bias = linear.args[0], linear.args[1], _argument(linear, 2, "bias")

    def part(of: fx.Node) -> fx.Node:
        taken = graph.call_function(_aten.slice.Tensor, (of, 0, first, first + heads * d))
        taken.meta = {"shape": (heads * d, *_shape(of)[1:]), "dtype": of.meta.get("dtype")}
        return taken

    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    return x, part(weight), part(bias) if isinstance(bias, fx.Node) else None


def _takes_nothing_away(node: fx.Node, operands: Operands) -> bool:
    """Whether a slice's operand is narrowed to just what the slice takes."""
    want = operands[0][0]
    dim = int(_argument(node, 1, "dim", 0)) % len(_shape(want.node))
    return want.need != ALL and want.need.dim == dim and not _argument(node, 2, "start")


def _split_projections(graph: fx.Graph, needs: dict[fx.Node, Need]) -> None:
    """Split linear layers whose parts are not read alike, in place."""
    for node in list(graph.nodes):
        if packet_of(node) not in _SPLITS or node not in needs:
            continue
        parts = {int(user.args[1]): user for user in node.users if user.target is operator.getitem}
        if len({needs.get(part) for part in parts.values()}) < 2 or len(parts) < len(node.users):
            continue
        projection = _Projection.before(node)
        if projection is not None:
            _split_projection(graph, node, parts, projection, needs)


@dataclass(frozen=True)
class _Projection:
    """A linear layer, and the views on the way to where its output is split."""

    linear: fx.Node
    path: tuple[tuple[fx.Node, int], ...]
    """Each view or permutation, and the dimension that the parts are along behind it."""
    sizes: tuple[int, ...]
    """Of each part, along that dimension at the split."""

    @classmethod
    def before(cls, node: fx.Node) -> _Projection | None:
        x, path = node.args[0], []
        while isinstance(x, fx.Node) and len(x.users) == 1:
            if packet_of(x) is _aten.linear:
                break
            if packet_of(x) not in _PERMUTATIONS | _COPIES | _SIZED:
                return None
            path.append(x)
            x = x.args[0]
        if not isinstance(x, fx.Node) or packet_of(x) is not _aten.linear or len(x.users) != 1:
            return None
        unbound = packet_of(node) is _aten.unbind
        source = node.args[0]
        assert isinstance(source, fx.Node)
        split = int(_argument(node, 1 if unbound else 2, "dim", 0)) % len(_shape(source))
        count = _shape(source)[split]
        channels = _shape(x)[-1]
        if channels % count or (not unbound and count != channels):
            return None
        dim, tracked, before = len(_shape(x)) - 1, [], x
        for step in reversed(path):
            moved = _outermost(step, _shape(before), dim, count)
            if moved is None:
                return None
            dim, before = moved, step
            tracked.append((step, dim))
        if dim != split:
            return None
        sizes = (1,) * count if unbound else tuple(_shape(part)[split] for part in _in_order(node))
        return cls(x, tuple(tracked), sizes) if sum(sizes) == count else None


def _in_order(node: fx.Node) -> list[fx.Node]:
    return sorted(node.users, key=lambda user: int(user.args[1]))  # type: ignore[arg-type]


def _outermost(step: fx.Node, before: tuple[int, ...], dim: int, count: int) -> int | None:
    """Where the outermost part of a dimension, in `count` pieces, is behind a view or permutation."""
    if packet_of(step) in _COPIES:
        return dim
    if packet_of(step) in _PERMUTATIONS:
        order = _order(step, len(before))
        return None if order is None else order.index(dim)
    after, whole = _shape(step), math.prod(before[dim:])
    return next(
        (d for d, size in enumerate(after) if size == count and math.prod(after[d:]) == whole), None
    )


def _split_projection(
    graph: fx.Graph,
    node: fx.Node,
    parts: dict[int, fx.Node],
    projection: _Projection,
    needs: dict[fx.Node, Need],
) -> None:
    """A linear layer of its own for each run of parts that are read alike."""
    runs: list[list[int]] = []
    for index in sorted(parts):
        alike = runs and needs.get(parts[runs[-1][0]]) == needs.get(parts[index])
        if alike and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    linear, sizes = projection.linear, projection.sizes
    rows = _shape(linear)[-1] // sum(sizes)

    def call(target: Any, args: tuple[Any, ...], like: fx.Node, shape: Sequence[int]) -> fx.Node:
        made = graph.call_function(target, args)
        # Sizes of a part are those of the whole, but for one dimension: nothing symbolic is lost.
        made.meta = {"shape": tuple(shape), "dtype": like.meta.get("dtype")}
        return made

    def resized(like: fx.Node, dim: int, size: int) -> list[int]:
        shape = list(_shape(like))
        shape[dim] = size
        return shape

    for run in runs:
        first, last = run[0], run[-1] + 1
        begin, end = sum(sizes[:first]) * rows, sum(sizes[:last]) * rows
        width = sum(sizes[first:last])
        with graph.inserting_before(node):
            taken = [
                call(_aten.slice.Tensor, (w, 0, begin, end), w, resized(w, 0, end - begin))
                if isinstance(w, fx.Node)
                else w
                for w in (_argument(linear, 1, "weight"), _argument(linear, 2, "bias"))
            ]
            value = call(
                linear.target, (linear.args[0], *taken), linear, resized(linear, -1, end - begin)
            )
            for step, dim in projection.path:
                args = list(step.args)
                args[0] = value
                if packet_of(step) in _SIZED:
                    args[1] = [width if d == dim else s for d, s in enumerate(args[1])]  # type: ignore[arg-type]
                value = call(step.target, tuple(args), step, resized(step, dim, width))
            if packet_of(node) is _aten.unbind:
                value = call(node.target, (value, *node.args[1:]), node, ())
            elif len(run) > 1:
                split = _argument(node, 2, "dim", 0)
                lengths = list(sizes[first:last])
                value = call(_aten.split_with_sizes.default, (value, lengths, split), node, ())
            for index in run:
                part = parts[index]
                new = value
                if packet_of(value) in _SPLITS:
                    new = call(operator.getitem, (value, index - first), part, _shape(part))
                part.replace_all_uses_with(new)
    for part in parts.values():
        graph.erase_node(part)
    for dead in (node, *(step for step, _ in reversed(projection.path)), linear):
        graph.erase_node(dead)
