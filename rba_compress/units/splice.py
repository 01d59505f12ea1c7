"""Execution of a plan: checked against the network and its tensors, then spliced unit by unit.

Nothing is decided here, and nothing is changed before every check has passed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from rba_compress.core.errors import ModelError, PlanError
from rba_compress.core.inference import unwrap
from rba_compress.core.offload import execution_device, hold, take_place
from rba_compress.core.plan import STATISTICS, Block, NormRefit, Plan, Refit, Replacement
from rba_compress.core.schema import nested
from rba_compress.graph.rewrite import (
    copy_model,
    keep_cache_length,
    refuse_writers,
    replace_blocks,
    replace_parameters,
)
from rba_compress.units.base import built
from rba_compress.units.block_variants import Form, Traces, thin
from rba_compress.units.registry import unit_of
from rba_compress.units.token_merge import SIZED


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
        plan: the replacements and refits.
        tensors: the fitted tensors of its maps, by their key in the compressed model's state dict. They
            take the dtype and device of the block that they replace.
        inplace: rewrite `model` itself; otherwise it is left untouched and a deep copy is returned.
        traces: cache of the model's traced blocks, where there is one.

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
    """Splice a new module tree that shares the model's weights: for evaluation, not for keeping.

    Args:
        model, plan, tensors: as in `splice`.
        traces: cache of the model's traced blocks, kept from splice to splice.
    """
    return _splice(copy_model(model, share=True), plan, tensors, traces or Traces())


def _splice(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor], traces: Traces) -> nn.Module:
    _check(model, plan, tensors)
    # Every module is made before the first block is replaced: a unit may refuse.
    forms, sized = forms_of(plan)
    made = [(new, _module(model, new, tensors, traces, forms[new.key])) for new in plan.replacements]
    carrying = [
        (block, thin(model, block, nn.Identity(), traces, unit=SIZED, form=form))
        for block, form in sized
    ]
    gone = [b for new in plan.replacements if unit_of(new.unit).removes for b in new.blocks]
    keep_cache_length(model, gone)
    for new, module in made:
        first = model.get_submodule(new.blocks[0].path)
        for block in new.blocks:
            hold(model, block.path.rpartition(".")[0])
        replace_blocks(model, new.blocks, module)
        take_place(model.get_submodule(new.blocks[0].path), first)
    for block, module in carrying:
        hold(model, block.path.rpartition(".")[0])
        replace_blocks(model, [block], module)
    for refit in plan.refits:
        _refit(model, refit, tensors)
    if plan.healed is not None:
        replace_parameters(model, {key: tensors[key] for key in plan.healed.keys})
    refuse_writers(model, plan)
    return model


def forms_of(plan: Plan) -> tuple[dict[str, Form], list[tuple[Block, Form]]]:
    """Return the form of each replacement by key, and the other blocks whose stream carries sizes."""
    forms, others = {}, []
    for chain in dict.fromkeys(r.chain for r in plan.replacements):
        own = [r for r in plan.in_order if r.chain == chain]
        first = next((r for r in own if r.behind), None)
        at = {b: r for r in own for b in range(r.start, r.stop)}
        last = max(at) if first is None else first.start + len(first.behind)
        # Behind an exact read-out the stream has the read positions alone, and no sizes.
        end = next((r.start for r in own if r.exact), last + 1)
        taken = sum(int(r.level or 0) for r in own if r.behind)
        gone = taken if first is not None and first.restores else 0
        for r in own:
            carried = first is not None and first.start < r.start <= end
            hands = first is not None and first.start <= r.start and r.stop - 1 < min(last, end)
            forms[r.key] = Form(
                r.reads,
                r.exact,
                r.level,
                sized=carried,
                hands_sizes=hands,
                restored=gone * (carried and r.stop - 1 == last),
                by_attention=bool(r.behind) and not r.restores,
            )
        if first is None:
            continue
        for b, block in enumerate(first.behind, first.start + 1):
            if b not in at and b <= end:
                ends = b == last
                form = Form(first.reads, sized=True, hands_sizes=not ends, restored=gone * ends)
                others.append((block, form))
    return forms, others


def _module(
    model: nn.Module,
    new: Replacement,
    tensors: Mapping[str, Tensor],
    traces: Traces,
    form: Form,
) -> nn.Module:
    """Return the module that replaces the blocks, its tensors in their dtype and on their device.

    Raises:
        PlanError: the unit cannot cut the block.
    """
    unit, first = unit_of(new.unit), new.blocks[0].path
    like = next(
        (
            parameter
            for block in new.blocks
            for parameter in model.get_submodule(block.path).parameters()
            if parameter.is_floating_point()
        ),
        torch.empty(0),
    )
    device = execution_device(model, like, first)
    module = built(unit, new).to(like.dtype).to_empty(device=device)
    state = module.state_dict()
    module.load_state_dict({n: tensors[f"{new.key}{n}"].reshape(v.shape) for n, v in state.items()})
    try:
        return unit.rewrite(model, new, module, traces, form)
    except ModelError as error:
        raise PlanError(f"{new}: {first} cannot be thinned: {error}") from error


def _refit(model: nn.Module, refit: Refit, tensors: Mapping[str, Tensor]) -> None:
    """Give a kept layer its re-solved tensors."""
    hold(model, refit.path)
    layer = model.get_submodule(refit.path)
    for name, old in _moved(layer, refit):
        # A new tensor: the old one may be shared with the original.
        value = tensors[f"{refit.key}{name}"].to(old.device, old.dtype).clone()
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(layer, name, value)


def _check(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    taken: dict[str, Replacement] = {}
    wanted: set[str] = set()
    for replacement in plan.replacements:
        for block in replacement.blocks:
            other = next((path for path in taken if nested(path, block.path)), None)
            if other is not None:
                raise PlanError(f"{replacement} and {taken[other]} share the block {block.path}")
            taken[block.path] = replacement
            module = _submodule(model, block.path)
            if module is None:
                raise PlanError(
                    f"{replacement}: {type(model).__name__} has no block {block.path!r}; the plan is "
                    "of another architecture"
                )
            kind = type(module).__name__
            if not isinstance(model, fx.GraphModule) and kind != block.type:
                raise PlanError(
                    f"{replacement}: {block.path} is a {kind}, the plan replaces a {block.type}"
                )
        shapes = unit_of(replacement.unit).shapes(replacement)
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


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path; None where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _check_refits(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> set[str]:
    """Check the refits, and return the keys of their tensors."""
    wanted: set[str] = set()
    spans = [block.path for r in plan.replacements if unit_of(r.unit).removes for block in r.blocks]
    for refit in plan.refits:
        if any(f"{refit.path}.".startswith(f"{path}.") for path in spans):
            raise PlanError(f"{refit}: it is inside of a block that is replaced")
        layer = _submodule(model, refit.path)
        if layer is None or not _refittable(layer, refit):
            raise PlanError(f"{type(model).__name__} has no layer {refit.path!r} to refit")
        for name, value in _moved(layer, refit):
            given = tensors.get(f"{refit.key}{name}")
            if given is None or given.shape != value.shape:
                raise PlanError(f"{refit}: its tensor {name!r} is missing or of another shape")
            wanted.add(f"{refit.key}{name}")
    return wanted


def _check_healed(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> set[str]:
    """Check the trained tensors, and return their keys without those of maps, checked already."""
    if plan.healed is None:
        return set()
    own = dict(model.named_parameters())
    maps = tuple(r.key for r in plan.replacements)
    trained = dict.fromkeys(plan.healed.keys)
    wanted = {key for key in trained if not maps or not key.startswith(maps)}
    for key in sorted(wanted):
        if key not in own or key not in tensors or tensors[key].shape != own[key].shape:
            raise PlanError(
                f"the trained tensor {key!r} is missing, or is not of this {type(model).__name__}"
            )
    return wanted


def _refittable(layer: nn.Module, refit: Refit) -> bool:
    return isinstance(
        getattr(layer, "running_mean" if isinstance(refit, NormRefit) else "weight", None), Tensor
    )


def _moved(layer: nn.Module, refit: Refit) -> list[tuple[str, Tensor]]:
    """Return the tensors of a layer that a refit changes."""
    if isinstance(refit, NormRefit):
        return [(name, getattr(layer, name)) for name in STATISTICS]
    return list(layer.named_parameters(recurse=False))
