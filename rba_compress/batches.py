"""Whatever a user's loader yields, as arguments for the model: the only place that knows its forms.

A loader is any iterable of batches that can be read more than once. A batch is a tensor, a tuple or
list whose first items are the inputs (tensors, or one dict), or a dict that is passed as keywords.
Which items are inputs and which are labels is a `Form`, worked out on the first batch and the model's
signature (`rba_compress.loader_form`). Labels are used to report accuracy, for a budget of
`accuracy_drop`, and to tell what the output means.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rba_compress.errors import LoaderError, RBAError
from rba_compress.files import below
from rba_compress.moments import out_of_memory
from rba_compress.offload import execution_device
from rba_compress.ranks import ALONE, Ranks, current
from rba_compress.schema import Frozen

Part = Literal["fit", "choose", "confirm"]

FormOf = Callable[[Any], "Form"]
"""Works out the form of a loader on its first item."""

ENDLESS = 100_000
"""Batches after which a loader that tells no length is taken for one without an end."""

_PATTERN: tuple[Part, ...] = ("fit",) * 5 + ("choose",) * 4 + ("confirm",)


class Form(Frozen):
    """Assignment of a loader's items to the arguments of a model, the same for every batch."""

    inputs: tuple[str, ...] = ()
    """Names of the model's parameters that the items are passed to, in order."""
    arguments: int = 1
    """Leading items of a tuple that are passed on."""
    named: bool = False
    """Whether those behind the first are passed by name, so that a mask is known for one."""
    labels: int | str | None = None
    """The item of a tuple, or the key of a dict, that holds labels."""
    wrapped: bool = False
    """Whether a dict is one positional argument of the model, not its keywords."""
    ignored: tuple[str, ...] = ()
    """Items that reach neither the model nor a measure."""

    def __str__(self) -> str:
        parts = [f"inputs {', '.join(self.inputs)}"] if self.inputs else []
        if self.labels is not None:
            parts.append(f"labels {item_name(self.labels)}")
        return "; ".join([*parts, *([f"ignored {', '.join(self.ignored)}"] if self.ignored else [])])


def item_name(item: int | str) -> str:
    """Return how a message names an item of a tuple, counted from 0, or a key of a dict."""
    return f"item {item}" if isinstance(item, int) else repr(item)


