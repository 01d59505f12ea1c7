"""Form of a loader: which items of a batch are a model's inputs, and which are labels.

A tuple's items are passed by position for as long as `forward` takes them. Where a parameter is
optional, an item is tried in its place on two samples. The last integer vector is labels, and so is an
item with the shape of the output. Nothing else is guessed: an item that could be an argument but does
not run as one is refused, and the error names the dict form, which is never ambiguous.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.core.batch import (
    LABELS,
    Batch,
    Form,
    FormOf,
    as_batch,
    as_labels,
    class_labels,
    item_name,
    plain_form,
)
from rba_compress.core.errors import LoaderError, RBAError
from rba_compress.core.inference import evaluating
from rba_compress.core.outputs import main_output

_Parameter = inspect.Parameter
_POSITIONAL = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)


def form_of(model: nn.Module) -> FormOf:
    """Return a function that derives a loader's form from its first item."""
    return partial(_form, model)


def batch_of(model: nn.Module, item: Any) -> Batch:
    """Return one item of a loader as a batch for `model`, read with the form of that item."""
    return item if isinstance(item, Batch) else as_batch(item, _form(model, item))


def _form(model: nn.Module, item: Any) -> Form:
    """Return the form of an item.

    Raises:
        LoaderError: an item could be an input or labels.
    """
    plain = as_batch(item, plain_form(item).model_copy(update={"labels": None}))  # named errors first
    with torch.no_grad():
        if plain.args:
            return _tuple_form(model, item, plain)
        return _dict_form(model, item, plain)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # a builtin or a wrapper without a signature
        return {}


def _places(parameters: Mapping[str, inspect.Parameter]) -> tuple[list[str], int, bool]:
    """Return the names of positional parameters for tensors, how many are required, and True if `*args`
    is taken.
    """
    named = [p for p in parameters.values() if p.kind in _POSITIONAL]
    # A setting such as is_causal=False ends the parameters for tensors.
    end = next((k for k, p in enumerate(named) if isinstance(p.default, (bool, int, float, str))), None)
    names = [p.name for p in named[:end]]
    required = sum(p.default is _Parameter.empty for p in named)
    return names, required, any(p.kind is _Parameter.VAR_POSITIONAL for p in parameters.values())


# --- tuples ------------------------------------------------------------------------------------


def _tuple_form(model: nn.Module, item: Any, plain: Batch) -> Form:
    items = [*item] if isinstance(item, (tuple, list)) else [item]
    names, required, starred = _places(_parameters(model))
    taken = max(1, min(required, len(items)))
    labels: int | None = None
    ignored: list[int] = []
    rest = [k for k in range(taken, len(items)) if _sampled(items[k], len(plain))]
    ignored += [k for k in range(taken, len(items)) if k not in rest]
    vectors = [k for k in rest if class_labels(items[k]) is not None]
    output = _output(model, items[:taken]) if rest else None
    for end in range(len(items), taken, -1) if rest and output is None else ():
        # A decoder's input may be required, though its parameter is optional.
        output = _output(model, items[:end]) if end <= len(names) or starred else None
        if output is not None:
            taken, rest = end, [k for k in rest if k >= end]
            break
    for k in rest:
        free, open_place = labels is None, starred or taken < len(names)
        shaped = output is not None and _targets(items[k], output, len(plain))
        if free and ((k == rest[-1] and k in vectors) or shaped):
            labels = k
            continue
        tried = _tried(model, items[: k + 1], names) if open_place and k == taken else None
        if tried is not None:
            taken, output = k + 1, tried
        elif free and vectors == [k]:
            labels = k
        elif output is None:  # the recording will say why
            ignored.append(k)
        elif open_place or _keywords(model):
            raise LoaderError(_ambiguous(model, items, k, names))
        elif free and k in vectors:
            raise LoaderError(
                f"items {vectors} of a batch are integer vectors, and one of them may be the labels: "
                "yield (input, labels)"
            )
        else:
            ignored.append(k)
    # What no argument takes is a target of another shape, such as the classes of a map's pixels.
    if labels is None and rest and ignored[-1:] == rest[-1:] and output is not None:
        target = as_labels(items[rest[-1]])
        labels = ignored.pop() if target is not None and target.ndim > 1 else None
    told = [*names[:taken], *(f"item {k}" for k in range(len(names), taken))]
    return Form(
        inputs=tuple(told),
        arguments=taken,
        named=len(names) >= taken and not _positional_only(model),
        labels=labels,
        ignored=tuple(item_name(k) for k in sorted(ignored)),
    )


def _positional_only(model: nn.Module) -> bool:
    return any(p.kind is _Parameter.POSITIONAL_ONLY for p in _parameters(model).values())


def _sampled(value: Any, samples: int) -> bool:
    """Tell whether an item holds one entry for each sample, as numbers."""
    tensor = as_labels(value)
    return tensor is not None and len(tensor) == samples


