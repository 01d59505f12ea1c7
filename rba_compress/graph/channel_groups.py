"""Channels between the layers of a block that can be taken away one by one.

From the input of a layer (the reader) the graph is followed backwards through operations that act on
each channel separately: pointwise operations, BatchNorms, depthwise convolutions, views that leave the
channels a dimension of their own, and splits into equal parts (gates). Where every path ends at a
layer that computes the channels, and nothing else reads them, they are a group: channel c of each of
these tensors can be left out together.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from rba_compress.core.call_signature import Signature, stream_path
from rba_compress.core.errors import ModelError
from rba_compress.core.plan import Called, ChannelGroup, Slice
from rba_compress.graph.block_analysis import output_template
from rba_compress.graph.liveness import COPIES, PERMUTATIONS, SIZED, argument, packet_of, permuted
from rba_compress.graph.tracer import Recording

_aten = torch.ops.aten
_PRODUCTS = {_aten.addmm: 1, _aten.mm: 0, _aten.convolution: 0, _aten.linear: 0}
"""Operand of each product that holds the channels; the weight is the next one."""
_PASSED = {*COPIES, _aten._to_copy, _aten.hardswish_}
"""Operations that act on each channel separately, beside those that torch calls pointwise."""
_NORMS = {
    _aten.native_batch_norm,
    _aten._native_batch_norm_legit_no_training,
    _aten.cudnn_batch_norm,
    _aten.miopen_batch_norm,
}
_ATTENTION = "scaled_dot_product"
_SPLITS = {_aten.split, _aten.chunk, _aten.split_with_sizes}


class _RefusedError(Exception):
    """Reason for which channels that a layer reads are no group."""


class _NoGroupError(Exception):
    """Signal that a layer reads no channels of other layers of its block."""


class ChannelGroups:
    """Groups of channels in the blocks of one recorded network."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self._model, self._recording, self._graph = model, recording, recording.graph
        self.calls = recording.calls
        names: dict[int, list[str]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
        self.names = {*model.state_dict()}
        self._tied = {name for same in names.values() if len(same) > 1 for name in same}
        layers = [_layer(node) for node in self._graph.nodes if packet_of(node) in _PRODUCTS]
        self._calls = Counter(layers)

    def macs_of(self, layer: str) -> int:
        """Return the multiply-accumulates of a layer for one sample."""
        return self._recording.macs_of(layer)

    def macs(self, block: str, group: ChannelGroup) -> int:
        """Return the multiply-accumulates for one sample of the layers that have a group's channels."""
        named = {each.tensor.rpartition(".")[0] for each in group.slices}
        return sum(self.macs_of(f"{block}.{layer}") for layer in named)

    def size(self, name: str) -> int:
        """Return the number of elements of a parameter; 0 for a buffer, which is none."""
        found = dict(self._model.named_parameters()).get(name)
        return 0 if found is None else found.numel()

    def of(self, path: str) -> tuple[list[ChannelGroup], list[str]]:
        """Return the groups inside the block at `path`, and reasons why other channels are none."""
        groups, reasons = [], []
        for node in self._graph.nodes:
            if packet_of(node) not in _PRODUCTS or not _layer(node).startswith(f"{path}."):
                continue
            try:
                groups.append(_Walk(self, path, node).group())
            except _NoGroupError:
                continue
            except _RefusedError as refused:
                reasons.append(f"{_layer(node)}: {refused}")
        return groups, reasons

    def heads(self, path: str) -> tuple[ChannelGroup, int]:
        """Return the heads of attention inside the block at `path` as a group, those that share keys as
        one channel, and the multiply-accumulates of attention for one sample.

        Only the layers are found here: that heads are rows one after the other has to be tried.

        Raises:
            ModelError: the attention is not understood, with the reason.
        """
        nodes = [n for n in self._graph.nodes if _ATTENTION in str(n.target) and _inside(n, path)]
        if len(nodes) != 1:
            raise ModelError(f"it has {len(nodes)} calls of scaled_dot_product_attention, not one")
        (node,) = nodes
        width = node.args[0].meta["shape"][-1]
        query, key, value = (self._maker(each, path) for each in node.args[:3])
        output = self._reader(node, path)
        layers = [self.require_heads(layer) for layer in (query, key, value, output)]
        made = {layer: self._model.get_submodule(layer) for layer in layers}
        rows = {layer: _outputs(module) for layer, module in made.items()}
        heads, groups = node.args[0].meta["shape"][1], rows[value] // width
        if len({query, key, value}) == 1:
            groups, parts = rows[value] // (3 * width), 3
        else:
            parts = 1
        if groups < 1 or heads % groups or rows[query] != parts * heads * width:
            raise ModelError("its layers do not compute the heads one after the other")
        slices: dict[str, Slice] = {}
        for layer, times in ((query, heads // groups), (key, 1), (value, 1)):
            dim = _outputs_first(made[layer])
            for name, _ in made[layer].named_parameters(recurse=False):
                own = Slice(
                    tensor=f"{layer}.{name}".removeprefix(f"{path}."),
                    dim=dim if name == "weight" else 0,
                    parts=parts,
                    size=width * times,
                )
                slices.setdefault(own.tensor, own)
        reader = output.removeprefix(f"{path}.")
        dim = 1 - _outputs_first(made[output])
        size = width * heads // groups
        slices[f"{reader}.weight"] = Slice(tensor=f"{reader}.weight", dim=dim, size=size)
        bias = getattr(made[output], "bias", None) is not None
        group = ChannelGroup(
            reader=reader,
            channels=groups,
            slices=tuple(slices.values()),
            shift=f"{reader}.bias" if bias else "",
        )
        return group, round(node.meta["macs"] / self._recording.samples)

    def attends(self, path: str) -> bool:
        """Return whether the module at `path` computes attention."""
        names = [str(n.target) for n in self._graph.nodes if _inside(n, path)]
        return any(_ATTENTION in name or "softmax" in name for name in names)

    def called(self, block: str, last: str) -> Called:
        """Return the module of a block that computes what its child, a layer, does.

        Args:
            block: path of the block.
            last: path of the layer in the network.

        Raises:
            ModelError: there is none, or the block uses it in another way.
        """
        path = last.rpartition(".")[0]
        found = [c for c in self.calls if c.path == path]
        if path == block or len(found) != 1:
            raise ModelError("it is no module of its own that runs once")
        output = next(node for c in self.calls if c.path == last for node in c.outputs.values())
        shape = output.meta["shape"]
        place = next((p for p, n in found[0].inputs.items() if n.meta["shape"] == shape), None)
        if place is None:
            raise ModelError("it reads no stream")
        try:
            template = output_template(found[0], output)
        except TypeError as error:
            raise ModelError(str(error)) from error
        if stream_path(template) is None:
            raise ModelError("its output is not that of its last layer")
        signature = Signature(stream=place, output=template)
        return Called(path=path.removeprefix(f"{block}."), signature=signature)

    def require_heads(self, layer: str) -> str:
        """Return a layer whose heads may be taken.

        Raises:
            ModelError: they may not.
        """
        try:
            self.require_own(layer)
        except _RefusedError as error:
            raise ModelError(str(error)) from error
        return layer

    def _maker(self, node: fx.Node, path: str) -> str:
        """Return the one layer from which an operand of attention comes."""
        waiting, seen, found = [node], set(), set()
        while waiting:
            at = waiting.pop()
            if at in seen or not _inside(at, path):
                continue
            seen.add(at)
            if packet_of(at) in _PRODUCTS:
                found.add(_layer(at))
            else:
                waiting += at.all_input_nodes
        if len(found) != 1:
            raise ModelError(f"queries, keys or values come from {len(found)} layers, not from one")
        return found.pop()

    def _reader(self, node: fx.Node, path: str) -> str:
        """Return the one layer that reads what attention computes."""
        waiting, found = [*node.users], set()
        while waiting:
            at = waiting.pop()
            if packet_of(at) in _PRODUCTS:
                found.add(_layer(at))
            elif _inside(at, path):
                waiting += at.users
        if len(found) != 1:
            raise ModelError(f"{len(found)} layers read what its attention computes, not one")
        return found.pop()

    def require_own(self, layer: str) -> nn.Module:
        """Return a layer whose tensors can be replaced by smaller ones.

        Raises:
            _RefusedError: they cannot.
        """
        module = self._model.get_submodule(layer)
        if self._calls[layer] > 1:
            raise _RefusedError(f"{layer} runs {self._calls[layer]} times")
        plain = isinstance(getattr(module, "weight", None), nn.Parameter)
        if parametrize.is_parametrized(module) or not plain:
            raise _RefusedError(f"the weight of {layer} is computed from other tensors")
        for name, _ in module.named_parameters(recurse=False):
            if f"{layer}.{name}" in self._tied:
                raise _RefusedError(f"{layer}.{name} is tied to another layer")
        return module


class _Walk:
    """Walk from one reader backwards to the layers that compute its channels."""

    def __init__(self, groups: ChannelGroups, block: str, reader: fx.Node) -> None:
        self._groups, self._block, self._reader = groups, block, reader
        self._region: set[fx.Node] = set()
        self._slices: dict[str, Slice] = {}
        self._parts: dict[fx.Node, set[int]] = {}
        self._layers: set[str] = set()

    def group(self) -> ChannelGroup:
        """Return the group that the reader reads.

        Raises:
            _NoGroupError, _RefusedError: there is none.
        """
        node, weight = self._reader, _weight(self._reader)
        path = _layer(node)
        if weight is None or weight[0] != f"{path}.weight" or _groups(node) != 1:
            raise _NoGroupError
        given = node.args[_PRODUCTS[packet_of(node)]]
        assert isinstance(given, fx.Node)
        convolution = packet_of(node) is _aten.convolution
        axis = 1 if convolution else len(given.meta["shape"]) - 1
        self._channels = given.meta["shape"][axis]
        self._follow(given, axis)
        self._require_unread()
        for layer in sorted({*self._layers, path}):
            self._groups.require_own(layer)
        own = self._slice(f"{path}.weight", 1 if weight[1] or convolution else 0)
        return ChannelGroup(
            reader=self._relative(path),
            channels=self._channels,
            slices=(*self._slices.values(), own),
            **self._behind(path),
        )

    def _relative(self, path: str) -> str:
        if not path.startswith(f"{self._block}."):
            raise _NoGroupError
        return path.removeprefix(f"{self._block}.")

    def _slice(self, tensor: str, dim: int, parts: int = 1) -> Slice:
        return Slice(tensor=self._relative(tensor), dim=dim, parts=parts)

    def _take(self, tensor: str, dim: int, parts: int = 1) -> None:
        new = self._slice(tensor, dim, parts)
        if self._slices.setdefault(tensor, new) != new:
            raise _RefusedError(f"{tensor} holds the channels in two ways")

    def _follow(self, start: fx.Node, axis: int) -> None:
        """Follow the channels on an axis of a node back to the layers that compute them."""
        waiting, axes = [(start, axis)], {start: axis}
        while waiting:
            node, axis = waiting.pop()
            self._region.add(node)
            for source, at in self._sources(node, axis):
                if axes.setdefault(source, at) != at:
                    raise _NoGroupError
                if source not in self._region:
                    waiting.append((source, at))
        if not self._slices:
            raise _NoGroupError
        for node, seen in self._parts.items():
            if len(seen) != len([user for user in node.users if user.users]):
                raise _RefusedError("a part of what a layer computes is read elsewhere")

    def _sources(self, node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
        """Yield the operands from which a node has its channels, with their axes."""
        packet = packet_of(node)
        if node.op == "placeholder":
            raise _NoGroupError
        if not node.all_input_nodes and str(node.target) not in self._groups.names:
            raise _RefusedError("its code has a number of its own for each channel")
        if node.op == "get_attr":
            self._take(str(node.target), axis)
        elif packet in _PRODUCTS:
            yield from self._product(node, axis)
        elif node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            if packet_of(source) in _NORMS and index == 0:
                yield from self._norm(source, axis)
            elif packet_of(source) in _SPLITS:
                yield from self._part(source, int(index), axis)  # type: ignore[arg-type]
            else:
                raise _NoGroupError
        elif packet in SIZED:
            yield self._view(node, axis)
        elif packet in PERMUTATIONS:
            yield node.args[0], permuted(node)[axis]  # type: ignore[misc]
        elif packet in _PASSED or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            yield from self._pointwise(node, axis)
        else:
            raise _NoGroupError

    def _pointwise(self, node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
        ndim = len(node.meta["shape"])
        for operand in node.all_input_nodes:
            shape = operand.meta["shape"]
            at = axis - ndim + len(shape)
            if at >= 0 and shape[at] == self._channels:
                yield operand, at
            elif at >= 0 and shape[at] != 1:
                raise _NoGroupError

    def _view(self, node: fx.Node, axis: int) -> tuple[fx.Node, int]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = source.meta["shape"], node.meta["shape"]
        behind = math.prod(after[axis + 1 :])
        for d, size in enumerate(before):
            if size == after[axis] and math.prod(before[d + 1 :]) == behind:
                return source, d
        raise _NoGroupError

    def _part(self, split: fx.Node, index: int, axis: int) -> Iterator[tuple[fx.Node, int]]:
        """Yield the layer whose output is split into equal parts, of which one holds the channels."""
        source = split.args[0]
        assert isinstance(source, fx.Node)
        ndim = len(source.meta["shape"])
        dim = int(argument(split, 2, "dim", 0)) % ndim
        parts = source.meta["shape"][dim] // self._channels
        if dim != axis:
            yield source, axis
            return
        if parts * self._channels != source.meta["shape"][dim] or len(split.users) != parts:
            raise _NoGroupError
        self._parts.setdefault(split, set()).add(index)
        self._region.add(split)
        node = source
        while packet_of(node) in SIZED and node.meta["shape"][-1] == source.meta["shape"][-1]:
            self._region.add(node)
            node = node.args[0]  # type: ignore[assignment]
        if packet_of(node) not in _PRODUCTS or _groups(node) != 1:
            raise _NoGroupError
        self._region.add(node)
        list(self._product(node, 1 if packet_of(node) is _aten.convolution else -1, parts))

    def _norm(self, node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
        if axis != 1:
            raise _NoGroupError
        self._region.add(node)
        source, *tensors = node.args[:5]
        for tensor in tensors:
            if isinstance(tensor, fx.Node):
                self._attribute(tensor, 0)
        yield source, axis  # type: ignore[misc]

    def _attribute(self, node: fx.Node, dim: int, parts: int = 1) -> None:
        if node.op != "get_attr":
            raise _NoGroupError
        self._take(str(node.target), dim, parts)

    def _product(self, node: fx.Node, axis: int, parts: int = 1) -> Iterator[tuple[fx.Node, int]]:
        """Take the channels that a layer computes; yield its input where the layer is depthwise."""
        layer, weight = _layer(node), _weight(node)
        if weight is None or weight[0] != f"{layer}.weight":
            raise _RefusedError(f"the weight of {layer} is computed from other tensors")
        convolution = packet_of(node) is _aten.convolution
        last = axis in (-1, len(node.meta["shape"]) - 1)
        if (axis != 1 if convolution else not last) or (convolution and node.args[6]):
            raise _NoGroupError
        self._layers.add(layer)
        self._take(weight[0], 0 if weight[1] or convolution else 1, parts)
        bias = node.args[2] if convolution else argument(node, 2, "bias")
        if packet_of(node) is _aten.addmm:
            bias = node.args[0]
        if isinstance(bias, fx.Node):
            self._attribute(bias, 0, parts)
        if convolution and _groups(node) != 1:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if _groups(node) != self._channels or source.meta["shape"][1] != self._channels:
                raise _NoGroupError
            yield source, 1

    def _require_unread(self) -> None:
        """Require that nothing but the reader reads the channels.

        Raises:
            _RefusedError: something else does.
        """
        for node in self._region:
            if node.op == "get_attr":
                continue
            for user in node.users:
                if user not in self._region and user is not self._reader and _counts(user):
                    where = user.meta["calls"][-1].path if user.meta.get("calls") else "the output"
                    raise _RefusedError(f"its input is read elsewhere ({where})")

    def _behind(self, path: str) -> dict[str, Any]:
        """Return the fields of a group that say what stands behind its reader."""
        found: dict[str, Any] = {}
        users = [user for user in self._reader.users if _counts(user)]
        if len(users) == 1 and packet_of(users[0]) in _NORMS:
            mean = users[0].args[3]
            if isinstance(mean, fx.Node) and mean.op == "get_attr":
                shift = self._relative(str(mean.target))
                norm, skip = shift.rpartition(".")[0], self._skip(users[0])
                found = {"shift": shift, "norm": norm, "skip": skip}
        if isinstance(getattr(self._groups.require_own(path), "bias", None), nn.Parameter):
            found["shift"] = self._relative(f"{path}.bias")
        return found

    def _skip(self, norm: fx.Node) -> str | None:
        """Return the path of the module to whose output a BatchNorm's is added, from the block; empty
        for the block's input, None where there is no such sum.
        """
        outputs = [user for user in norm.users if _counts(user)]
        sums = [user for each in outputs for user in each.users]
        if len(sums) != 1 or packet_of(sums[0]) not in (_aten.add, _aten.add_):
            return None
        others = [n for n in sums[0].all_input_nodes if n not in outputs]
        if len(others) != 1:
            return None
        for call in self._groups.calls:
            if call.path == self._block and others[0] in call.inputs.values():
                return ""
            if call.path.startswith(f"{self._block}.") and others[0] in call.outputs.values():
                return self._relative(call.path)
        return None


def _inside(node: fx.Node, path: str) -> bool:
    return any(call.path == path for call in node.meta.get("calls", ()))


def _outputs(layer: nn.Module) -> int:
    """Return the number of outputs of a linear layer."""
    weight: Any = layer.weight
    return int(weight.shape[_outputs_first(layer)])


def _outputs_first(layer: nn.Module) -> int:
    """Return the dimension of a weight that counts outputs: 1 for Conv1D of transformers."""
    return 0 if isinstance(layer, nn.Linear) else 1


def _counts(node: fx.Node) -> bool:
    """Return whether a node is more than an unused result of an operation with several."""
    return bool(node.users) or node.target is not operator.getitem


def _layer(node: fx.Node) -> str:
    """Return the path of the module in which a node runs."""
    calls = node.meta.get("calls")
    return calls[-1].path if calls else ""


def _groups(node: fx.Node) -> int:
    return int(node.args[8]) if packet_of(node) is _aten.convolution else 1  # type: ignore[arg-type]


def _weight(node: fx.Node) -> tuple[str, bool] | None:
    """Return the name of a product's weight, and True where its first dimension counts outputs."""
    found: Any = node.args[_PRODUCTS[packet_of(node)] + 1]
    turned = packet_of(node) is _aten.linear
    if isinstance(found, fx.Node) and packet_of(found) in PERMUTATIONS:
        found, turned = found.args[0], not turned
    if not isinstance(found, fx.Node) or found.op != "get_attr":
        return None
    return str(found.target), turned
