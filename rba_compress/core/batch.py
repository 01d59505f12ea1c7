"""Batches of a user's loader as arguments for the model: the only module that knows a loader's forms.

A loader is any iterable of batches that can be read more than once. A batch is a tensor, a tuple or
list whose first items are the inputs (tensors, or one dict), or a dict that is passed as keywords.
A `Form` says which items are inputs and which are labels; `loader_form` derives it from the first batch
and the model's signature. Labels are used to report accuracy, for a budget of `accuracy_drop`, and to
choose the divergence of the output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from rba_compress.core.errors import LoaderError
from rba_compress.core.io import below
from rba_compress.core.offload import execution_device
from rba_compress.core.schema import Frozen

FormOf = Callable[[Any], "Form"]
"""Function that derives the form of a loader from its first item."""


class Form(Frozen):
    """Assignment of a loader's items to the arguments of a model, the same for every batch."""

    inputs: tuple[str, ...] = ()
    """Names of the model's parameters that the items are passed to, in order."""
    arguments: int = 1
    """Number of leading items of a tuple that are passed to the model."""
    named: bool = False
    """True where the items behind the first are passed by name, so that a mask can be recognised."""
    labels: int | str | None = None
    """Index of the tuple item, or key of the dict, that holds the labels."""
    wrapped: bool = False
    """True where a dict is one positional argument of the model, not its keywords."""
    ignored: tuple[str, ...] = ()
    """Names of the items that are neither inputs nor labels."""

    def __str__(self) -> str:
        parts = [f"inputs {', '.join(self.inputs)}"] if self.inputs else []
        if self.labels is not None:
            parts.append(f"labels {item_name(self.labels)}")
        return "; ".join([*parts, *([f"ignored {', '.join(self.ignored)}"] if self.ignored else [])])


def item_name(item: int | str) -> str:
    """Return the name that messages use for an item of a tuple, counted from 0, or a key of a dict."""
    return f"item {item}" if isinstance(item, int) else repr(item)


