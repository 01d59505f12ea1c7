"""Blocks traced into aten graphs, cut by a unit, and run from the graph.

A block of two sublayers is x -> m = mix(x) -> y = f(m), where f acts on positions separately (an MLP)
and mix does not (attention); m is found on the graph as a value that every path from x to y crosses. A
unit edits the graph by a node or two; slice propagation then moves the selections upstream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, fx, nn

from rba_compress.core.call_signature import Signature
from rba_compress.core.errors import ModelError
from rba_compress.core.inference import evaluating
from rba_compress.core.offload import in_memory, undispatched
from rba_compress.core.plan import Attention, Block, CountName
from rba_compress.graph.attention_heads import HeadSizes, attention_of, resize_heads
from rba_compress.graph.liveness import copy_graph, liveness, packet_of
from rba_compress.graph.rewrite import MERGE, BlockModule
from rba_compress.graph.slice_propagation import narrow
from rba_compress.graph.token_merging import (
    attention_of_reads,
    importance_of_attention,
    merge,
    merged_sizes,
    places,
    restored,
    rows_of_reads,
    shares,
    unit_sizes,
    weights,
    with_sizes,
)

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.linear,
    _aten.matmul,
    _aten.bmm,
    _aten.addmm,
    _aten.mm,
    _aten.conv1d,
    _aten.conv2d,
    _aten.convolution,
    _aten.scaled_dot_product_attention,
}
_CHECKS = ("_assert", "sym_constrain")
_END = 2**63 - 1


@dataclass(frozen=True)
class Form:
    """Form in which a block is run from its graph, beside its unit."""

    reads: int = 0
    """Positions that the output reads, the first ones."""
    exact: bool = False
    """True to leave the other positions out."""
    level: float | None = None
    """Numeric setting of the unit."""
    sized: bool = False
    """True where the stream comes with the sizes of its positions as the last channel."""
    hands_sizes: bool = False
    """True where the output has such a channel, too."""
    restored: int = 0
    """Number of positions that were merged and are repeated in the output."""
    by_attention: bool = False
    """True where positions merge by the attention of the read ones, and not by their sizes alone."""
    heads: HeadSizes | None = None
    """Sizes of the block's attention, where its layers have others than the block's code knows."""


class Cut(Protocol):
    """The part of a unit that edits a traced block: see `units.base.Unit.cut`."""

    @property
    def name(self) -> str:
        """Name of the unit, the key under which edited graphs are cached."""

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Edit the graph and return its output."""


class Body:
    """Compiled graph of a cut block for one call signature; it holds no tensors.

    Args:
        names: parameters and buffers of the block, in the order of the graph's first inputs.
    """

    def __init__(self, signature: Signature, names: Sequence[str], graph: fx.Graph) -> None:
        self.signature, self.names = signature, tuple(names)
        self._paths = tuple(tuple(name.split(".")) for name in names)
        self._compiled = fx.GraphModule(nn.ModuleDict({"map": nn.Identity()}), graph)

    def __deepcopy__(self, memo: Any) -> Body:
        """Return the same body: a search copies networks hundreds of times, and compiling is slow."""
        return self

    def __call__(self, block: Thinned, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the graph on a block's tensors and its `map`."""
        values = [_tensor(block, path) for path in self._paths]
        values += self.signature.tensors(args, kwargs)
        if block.watching:
            stream = _Watched(self._compiled, self.names, block).run(*values)
        else:
            stream = type(self._compiled).forward(block, *values)
        return self.signature.rebuild(stream, args, kwargs)


class _Watched(fx.Interpreter):
    """Run of a body that shows the inputs and outputs of layers which `block.watching` asks for."""

    def __init__(self, compiled: fx.GraphModule, names: Sequence[str], block: Thinned) -> None:
        super().__init__(compiled)
        self._block, self._watching = block, dict(block.watching or {})
        weights = zip(compiled.graph.nodes, names, strict=False)
        self._layers = {node: name.removesuffix(".weight") for node, name in weights}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._block.get_submodule(target)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        names = {self._layers[node] for node in n.all_input_nodes if node in self._layers}
        if n.target is shares:
            names.add(MERGE)
        given = [self.env[node] for node in n.all_input_nodes if node not in self._layers]
        for name in names.intersection(self._watching) if given else ():
            self._watching[name](given[0], result)
        return result


class Thinned(BlockModule):
    """Block cut by a unit: its remaining submodules, run by a graph instead of the block's own code."""

    def __init__(
        self,
        block: nn.Module,
        bodies: Sequence[Body],
        map: nn.Module,  # noqa: A002
    ) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in block.named_buffers(recurse=False):
            kept = name not in block._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=kept)
        self.map = map
        self._bodies = tuple(bodies)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for body in self._bodies:
            if body.signature.mismatch(args, kwargs) is None:
                return body(self, args, kwargs)
        raise ModelError(
            f"a thinned block is called in another way than on calibration data: "
            f"{self._bodies[0].signature.mismatch(args, kwargs)}"
        )


