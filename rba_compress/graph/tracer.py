"""Recording of one real forward pass as an fx graph of aten operations with module stacks.

Symbolic tracing fails on a third of real networks; a real pass fails on none. Every module call is
seen by hooks and every operation by a `TorchDispatchMode`; each operation becomes one fx node with

    meta["calls"]   the module calls it ran in, outermost first
    meta["shape"], meta["dtype"]   of its result (None where that is not a tensor)
    meta["macs"]    multiply-accumulates for the whole batch

A value is a tensor *at a time*: an operation that writes into a tensor becomes the new producer of
every known tensor on that storage, so in-place residuals and views keep their data flow. A GraphModule
(or the module of an exported program) is run by an `fx.Interpreter` under the same mode: its module
calls are the `nn_module_stack` of its nodes. Both give one `Recording` that one pass analyses.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rba_compress.core.batch import Batch
from rba_compress.core.errors import ModelError
from rba_compress.core.inference import evaluating, running
from rba_compress.core.outputs import with_paths
from rba_compress.core.schema import Path

_aten = torch.ops.aten


@dataclass(eq=False)
class Call:
    """Call of a module during the recorded pass."""

    path: str
    type: str
    start: int
    """Index of the first node that could belong to the call."""
    end: int = -1
    inputs: dict[Path, fx.Node] = field(default_factory=dict)
    """Tensor leaves of (args, kwargs); empty in a GraphModule, whose calls have no arguments."""
    given: Any = None
    """The structure of {"args": args, "kwargs": kwargs}, tensors replaced by their nodes."""
    constants: dict[Path, Any] = field(default_factory=dict)
    """Leaves of (args, kwargs) that are numbers or strings."""
    outputs: dict[Path, fx.Node] = field(default_factory=dict)
    result: Any = None
    """The output's structure, tensors replaced by their nodes."""


@dataclass(eq=False)
class Recording:
    """The graph of one forward pass of `model`."""

    graph: fx.Graph
    calls: list[Call]
    outputs: dict[Path, fx.Node]
    """Tensor leaves of the model's output."""
    values: dict[str, fx.Node]
    """Recorded node of the tensor of each node of a GraphModule, by name; empty for a plain module."""
    samples: int
    constants: dict[str, Any] = field(default_factory=dict)
    """Inputs of a GraphModule that are not tensors, by name."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        total: int = sum(n.meta.get("macs", 0) for n in self.graph.nodes)
        return round(total / self.samples)

    def macs_of(self, path: str) -> int:
        """Return the multiply-accumulates of one sample inside the calls of the module at `path`."""
        inside: Iterator[int] = (
            n.meta["macs"]
            for n in self.graph.nodes
            if any(call.path == path for call in n.meta.get("calls", ()))
        )
        return round(sum(inside) / self.samples)


def op_macs(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the multiply-accumulates of one aten operation, by torch's own formulas.

    The formulas count two FLOPs for each multiply-accumulate, and lack attention on the CPU.
    """
    packet = func._overloadpacket
    if packet in _CPU_ATTENTION:
        queries, keys, values = (t.shape for t in args[:3])
        return int(math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1]))
    from torch.utils.flop_counter import flop_registry  # loads triton

    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) // 2 if formula else 0