@dataclass(frozen=True)
class Batch:
    """Batch of samples: positional `args` and keyword `kwargs` of the model, and labels where given.

    Labels are (N,) integers, or (N, ...) numbers: one for each output of a sample.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    wrapped: bool = False
    """True where `kwargs` are passed as one dict by position."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {f"input {i}": a for i, a in enumerate(self.args)} | self.kwargs
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        """Return the number of samples: the first dimension of the first tensor that has one."""
        return int(next(t.shape[0] for t in self.tensors.values() if t.ndim))

    def digest(self, *, whole: bool = False) -> int:
        """Return a hash of the first sample, or of all samples, to recognise the batch later."""
        hashed = hashlib.blake2b(digest_size=8)
        for tensor in self.tensors.values():
            rows = tensor[:1] if tensor.ndim and not whole else tensor
            hashed.update(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return int.from_bytes(hashed.digest(), "big", signed=True)

    def digests(self) -> list[int]:
        """Return a hash of each sample, to find copies."""
        n = len(self)
        rows = [t for t in self.tensors.values() if t.ndim and len(t) == n]
        parts = [t.detach().cpu().contiguous().reshape(n, -1).view(torch.uint8).numpy() for t in rows]
        found = []
        for each in zip(*parts, strict=True):
            hashed = hashlib.blake2b(digest_size=8)
            for part in each:
                hashed.update(part.data)
            found.append(int.from_bytes(hashed.digest(), "big", signed=True))
        return found

    def state(self) -> tuple[dict[str, JsonValue], dict[str, Tensor]]:
        """Return the keywords that are not tensors, and the tensors by a name that tells their place.

        Raises:
            LoaderError: a keyword is neither a tensor nor a JSON value.
        """
        others = {key: v for key, v in self.kwargs.items() if not isinstance(v, Tensor)}
        named = {f"argument.{i}": value for i, value in enumerate(self.args)}
        named |= {f"keyword.{key}": v for key, v in self.kwargs.items() if key not in others}
        named |= {} if self.labels is None else {"labels": self.labels}
        try:
            return json.loads(json.dumps(others)), named
        except (TypeError, ValueError) as error:
            raise LoaderError(f"a batch holds what no file can ({error}): pass tensors") from error

    @classmethod
    def restored(
        cls, others: dict[str, JsonValue], named: Mapping[str, Tensor], *, wrapped: bool = False
    ) -> Batch:
        """Return the batch that a `state` describes."""
        arguments = below("argument.", named)
        return cls(
            tuple(arguments[str(i)] for i in range(len(arguments))),
            {**below("keyword.", named), **others},
            named.get("labels"),
            wrapped,
        )

    def _map(self, change: Any) -> Batch:
        def apply(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            args=tuple(apply(a) for a in self.args),
            kwargs={k: apply(v) for k, v in self.kwargs.items()},
            labels=apply(self.labels),
        )

    def select(self, rows: list[int]) -> Batch:
        """Return the samples `rows`; a tensor with another first dimension is kept whole."""
        n = len(self)
        if rows == list(range(n)):
            return self
        index = torch.tensor(rows, dtype=torch.long)

        def pick(value: Tensor) -> Tensor:
            if value.ndim == 0 or value.shape[0] != n:
                return value
            return value[index.to(value.device)]

        return self._map(pick)

    def with_tensor(self, name: str, value: Tensor) -> Batch:
        """Return the batch with `value` in place of the tensor `name`, one of its `tensors`."""
        if name in self.kwargs:
            return replace(self, kwargs={**self.kwargs, name: value})
        places = range(len(self.args))
        return replace(
            self, args=tuple(value if name == f"input {i}" else self.args[i] for i in places)
        )

    def is_sequence(self, value: Tensor) -> bool:
        """Return True if a tensor may hold sequences: token ids (N, T), or a mask beside them."""
        return value.ndim == 2 and len(value) == len(self) and not value.is_floating_point()

    def padding(self, *, decoder: bool = False) -> Tensor | None:
        """Return the mask (N, T) of text, true at real tokens; None where there is none.

        Args:
            decoder: return the mask of the decoder's input, where the decoder has an input of its own.
        """
        own = decoder and "decoder_input_ids" in self.kwargs
        mask = self.kwargs.get("decoder_attention_mask" if own else "attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @property
    def length(self) -> int | None:
        """Length of the batch's sequences; None where there are none, or where lengths differ."""
        lengths = {t.shape[1] for t in self.tensors.values() if self.is_sequence(t)}
        return lengths.pop() if len(lengths) == 1 else None

    def cut(self, length: int) -> Batch:
        """Return the batch with its sequences cut to their first `length` positions."""
        return self._map(lambda value: value[:, :length] if self.is_sequence(value) else value)

    @classmethod
    def join(cls, batches: list[Batch]) -> Batch:
        """Join batches; tensors of one name must agree in all dimensions but the first.

        The joined batch has labels where every batch has labels.
        """
        first = batches[0]

        def joined(values: list[Any]) -> Any:
            return torch.cat(values) if isinstance(values[0], Tensor) else values[0]

        labelled = all(b.labels is not None for b in batches)
        return cls(
            tuple(joined([b.args[i] for b in batches]) for i in range(len(first.args))),
            {key: joined([b.kwargs[key] for b in batches]) for key in first.kwargs},
            joined([b.labels for b in batches]) if labelled else None,
            first.wrapped,
        )

    def to(self, model: nn.Module) -> Batch:
        """Move inputs to the model's device, floating-point ones to its dtype; labels are not moved."""
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        if parameter is None:
            return self
        device = execution_device(model, parameter)

        def move(value: Tensor) -> Tensor:
            dtype = parameter.dtype if value.is_floating_point() else value.dtype
            return value.to(device, dtype, non_blocking=True)

        return replace(self._map(move), labels=self.labels)

    def run(self, model: nn.Module) -> Any:
        """Return the model's output on this batch."""
        if self.wrapped:  # a copy, because models that take a dict may write into it
            return model({**self.kwargs})
        return model(*self.args, **self.kwargs)


def as_batch(item: Any, form: Form | None = None) -> Batch:
    """Return one item of a loader as a batch.

    Args:
        form: roles of the items. By default the first item of a tuple is the input, and
            integers (N,) in the second one, or under `labels` or `label` in a dict, are labels.

    Raises:
        LoaderError: the item is none of the known forms, or holds no sample, or no values.
    """
    form = form or plain_form(item)
    items = [*item] if isinstance(item, (tuple, list)) and item else [item]
    first, labels = items[0], None
    if isinstance(form.labels, int) and form.labels < len(items):
        labels = as_labels(items[form.labels])
    if isinstance(first, Mapping):
        kwargs = dict(first)
        if isinstance(form.labels, str) and form.labels in kwargs:
            labels = as_labels(kwargs.pop(form.labels))
        batch = Batch((), kwargs, labels, form.wrapped)
    elif isinstance(first, Tensor):
        if len(items) < form.arguments:
            raise LoaderError(
                f"a batch holds {len(items)} items, the first one {form.arguments} inputs: make every "
                "batch of one kind"
            )
        rest = items[1 : form.arguments]
        if form.named:
            batch = Batch((first,), dict(zip(form.inputs[1:], rest, strict=True)), labels)
        else:
            batch = Batch((first, *rest), {}, labels)
    else:
        raise LoaderError(
            f"a batch is a {type(item).__name__} whose input is a {type(first).__name__}: yield a "
            "tensor, a tuple whose first item is the input, or a dict of the model's keywords"
        )
    _require_values(batch)
    return batch


def _require_values(batch: Batch) -> None:
    """Check that a batch holds samples with values, and labels of the same samples.

    Raises:
        LoaderError: a batch holds no sample, tensors without values, or labels of other samples.
    """
    sized = [t for t in batch.tensors.values() if t.ndim]
    if not sized or len(batch) == 0:
        raise LoaderError("a batch holds no sample: yield tensors whose first dimension counts samples")
    for name, tensor in batch.tensors.items():
        if tensor.is_meta:
            raise LoaderError(
                f"a batch holds {name} on the meta device, without values: yield real data"
            )
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise LoaderError(f"a batch holds {name} as a {kind} tensor: yield dense ones")
    labels = batch.labels
    if labels is not None and len(labels) != len(batch):
        raise LoaderError(f"a batch has {len(batch)} samples and {len(labels)} labels")


def plain_form(item: Any) -> Form:
    """Return the form of an item where no model is known: one input, and integer labels (N,)."""
    if isinstance(item, (tuple, list)) and len(item) > 1 and class_labels(item[1]) is not None:
        return Form(labels=1)
    first = item[0] if isinstance(item, (tuple, list)) and item else item
    if isinstance(first, Mapping):
        return Form(labels=next((k for k in LABELS if class_labels(first.get(k)) is not None), None))
    return Form()


LABELS = ("labels", "label")
"""Keys of a dict that may hold labels, in order of preference."""


def as_labels(value: Any) -> Tensor | None:
    """Return a tensor, an array or a list as a tensor of labels, None for anything else.

    Integers (N, 1) become (N,).
    """
    if isinstance(value, (np.ndarray, list)) and len(value):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return None
    if not isinstance(value, Tensor) or value.is_complex() or value.is_meta or not value.ndim:
        return None
    if value.ndim == 2 and value.shape[1] == 1 and not value.is_floating_point():
        value = value.flatten()
    return value if isinstance(value, Tensor) else None


def class_labels(value: Any) -> Tensor | None:
    """Return integer labels (N,); None for anything else."""
    labels = as_labels(value)
    return None if labels is None or labels.is_floating_point() or labels.ndim != 1 else labels
