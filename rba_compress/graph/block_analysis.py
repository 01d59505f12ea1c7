"""Pass over a recorded graph that finds chains of replaceable blocks.

A *block* is a module that is called once and maps a tensor, the stream, to one of the same shape with
a residual addition inside. A *chain* is blocks of one class in sequence, where each one's stream is
read by the next one alone. Any other value of a block that is read outside of it (a tensor collected
for the output, for example) is a leak, and the block is refused: a replacement would not compute that
value. Refusals carry their reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import JsonValue
from torch import fx, nn

from rba_compress.core.call_signature import Input, Signature
from rba_compress.core.plan import Block, Branch, Chain, Refusal
from rba_compress.core.schema import Path, nested
from rba_compress.core.weight_types import of_peft
from rba_compress.graph.liveness import ALL, liveness, packet_of
from rba_compress.graph.tracer import Call, Recording, module_stack

_aten = torch.ops.aten
_ADDITIONS = {_aten.add, _aten.add_, _aten.addcmul, _aten.addcmul_}
_CONVOLUTIONS = {_aten.convolution, _aten.mkldnn_convolution, _aten.cudnn_convolution}
_CHANNELS_SECOND = _CONVOLUTIONS | {
    _aten.native_batch_norm,
    _aten._native_batch_norm_legit_no_training,
    _aten.cudnn_batch_norm,
    _aten.native_group_norm,
}
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.linear: 0, _aten.mkldnn_rnn_layer: 0}
_SPLITS = {_aten.split, _aten.split_with_sizes}
_RESHAPES = {_aten.view, _aten._unsafe_view, _aten.reshape, _aten.clone, _aten._to_copy}
_PASSED = _RESHAPES | {_aten.mul}
_SIMPLE = (bool, int, float, str)


@dataclass(eq=False)
class _Candidate:
    call: Call
    leaks: dict[fx.Node, list[fx.Node]]  # values read outside of it, and their outside readers
    reads: dict[fx.Node, None]  # values from outside that it reads, in order
    keeps_shape: bool  # some output has the shape of an input
    stream: fx.Node | None = None  # the one value that leaves it
    entry: fx.Node | None = None  # the stream that it reads
    reason: str = ""
    next: _Candidate | None = None
    previous: _Candidate | None = None


@dataclass
class _Flow:
    """Values that enter and leave every call."""

    leaks: dict[Call, dict[fx.Node, list[fx.Node]]] = field(default_factory=dict)
    reads: dict[Call, dict[fx.Node, None]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.Graph) -> _Flow:
        flow = cls()
        for node in graph.nodes:
            inside = node.meta["calls"]
            for reader in node.users:
                readers = reader.meta["calls"]
                for call in inside:
                    if call not in readers:
                        flow.leaks.setdefault(call, {}).setdefault(node, []).append(reader)
                for call in readers:
                    if call not in inside:
                        flow.reads.setdefault(call, {})[node] = None
        return flow


@dataclass(frozen=True)
class Analysis:
    """Result of the pass: chains that may overlap, in order of preference, and all candidates."""

    chains: tuple[Chain, ...]
    candidates: tuple[_Candidate, ...]

    def refusals(self, taken: Iterable[str]) -> list[Refusal]:
        """Return the candidates neither in `taken` nor above or below it, by class and reason."""
        paths = tuple(taken)
        groups: dict[tuple[str, str], list[str]] = {}
        for c in self.candidates:
            if not c.keeps_shape or any(nested(c.call.path, path) for path in paths):
                continue
            reason = c.reason or "no other module of its class precedes or follows it"
            groups.setdefault((c.call.type, reason), []).append(c.call.path)
        return [
            Refusal(paths=tuple(paths), type=kind, reason=reason)
            for (kind, reason), paths in groups.items()
        ]


def analyse(model: nn.Module, recording: Recording) -> Analysis:
    """Find the chains of a recorded forward pass of `model`, and every candidate with its reason."""
    flow = _Flow.of(recording.graph)
    candidates = _candidates(model, recording, flow)
    _link(candidates)
    runs = [run for run in _runs(candidates) if run]
    # Shallower chains first, and chains of containers last: the blocks inside are the finer choice.
    runs.sort(key=lambda run: (run[0].call.type == "Sequential", run[0].call.path.count(".")))
    chains: list[Chain] = []
    for run in runs:
        chain = _chain(model, recording, run)
        if isinstance(chain, Chain):
            chains.append(chain)
            continue
        for candidate in run:
            candidate.reason = chain
    return Analysis(_named(chains), tuple(candidates))


def residuals_outside(recording: Recording, known: Iterable[str]) -> list[Refusal]:
    """Return the modules whose output is added to their own input outside of them, by class.

    Args:
        known: paths of blocks and refusals; modules in or around them are left out.
    """
    taken = tuple(known)
    made = {node: call for call in recording.calls for node in call.outputs.values()}
    found: dict[str, list[str]] = {}
    for node in recording.graph.nodes:
        parts = [part for part in node.args if isinstance(part, fx.Node)]
        if node.target is not torch.ops.aten.add.Tensor or len(parts) != 2:
            continue
        for stream, last in (parts, parts[::-1]):
            branch: fx.Node | None = last
            while branch is not None and not _adds_to(made.get(branch), stream):
                inputs = branch.all_input_nodes
                branch = inputs[0] if len(inputs) == 1 else None
            if branch is not None and not any(nested(made[branch].path, path) for path in taken):
                call = made[branch]
                found.setdefault(call.type, []).append(call.path)
    reason = (
        "its output is added to its own input outside of it: put the sum into the forward of a module, "
        "as x + branch(x), and that module is a block"
    )
    return [
        Refusal(paths=tuple(dict.fromkeys(paths)), type=kind, reason=reason)
        for kind, paths in found.items()
        if len(paths) > 1
    ]


def _adds_to(call: Call | None, stream: fx.Node) -> bool:
    return call is not None and stream in call.inputs.values()


def _candidates(model: nn.Module, recording: Recording, flow: _Flow) -> list[_Candidate]:
    """Return every module with parameters and children; one that changes the shape may head a chain."""
    times = Counter(call.path for call in recording.calls)
    sharing = _shared_weights(model)
    modules = dict(model.named_modules())
    found: dict[str, _Candidate] = {}
    for call in recording.calls:
        module = modules.get(call.path)
        if module is None or call.path in found or not any(True for _ in module.children()):
            continue
        quantized = any("quantized" in type(m).__module__ for m in module.modules())
        if not quantized and not any(True for _ in module.parameters()):
            continue
        leaks, reads = flow.leaks.get(call, {}), flow.reads.get(call, {})
        outputs = leaks if isinstance(model, fx.GraphModule) else call.outputs.values()
        inputs = {n.meta["shape"] for n in reads if n.op != "get_attr"}
        alike = [n for n in outputs if n.meta["shape"] is not None and n.meta["shape"] in inputs]
        candidate = found[call.path] = _Candidate(call, leaks, reads, bool(alike))
        repeated = [p for p in _ancestors(call.path) if times[p] > 1]
        if alike and not any(map(_is_float, alike)):
            dtype = str(alike[0].meta["dtype"]).removeprefix("torch.")
            candidate.reason = f"its stream is of {dtype}, and maps are of floating-point numbers"
        elif repeated:
            outer = "" if repeated[-1] == call.path else f"it is inside {repeated[-1]}, which "
            candidate.reason = f"{outer or 'it '}is called {times[repeated[-1]]} times"
        elif quantized:
            candidate.reason = "its weights are quantised: compress the network before it is quantised"
        elif any(map(of_peft, module.modules())):
            candidate.reason = (
                "it holds adapters of PEFT, which a replaced block could not merge or disable: call "
                "merge_and_unload() before, or leave the block as it is"
            )
        elif call.path in sharing:
            candidate.reason = "it shares {} with {}".format(*sharing[call.path])
        elif len(candidate.leaks) != 1:
            candidate.reason = _leak_reason(candidate)
        else:
            (candidate.stream,) = candidate.leaks
    return list(found.values())


def _leak_reason(candidate: _Candidate) -> str:
    if not candidate.leaks:
        return "nothing reads its output"
    readers = sorted({_place(r) for readers in candidate.leaks.values() for r in readers})
    return f"{len(candidate.leaks)} of its values are read outside of it, by {', '.join(readers[:3])}"


def _place(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    calls = node.meta["calls"]
    return calls[-1].path if calls else "the model itself"


def _is_float(node: fx.Node) -> bool:
    dtype = node.meta["dtype"]
    return dtype is not None and dtype.is_floating_point


def _ancestors(path: str) -> list[str]:
    """Return the path and the paths of all modules above it, the innermost first."""
    parts = path.split(".")
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _shared_weights(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Return the modules that share a parameter with a module outside of them: path -> (the weight, the
    other)."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared: dict[str, tuple[str, str]] = {}
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            for path in _ancestors(name)[1:]:
                other = next((n for n in names if not n.startswith(f"{path}.")), None)
                if other is not None:
                    shared.setdefault(path, (name.removeprefix(f"{path}."), other))
    return shared


def _link(candidates: list[_Candidate]) -> None:
    by_path = {c.call.path: c for c in candidates}
    for a in candidates:
        if a.stream is None or a.reason:
            continue
        readers = a.leaks[a.stream]
        successor = _common_reader(a, readers, by_path)
        if successor is None:
            a.reason = "its output is not read by one next module of its class alone"
        elif successor.previous is not None or successor.reason:
            a.reason = f"what follows it, {successor.call.path}, cannot take its place in a chain"
        else:
            a.next, successor.previous = successor, a
            successor.entry = a.stream


def _common_reader(
    a: _Candidate, readers: list[fx.Node], by_path: dict[str, _Candidate]
) -> _Candidate | None:
    """Return the candidate of the class of `a` that holds every reader of its stream, or None."""
    for call in readers[0].meta["calls"]:
        b = by_path.get(call.path)
        if (
            b is not None
            and not nested(call.path, a.call.path)
            and call.type == a.call.type
            and b.stream is not None
            and b.stream.meta["shape"] == (a.stream.meta["shape"] if a.stream else None)
            and all(call in reader.meta["calls"] for reader in readers)
            and _output_path(a) == _output_path(b)
        ):
            return b
    return None


def _output_path(candidate: _Candidate) -> Path | None:
    places = candidate.call.outputs
    return next((path for path, node in places.items() if node is candidate.stream), None)


def _runs(candidates: list[_Candidate]) -> Iterator[list[_Candidate]]:
    """Yield linked candidates in sequence, cut where one has no residual addition."""
    for head in candidates:
        if head.previous is not None or head.next is None:
            continue
        member: _Candidate | None = head
        run: list[_Candidate] = []
        while member is not None:
            if member.entry is None:
                member.entry = _entry(member)
            if member.entry is None:
                member.reason = "its input has another shape than its output"
            elif not _has_residual(member):
                member.reason = "no addition inside it has two operands that come from the stream"
                member.entry = None
            if member.entry is not None:
                run.append(member)
            elif run:
                yield run
                run = []
            member = member.next
        yield run


def _entry(candidate: _Candidate) -> fx.Node | None:
    """Return the stream that a chain's first block reads: the one input of its shape, or None."""
    assert candidate.stream is not None
    shape = candidate.stream.meta["shape"]
    follower = candidate.next
    if candidate.call.inputs and follower is not None:
        # The block takes the stream at the same place as the next block.
        places = follower.call.inputs
        path = next((p for p, node in places.items() if node is candidate.stream), None)
        node = candidate.call.inputs.get(path) if path else None
        return node if node is not None and node.meta["shape"] == shape else None
    same = [n for n in candidate.reads if n.op != "get_attr" and n.meta["shape"] == shape]
    return same[0] if len(same) == 1 else None