@dataclass(frozen=True)
class Batch:
    """One batch: keyword `kwargs` and positional `args` of the model, and labels where given.

    Labels are (N,) integers, or (N, ...) numbers: one for each output of a sample.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    wrapped: bool = False
    """Whether `kwargs` are passed as one dict by position."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {f"input {i}": a for i, a in enumerate(self.args)} | self.kwargs
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        """Samples: the first dimension of the first tensor that has one."""
        return int(next(t.shape[0] for t in self.tensors.values() if t.ndim))

    def digest(self, *, whole: bool = False) -> int:
        """Of the first sample, or of all of them, to know it again."""
        hashed = hashlib.blake2b(digest_size=8)
        for tensor in self.tensors.values():
            rows = tensor[:1] if tensor.ndim and not whole else tensor
            hashed.update(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return int.from_bytes(hashed.digest(), "big", signed=True)

    def digests(self) -> list[int]:
        """Of each sample, to tell copies."""
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
        """Its keywords that are no tensors, and its tensors, by a name that says where they belong.

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
        """The batch of a `state`."""
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
        """The samples `rows`; what has another first dimension is passed on whole."""
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
        """The batch with another tensor in place of one of its `tensors`."""
        if name in self.kwargs:
            return replace(self, kwargs={**self.kwargs, name: value})
        places = range(len(self.args))
        return replace(
            self, args=tuple(value if name == f"input {i}" else self.args[i] for i in places)
        )

    def is_sequence(self, value: Tensor) -> bool:
        """Whether a tensor of the batch may hold sequences: token ids (N, T), or a mask beside them."""
        return value.ndim == 2 and len(value) == len(self) and not value.is_floating_point()

    def padding(self, *, decoder: bool = False) -> Tensor | None:
        """The mask (N, T) of text, true at real tokens; None where there is none.

        `decoder`: of what a decoder reads, where that has an input of its own.
        """
        own = decoder and "decoder_input_ids" in self.kwargs
        mask = self.kwargs.get("decoder_attention_mask" if own else "attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @property
    def length(self) -> int | None:
        """Of its sequences; None where there are none, or some of another length."""
        lengths = {t.shape[1] for t in self.tensors.values() if self.is_sequence(t)}
        return lengths.pop() if len(lengths) == 1 else None

    def cut(self, length: int) -> Batch:
        """Its sequences cut to their first `length` positions."""
        return self._map(lambda value: value[:, :length] if self.is_sequence(value) else value)

    @classmethod
    def join(cls, batches: list[Batch]) -> Batch:
        """One batch of all samples; tensors of one name must agree in all dimensions but the first.

        It has labels where every batch has them.
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
        """On the model's device, floating-point inputs in its dtype; labels stay where they are."""
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        if parameter is None:
            return self
        device = execution_device(model, parameter)

        def move(value: Tensor) -> Tensor:
            dtype = parameter.dtype if value.is_floating_point() else value.dtype
            return value.to(device, dtype, non_blocking=True)

        return replace(self._map(move), labels=self.labels)

    def run(self, model: nn.Module) -> Any:
        """The model's output on this batch."""
        if self.wrapped:  # a copy, for such models write into their input
            return model({**self.kwargs})
        return model(*self.args, **self.kwargs)


def as_batch(item: Any, form: Form | None = None) -> Batch:
    """Read one item of a loader.

    Args:
        form: which items are inputs and labels. By default the first item of a tuple is the input, and
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
    """
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
    """Return the form of an item where no model is at hand: one input, and integer labels (N,)."""
    if isinstance(item, (tuple, list)) and len(item) > 1 and class_labels(item[1]) is not None:
        return Form(labels=1)
    first = item[0] if isinstance(item, (tuple, list)) and item else item
    if isinstance(first, Mapping):
        return Form(labels=next((k for k in LABELS if class_labels(first.get(k)) is not None), None))
    return Form()


LABELS = ("labels", "label")
"""Keys of a dict that labels are looked for under."""


def as_labels(value: Any) -> Tensor | None:
    """Labels as a tensor, from a tensor, an array or a list; (N, 1) integers become (N,)."""
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
    """Integer labels (N,); None for anything else."""
    labels = as_labels(value)
    return None if labels is None or labels.is_floating_point() or labels.ndim != 1 else labels


def read(loader: Iterable[Any], form: Form | None = None) -> Iterator[Batch]:
    """The batches of a loader, checked; on one of several ranks, its share of them.

    Args:
        form: as in `as_batch`.

    Raises:
        LoaderError: the loader is empty or one-shot, or a batch differs from the first in its
            arguments or their dtypes.
    """
    for _, _, batch in _read(loader, current(), form):
        yield batch


def _read(
    loader: Iterable[Any],
    ranks: Ranks,
    form: Form | FormOf | None = None,
    *,
    again: bool = False,
) -> Iterator[tuple[int, int, Batch]]:
    """As `read`: the number of each batch, its first sample's, and the batch.

    Args:
        ranks: of `count` batches in sequence one is each rank's.
        form: as in `as_batch`, or what works it out on the first item.
        again: whether the loader was read before.
    """
    if isinstance(loader, Tensor):
        raise LoaderError("the loader is a tensor: pass an iterable of batches, such as [tensor]")
    expected: dict[str, torch.dtype] | None = None
    index = -1
    for index, start, item in _share(loader, ranks):
        if form is not None and not isinstance(form, Form):
            form = form(item)
        batch = as_batch(item, form)
        kinds = {name: tensor.dtype for name, tensor in batch.tensors.items()}
        if expected is None:
            expected = kinds
        elif kinds != expected:
            raise LoaderError(
                f"batch {index} holds {_describe(kinds)}, the first {_describe(expected)}: make every "
                "batch of one kind"
            )
        yield index, start, batch
    if index >= 0 or ranks.count > 1:
        return  # another rank may have what this one has not
    if again:
        raise LoaderError(
            f"the loader, a {type(loader).__name__}, gives nothing when it is read again: pass one "
            "that can be read more than once, or list(loader)"
        )
    raise LoaderError("the loader is empty: pass at least one batch of samples")


def _share(loader: Iterable[Any], ranks: Ranks) -> Iterator[tuple[int, int, Any]]:
    """A rank's items of a loader: number, first sample's number, item."""
    if ranks.count > 1 and isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        from accelerate.data_loader import prepare_data_loader

        # What the other ranks read is not read here.
        starts = itertools.accumulate((len(rows) for rows in loader.batch_sampler), initial=0)
        shared = [*itertools.islice(enumerate([*starts][:-1]), ranks.rank, None, ranks.count)]
        own = prepare_data_loader(
            loader,
            device=torch.device("cpu"),
            num_processes=ranks.count,
            process_index=ranks.rank,
            even_batches=False,
            dispatch_batches=False,
        )
        for (index, start), item in zip(shared, _items(own), strict=True):
            yield index, start, item
        return
    start = 0
    for index, item in enumerate(_items(loader)):
        if index % ranks.count == ranks.rank:
            yield index, start, item
        start += len(as_batch(item))


def _items(loader: Any) -> Iterator[Any]:
    """What a loader yields.

    Raises:
        LoaderError: it cannot be iterated, or only once; it raises; it does not end.
    """
    kind = type(loader).__name__
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise LoaderError(
            f"the loader is a {kind}, which cannot be iterated: pass an iterable of batches, such as a "
            "DataLoader"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise LoaderError(f"the loader is a dataset, a {kind}: pass DataLoader(dataset, batch_size=32)")
    with _named(0):
        iterator = iter(loader)
    if iterator is loader:
        raise LoaderError(
            f"the loader is a one-shot {kind} and is read more than once: pass a DataLoader, or "
            "list(loader)"
        )
    for index in itertools.count():
        with _named(index):
            try:
                item = next(iterator)
            except StopIteration:
                return
        if index >= ENDLESS and _length(loader) is None:
            raise LoaderError(
                f"the loader, a {kind}, gave more than {ENDLESS} batches and has no length: does it "
                "never end? Pass [*itertools.islice(loader, 100)], or give it a __len__"
            )
        yield item


@contextmanager
def _named(index: int) -> Iterator[None]:
    """
    Raises:
        LoaderError: the loader's own code raises in it.
    """
    try:
        yield
    except Exception as error:
        if named_elsewhere(error):
            raise
        raise LoaderError(
            f"batch {index} of the loader could not be read ({type(error).__name__}: {error}): its "
            "dataset or transform fails there, or a worker died"
        ) from error


@contextmanager
def workers_named() -> Iterator[None]:
    """The death of a loader's worker has a name, wherever the process happens to be: torch signals it.

    Raises:
        LoaderError: a worker died in it.
    """
    try:
        yield
    except RuntimeError as error:
        if not _worker_died(error):
            raise
        raise LoaderError(
            f"the loader could not be read on ({error}): its dataset or transform ends its process, or "
            "memory ran out"
        ) from error


def named_elsewhere(error: Exception) -> bool:
    """Whether an error has a name, or gets one further out: of memory, or of a dead worker."""
    return isinstance(error, RBAError) or out_of_memory(error) or _worker_died(error)


def _worker_died(error: Exception) -> bool:
    """Whether it is torch's word of a worker's death."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # one of an IterableDataset has a __len__ that raises
        return None


def _describe(kinds: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in kinds.items())


class Split:
    """Deals the samples of a loader to the three parts, one by one.

    Every run of ten samples is dealt in an order of its own, drawn from `seed`: five to fit, four to
    choose, one to confirm. So a loader sorted by class gives every part every class, and a sample's
    part depends only on its position and the seed. Parts are disjoint only if the loader gives the
    same samples in the same order at every read: this is checked on the first sample of each batch.

    Where several ranks work together, each reads its share of the batches; the deal is the same.

    Args:
        loader: read anew for every part.
        seed: deals the samples.
        order: `order` of an earlier split of the same loader, to go on checking against.
        lengths: samples of each of the loaders that this one is made of, which were dealt one by one.
        form: as in `as_batch`.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        seed: int,
        order: Sequence[int] = (),
        lengths: Sequence[int] = (),
        form: Form | None = None,
    ) -> None:
        self.loader = loader
        self.seed = seed
        self.form = form
        self.ranks = current()
        self._digests = dict(enumerate(order))
        self._whole = bool(order)
        self._starts = [0, *itertools.accumulate(lengths[:-1])]
        self.samples = 0
        """Of the loader, on all ranks, once it was dealt."""
        self.copies = (0, 0)
        """Held-out samples that are copies of samples to fit on, of how many; once it was dealt."""

    def first(self, form_of: FormOf | None = None) -> Batch:
        """Return the first batch, whole, on every rank.

        Args:
            form_of: works out the form, for this read and all later ones.
        """

        def form(item: Any) -> Form:
            assert form_of is not None
            self.form = form_of(item)
            return self.form

        return next(self._read(ALONE, form if form_of else None))[1]

    def order(self) -> tuple[int, ...]:
        """Digests of the loader's batches, once it was read to its end."""
        known = torch.tensor(sorted(self._digests.items()))
        return tuple(dict(sorted(torch.cat(self.ranks.gathered(known)).tolist())).values())

    def _read(self, ranks: Ranks, form: FormOf | None = None) -> Iterator[tuple[int, Batch]]:
        """The first sample's number and the batch."""
        count = 0
        how = form or self.form
        for index, start, batch in _read(self.loader, ranks, how, again=bool(self._digests)):
            digest = batch.digest()
            if self._whole and index not in self._digests:
                count = -1
                break
            if self._digests.setdefault(index, digest) != digest:
                raise LoaderError(
                    f"batch {index} is another one than at the first read: the loader shuffles or "
                    "augments at random, so held-out samples would be fitted on. Pass shuffle=False "
                    "and a transform without randomness"
                )
            count += 1
            yield start, batch
        own = sum(index % ranks.count == ranks.rank for index in self._digests)
        if self._whole and count != own:
            raise LoaderError(
                f"the loader gave {own} batches at first and another number when read "
                "again: pass one that gives the same batches at every read"
            )
        self._whole = True

    def part(self, part: Part) -> Iterator[Batch]:
        """The batches of one part, in the loader's order; batches left empty are dropped.

        Raises:
            LoaderError: as `read`, and where the loader has too few samples to fill the part.
        """
        for _, _, batch in self.deal(part):
            yield batch

    def deal(self, *parts: Part) -> Iterator[tuple[Part, list[int], Batch]]:
        """The batches of several parts in one read: the part, its samples' numbers in it, the batch.

        Raises:
            LoaderError: as `part`.
        """
        samples, found = 0, dict.fromkeys(parts, 0)
        digests: dict[bool, list[int]] = {True: [], False: []}
        first = not self._whole
        for start, batch in self._read(self.ranks):
            samples += len(batch)
            for row, digest in enumerate(batch.digests() if first else ()):
                digests[self._dealt(start + row) == "fit"].append(digest)
            for part in parts:
                rows = [r for r in range(len(batch)) if self._dealt(start + r) == part]
                if rows:
                    found[part] += len(rows)
                    yield part, [self._place(start + r) for r in rows], batch.select(rows)
        self.samples = int(self.ranks.sum(samples))
        if first:
            fitted, held = (
                torch.cat(self.ranks.gathered(torch.tensor(digests[fit], dtype=torch.long)))
                for fit in (True, False)
            )
            self.copies = int(torch.isin(held, fitted).sum()), len(held)
        for part, count in found.items():
            if not self.ranks.sum(count):
                raise LoaderError(
                    f"the loader has {self.samples} samples, none of them dealt to {part!r}: pass at "
                    f"least {len(_PATTERN)}"
                )

    def _place(self, position: int) -> int:
        """A sample's number in its part: so many are before it (or, of several loaders, fewer)."""
        start = max(start for start in self._starts if start <= position)
        tens, place = divmod(position - start, len(_PATTERN))
        order = _deal(self.seed, tens)
        return start + tens * _PATTERN.count(order[place]) + order[:place].count(order[place])

    def _dealt(self, position: int) -> Part:
        start = max(start for start in self._starts if start <= position)
        tens, place = divmod(position - start, len(_PATTERN))
        return _deal(self.seed, tens)[place]


@functools.lru_cache(maxsize=64)
def _deal(seed: int, tens: int) -> list[Part]:
    order = list(_PATTERN)
    random.Random(f"{seed}/{tens}").shuffle(order)  # nosec B311 # repeatable, no secret
    return order
