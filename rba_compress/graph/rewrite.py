"""Modules in place of blocks, in plain modules and in GraphModules.

In a plain module the first block of a span becomes a `Spliced` module that holds the map, the others
`Spliced` pass-throughs: both take and ignore side inputs and keep the block's output structure, so the
network's own code runs unchanged. In a GraphModule one `call_module` maps the stream before the span to
the stream after it, and the span's nodes are erased. Both forms name the map `<first block>.map`, so
their state dicts agree. A `BlockModule` is called as the block was, in either form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from rba_compress.core.call_signature import Signature
from rba_compress.core.errors import ArtifactError, ModelError, PlanError
from rba_compress.core.offload import above, copy_tree, deep_copy, hold, modules_of
from rba_compress.core.plan import Block, Plan, listed
from rba_compress.core.weight_types import of_peft
from rba_compress.graph.tracer import module_stack

MERGE = "merge"
"""Name under which a block that merges positions shows where each goes, and its share in the mean."""


class BlockModule(nn.Module):
    """Base of modules that replace one block and are called as the block was, side inputs included."""

    watching: Mapping[str, Callable[[Any, Any], None]] | None = None
    """Set while a pass is observed: for layers of the block that run by a graph and not as modules, by
    path, what is called with their input and output. `MERGE` stands for a merge of positions."""


class Spliced(nn.Module):
    """Module in place of a block: the stream goes through `map`, side inputs are passed through."""

    def __init__(self, map: nn.Module, signature: Signature | None = None) -> None:  # noqa: A002
        super().__init__()
        self.map = map
        self.signature = signature or Signature()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.signature.stream_in(args, kwargs)
        return self.signature.rebuild(self.mapped(stream), args, kwargs)

    def mapped(self, stream: Tensor) -> Tensor:
        """Return the stream behind the block."""
        found: Tensor = self.map(stream)
        return found


class Held(nn.Module):
    """Module that ignores its input and returns `value`, a cached stream."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        assert self.value is not None, "set before every pass"
        return self.value


class RefusedWriter:
    """Replacement for a method that writes a stock network, set on an instance that is none any more.

    A class attribute would change the class, which the compressed network shares with its original.
    """

    def __init__(self, module: nn.Module, method: str, replaced: Sequence[str]) -> None:
        self.module, self.method, self.replaced = module, method, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the adapters alone, where transformers has loaded some: they fit the network as it is.

        Raises:
            ArtifactError: the weights would be read back into another network.
        """
        kind = type(self.module)
        if getattr(self.module, "_hf_peft_config_loaded", False):
            return getattr(kind, self.method)(self.module, *args, **kwargs)
        raise ArtifactError(
            f"{self.method} writes no compressed {kind.__name__}: from_pretrained would build the "
            f"stock network, with random weights in {listed(self.replaced)}. Write the result with "
            "result.save(directory, hub=True) and read it with rba_compress.load(directory); a result "
            "of Config(stock=True) becomes a stock network by result.save(..., fold=True, hub=True)"
        )


def refuse_writers(model: nn.Module, plan: Plan) -> None:
    """Keep modules around replaced blocks from writing stock networks; PEFT may write its adapters."""
    replaced = [block.path for replacement in plan.replacements for block in replacement.blocks]
    for path in dict.fromkeys(part for each in replaced for part in above(each)):
        module = model.get_submodule(path)
        if not hasattr(type(module), "from_pretrained") or of_peft(module):
            continue
        inside = [each for each in replaced if not path or each.startswith(f"{path}.")]
        for method in ("save_pretrained", "push_to_hub"):
            if hasattr(type(module), method):
                setattr(module, method, RefusedWriter(module, method, inside))


def copy_model(model: nn.Module, *, share: bool = False) -> nn.Module:
    """Return a deep copy; with `share`, a new module tree over the same parameters and buffers.

    Raises:
        ModelError: the model cannot be copied.
    """
    try:
        return copy_tree(model) if share else deep_copy(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): pass a model "
            "that copy.deepcopy accepts, or splice it with inplace=True"
        ) from error


def replace_blocks(model: nn.Module, blocks: Sequence[Block], module: nn.Module) -> None:
    """Put `module` (stream to stream, or one that is called as a block) in place of some `blocks`."""
    if isinstance(model, fx.GraphModule):
        _replace_in_graph(model, blocks, module)
        return
    _keep_padded(model, blocks)
    if isinstance(module, BlockModule):
        model.set_submodule(blocks[0].path, module)
        return
    for index, block in enumerate(blocks):
        spliced = _spliced(module if index == 0 else nn.Identity())
        spliced.signature = block.signature
        model.set_submodule(block.path, spliced.train(model.get_submodule(block.path).training))


def _spliced(module: nn.Module) -> Spliced:
    return module if isinstance(module, Spliced) else Spliced(module)


def _keep_padded(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Make encoders around replaced blocks pass padded tensors on.

    On torch's fast path an `nn.TransformerEncoder` turns its input into a nested tensor, which a map or
    a traced block does not take.
    """
    for block in blocks:
        parts = block.path.split(".")
        for k in range(len(parts)):
            parent = model.get_submodule(".".join(parts[:k]))
            if isinstance(parent, nn.TransformerEncoder):
                parent.use_nested_tensor = False