def _targets(value: Any, output: Tensor, samples: int) -> bool:
    """Tell whether an item has the shape of the output, apart from a last axis of size one."""
    tensor = as_labels(value)
    if tensor is None or output.shape[:1] != (min(2, samples),):
        return False

    def squeezed(shape: torch.Size) -> tuple[int, ...]:
        return tuple(shape[1:-1] if shape[1:] and shape[-1] == 1 else shape[1:])

    return squeezed(tensor.shape) == squeezed(output.shape)


def _tried(model: nn.Module, items: list[Any], names: list[str]) -> Tensor | None:
    """Return the output with the last item passed by position, None where the model refuses it."""
    last, k = items[-1], len(items) - 1
    if not isinstance(last, Tensor):
        return None
    is_mask = k < len(names) and "mask" in names[k] and not last.is_floating_point()
    if is_mask and not bool(((last == 0) | (last == 1)).all()):
        return None
    return _output(model, items)


def _keywords(model: nn.Module) -> bool:
    """Tell whether `forward` has parameters that are passed by keyword alone, settings aside."""
    parameters = _parameters(model).values()
    return any(
        p.kind is _Parameter.KEYWORD_ONLY and not isinstance(p.default, (bool, int, float, str))
        for p in parameters
    )


def _ambiguous(model: nn.Module, items: list[Any], k: int, names: list[str]) -> str:
    own = [p.name for p in _parameters(model).values() if p.kind is not _Parameter.VAR_KEYWORD]
    value = items[k]
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    at = f" (by position it would be {names[k]!r})" if k < len(names) else ""
    keys = [*names[:1], *(n for n in own if n not in names[:1])][:4]
    return (
        f"item {k} of a batch, {shape}, is neither labels nor an argument that "
        f"{type(model).__name__}.forward runs with{at}: yield a dict of its keywords, "
        f"({', '.join(keys)}), with the labels under 'labels'"
    )


def _output(model: nn.Module, args: list[Any], kwargs: dict[str, Any] | None = None) -> Tensor | None:
    """Return the main output on two samples, None where the model does not run."""
    batch = Batch(tuple(args), dict(kwargs or {}), None)
    return _ran(model, batch)


def _ran(model: nn.Module, batch: Batch) -> Tensor | None:
    try:
        rows = list(range(min(2, len(batch))))
        with evaluating(model):
            return main_output(batch.select(rows).to(model).run(model))
    except RBAError:
        return None
    except Exception:  # noqa: BLE001  a model may raise anything at arguments that it does not take
        return None


# --- dicts -------------------------------------------------------------------------------------


def _dict_form(model: nn.Module, item: Any, plain: Batch) -> Form:
    items = [*item] if isinstance(item, (tuple, list)) else [item]
    parameters = _parameters(model)
    wrapped = _is_wrapped(model, parameters, plain)
    whole = replace(plain, wrapped=wrapped)
    labels: int | str | None = None
    for key in LABELS:
        if key in plain.kwargs and _is_label(model, key, whole, parameters):
            labels = key
            break
    vectors = [k for k in range(1, len(items)) if _sampled(items[k], len(plain))]
    if labels is None and vectors:
        labels = vectors[-1]
    keys = [key for key in plain.kwargs if key != labels]
    return Form(
        inputs=tuple(keys),
        labels=labels,
        wrapped=wrapped,
        ignored=tuple(item_name(k) for k in range(1, len(items)) if k != labels),
    )


def _is_wrapped(model: nn.Module, parameters: Mapping[str, inspect.Parameter], batch: Batch) -> bool:
    """Tell whether `forward` takes the whole dict as its one positional argument."""
    lacking = [
        p.name
        for p in parameters.values()
        if p.kind in _POSITIONAL and p.default is _Parameter.empty and p.name not in batch.kwargs
    ]
    if len(lacking) != 1:
        return False
    return _ran(model, batch) is None and _ran(model, replace(batch, wrapped=True)) is not None


def _is_label(
    model: nn.Module, key: str, batch: Batch, parameters: Mapping[str, inspect.Parameter]
) -> bool:
    """Tell whether the output does not depend on what a dict holds under a label's key.

    Labels of a language model (N, T) stay arguments: some models derive the decoder's input from them.
    """
    if not _sampled(batch.kwargs[key], len(batch)):
        return False
    own = parameters.get(key)
    rest = {name: value for name, value in batch.kwargs.items() if name != key}
    if not any(isinstance(value, Tensor) and value.ndim for value in rest.values()):
        return False
    without = _ran(model, replace(batch, kwargs=rest))
    if own is None or batch.wrapped:
        return without is not None or not any(
            p.kind is _Parameter.VAR_KEYWORD for p in parameters.values()
        )
    tensor = as_labels(batch.kwargs[key])
    if own.default is _Parameter.empty or tensor is None:
        return False
    if tensor.ndim > 1 and not tensor.is_floating_point():
        return False
    if without is None:
        return False
    if hasattr(model, "config"):
        # A transformers model that sees labels may write a problem type into its configuration.
        return True
    with_it = _ran(model, batch)
    return with_it is None or (with_it.shape == without.shape and torch.equal(with_it, without))