def _tensor(module: nn.Module, path: Sequence[str]) -> Any:
    """Return a parameter or buffer without `getattr`, which would add microseconds a module."""
    for part in path[:-1]:
        module = module._modules[part]  # type: ignore[assignment]
    found = module._parameters.get(path[-1])
    if found is not None:
        return found
    if "base_layer" in module._modules:
        # The weight is that of the layer without the adapter, which would be left out in silence.
        raise ModelError(
            f"{'.'.join(path[:-1])} of a thinned block has an adapter, and the block runs by a graph "
            "that does not: leave it out of the adapter's target_modules, or compress with "
            'Config(units=("span",), keep_features=True)'
        )
    return getattr(module, path[-1])


def thin(
    model: nn.Module,
    block: Block,
    map: nn.Module,  # noqa: A002
    traces: Traces,
    *,
    unit: Cut,
    form: Form = Form(),
) -> Thinned:
    """Return a block of `model` cut by a unit, over its own weights; parts that do not run are dropped.

    Raises:
        ModelError: the block cannot be traced, or the unit cannot cut it.
    """
    module = undispatched(model, block.path)
    traced = traces.of(model, block)
    bodies = [each.body(unit, form) for each in traced]
    thinned = Thinned(module, bodies, map)
    for each in traced:
        for name, tensor in each.constants.items():
            thinned.register_buffer(name, tensor.clone(), persistent=False)
    _prune(thinned, {name for body in bodies for name in body.names}, keep=("map",))
    return thinned.train(module.training)


def _prune(module: nn.Module, used: set[str], *, keep: Sequence[str] = ()) -> None:
    """Drop submodules, parameters and buffers that are not used; the others keep their paths.

    Children are replaced by copies over the same tensors: the block that they came from stays whole.
    """
    for name, child in list(module.named_children()):
        if name in keep:
            continue
        below = {path.removeprefix(f"{name}.") for path in used if path.startswith(f"{name}.")}
        if not below:
            delattr(module, name)
            continue
        own = type(child).__new__(type(child))
        own.__dict__.update(child.__dict__)
        for held in ("_parameters", "_buffers", "_modules"):
            own.__dict__[held] = dict(child.__dict__[held])
        module._modules[name] = own
        _prune(own, below)
    # Set to None, not deleted: a layer's repr reads its bias.
    for tensors in (module._parameters, module._buffers):
        tensors.update({name: None for name in tensors if name not in used})


