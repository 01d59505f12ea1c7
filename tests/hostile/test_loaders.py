"""Hostile loaders: each is used correctly, or refused by name before anything is made."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rba_compress import Budget, LoaderError, ModelError, compress
from rba_compress.core import loader as of_batches
from rba_compress.core.errors import ActivationError
from tests.hostile.cases import Case, table
from tests.networks import LIGHT, Chain, loader, rows, seeded

LABELS = torch.arange(40) % 3


class Reading:
    """Loader that passes the number of the read to a function and gives what that returns."""

    def __init__(self, give: Callable[[int], Any]) -> None:
        self.give, self.reads = give, 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return iter(self.give(self.reads))


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return itertools.cycle(rows(40))


def with_batch(number: int, batch: Any, given: list[Any] | None = None) -> list[Any]:
    """The loader with one batch replaced."""
    found: list[Any] = [*(loader() if given is None else given)]
    found[number] = batch
    return found


def changed(number: int, change: Callable[[Tensor], Any]) -> list[Any]:
    return with_batch(number, change(loader()[number].clone()))


def raising(error: Exception, after: int = 2) -> Callable[[int], Any]:
    def give(_: int) -> Iterator[Tensor]:
        yield from loader()[:after]
        raise error

    return give


def poisoned(value: float, sample: int) -> list[Tensor]:
    x = rows(40)
    x[sample, 2] = value
    return list(x.split(10))


def labelled(labels: Any) -> list[Any]:
    return list(zip(loader(), labels.split(10), strict=True))


def of_part(part: str) -> int:
    """Return the number of the first sample of a part."""
    return next(i for i in range(10) if of_batches._deal(0, 0)[i] == part)


def shuffled(_: int) -> list[Tensor]:
    order = list(range(40))
    random.shuffle(order)
    return list(rows(40)[order].split(10))


REFUSED = [
    Case("an empty list", lambda: [], LoaderError, "the loader is empty: pass at least one batch"),
    Case("an empty DataLoader", lambda: DataLoader(TensorDataset(rows(40)[:0])), LoaderError, "is empty"),
    Case("a generator", lambda: (b for b in loader()), LoaderError, r"one-shot generator.*or list\(loader\)"),
    Case("an iterator", lambda: iter(loader()), LoaderError, r"one-shot list_iterator.*or list\(loader\)"),
    Case("a map", lambda: map(torch.Tensor.float, loader()), LoaderError, "one-shot map"),
    Case("an endless one", lambda: Reading(lambda _: itertools.repeat(rows(10))), LoaderError,
         r"gave more than \d+ batches and has no length.*islice"),
    Case("an endless dataset", lambda: DataLoader(Endless(), 10), LoaderError, "batches and has no length"),
    Case("one that raises in mid-epoch", lambda: Reading(raising(ValueError("bad JPEG"))), LoaderError,
         "batch 2 of the loader.*ValueError: bad JPEG"),
    Case("one that raises at once", lambda: Reading(raising(OSError("no such file"), 0)), LoaderError,
         "batch 0 of the loader.*OSError: no such file"),
    Case("one that raises in its iter()", lambda: Reading(lambda _: 1 // 0), LoaderError,
         "ZeroDivisionError"),
    Case("one that runs out of files", lambda: Reading(raising(StopAsyncIteration("gone"))), LoaderError,
         "batch 2 of the loader.*gone"),
    Case("one that shuffles", lambda: Reading(shuffled), LoaderError, "another one than at the first read"),
    Case("one that augments", lambda: Reading(lambda n: [b + n for b in loader()]), LoaderError,
         "another one than at the first read.*without randomness"),
    Case("one that is read once", lambda: Reading(lambda n: loader() if n < 2 else []), LoaderError,
         "gives nothing when it is read again"),
    Case("one that shrinks", lambda: Reading(lambda n: loader()[: 5 - n]), LoaderError,
         r"gave \d batches at first and another number"),
    Case("one that grows", lambda: Reading(lambda n: loader(10 * (n + 3))), LoaderError,
         r"gave \d batches at first and another number"),
    Case("one sample", lambda: [rows(1)], LoaderError, "1 samples, none of them dealt to .* pass at least 10"),
    Case("nine samples", lambda: [rows(9)[:k] for k in (4,)], LoaderError, "pass at least 10"),
    Case("nothing", lambda: None, LoaderError, "a NoneType, which cannot be iterated"),
    Case("a number", lambda: 3, LoaderError, "a int, which cannot be iterated"),
    Case("a tensor", lambda: rows(40), LoaderError, r"the loader is a tensor: pass .* \[tensor\]"),
    Case("a string", lambda: "images/", LoaderError, "whose input is a str"),
    Case("a dict", lambda: {"x": rows(40)}, LoaderError, "whose input is a str"),
    Case("bytes", lambda: b"images", LoaderError, "whose input is a int"),
    Case("a dataset", lambda: TensorDataset(rows(40)), LoaderError,
         r"a dataset, a TensorDataset: pass DataLoader\(dataset"),
    Case("strings", lambda: [["a.png", "b.png"]], LoaderError, "whose input is a str: yield a tensor"),
    Case("None among batches", lambda: with_batch(2, None), LoaderError, "whose input is a NoneType"),
    Case("a string among batches", lambda: with_batch(3, "end"), LoaderError, "whose input is a str"),
    Case("arrays", lambda: [b.numpy() for b in loader()], LoaderError, "whose input is a ndarray"),
    Case("lists of numbers", lambda: [b.tolist() for b in loader()], LoaderError, "whose input is a list"),
    Case("empty tuples", lambda: [()], LoaderError, "whose input is a tuple"),
    Case("empty dicts", lambda: [{}], LoaderError, "holds no sample"),
    Case("scalars", lambda: [torch.tensor(1.0)] * 40, LoaderError, "holds no sample"),
    Case("batches of no sample", lambda: [rows(1)[:0]] * 4, LoaderError, "holds no sample"),
    Case("a batch of no sample in between", lambda: changed(1, lambda b: b[:0]), LoaderError, "no sample"),
    Case("another dtype in between", lambda: changed(2, Tensor.double), LoaderError,
         r"batch 2 holds input 0 in float64, the first input 0 in float32: make every batch of one kind"),
    Case("integers", lambda: [b.long() for b in loader()], ModelError, "dtype|Long"),
    Case("complex numbers", lambda: [b.to(torch.complex64) for b in loader()], ModelError, "dtype|Complex"),
    Case("another device in between", lambda: changed(1, lambda b: b.to("meta")), LoaderError,
         "on the meta device, without values"),
    Case("all on the meta device", lambda: [b.to("meta") for b in loader()], LoaderError, "on the meta device"),
    Case("another size in between", lambda: changed(2, lambda b: torch.cat([b, b], 1)), ModelError,
         r"fails on a batch of \d+ samples \(input 0 \(\d+, 8\)\)"),
    Case("another rank in between", lambda: changed(2, lambda b: b[:, :, None]), ModelError,
         r"fails on a batch of \d+ samples \(input 0 \(\d+, 4, 1\)\)"),
    Case("another form in between", lambda: with_batch(2, {"y": rows(10)}), LoaderError,
         "batch 2 holds y in float32, the first input 0"),
    Case("a keyword the model lacks", lambda: [{"x": b, "path": ["a"] * 10} for b in loader()], ModelError,
         "unexpected keyword argument 'path'"),
    Case("a keyword that is missing", lambda: [{"z": b} for b in loader()], ModelError, "keyword argument 'z'"),
    Case("sparse tensors", lambda: [b.to_sparse() for b in loader()], LoaderError, "sparse"),
    Case("labels that no class has", lambda: labelled(LABELS + 1), LoaderError,
         r"holds the label 3, the model has 3 classes \(0 to 2\)"),
    Case("labels below zero", lambda: labelled(LABELS - 100), LoaderError, "holds the label -100"),
    Case("labels that are indices", lambda: labelled(torch.arange(40)), LoaderError, "holds the label"),
    Case("fewer labels than samples", lambda: [(b, LABELS[:9]) for b in loader()], LoaderError,
         "10 samples and 9 labels"),
    Case("NaN in one number, to fit on", lambda: poisoned(torch.nan, of_part("fit")), ActivationError,
         "the input of blocks.0 holds NaN or infinity: check the calibration samples"),
    Case("NaN in one number, to choose on", lambda: poisoned(torch.nan, of_part("validation")), ActivationError,
         "NaN or infinity on held-out samples"),
    Case("NaN in one number, to confirm on", lambda: poisoned(torch.nan, of_part("test")),
         ActivationError, "NaN or infinity on held-out samples"),
    Case("infinity in one number", lambda: poisoned(torch.inf, of_part("fit")), ActivationError, "NaN or inf"),
]  # fmt: skip


@table(REFUSED)
def test_a_loader_is_refused_by_name(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_batches, "ENDLESS", 50)
    model = seeded(Chain)
    assert case.error is not None
    with pytest.raises(case.error, match=f"(?s){case.message}"):
        compress(model, case.make(), budget=Budget(macs=0.8), config=LIGHT)


def padded(extra: Any) -> list[Any]:
    return [(b, extra) for b in loader()]


RIGHT = [
    Case("a ragged last batch", lambda: list(rows(40).split(13))),
    Case("batches of one sample", lambda: list(rows(40).split(1))),
    Case("batches of every size", lambda: list(rows(45).split([1, 2, 3, 4, 5, 6, 7, 8, 9]))),
    Case("one batch of all", lambda: [rows(40)]),
    Case("ten samples", lambda: [rows(10)]),
    Case("a tuple of batches", lambda: tuple(loader())),
    Case("a DataLoader", lambda: DataLoader(TensorDataset(rows(40)), 10)),
    Case("a DataLoader of single samples", lambda: DataLoader(TensorDataset(rows(40)), batch_size=1)),
    Case("a DataLoader that drops the last", lambda: DataLoader(TensorDataset(rows(45)), 10, drop_last=True)),
    Case("labels", lambda: labelled(LABELS)),
    Case("labels of 8 bits", lambda: labelled(LABELS.to(torch.uint8))),
    Case("labels in a column", lambda: [(b, y[:, None]) for b, y in labelled(LABELS)]),
    Case("labels as floats, which are none", lambda: labelled(LABELS.float())),
    Case("labels one-hot", lambda: labelled(nn.functional.one_hot(LABELS))),
    Case("paths beside the input", lambda: padded(["a.png"] * 10)),
    Case("None beside the input", lambda: padded(None)),
    Case("a dict beside the input", lambda: padded({"weight": 3})),
    Case("more than two items", lambda: [(b, LABELS[:10], "a", None) for b in loader()]),
    Case("keywords", lambda: [{"x": b} for b in loader()]),
    Case("keywords and labels", lambda: [{"x": b, "labels": LABELS[:10]} for b in loader()]),
    Case("inputs that want gradients", lambda: [b.requires_grad_() for b in loader()]),
    Case("inputs that are no contiguous memory", lambda: [b.T.contiguous().T for b in loader()]),
    Case("inputs that are views of one", lambda: [rows(10).expand(10, 4)] * 4),
    Case("float64 inputs", lambda: [b.double() for b in loader()]),
    Case("float16 inputs", lambda: [b.half() for b in loader()]),
    Case("a subclass of Tensor", lambda: [nn.Parameter(b) for b in loader()]),
    Case("constant samples", lambda: [torch.ones(10, 4)] * 4),
    Case("all zeros", lambda: [torch.zeros(10, 4)] * 4),
    Case("minus zero", lambda: [-torch.zeros(10, 4)] * 4),
    Case("one sample forty times", lambda: [rows(1).repeat(10, 1)] * 4),
    Case("tiny numbers", lambda: [1e-30 * b for b in loader()]),
    Case("denormal numbers", lambda: [1e-42 * b for b in loader()]),
    Case("a number that is nearly infinite", lambda: poisoned(3e38, of_part("fit"))),
    Case("large numbers", lambda: [1e15 * b for b in loader()]),
]  # fmt: skip


@table(RIGHT)
def test_what_a_loader_gives_is_used(case: Case) -> None:
    model = seeded(Chain)
    result = compress(model, case.make(), budget=Budget(macs=0.8), config=LIGHT)
    assert result.report.compressed.macs <= 0.8 * result.report.original.macs
    assert bool(result.model(rows(7)).isfinite().all())
    fidelity = result.report.fidelity
    assert fidelity.divergence >= 0
    labels = "labels" in case.name or "more than two" in case.name
    assert (fidelity.accuracy_original is not None) == (labels and "none" not in case.name)
    if fidelity.samples > 1:
        assert fidelity.divergence_low is not None
        assert fidelity.divergence_high is not None
        assert fidelity.divergence_low <= fidelity.divergence <= fidelity.divergence_high


def test_held_out_copies_of_what_is_fitted_on_are_told() -> None:
    result = compress(seeded(Chain), [rows(10)] * 4, budget=Budget(macs=0.8), config=LIGHT)
    (warning,) = (w for w in result.report.warnings if "copies" in w)
    assert warning.startswith("20 of 20 held-out samples are copies of samples that are fitted on")
    clean = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=LIGHT)
    assert not any("copies" in w for w in clean.report.warnings)


def test_an_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(seeded(Chain), Reading(raising(KeyboardInterrupt())), config=LIGHT)  # type: ignore[arg-type]
