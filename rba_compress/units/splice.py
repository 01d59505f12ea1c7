"""Execution of a plan: checked against the network and its tensors, then spliced unit by unit.

Nothing is decided here, and nothing is changed before every check has passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from rba_compress.core.errors import ModelError, PlanError
from rba_compress.core.inference import unwrap
from rba_compress.core.offload import execution_device, hold, take_place
from rba_compress.core.plan import (
    STATISTICS,
    Attention,
    Block,
    Count,
    NormRefit,
    Plan,
    Refit,
    Replacement,
)
from rba_compress.core.schema import nested
from rba_compress.graph.attention_heads import PARTS, part_layers
from rba_compress.graph.rewrite import (
    copy_model,
    keep_cache_length,
    refuse_writers,
    replace_blocks,
    replace_parameters,
    resize,
)
from rba_compress.units.base import beside, built
from rba_compress.units.block_variants import Form, Traces, thin
from rba_compress.units.registry import unit_of, width_unit_of
from rba_compress.units.token_merge import SIZED
from rba_compress.units.width import head_sizes


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
    keep_cache_length(model, _gone(plan))
    for block, attention in _attentions(plan):
        traces.of(model, block)  # while the block's code still runs
        part_layers(model, block.path, attention)
    for new in (r for r in plan.replacements if r.inner):
        width_unit_of(new.unit).place(model, new)
        resize(model, {f"{new.key}{name}": tensors[f"{new.key}{name}"] for name in new.narrowed})
        for count in _counts(new):
            module = model.get_submodule(f"{new.key}{count.module}".rstrip("."))
            setattr(module, count.name, count.each * new.kept)
    outer = [new for new in plan.replacements if not new.inner]
    made = [(new, _module(model, new, tensors, traces, forms[new.key])) for new in outer]
    carrying = [
        (block, thin(model, block, nn.Identity(), traces, unit=SIZED, form=form))
        for block, form in sized
    ]
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


def _gone(plan: Plan) -> list[tuple[str, str]]:
    """Return the paths of modules that do not run any more, each with that of the list of its block."""
    found = []
    for new in plan.replacements:
        for block in new.blocks:
            gone = width_unit_of(new.unit).gone(new) if new.inner else []
            gone += [block.path] * unit_of(new.unit).removes
            found += [(block.path.rpartition(".")[0], path) for path in gone]
    return found


def _counts(new: Replacement) -> tuple[Count, ...]:
    width = new.blocks[0].width(new.unit)
    return () if width is None else width.counts


def _attentions(plan: Plan) -> list[tuple[Block, Attention]]:
    """Return the blocks whose attention is narrowed, each once."""
    found = {}
    for new in plan.replacements:
        width = new.blocks[0].width(new.unit)
        if new.inner and width is not None and width.attention is not None:
            found[new.blocks[0].path] = new.blocks[0], width.attention
    return list(found.values())


def forms_of(plan: Plan) -> tuple[dict[str, Form], list[tuple[Block, Form]]]:
    """Return the form of each replacement by key, and the other blocks whose stream carries sizes."""
    forms, others = {}, []
    for chain in dict.fromkeys(r.chain for r in plan.replacements):
        inner: dict[int, list[Replacement]] = {}
        for r in (r for r in plan.in_order if r.chain == chain and r.inner):
            inner.setdefault(r.start, []).append(r)
        heads = {b: head_sizes(rs[0].blocks[0], rs) for b, rs in inner.items()}
        own = [r for r in plan.in_order if r.chain == chain and not r.inner]
        first = next((r for r in own if r.behind), None)
        at = {b: r for r in own for b in range(r.start, r.stop)}
        last = max(at, default=-1) if first is None else first.start + len(first.behind)
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
                heads=heads.get(r.start),
            )
        sized = {} if first is None else dict(enumerate(first.behind, first.start + 1))
        for b, block in sized.items():
            if b not in at and b <= end:
                assert first is not None
                ends = b == last
                form = Form(first.reads, sized=True, hands_sizes=not ends, restored=gone * ends)
                others.append((block, replace(form, heads=heads.get(b))))
        for b, sizes in heads.items():
            if sizes is not None and b not in at and not (b in sized and b <= end):
                others.append((inner[b][0].blocks[0], Form(heads=sizes)))
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
    names = [f"{refit.key}{name}" for name, _ in _moved(model.get_submodule(refit.path), refit)]
    resize(model, {name: tensors[name] for name in names})


def _check(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    taken: list[tuple[str, Replacement]] = []
    wanted: set[str] = set()
    for replacement in plan.replacements:
        for block in replacement.blocks:
            for path, other in taken:
                if nested(path, block.path) and not (path == block.path and beside(replacement, other)):
                    raise PlanError(f"{replacement} and {other} share the block {block.path}")
            taken.append((block.path, replacement))
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
            if replacement.inner and not width_unit_of(replacement.unit).gone(replacement):
                _require_narrower(model, replacement, name, tensors[name])
        wanted |= set(expected)
    wanted |= _check_refits(model, plan, tensors) | _check_healed(model, plan, tensors)
    stray = sorted(set(tensors) - wanted)
    if stray:
        raise PlanError(f"the tensors {stray[:3]} belong to no replacement of the plan")


def _require_narrower(model: nn.Module, new: Replacement, name: str, tensor: Tensor) -> None:
    """Require that a model has a tensor that is at least as large as the narrowed one.

    Raises:
        PlanError: it has none.
    """
    module, attribute = _submodule(model, name.rpartition(".")[0]), name.rpartition(".")[2]
    old = getattr(module, attribute, None)
    source = _parts(new).get(name)
    if source is not None:
        module, attribute = (
            _submodule(model, source[0].rpartition(".")[0]),
            source[0].rpartition(".")[2],
        )
        whole = getattr(module, attribute, None)
        old = whole[source[1]] if isinstance(whole, Tensor) else None
    if not isinstance(old, Tensor):
        raise PlanError(f"{new}: {type(model).__name__} has no tensor {name!r}")
    pairs = zip(tensor.shape, old.shape, strict=False)
    if tensor.ndim != old.ndim or any(size > before for size, before in pairs):
        raise PlanError(
            f"{new}: {name!r} has shape {tuple(tensor.shape)}, and {tuple(old.shape)} in this "
            f"{type(model).__name__}: the plan is of another architecture"
        )


def _parts(new: Replacement) -> dict[str, tuple[str, slice]]:
    """Return the tensors of layers that are a part of another one in the original block, with the name
    and the rows of that one's tensor.
    """
    width, found = new.blocks[0].width(new.unit), {}
    attention = None if width is None else width.attention
    for rows in (getattr(attention, part) for part in PARTS) if attention else ():
        if rows is not None and rows.part:
            found[f"{new.key}{rows.layer}.weight"] = f"{new.key}{rows.source}", rows.rows
            if rows.bias:
                found[f"{new.key}{rows.layer}.bias"] = f"{new.key}{rows.bias}", rows.rows
    return found


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
    shapes = _narrowed_shapes(plan)
    for refit in plan.refits:
        if any(f"{refit.path}.".startswith(f"{path}.") for path in spans):
            raise PlanError(f"{refit}: it is inside of a block that is replaced")
        layer = _submodule(model, refit.path)
        if layer is None or not _refittable(layer, refit):
            raise PlanError(f"{type(model).__name__} has no layer {refit.path!r} to refit")
        for name, value in _moved(layer, refit):
            given = tensors.get(f"{refit.key}{name}")
            if given is None or given.shape != shapes.get(f"{refit.key}{name}", value.shape):
                raise PlanError(f"{refit}: its tensor {name!r} is missing or of another shape")
            wanted.add(f"{refit.key}{name}")
    return wanted


def _check_healed(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> set[str]:
    """Check the trained tensors, and return their keys without those of maps, checked already."""
    if plan.healed is None:
        return set()
    own = dict(model.named_parameters())
    outer = [r for r in plan.replacements if not r.inner]
    trained = dict.fromkeys(plan.healed.keys)
    wanted = {key for key in trained if not any(r.owns(key) for r in outer)}
    shapes = {name: value.shape for name, value in own.items()}
    parts = {name: place for r in plan.replacements for name, place in _parts(r).items()}
    shapes |= {name: own[source][rows].shape for name, (source, rows) in parts.items() if source in own}
    shapes |= _narrowed_shapes(plan)
    for key in sorted(wanted):
        if key not in shapes or key not in tensors or tensors[key].shape != shapes[key]:
            raise PlanError(
                f"the trained tensor {key!r} is missing, or is not of this {type(model).__name__}"
            )
    return wanted


def _narrowed_shapes(plan: Plan) -> dict[str, torch.Size]:
    """Return the shapes of all tensors that the plan narrows, by their names in a state dict."""
    return {
        f"{r.key}{name}": torch.Size(shape)
        for r in plan.replacements
        for name, shape in r.narrowed.items()
    }


def _refittable(layer: nn.Module, refit: Refit) -> bool:
    return isinstance(
        getattr(layer, "running_mean" if isinstance(refit, NormRefit) else "weight", None), Tensor
    )


def _moved(layer: nn.Module, refit: Refit) -> list[tuple[str, Tensor]]:
    """Return the tensors of a layer that a refit changes."""
    if isinstance(refit, NormRefit):
        return [(name, getattr(layer, name)) for name in STATISTICS]
    return list(layer.named_parameters(recurse=False))
