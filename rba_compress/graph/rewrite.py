"""The rewrite: modules in place of spans of blocks. It decides nothing; it obeys a plan.

In a plain module the first block of a span becomes a `Spliced` module that holds the map, the others
`Spliced` pass-throughs: both take and ignore side inputs and keep the block's output structure, so the
network's own code runs unchanged. In a GraphModule one `call_module` takes the stream before the span
to where the stream after it was read, and the span's nodes are erased. Both forms name the map
`<first block>.map`, so their state dicts agree. A block that is thinned becomes a `Thinned` module, in
either form; what is left of it keeps its state-dict keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rba_compress.core.call_signature import Signature
from rba_compress.core.errors import ArtifactError, ModelError, PlanError
from rba_compress.core.inference import unwrap
from rba_compress.core.offload import copy_tree, deep_copy, execution_device, hold, take_place
from rba_compress.core.plan import Block, Plan, Refit, Replacement, listed
from rba_compress.core.schema import nested
from rba_compress.core.weight_types import of_peft
from rba_compress.graph.block_variants import Thinned, Traces, thin
from rba_compress.graph.tracer import module_stack
from rba_compress.linalg.maps import build_map, map_shapes

STATISTICS = ("running_mean", "running_var")
"""Buffers of a BatchNorm."""


class Spliced(nn.Module):
    """Stands where a block stood: its stream goes through `map`, side inputs pass by."""

    def __init__(self, map: nn.Module, signature: Signature | None = None) -> None:  # noqa: A002
        super().__init__()
        self.map = map
        self.signature = signature or Signature()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.signature.stream_in(args, kwargs)
        return self.signature.rebuild(self.map(stream), args, kwargs)


class RefusedWriter:
    """A method that writes a stock network, in its place on the instance that is none any more.

    A class attribute would change the class that the compressed network shares with its original.
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
            "of Config(foldable=True) becomes a stock network by result.save(..., fold=True, hub=True)"
        )


def _refuse_writers(model: nn.Module, plan: Plan) -> None:
    """Let no module around a replaced block write itself as a stock network; PEFT writes adapters."""
    replaced = [block.path for replacement in plan.replacements for block in replacement.blocks]
    for path, module in model.named_modules():
        inside = [each for each in replaced if not path or each.startswith(f"{path}.")]
        if inside and hasattr(type(module), "from_pretrained") and not of_peft(module):
            for method in ("save_pretrained", "push_to_hub"):
                if hasattr(type(module), method):
                    setattr(module, method, RefusedWriter(module, method, inside))