class _StreamOnly(nn.Module):
    """Module of a block as a function from tensors to the stream."""

    def __init__(self, block: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.block, self.signature = block, signature

    def forward(self, *tensors: Tensor) -> Any:
        args, kwargs = self.signature.call(tensors)
        return self.signature.stream_out(self.block(*args, **kwargs))


@dataclass(frozen=True)
class Traced:
    """Aten graph of a block for one call signature, weights lifted to inputs."""

    signature: Signature
    graph: fx.Graph
    names: tuple[str, ...]
    """Parameters and buffers of the block, in the order of the first placeholders."""
    constants: dict[str, Tensor]
    """Tensors among `names` that the block's code creates."""
    entry: str
    """Name of the stream's placeholder."""
    middle: str | None
    """Name of the stream between the block's two sublayers; None where there are not two."""
    _bodies: dict[Any, Body] = field(default_factory=dict)

    def body(self, unit: Cut, form: Form) -> Body:
        """Return the block cut by a unit, compiled once.

        Raises:
            ModelError: the unit needs two sublayers, and the block does not consist of two.
        """
        key = unit.name, form
        if key not in self._bodies:
            graph, names = self._cut(unit, form)
            weights = list(zip(list(graph.nodes), names, strict=False))
            for placeholder, _ in weights:
                if not placeholder.users:
                    graph.erase_node(placeholder)
            used = [name for node, name in weights if node.users]
            self._bodies[key] = Body(self.signature, used, graph)
        return self._bodies[key]

    def _cut(self, unit: Cut, form: Form) -> tuple[fx.Graph, Sequence[str]]:
        graph, values, output = copy_graph(self.graph)
        assert isinstance(output, fx.Node)
        names = self.names if form.heads is None else resize_heads(graph, self.names, form.heads)
        named = {old.name: new for old, new in values.items()}
        middle = named[self.middle] if self.middle else None
        block = BlockGraph(graph, named[self.entry], middle, output)
        if form.sized:
            block.take_sizes()
        result = unit.cut(block, form)
        if form.restored:
            assert block.sizes is not None
            shape = result.meta["shape"]
            result = block.call(restored, result, block.sizes, form.restored, like=shape)
        graph.output(block.joined_sizes(result) if form.hands_sizes else result)
        return narrow(graph), names

    @property
    def attention(self) -> Attention:
        """Attention of the block.

        Raises:
            ModelError: it has none that is understood.
        """
        return attention_of(self.graph, self.names)


class BlockGraph:
    """Aten graph of a block while a unit edits it."""

    def __init__(
        self, graph: fx.Graph, entry: fx.Node, middle: fx.Node | None, output: fx.Node
    ) -> None:
        self.graph, self.entry, self.output, self._middle = graph, entry, output, middle
        self.sizes: fx.Node | None = None
        """Sizes of the positions, (N, T, 1); None where each is one."""

    @property
    def middle(self) -> fx.Node:
        """The stream between the two sublayers.

        Raises:
            ModelError: the block does not consist of two.
        """
        if self._middle is None:
            raise ModelError("its sublayers cannot be told apart")
        return self._middle

    def call(self, function: Any, *args: Any, like: tuple[int, ...]) -> fx.Node:
        """Add a call of a function whose result has a shape."""
        called = self.graph.call_function(function, args)
        called.meta["shape"] = like
        return called

    def channels(self, node: fx.Node, start: int, end: int) -> fx.Node:
        """Select channels of a stream."""
        *rest, width = node.meta["shape"]
        return self.call(
            _aten.slice.Tensor, node, -1, start, end, like=(*rest, min(end, width) - start)
        )

    def take_sizes(self) -> None:
        """Split the sizes off the stream that comes in, and let attention count positions by them.

        Raises:
            ModelError: the block's attention has another form than the known ones.
        """
        entry, shape = self.entry, self.entry.meta["shape"]
        readers, width = list(entry.users), shape[-1]
        after = next(n for n in entry.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(after):
            stream = self.channels(entry, 0, width)
            self.sizes = self.channels(entry, width, width + 1)
            self.sizes.meta["shape"] = (*shape[:-1], 1)
            added = self.call(weights, self.sizes, like=(shape[0], 1, 1, shape[1]))
        for reader in readers:
            reader.replace_input_with(entry, stream)
        for node in attentions(self.graph):
            with self.graph.inserting_before(node):
                _add_to_scores(self, node, added)
        self.entry = stream

    def joined_sizes(self, stream: fx.Node) -> fx.Node:
        """Append the sizes of the positions to a stream."""
        assert self.sizes is not None
        *rest, width = stream.meta["shape"]
        return self.call(with_sizes, stream, self.sizes, like=(*rest, width + 1))

    def merge_middle(self, count: int, protected: int, *, by_attention: bool) -> None:
        """Merge positions of the stream between the two sublayers.

        Args:
            count, protected: as in `places`.
            by_attention: weigh positions by the attention of the protected ones, and not by sizes.

        Raises:
            ModelError: the block does not consist of two sublayers, or has no attention of one form.
        """
        middle, found = self.middle, attentions(self.graph)
        if len(found) != 1:
            raise ModelError(f"it has {len(found)} attentions, where one was expected")
        readers, shape = list(middle.users), middle.meta["shape"]
        rows, left = tuple(shape[:2]), (shape[0], shape[1] - count)
        # Behind all that merging reads, and before the second sublayer.
        following = middle.next
        with self.graph.inserting_before(following):
            before = self.sizes or self.call(unit_sizes, middle, like=(*rows, 1))
            if by_attention:
                of_mean = self._attention_of_reads(found[0], protected, like=rows)
                importance: fx.Node | None = self.call(
                    importance_of_attention, of_mean, self.sizes, like=rows
                )
            else:
                of_mean = self.call(_aten.squeeze.dim, before, -1, like=rows)
                importance = None if self.sizes is None else of_mean
            new = self.call(places, middle, importance, count, protected, like=rows)
            share = self.call(shares, new, of_mean, count, like=(*rows, 1))
            sizes = self.call(merged_sizes, before, new, count, like=(*left, 1))
            stream = self.call(merge, middle, share, new, count, like=(*left, shape[2]))
        for reader in readers:
            reader.replace_input_with(middle, stream)
        self.sizes = sizes

    def _attention_of_reads(self, node: fx.Node, reads: int, *, like: tuple[int, ...]) -> fx.Node:
        """Add the attention (N, T) that the first positions give, from the node of all attention."""
        if packet_of(node) is _aten.scaled_dot_product_attention:
            queries, keys = (argument_node(each) for each in node.args[:2])
            scale = node.kwargs.get("scale")
            width = queries.meta["shape"][-1]
            factor = scale if isinstance(scale, int | float) else width**-0.5
            return self.call(attention_of_reads, queries, keys, self.sizes, reads, factor, like=like)
        heads = node.meta["shape"][0] // like[0]
        return self.call(rows_of_reads, node, heads, reads, like=like)

    def mapped(self, node: fx.Node) -> fx.Node:
        """Apply the fitted map to a stream."""
        called = self.graph.call_module("map", (node,))
        called.meta["shape"] = node.meta["shape"]
        return called

    def part(self, node: fx.Node, start: int, end: int) -> fx.Node:
        """Select the positions from `start` to `end` of a stream."""
        n, positions, *rest = node.meta["shape"]
        taken = self.graph.call_function(_aten.slice.Tensor, (node, 1, start, end))
        taken.meta["shape"] = (n, min(end, positions) - start, *rest)
        return taken

    def joined(self, read: fx.Node, others: fx.Node, reads: int) -> fx.Node:
        """Join the first `reads` positions of a stream and the mapped others of another one."""
        # All positions are mapped, also the read ones: a part of a stream is not contiguous.
        halves = [self.part(read, 0, reads), self.part(self.mapped(others), reads, _END)]
        output = self.graph.call_function(_aten.cat.default, (halves, 1))
        output.meta["shape"] = others.meta["shape"]
        return output

    def replace_middle(self, source: fx.Node) -> None:
        """Let the second sublayer read the mapped `source` instead of the stream between the two."""
        readers = list(self.middle.users)
        with self.graph.inserting_after(self.middle):
            new = self.mapped(source)
        for reader in readers:
            reader.replace_input_with(self.middle, new)


def attentions(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of a graph that mix positions by content: attention, or a softmax of scores."""
    known = (_aten.scaled_dot_product_attention, _aten.softmax, _aten._softmax)
    return [node for node in graph.nodes if packet_of(node) in known]


def argument_node(value: Any) -> fx.Node:
    """Return an argument that must be a node.

    Raises:
        ModelError: it is a constant.
    """
    if not isinstance(value, fx.Node):
        raise ModelError("its attention is no product of queries and keys")
    return value


def _add_to_scores(block: BlockGraph, node: fx.Node, added: fx.Node) -> None:
    """Add weights of positions to the scores of attention, before its node.

    Raises:
        ModelError: attention is causal, or its mask is not one of floats.
    """
    if packet_of(node) is not _aten.scaled_dot_product_attention:
        scores = argument_node(node.args[0])
        total = block.call(_aten.add.Tensor, scores, added, like=scores.meta["shape"])
        node.replace_input_with(scores, total)
        return
    arguments = [*node.args, None, 0.0, False][:6]
    if (len(node.args) > 5 and node.args[5]) or node.kwargs.get("is_causal"):
        raise ModelError("its attention is causal")
    if arguments[3] is not None or node.kwargs.get("attn_mask") is not None:
        raise ModelError("its attention has a mask of its own")
    node.args = (*node.args[:3], added, *node.args[4:])


class Traces:
    """Cache of traced blocks: a trace takes tenths of a second, and a search splices often."""

    def __init__(self) -> None:
        self._known: dict[Any, list[Traced]] = {}
        self._kinds: dict[str, list[list[Traced]]] = {}

    def __reduce__(self) -> Any:
        """Pickle and copy as an empty cache: nothing is lost but time."""
        return Traces, ()

    def of(self, model: nn.Module, block: Block) -> list[Traced]:
        """Return the traces of a block, one for each signature; the model must not be rewritten there,
        but for the sizes of its layers.

        Raises:
            ModelError: the block cannot be traced, or it writes into tensors.
        """
        # A graph runs with layers of other sizes, but for numbers that the block's code reads itself.
        parts = [vars(module) for module in model.get_submodule(block.path).modules()]
        names = ("groups", *get_args(CountName))
        sizes = tuple(part[n] for part in parts for n in names if type(part.get(n)) is int)
        key = block.path, tuple(size for size in sizes if size != 1)
        if key not in self._known:
            ways = (block.signature, *block.variants)
            alike = self._kinds.setdefault(f"{block.type} {ways}", [])
            found = next((t for t in alike if _is_of(model, block, t)), None)
            if found is None:
                found = [_trace(model, block, way, f"constant_{k}") for k, way in enumerate(ways)]
                alike.append(found)
            self._known[key] = found
        return self._known[key]


@torch.inference_mode(False)
def _is_of(model: nn.Module, block: Block, traced: Sequence[Traced]) -> bool:
    """Return True if the graphs of another block compute, bit for bit, what this block computes."""
    if isinstance(model, fx.GraphModule):
        return False
    module = in_memory(model, block.path)
    generator = torch.Generator().manual_seed(0)
    for each in traced:
        wrapped, tensors = _StreamOnly(module, each.signature), example_inputs(module, each.signature)
        stream = tensors[each.signature.stream_index]
        stream.copy_(torch.randn(stream.shape, generator=generator))
        try:
            own = [each.constants.get(n) for n in each.names]
            values = [
                _tensor(module, name.split(".")) if value is None else value
                for name, value in zip(each.names, own, strict=True)
            ]
            with evaluating(wrapped):
                found = fx.GraphModule(nn.Module(), each.graph)(*values, *tensors)
                if not torch.equal(found, wrapped(*tensors)):
                    return False
        except Exception:  # noqa: BLE001  after any failure the block is traced anew
            return False
    return True


def example_inputs(module: nn.Module, signature: Signature) -> list[Tensor]:
    """Return inputs of a call, filled with zeros."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return [given.zeros(parameter, like=signature.inputs[0]) for given in signature.inputs]


@torch.inference_mode(False)
def _trace(model: nn.Module, block: Block, signature: Signature, constant: str) -> Traced:
    if not signature.inputs:
        raise ModelError("what it is called with cannot be written down")
    module = in_memory(model, block.path)
    taken = {"map", "_bodies"}.intersection(name for name, _ in module.named_children())
    if taken:
        raise ModelError(f"it has a submodule {taken.pop()!r} of its own")
    prefix = "block."
    if isinstance(model, fx.GraphModule):
        module, prefix = _cut_out(model, block), f"block.{block.path}."
    auto = torch.export.Dim.AUTO
    tensors = tuple(example_inputs(module, signature))
    # Batch sizes and lengths of text are dynamic. Sizes of one are static, and so are those of images:
    # export would take seconds a block to reason about windows of any size.
    free = 1 if tensors[signature.stream_index].ndim > 3 else 4
    shapes = tuple({d: auto for d, size in enumerate(t.shape[:free]) if size > 1} for t in tensors)
    wrapped = _StreamOnly(module, signature)
    try:
        with evaluating(wrapped):
            exported = torch.export.export(wrapped, tensors, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise ModelError(f"it cannot be traced ({type(error).__name__}: {error})") from error
    return _lifted(exported, signature, prefix, constant)


def _cut_out(model: fx.GraphModule, block: Block) -> fx.GraphModule:
    """Return the nodes of a block as a module of their own; its weights keep their paths."""
    assert block.nodes is not None
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    named = {node.name: node for node in model.graph.nodes}
    for name in (block.nodes[0], *block.sides):
        made[named[name]] = graph.placeholder(name)
    wanted, frontier = set(), [named[block.nodes[1]]]
    while frontier:
        node = frontier.pop()
        if node not in wanted and node not in made:
            wanted.add(node)
            frontier += node.all_input_nodes
    for node in model.graph.nodes:
        if node in wanted:
            made[node] = graph.node_copy(node, lambda n: made[n])
    graph.output(made[named[block.nodes[1]]])
    return fx.GraphModule(model, graph)


def _lifted(
    exported: torch.export.ExportedProgram, signature: Signature, prefix: str, constant: str
) -> Traced:
    graph, kinds = exported.graph, torch.export.graph_signature.InputKind
    names: list[str] = []
    constants: dict[str, Tensor] = {}
    placeholders = iter(node for node in graph.nodes if node.op == "placeholder")
    entry = ""
    inputs = 0
    for spec, node in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind is kinds.USER_INPUT:
            if inputs == signature.stream_index:
                entry = node.name
            inputs += 1
        elif spec.kind is kinds.CONSTANT_TENSOR:
            name = f"{constant}_{len(constants)}"
            constants[name] = exported.constants[str(spec.target)]
            names.append(name)
        else:
            if not str(spec.target).startswith(prefix):
                raise ModelError(f"it reads {str(spec.target).removeprefix('block.')} outside of it")
            names.append(str(spec.target).removeprefix(prefix))
    output = next(node for node in graph.nodes if node.op == "output")
    mutated = [s for s in exported.graph_signature.output_specs if "MUTATION" in s.kind.name]
    for node in reversed(list(graph.nodes)):
        schema = getattr(node.target, "_schema", None)
        if not node.users and any(text in str(node.target) for text in _CHECKS):
            graph.erase_node(node)
        elif packet_of(node) is _aten.dropout and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif schema is not None and schema.is_mutable:
            mutated.append(node)
    if mutated:
        raise ModelError(f"it writes into a tensor ({mutated[0]})")
    (result,) = output.args[0]
    for node in graph.nodes:
        value = node.meta.get("val")
        shape = tuple(map(_hint, value.shape)) if isinstance(value, Tensor) else None
        node.meta["shape"] = shape
    output.args = (result,)
    start = next(node for node in graph.nodes if node.name == entry)
    return Traced(signature, graph, tuple(names), constants, entry, _middle(start, result))


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _middle(entry: fx.Node, output: fx.Node) -> str | None:
    """Return the name of the stream between two sublayers, of which only the second acts on positions
    separately; None where there is no such stream.

    Cuts are values of the stream's shape that every path from entry to output crosses. Operations
    between two cuts without a matrix product (a norm) belong to the sublayer before.
    """
    cuts = [
        node
        for node in entry.graph.nodes
        if node.meta["shape"] == entry.meta["shape"]
        and node not in (entry, output)
        and not _reaches(entry, output, without=node)
        and _reaches(entry, node)
    ]
    cuts = [
        node
        for node, after in zip(cuts, [*cuts[1:], output] if cuts else [], strict=True)
        if any(packet_of(n) in _PRODUCTS for n in _between(node, after))
    ]
    cuts = [n for n in cuts if any(packet_of(m) in _PRODUCTS for m in _between(entry, n))]
    if len(cuts) != 1 or _treats_apart(entry, cuts[0]) or not _treats_apart(cuts[0], output):
        return None
    return str(cuts[0].name)


def _reaches(start: fx.Node, end: fx.Node, *, without: fx.Node | None = None) -> bool:
    seen, frontier = {start, without}, [start]
    while frontier:
        node = frontier.pop()
        if node is end:
            return True
        fresh = [user for user in node.users if user not in seen]
        seen.update(fresh)
        frontier += fresh
    return False


def _between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes on paths from start to end, the end among them."""
    for node in start.graph.nodes:
        if node is not start and _reaches(start, node) and _reaches(node, end):
            yield node


def _treats_apart(start: fx.Node, end: fx.Node) -> bool:
    """Return True if the first position of `end` needs no other position of `start`."""
    graph, values, _ = copy_graph(start.graph)
    dim = 1 if len(end.meta["shape"]) == 3 else 2
    first = graph.call_function(_aten.slice.Tensor, (values[end], dim, 0, 1))
    first.meta = {"shape": tuple(1 if d == dim else s for d, s in enumerate(end.meta["shape"]))}
    graph.output(first)
    # What lies before `start` does not matter.
    need = liveness(graph).needs.get(values[start])
    return need is not None and need.count == 1
