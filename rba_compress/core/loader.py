"""Reading of a loader: checked batches, split into fit, validation and test samples."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rba_compress.core.batch import (
    Batch,
    Form,
    FormOf,
    as_batch,
)
from rba_compress.core.distributed import ALONE, Ranks, current
from rba_compress.core.errors import LoaderError, RBAError
from rba_compress.core.memory import out_of_memory

Part = Literal["fit", "validation", "test"]

Dealt = tuple[Part, list[int], Batch]
"""Samples of one batch in one part: the part, their numbers in the part, and the samples."""


ENDLESS = 100_000
"""Number of batches after which a loader without a length is taken to be endless."""


_PATTERN: tuple[Part, ...] = ("fit",) * 5 + ("validation",) * 4 + ("test",)


def read(loader: Iterable[Any], form: Form | None = None) -> Iterator[Batch]:
    """Yield the batches of a loader, checked; on one of several ranks, its share of them.

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
    """Yield the number of each batch, the number of its first sample, and the batch; see `read`.

    Args:
        ranks: each rank reads one of every `count` consecutive batches.
        form: as in `as_batch`, or a function that derives it from the first item.
        again: True if the loader was read before.
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
        return  # another rank may have read a batch
    if again:
        raise LoaderError(
            f"the loader, a {type(loader).__name__}, gives nothing when it is read again: pass one "
            "that can be read more than once, or list(loader)"
        )
    raise LoaderError("the loader is empty: pass at least one batch of samples")


def _share(loader: Iterable[Any], ranks: Ranks) -> Iterator[tuple[int, int, Any]]:
    """Yield a rank's items of a loader: number, number of the first sample, item."""
    if ranks.count > 1 and isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        from accelerate.data_loader import prepare_data_loader

        # The batches of other ranks are not loaded here.
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
    """Yield the items of a loader.

    Raises:
        LoaderError: the loader cannot be iterated, or only once; it raises; it does not end.
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
    """Name the batch where the loader's own code fails in the context.

    Raises:
        LoaderError: the loader's own code raises.
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
    """Name the death of a loader's worker, which torch signals whatever code is running.

    Raises:
        LoaderError: a worker died in the context.
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
    """Return True if an error is specific, or an outer handler names it: out of memory, dead worker."""
    return isinstance(error, RBAError) or out_of_memory(error) or _worker_died(error)


def _worker_died(error: Exception) -> bool:
    """Return True if an error is torch's report of a dead DataLoader worker."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # one of an IterableDataset has a __len__ that raises
        return None


def _describe(kinds: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in kinds.items())


class Split:
    """Split of a loader's samples into fit, validation and test samples.

    Every run of ten consecutive samples is split in an order of its own, drawn from `seed`: five fit
    samples, four validation samples, one test sample. So a loader sorted by class gives every part
    every class, and a sample's part depends only on its position and the seed. Parts are disjoint only
    if the loader gives the same samples in the same order at every read. The first sample of each batch
    is checked for this.

    Where several ranks work together, each reads its share of the batches; the split is the same.

    Args:
        loader: read anew for every part.
        seed: of the split.
        order: `order` of an earlier split of the same loader, to continue its check.
        lengths: numbers of samples of the loaders that this one joins, which were split one by one.
        form: as in `as_batch`.
        stretch: consecutive samples that are dealt together, in place of single ones.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        seed: int,
        order: Sequence[int] = (),
        lengths: Sequence[int] = (),
        form: Form | None = None,
        *,
        stretch: int = 1,
    ) -> None:
        self.loader = loader
        self.seed, self.stretch = seed, stretch
        self.form = form
        self.ranks = current()
        self._digests = dict(enumerate(order))
        self._whole = bool(order)
        self._starts = [0, *itertools.accumulate(lengths[:-1])]
        self.samples = 0
        """Number of the loader's samples on all ranks, known after a whole `deal`."""
        self.copies = (0, 0)
        """Number of held-out samples that are copies of fit samples, and number of held-out samples;
        known after a whole `deal`."""

    def first(self, form_of: FormOf | None = None) -> Batch:
        """Return the first batch, whole, on every rank.

        Args:
            form_of: derives the form, for this read and all later ones.
        """

        def form(item: Any) -> Form:
            assert form_of is not None
            self.form = form_of(item)
            return self.form

        return next(self._read(ALONE, form if form_of else None))[1]

    def expected(self, part: Part, size: int) -> int | None:
        """Return the number of batches of a part that this rank reads if each batch of the loader has
        `size` samples; None where the loader has no length.
        """
        length = _length(self.loader)
        if length is None:
            return None
        own = range(self.ranks.rank, length, self.ranks.count)
        return sum(any(self._dealt(k * size + r) == part for r in range(size)) for k in own)

    def order(self) -> tuple[int, ...]:
        """Return digests of the loader's batches, known after a whole read."""
        known = torch.tensor(sorted(self._digests.items()))
        return tuple(dict(sorted(torch.cat(self.ranks.gathered(known)).tolist())).values())

    def _read(self, ranks: Ranks, form: FormOf | None = None) -> Iterator[tuple[int, Batch]]:
        """Yield the number of each batch's first sample, and the batch, compared with earlier reads."""
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
        """Yield the batches of one part, in the loader's order; empty batches are dropped.

        Raises:
            LoaderError: as `read`, and where the loader has too few samples to fill the part.
        """
        for _, _, batch in self.deal(part):
            yield batch

    def deal(self, *parts: Part) -> Iterator[Dealt]:
        """Yield the batches of several parts in one read: part, samples' numbers in the part, batch.

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
                    f"least {len(_PATTERN) * self.stretch}"
                )

    def _place(self, position: int) -> int:
        """Return a sample's number in its part; numbers increase, with gaps between joined loaders."""
        start, stretch, within = self._stretch(position)
        tens, place = divmod(stretch, len(_PATTERN))
        order = _deal(self.seed, tens)
        before = tens * _PATTERN.count(order[place]) + order[:place].count(order[place])
        return start + before * self.stretch + within

    def _dealt(self, position: int) -> Part:
        tens, place = divmod(self._stretch(position)[1], len(_PATTERN))
        return _deal(self.seed, tens)[place]

    def _stretch(self, position: int) -> tuple[int, int, int]:
        """Return the start of a sample's loader, the number of its stretch, and its place in that."""
        start = max(start for start in self._starts if start <= position)
        return start, *divmod(position - start, self.stretch)


@functools.lru_cache(maxsize=64)
def _deal(seed: int, tens: int) -> list[Part]:
    order = list(_PATTERN)
    random.Random(f"{seed}/{tens}").shuffle(order)  # nosec B311 # repeatable, no secret
    return order