def _inside(call: Call, graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if call in node.meta["calls"])


def _has_residual(candidate: _Candidate) -> bool:
    assert candidate.entry is not None
    derived = _derived(candidate)
    return any(
        packet_of(node) in _ADDITIONS
        and sum(operand in derived for operand in node.all_input_nodes) > 1
        for node in _inside(candidate.call, candidate.entry.graph)
    )


def _branches(model: nn.Module, member: _Candidate) -> tuple[Branch, ...]:
    """Return the branches of a block that is its stream plus linear layers' outputs; else nothing.

    Where a LayerNorm stands behind each sum (BERT), the stream of the next sum is the norm's output.
    """
    assert member.entry is not None
    assert member.stream is not None
    modules = dict(model.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    tensors = {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}
    derived, stream = _derived(member), member.stream
    found: list[tuple[int, Branch]] = []
    while stream is not member.entry:
        norm = _norm(stream, modules)
        summed = stream.args[0].args[0] if norm else stream  # type: ignore[union-attr]
        passed = []
        for term in _terms(summed, derived):  # type: ignore[arg-type]
            branch = None if term is member.entry else _branch(term, linears, tensors)
            if branch is None:
                passed.append(term)
            else:
                found.append((term.meta["index"], branch.model_copy(update={"norm": norm})))
        if len(passed) != 1 or passed[0] is stream:
            return ()
        (stream,) = passed
        if stream is not member.entry and (norm is None or _norm(stream, modules) is None):
            return ()
    return tuple(branch for _, branch in sorted(found, key=lambda pair: pair[0]))


def _terms(summed: fx.Node, derived: set[fx.Node]) -> list[fx.Node]:
    """Return the operands of a sum, with additions of values that come from the stream expanded."""
    terms, wanted = [], [summed]
    while wanted:
        node = wanted.pop()
        if packet_of(node) in (_aten.add, _aten.add_) and all(n in derived for n in node.args[:2]):
            wanted += node.args[:2]  # type: ignore[arg-type]
        else:
            terms.append(node)
    return terms


def _norm(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the path of the LayerNorm over the last axis, with a weight, whose output a node is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or packet_of(source) is not _aten.native_layer_norm:
        return None
    path = source.meta["calls"][-1].path if source.meta["calls"] else ""
    module = modules.get(path)
    plain = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    return path if plain and module.weight is not None else None  # type: ignore[union-attr]


def _branch(term: fx.Node, linears: set[str], tensors: set[str]) -> Branch | None:
    """Return the linear layer whose output a term is, times a layer scale (one of `tensors`) or not."""
    scale = None
    node: Any = term
    while packet_of(node) in _PASSED:
        if packet_of(node) is _aten.mul:
            weights = [n for n in node.all_input_nodes if n.op == "get_attr"]
            if scale is not None or len(weights) != 1 or str(weights[0].target) not in tensors:
                return None
            scale = str(weights[0].target)
            node = next(n for n in node.all_input_nodes if n is not weights[0])
        else:
            node = node.args[0]
    if packet_of(node) not in _PRODUCTS:
        return None
    weights = [n.args[0] if "aten.t." in str(n.target) else n for n in node.all_input_nodes]
    paths = {str(n.target).removesuffix(".weight") for n in weights if n.op == "get_attr"} & linears
    return Branch(path=paths.pop(), scale=scale) if len(paths) == 1 else None


def _derived(member: _Candidate) -> set[fx.Node]:
    """Return the nodes of the block that come from its stream, and the stream."""
    assert member.entry is not None
    derived = {member.entry}
    for node in _inside(member.call, member.entry.graph):
        if any(n in derived for n in node.all_input_nodes):
            derived.add(node)
    return derived


def _chain(model: nn.Module, recording: Recording, run: list[_Candidate]) -> Chain | str:
    """Return the chain of a run, or the reason why there is none."""
    head, tail = run[0], run[-1]
    assert head.entry is not None
    assert tail.stream is not None
    axis = next((a for a in map(_channel_axis, run) if a is not None), None)
    if axis is None:
        return "no convolution, norm or product in it tells the channels of its stream"
    blocks = []
    for member in run:
        block = _block(model, recording, member)
        if isinstance(block, str):
            return block
        blocks.append(block)
    shape = head.entry.meta["shape"]
    width = shape[axis]
    reads, unread = _read_positions(recording, tail.stream, axis)
    return Chain(
        name=head.call.path.rpartition(".")[0] or head.call.path,
        blocks=tuple(blocks),
        width=width,
        ndim=len(shape),
        axis=axis,
        positions=int(torch.Size(shape).numel()) // width // recording.samples,
        rows=0 if shape[0] % recording.samples else shape[0] // recording.samples,
        class_tokens=_class_tokens(tail.stream),
        reads=reads,
        unread=unread,
        macs=tuple(recording.macs_of(b.path) for b in blocks),
        params=tuple(sum(p.numel() for p in model.get_submodule(b.path).parameters()) for b in blocks),
    )


def fixed_chains(
    model: nn.Module, recording: Recording, analysis: Analysis, chains: Sequence[Chain]
) -> list[Chain]:
    """Return the blocks of the classes of chains' blocks that change the shape of the stream, each as a
    chain for itself.
    """
    kinds = {block.type for chain in chains for block in chain.blocks}
    starts = [chain.blocks[0].path for chain in chains]
    order = [call.path for call in recording.calls]
    found = []
    for member in analysis.candidates:
        path, inputs = member.call.path, [n for n in member.reads if n.op != "get_attr"]
        taken = any(nested(path, block.path) for chain in chains for block in chain.blocks)
        if member.call.type not in kinds or taken or member.stream is None or len(inputs) != 1:
            continue
        member.entry = inputs[0]
        axis, block = _channel_axis(member), _block(model, recording, member)
        if axis is None or isinstance(block, str):
            continue
        shape = member.entry.meta["shape"]
        found.append(
            Chain(
                name=path,
                blocks=(block,),
                width=shape[axis],
                ndim=len(shape),
                axis=axis,
                positions=int(torch.Size(shape).numel()) // shape[axis] // recording.samples,
                macs=(recording.macs_of(path),),
                params=(sum(p.numel() for p in model.get_submodule(path).parameters()),),
                after=sum(order.index(start) < order.index(path) for start in starts),
            )
        )
    return found


def _named(chains: list[Chain]) -> tuple[Chain, ...]:
    """Name chains of one parent by their first block."""
    count = Counter(chain.name for chain in chains)
    return tuple(
        c if count[c.name] == 1 else c.model_copy(update={"name": c.blocks[0].path}) for c in chains
    )


def _block(model: nn.Module, recording: Recording, member: _Candidate) -> Block | str:
    call, entry, stream = member.call, member.entry, member.stream
    assert entry is not None
    assert stream is not None
    if isinstance(model, fx.GraphModule):
        before = [n for n, value in recording.values.items() if value is entry]
        after = [n for n, value in recording.values.items() if value is stream]
        group = {n for n in model.graph.nodes if any(p == call.path for _, p, _ in module_stack(n))}
        named = {n.name: n for n in model.graph.nodes}
        outside = [n for n in before if named[n] not in group]
        before = [n for n in outside if any(user in group for user in named[n].users)]
        after = [
            n for n in after if named[n] in group and any(user not in group for user in named[n].users)
        ]
        if len(before) != 1 or len(after) != 1:
            return "its stream has several names in the graph"
        sides = [n.name for n in _outer(model.graph, group, recording) if n.name != before[0]]
        return Block(
            path=call.path,
            type=call.type,
            signature=_graph_signature(recording, [before[0], *sides]),
            nodes=(before[0], after[0]),
            sides=tuple(sides),
            branches=_branches(model, member),
        )
    place = next((p for p, node in call.inputs.items() if node is entry), None)
    if place is None:
        return "its stream is not among its arguments"
    try:
        template = output_template(call, stream)
    except TypeError as error:
        return str(error)
    return Block(
        path=call.path,
        type=call.type,
        signature=Signature(stream=place, output=template, **_arguments(call)),
        branches=_branches(model, member),
    )


def _outer(graph: fx.Graph, group: set[fx.Node], recording: Recording) -> list[fx.Node]:
    """Return the tensors outside of a group of nodes that the group reads, without weights; for a size,
    the tensor that has it."""
    found: dict[fx.Node, None] = {}
    wanted = [n for node in graph.nodes if node in group for n in node.all_input_nodes]
    while wanted:
        node = wanted.pop(0)
        if node in group or node in found or node.op == "get_attr":
            continue
        if node.name in recording.values or not node.all_input_nodes:
            found[node] = None
        else:
            wanted += node.all_input_nodes
    return list(found)


def _encoded(value: Any, leaf: Callable[[Any, Any], JsonValue], key: Any = None) -> JsonValue:
    """Return a template for a `Signature`: containers as they are, leaves by `leaf(value, key)`.

    Raises:
        TypeError: a leaf is neither a tensor's node nor a simple value.
    """
    if type(value) in (tuple, list):
        return {type(value).__name__: [_encoded(item, leaf, i) for i, item in enumerate(value)]}
    if type(value) is dict:
        return {"dict": {key: _encoded(item, leaf, key) for key, item in value.items()}}
    if value is None:
        return None
    if isinstance(value, (fx.Node, *_SIMPLE)):
        return leaf(value, key)
    raise TypeError(type(value).__name__)


def output_template(call: Call, stream: fx.Node) -> JsonValue:
    """Return the output's template for a `Signature`: stream, inputs, constants, None elsewhere."""

    def leaf(value: Any, key: Any) -> Any:
        if value is stream:
            return "stream"
        if isinstance(value, fx.Node):
            return next((list(path) for path, node in call.inputs.items() if node is value), None)
        # Most likely a size that is passed on; of several equal ones, the one in the same place.
        same = [p for p, v in call.constants.items() if type(v) is type(value) and v == value]
        same.sort(key=lambda path: path[-1] != key)
        return list(same[0]) if same else {"value": value}

    try:
        return _encoded(call.result, leaf)
    except TypeError as error:
        raise TypeError(f"it returns a {error}, which cannot be rebuilt") from error


def _arguments(call: Call) -> dict[str, Any]:
    """Return a call's template and inputs for a `Signature`; empty where no template can express it."""
    places = {node: index for index, node in enumerate(call.inputs.values())}

    def leaf(value: Any, _: Any) -> JsonValue:
        return ["args", places[value]] if isinstance(value, fx.Node) else {"value": value}

    try:
        template = _encoded(call.given, leaf)
    except TypeError:
        return {}
    inputs = tuple(_input(path, node) for path, node in call.inputs.items())
    return {"arguments": template, "inputs": inputs}


def _input(path: Path, node: fx.Node) -> Input:
    dtype = str(node.meta["dtype"]).removeprefix("torch.")
    return Input(path=path, shape=node.meta["shape"], dtype=dtype)


def _graph_signature(recording: Recording, names: list[str]) -> Signature:
    """Return the signature of a call with the values of a GraphModule's nodes, the stream first."""
    places: list[JsonValue] = []
    inputs: list[Input] = []
    for i, name in enumerate(names):
        if name in recording.values:
            places.append(["args", len(inputs)])
            inputs.append(_input(("args", i), recording.values[name]))
        elif isinstance(recording.constants.get(name, ...), (*_SIMPLE, type(None))):
            value = recording.constants[name]
            places.append(None if value is None else {"value": value})
        else:
            return Signature()
    arguments: JsonValue = {"dict": {"args": {"tuple": places}, "kwargs": {"dict": {}}}}
    return Signature(arguments=arguments, inputs=tuple(inputs))


def _channel_axis(candidate: _Candidate) -> int | None:
    """Return the stream's channel axis, by the first operation in the block that determines it.

    Convolutions and batch norms have channels second, layer norms over one axis and matrix products
    last. `axes` follows the stream's axes through permutations; None marks an axis that is lost.
    """
    entry = candidate.entry
    assert entry is not None
    axes: dict[fx.Node, list[int | None]] = {entry: list(range(len(entry.meta["shape"])))}
    for node in _inside(candidate.call, entry.graph):
        source = next((n for n in node.all_input_nodes if n in axes), None)
        if source is None or node.op != "call_function":
            continue
        packet, order = packet_of(node), axes[source]
        channels_second = packet in _CHANNELS_SECOND and node.args[0] is source
        channels_last = (
            (packet in _PRODUCTS and node.args[_PRODUCTS[packet]] is source)
            or (packet is _aten.native_layer_norm and len(node.args[1]) == 1)  # type: ignore[arg-type]
            or "rms_norm" in str(packet)
        )
        if channels_second or channels_last:
            return order[1] if channels_second else order[-1]
        moved = _follow(node, packet, source, order)
        if moved is not None:
            axes[node] = moved
    return None


def _follow(
    node: fx.Node, packet: Any, source: fx.Node, order: list[int | None]
) -> list[int | None] | None:
    shape, before = node.meta["shape"], source.meta["shape"]
    if shape is None:
        return order if packet in _SPLITS else None
    if before is None:  # a part of a split
        return order if len(shape) == len(order) else None
    if packet is _aten.permute:
        return [order[d] for d in node.args[1]]  # type: ignore[index, union-attr]
    if packet is _aten.transpose:
        a, b = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
        moved = list(order)
        moved[a], moved[b] = moved[b], moved[a]
        return moved
    if shape == before:
        return order
    if packet in _RESHAPES and shape[-1] == before[-1]:
        return [*[None] * (len(shape) - 1), order[-1]]
    return None


def _read_positions(recording: Recording, stream: fx.Node, axis: int) -> tuple[int, str]:
    """Return the number of positions of a stream that are read, the first ones; or 0, and a reason."""
    shape = stream.meta["shape"]
    if len(shape) != 3 or axis != 2 or shape[0] % recording.samples:
        return 0, "its positions are not tokens"
    if shape[1] == 1:
        return 0, "it has one position"
    found = liveness(recording.graph)
    need = found.needs.get(stream, ALL)
    if need.dim != 1:
        return 0, found.reader(stream, 1)
    if 2 * need.count > shape[1]:
        return 0, f"position {need.count - 1} of {shape[1]} is read"
    return need.count, ""


def _class_tokens(stream: fx.Node) -> tuple[int, ...]:
    """Return the positions of a (N, T, d) stream that are selected one by one somewhere behind it."""
    shape = stream.meta["shape"]
    if len(shape) != 3:
        return ()
    found: set[int] = set()
    reached, frontier = {stream}, [stream]
    while frontier:
        for user in frontier.pop().users:
            packet = packet_of(user)
            if packet is _aten.select and user.args[1] == 1:
                found.add(int(user.args[2]) % shape[1])  # type: ignore[arg-type]
            values = [user, *user.users] if user.meta.get("shape") is None else [user]
            for value in values:  # an operation with several results is read through getitem
                if value not in reached and value.meta.get("shape") == shape:
                    reached.add(value)
                    frontier.append(value)
    return tuple(sorted(found))