_CPU_ATTENTION = {
    getattr(_aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(_aten, name)
}


def type_name(module: object) -> str:
    return module if isinstance(module, str) else getattr(module, "__name__", str(module))


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.calls: list[Call] = []
        self.stack: list[Call] = []
        self.count = 0
        self._node: dict[int, fx.Node] = {}  # id of a live tensor -> the node that produced its value
        self._kept: dict[int, Tensor] = {}  # keeps every tensor alive, so that no id is used twice
        self._on_storage: dict[int, list[int]] = {}
        named = (*model.named_parameters(), *model.named_buffers())
        self._names = {id(tensor): name for name, tensor in named}
        self._owned = {
            _storage(t): (n, t)
            for n, t in model.state_dict(keep_vars=True).items()
            if isinstance(t, Tensor)
        }
        self.written: dict[str, tuple[Tensor, Tensor]] = {}
        """Tensors of the state dict that the pass writes into, and copies of their former values."""

    def place(self, tensor: Tensor, node: fx.Node) -> None:
        """Record that `node` now produces the value of `tensor`."""
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor
            self._on_storage.setdefault(_storage(tensor), []).append(id(tensor))
        self._node[id(tensor)] = node

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the producer of a tensor's current value; an unseen tensor is a weight or constant."""
        node = self._node.get(id(tensor))
        if node is None:
            name = self._names.get(id(tensor), f"constant_{len(self._kept)}")
            node = self._add(self.graph.create_node("get_attr", name), tensor)
            node.meta["calls"] = ()  # reading a weight belongs to no call
            self.place(tensor, node)
        return node

    def placeholder(self, name: str, tensor: Tensor) -> None:
        self.place(tensor, self._add(self.graph.placeholder(name), tensor))

    def _add(self, node: fx.Node, result: Any) -> fx.Node:
        is_tensor = isinstance(result, Tensor)
        node.meta |= {
            "calls": tuple(self.stack),
            "shape": tuple(result.shape) if is_tensor else None,
            "dtype": result.dtype if is_tensor else None,
            "macs": 0,
            "index": self.count,
        }
        self.count += 1
        return node

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._can_decompose():
            # In inference mode, composite operations arrive here before torch has decomposed them.
            with self:
                return func.decompose(*args, **kwargs)
        node_args, node_kwargs = self._as_fx(args), self._as_fx(kwargs)
        for written in _written(func, args, kwargs):
            name, own = self._owned.get(_storage(written), ("", written))
            if name and name not in self.written:
                self.written[name] = own, own.detach().clone()
        out = func(*args, **kwargs)
        node = self._add(self.graph.call_function(func, node_args, node_kwargs), out)
        node.meta["macs"] = op_macs(func, args, kwargs, out)
        for written in _written(func, args, kwargs):
            self.node_of(written)
            for alias in self._on_storage[_storage(written)]:
                self._node[alias] = node
        if isinstance(out, Tensor):
            self.place(out, node)
        elif isinstance(out, (tuple, list)):
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    getitem = self.graph.call_function(operator.getitem, (node, index))
                    self.place(item, self._add(getitem, item))
        return out

    def _as_fx(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._as_fx(item) for item in value)
        if isinstance(value, dict):
            return {key: self._as_fx(item) for key, item in value.items()}
        known = (str, int, float, bool, complex, torch.dtype, torch.device, torch.layout)
        if value is None or isinstance(value, (*known, torch.memory_format)):
            return value
        return str(value)

    def leaves(self, tree: Any) -> dict[Path, fx.Node]:
        return {path: self.node_of(t) for path, t in with_paths(tree) if isinstance(t, Tensor)}

    def structure(self, tree: Any) -> Any:
        return pytree.tree_map(lambda t: self.node_of(t) if isinstance(t, Tensor) else t, tree)

    def open(self, path: str, type_: str) -> Call:
        call = Call(path, type_, start=self.count)
        self.calls.append(call)
        self.stack.append(call)
        return call

    def close(self) -> Call:
        call = self.stack.pop()
        call.end = self.count
        return call


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have no storage
        return -id(tensor)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


def record(model: nn.Module, batch: Batch) -> Recording:
    """Record one forward pass of `model` (any mode; it runs in eval mode) on a batch on its device.

    Raises:
        ModelError: the forward pass fails, or writes into the state dict, whose values are restored.
    """
    recorder = _Recorder(model)
    for name, tensor in batch.tensors.items():
        recorder.placeholder(name.replace(" ", "_"), tensor)
    values: dict[str, fx.Node] = {}
    constants: dict[str, Any] = {}
    with evaluating(model):
        try:
            with running(model, batch):
                if isinstance(model, fx.GraphModule):
                    output = _run_graph(recorder, model, batch, values, constants)
                else:
                    output = _run_module(recorder, model, batch)
        finally:
            for own, before in recorder.written.values():
                own.copy_(before)
    if recorder.written:
        names = ", ".join(map(repr, list(recorder.written)[:3]))
        raise ModelError(
            f"the forward pass of {type(model).__name__} writes into its state dict in eval mode "
            f"({names}): it would not be left as it is. Let it write in training alone, or register "
            "the buffer with persistent=False"
        )
    outputs = recorder.leaves(output)
    node = recorder.graph.output(tuple(outputs.values()))
    node.meta |= {"calls": (), "macs": 0, "index": recorder.count}
    return Recording(recorder.graph, recorder.calls, outputs, values, len(batch), constants)


def _run_module(recorder: _Recorder, model: nn.Module, batch: Batch) -> Any:
    handles = []

    def hooks(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = recorder.open(path, type(module).__name__)
            given = {"args": args, "kwargs": kwargs}
            call.inputs = recorder.leaves(given)
            call.given = recorder.structure(given)
            simple = (bool, int, float, str)
            call.constants = {p: leaf for p, leaf in with_paths(given) if isinstance(leaf, simple)}

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = recorder.close()
            call.outputs = recorder.leaves(output)
            call.result = recorder.structure(output)

        return before, after

    for path, module in model.named_modules():
        if path:
            before, after = hooks(path)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with recorder:
            return batch.run(model)
    finally:
        for handle in handles:
            handle.remove()


def module_stack(node: fx.Node) -> list[tuple[str, str, str]]:
    """Return (call key, path, type name) of the modules of a GraphModule's node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(str(key), path, type_name(kind)) for key, (path, kind) in stack.items() if path]


def _run_graph(
    recorder: _Recorder,
    model: fx.GraphModule,
    batch: Batch,
    values: dict[str, fx.Node],
    constants: dict[str, Any],
) -> Any:
    known: dict[str, Call] = {}

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            stack = []
            for key, path, kind in module_stack(n):
                if key not in known:  # a call's nodes need not be contiguous after a graph pass
                    known[key] = Call(path, kind.rsplit(".", 1)[-1], start=recorder.count)
                    recorder.calls.append(known[key])
                stack.append(known[key])
            recorder.stack = stack
            result = super().run_node(n)
            for call in stack:
                call.end = recorder.count
            if isinstance(result, Tensor):
                values[n.name] = recorder.node_of(result)
            elif n.op == "placeholder":
                constants[n.name] = result
            return result

    with recorder:
        return Runner(model).run(*graph_arguments(model, batch))


def graph_arguments(model: fx.GraphModule, batch: Batch) -> tuple[Any, ...]:
    """Return a batch as positional arguments for an `fx.Interpreter`, keywords by placeholder name."""
    given = list(batch.args)
    arguments: list[Any] = []
    for node in model.graph.nodes:
        if node.op != "placeholder":
            continue
        if given:
            arguments.append(given.pop(0))
        elif node.target in batch.kwargs:
            arguments.append(batch.kwargs[node.target])
        elif node.args:
            arguments.append(node.args[0])
        else:
            raise TypeError(f"the graph's input {node.target!r} is not in the batch")
    return tuple(arguments)