def _replace_in_graph(model: fx.GraphModule, blocks: Sequence[Block], module: nn.Module) -> None:
    first, last = blocks[0], blocks[-1]
    if first.nodes is None or last.nodes is None:
        raise PlanError("the plan was made for a plain module: this is a GraphModule")
    graph = model.graph
    nodes = {node.name: node for node in graph.nodes}
    before, after = nodes[first.nodes[0]], nodes[last.nodes[1]]
    paths = {block.path for block in blocks}
    dead = {
        n
        for n in graph.nodes
        if any(path in paths for _, path, _ in module_stack(n))
        # An exported program reads its weights outside of every module.
        or (n.op == "get_attr" and any(str(n.target).startswith(f"{path}.") for path in paths))
    }
    thinned = isinstance(module, BlockModule)
    model.set_submodule(first.path, module if thinned else _spliced(module))
    read = [before, *(nodes[side] for side in first.sides if thinned)]
    order = {node: k for k, node in enumerate(graph.nodes)}
    with graph.inserting_after(max(read, key=lambda node: order[node])):
        spliced = graph.call_module(first.path, tuple(read))
    name = after.name
    spliced.meta = {**before.meta, "nn_module_stack": {first.path: (first.path, Spliced)}}
    after.replace_all_uses_with(spliced)
    for node in reversed(list(graph.nodes)):
        if node in dead and not node.users:
            # A value that only the span read, such as a bias table, is dead, too.
            dead.update(n for n in node.all_input_nodes if n.op != "placeholder")
            graph.erase_node(node)
    spliced.name = name  # the stream after the span keeps its name, which is free now
    for block in blocks[1:]:
        model.delete_submodule(block.path)
    graph.lint()
    model.recompile()


def keep_cache_length(model: nn.Module, gone: Sequence[tuple[str, str]]) -> None:
    """Give a kept layer the cache index of the first layer, where the first layer is removed, or its
    attention.

    The key-value cache of a language model of transformers takes its length from the first layer of
    each kind (`layer_types`: full or sliding attention): without that layer a cached step would take
    every position for the first.

    Args:
        gone: paths of the list of blocks and of what does not run any more.
    """
    if not any(hasattr(module, "layer_idx") for module in modules_of(model)):
        return
    config: Any = getattr(model, "config", None)
    kinds = dict(enumerate(getattr(config, "layer_types", None) or ()))
    for parent in dict.fromkeys(parent for parent, _ in gone):
        kept: dict[int, list[Any]] = {}
        first: dict[str | None, int] = {}
        for path, module in model.named_modules():
            index = getattr(module, "layer_idx", None)
            if type(index) is not int or not path.startswith(f"{parent}."):
                continue
            kind = kinds.get(index)
            first[kind] = min(index, first.get(kind, index))
            if not any(f"{path}.".startswith(f"{each}.") for _, each in gone):
                kept.setdefault(index, []).append(module)
        for kind, index in first.items():
            alike = [k for k in kept if kinds.get(k) == kind]
            if index not in kept and alike:
                for module in kept[min(alike)]:
                    module.layer_idx = index


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a model.

    Raises:
        ModelError: the model has none of that name.
    """
    path, _, attribute = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(path), attribute)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise ModelError(f"{type(model).__name__} has no tensor {name!r}")
    return found.detach()


def resize(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give layers new tensors, of other sizes maybe, and the attributes that say the sizes.

    The old tensors, which may be shared with another model, keep their values. The new ones take their
    dtype and device.
    """
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        hold(model, path)
        layer: Any = model.get_submodule(path)
        old = getattr(layer, attribute)
        new = value.to(old.device, old.dtype).clone()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(layer, attribute, new)
        if attribute == "weight" and old.shape != new.shape:
            _state_sizes(layer, new.shape)


def _state_sizes(layer: Any, shape: Sequence[int]) -> None:
    """Set the attributes of a layer that say its sizes, where it has them."""
    own = vars(layer)
    if "groups" in own:
        # A convolution with groups that is narrowed is depthwise: a group for each channel.
        layer.groups = layer.groups if layer.groups == 1 else shape[0]
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups
    elif "nf" in own:  # transformers' Conv1D, whose weight is (inputs, outputs)
        layer.nx, layer.nf = shape
    elif "out_features" in own:
        layer.out_features, layer.in_features = shape
    elif "num_features" in own:
        layer.num_features = shape[0]


def replace_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace some parameters of a model wherever it holds them; the old ones, which may be shared with
    another model, keep their values.
    """
    named = dict(model.named_parameters())
    new = {
        id(named[key]): nn.Parameter(
            value.to(named[key].device, named[key].dtype).clone(),
            requires_grad=named[key].requires_grad,
        )
        for key, value in values.items()
    }
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) in new:
                setattr(module, name, new[id(old)])