def copy_model(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy; with `share`, a new module tree over the same parameters and buffers.

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
    """Put `module` (stream to stream, or one thinned block) in place of consecutive `blocks`."""
    if isinstance(model, fx.GraphModule):
        _replace_in_graph(model, blocks, module)
        return
    _keep_padded(model, blocks)
    if isinstance(module, Thinned):
        model.set_submodule(blocks[0].path, module)
        return
    for index, block in enumerate(blocks):
        held = module if index == 0 else nn.Identity()
        spliced = Spliced(held, block.signature).train(model.get_submodule(block.path).training)
        model.set_submodule(block.path, spliced)


def _keep_padded(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Let encoders around replaced blocks pass padded tensors on.

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
    thinned = isinstance(module, Thinned)
    model.set_submodule(first.path, module if thinned else Spliced(module))
    read = [before, *(nodes[side] for side in first.sides if thinned)]
    order = {node: k for k, node in enumerate(graph.nodes)}
    with graph.inserting_after(max(read, key=lambda node: order[node])):
        spliced = graph.call_module(first.path, tuple(read))
    name = after.name
    spliced.meta = {**before.meta, "nn_module_stack": {first.path: (first.path, Spliced)}}
    after.replace_all_uses_with(spliced)
    for node in reversed(list(graph.nodes)):
        if node in dead and not node.users:
            # What only the span read, a bias table say, is dead with it.
            dead.update(n for n in node.all_input_nodes if n.op != "placeholder")
            graph.erase_node(node)
    spliced.name = name  # the stream after the span keeps its name, which is free now
    for block in blocks[1:]:
        model.delete_submodule(block.path)
    graph.lint()
    model.recompile()


def _check(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    taken: dict[str, Replacement] = {}
    wanted: set[str] = set()
    for replacement in plan.replacements:
        for block in replacement.blocks:
            other = next((path for path in taken if nested(path, block.path)), None)
            if other is not None:
                raise PlanError(f"{replacement} and {taken[other]} share the block {block.path}")
            taken[block.path] = replacement
            if block.path not in modules:
                raise PlanError(
                    f"{replacement}: {type(model).__name__} has no block {block.path!r}; the plan is "
                    "of another architecture"
                )
            kind = type(modules[block.path]).__name__
            if not isinstance(model, fx.GraphModule) and kind != block.type:
                raise PlanError(
                    f"{replacement}: {block.path} is a {kind}, the plan replaces a {block.type}"
                )
        shapes = map_shapes(
            replacement.map, replacement.width, ndim=replacement.ndim, axis=replacement.axis
        )
        expected = {f"{replacement.key}{name}": shape for name, shape in shapes.items()}
        for name, shape in expected.items():
            if name not in tensors:
                raise PlanError(f"{replacement}: its tensor {name!r} is missing")
            if tensors[name].numel() != torch.Size(shape).numel():
                raise PlanError(
                    f"{replacement}: {name!r} has shape {tuple(tensors[name].shape)}, wanted {shape}"
                )
        wanted |= set(expected)
    wanted |= _check_refits(model, plan, tensors) | _check_healed(model, plan, tensors)
    stray = sorted(set(tensors) - wanted)
    if stray:
        raise PlanError(f"the tensors {stray[:3]} belong to no replacement of the plan")


def _check_refits(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> set[str]:
    """The keys of the refitted layers' tensors."""
    modules, wanted = dict(model.named_modules()), set()
    spans = [block.path for r in plan.replacements if r.unit == "span" for block in r.blocks]
    for refit in plan.refits:
        if any(f"{refit.path}.".startswith(f"{path}.") for path in spans):
            raise PlanError(f"{refit}: it is inside of a block that is replaced")
        layer = modules.get(refit.path)
        if layer is None or not _refittable(layer, refit):
            raise PlanError(f"{type(model).__name__} has no layer {refit.path!r} to refit")
        for name, value in _moved(layer, refit):
            given = tensors.get(f"{refit.key}{name}")
            if given is None or given.shape != value.shape:
                raise PlanError(f"{refit}: its tensor {name!r} is missing or of another shape")
            wanted.add(f"{refit.key}{name}")
    return wanted


def _check_healed(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> set[str]:
    """The keys of the trained tensors, those of maps excepted, which are checked already."""
    own = dict(model.named_parameters())
    maps = tuple(r.key for r in plan.replacements)
    trained = {} if plan.healed is None else dict.fromkeys(plan.healed.keys)
    wanted = {key for key in trained if not maps or not key.startswith(maps)}
    for key in sorted(wanted):
        if key not in own or key not in tensors or tensors[key].shape != own[key].shape:
            raise PlanError(
                f"the trained tensor {key!r} is missing, or is not of this {type(model).__name__}"
            )
    return wanted


def _refittable(layer: nn.Module, refit: Refit) -> bool:
    return isinstance(getattr(layer, "running_mean" if refit.statistics else "weight", None), Tensor)


def _moved(layer: nn.Module, refit: Refit) -> list[tuple[str, Tensor]]:
    """The tensors of a layer that a refit changes."""
    if refit.statistics:
        return [(name, getattr(layer, name)) for name in STATISTICS]
    return list(layer.named_parameters(recurse=False))


def _build(replacement: Replacement) -> nn.Module:
    """The map's module without storage, so that no random state is drawn from."""
    with torch.device("meta"):
        return build_map(
            replacement.map, replacement.width, ndim=replacement.ndim, axis=replacement.axis
        )


@torch.inference_mode(False)
def splice(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    *,
    inplace: bool = False,
    traces: Traces | None = None,
) -> nn.Module:
    """Rewrite `model` as `plan` says; an empty plan gives back a copy with bit-equal outputs.

    Args:
        model: the network that the plan was made for, a plain module or a GraphModule.
        plan: what is replaced by what.
        tensors: the fitted tensors of its maps, by their key in the slim model's state dict. They
            take the dtype and device of the block that they replace.
        inplace: rewrite `model` itself; otherwise it is left untouched and a deep copy is returned.
        traces: of the model's blocks, where some were traced before.

    Raises:
        PlanError: the plan's blocks are not in the model, or the tensors do not fit the plan. The
            model is unchanged.
        ModelError: the model cannot be copied.
    """
    model = unwrap(model)
    return _splice(model if inplace else copy_model(model), plan, tensors, traces or Traces())


def splice_shared(
    model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], traces: Traces | None = None
) -> nn.Module:
    """As `splice`, in a new module tree that shares the weights: for evaluation, not for keeping.

    Args:
        model, plan, tensors: as in `splice`.
        traces: of the model's blocks, kept from splice to splice.
    """
    return _splice(copy_model(model, share=True), plan, tensors, traces or Traces())


def _require_thinnable(model: nn.Module, replacement: Replacement, traces: Traces) -> None:
    """
    Raises:
        PlanError: the block cannot be thinned so; nothing is changed yet.
    """
    (block,) = replacement.blocks
    try:
        for traced in traces.of(model, block):
            traced.body(replacement.unit, replacement.reads, replacement.exact)
    except ModelError as error:
        raise PlanError(f"{replacement}: {block.path} cannot be thinned: {error}") from error


def _keep_cache_length(model: nn.Module, gone: Sequence[Block]) -> None:
    """Let a kept layer take the cache index of the first one, where that is gone.

    The key-value cache of a language model of transformers takes its length from the first layer of
    each kind (`layer_types`: full or sliding attention): without that layer a cached step would take
    every position for the first.
    """
    config: Any = getattr(model, "config", None)
    kinds = dict(enumerate(getattr(config, "layer_types", None) or ()))
    for parent in dict.fromkeys(block.path.rpartition(".")[0] for block in gone):
        kept: dict[int, list[Any]] = {}
        first: dict[str | None, int] = {}
        for path, module in model.named_modules():
            index = getattr(module, "layer_idx", None)
            if type(index) is not int or not path.startswith(f"{parent}."):
                continue
            kind = kinds.get(index)
            first[kind] = min(index, first.get(kind, index))
            if not any(f"{path}.".startswith(f"{block.path}.") for block in gone):
                kept.setdefault(index, []).append(module)
        for kind, index in first.items():
            alike = [k for k in kept if kinds.get(k) == kind]
            if index not in kept and alike:
                for module in kept[min(alike)]:
                    module.layer_idx = index


def _splice(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], traces: Traces) -> nn.Module:
    _check(model, plan, tensors)
    _keep_cache_length(model, [b for r in plan.replacements if r.unit == "span" for b in r.blocks])
    built: list[tuple[Replacement, nn.Module]] = []
    for replacement in plan.replacements:
        like = next(
            (
                parameter
                for block in replacement.blocks
                for parameter in model.get_submodule(block.path).parameters()
                if parameter.is_floating_point()
            ),
            torch.empty(0),
        )
        device = execution_device(model, like, replacement.blocks[0].path)
        module = _build(replacement).to(like.dtype).to_empty(device=device)
        state = {
            name: tensors[f"{replacement.key}{name}"].reshape(value.shape)
            for name, value in module.state_dict().items()
        }
        module.load_state_dict(state)
        if replacement.unit != "span":
            _require_thinnable(model, replacement, traces)
        built.append((replacement, module))
    for replacement, module in built:
        first = model.get_submodule(replacement.blocks[0].path)
        held = module
        if replacement.unit != "span":
            held = thin(
                model,
                replacement.blocks[0],
                module,
                traces,
                unit=replacement.unit,
                reads=replacement.reads,
                exact=replacement.exact,
            )
        for block in replacement.blocks:
            hold(model, block.path.rpartition(".")[0])
        replace_blocks(model, replacement.blocks, held)
        take_place(model.get_submodule(replacement.blocks[0].path), first)
    for refit in plan.refits:
        hold(model, refit.path)
        layer = model.get_submodule(refit.path)
        for name, old in _moved(layer, refit):
            # A new tensor: the old one may be shared with the original.
            value = tensors[f"{refit.key}{name}"].to(old.device, old.dtype).clone()
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(layer, name, value)
    if plan.healed is not None:
        replace_parameters(model, {key: tensors[key] for key in plan.healed.keys})
    _refuse_writers(model, plan)
    return model


def replace_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a model new parameters in place of some, wherever it holds them; the old ones may be shared
    with another model, and keep their values.
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
