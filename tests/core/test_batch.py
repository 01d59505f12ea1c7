from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rba_compress import LoaderError, ModelError
from rba_compress.core.batch import as_batch
from rba_compress.core.loader import Part, Split, read
from rba_compress.core.outputs import main_output

X, LABELS = torch.arange(12.0).reshape(6, 2), torch.arange(6)


def test_the_forms_of_a_batch() -> None:
    assert as_batch(X).args == (X,)
    for item in ((X, LABELS), [X, LABELS], (X, LABELS, "path")):
        batch = as_batch(item)
        assert batch.args == (X,)
        assert batch.labels is LABELS
    assert as_batch((X, X)).labels is None  # a float second item is no label
    batch = as_batch({"pixel_values": X, "labels": LABELS, "return_dict": True})
    assert batch.kwargs == {"pixel_values": X, "return_dict": True}
    assert batch.labels is LABELS
    assert as_batch(({"input": X}, LABELS)).labels is LABELS
    assert len(batch) == 6


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("text", "a batch is a str whose input is a str: yield a tensor"),
        ([], "a batch is a list whose input is a list"),
        ({"n": 3}, "a batch holds no sample"),
        (X[:0], "a batch holds no sample"),
        ((X, LABELS[:4]), "a batch has 6 samples and 4 labels"),
    ],
)
def test_what_is_no_batch_is_named(item: Any, message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        as_batch(item)


def generator() -> Iterator[torch.Tensor]:
    yield X


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader is empty: pass at least one batch"),
        (generator(), r"a one-shot generator and is read more than once: pass a DataLoader, or list"),
        (X, r"the loader is a tensor: pass an iterable of batches, such as \[tensor\]"),
        (3, "the loader is a int, which cannot be iterated"),
        ([X, X.double()], "batch 1 holds input 0 in float64, the first input 0 in float32"),
        ([{"a": X}, {"b": X}], "batch 1 holds b in float32, the first a in float32"),
    ],
)
def test_a_loader_that_cannot_be_used_is_named(loader: Any, message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        list(read(loader))


def test_a_data_loader_is_read_twice() -> None:
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4)
    for _ in range(2):
        assert [len(batch) for batch in read(loader)] == [4, 2]


def test_select_takes_samples_and_passes_the_rest() -> None:
    bias = torch.ones(3)
    batch = as_batch({"x": X, "bias": bias, "labels": LABELS}).select([1, 4])
    assert batch.kwargs["x"].tolist() == X[[1, 4]].tolist()
    assert batch.kwargs["bias"] is bias
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 4]


def test_a_batch_takes_the_dtype_of_the_model_and_keeps_integers() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    moved = as_batch({"x": X, "mask": LABELS}).to(model)
    assert moved.kwargs["x"].dtype == torch.bfloat16
    assert moved.kwargs["mask"].dtype == torch.int64


PARTS: tuple[Part, ...] = ("fit", "validation", "test")


def dealt(loader: list[torch.Tensor], seed: int = 0) -> dict[Part, list[float]]:
    split = Split(loader, seed)
    return {p: torch.cat([b.args[0] for b in split.part(p)]).flatten().tolist() for p in PARTS}


def test_parts_are_disjoint_complete_and_interleaved() -> None:
    samples = torch.arange(100.0).reshape(100, 1)
    parts = dealt(list(samples.split(16)))
    assert {p: len(v) for p, v in parts.items()} == {"fit": 50, "validation": 40, "test": 10}
    assert sorted(v for part in parts.values() for v in part) == list(range(100))
    for tens in range(10):  # a loader sorted by class gives every part every class
        assert sum(10 * tens <= v < 10 * tens + 10 for v in parts["validation"]) == 4


def test_a_samples_part_depends_on_its_place_and_the_seed_alone() -> None:
    samples = torch.arange(100.0).reshape(100, 1)
    assert dealt(list(samples.split(16))) == dealt(list(samples.split(7)))
    assert dealt(list(samples.split(16))) != dealt(list(samples.split(16)), seed=1)


def test_neighbours_are_dealt_together() -> None:
    samples = torch.arange(120.0).reshape(120, 1)
    split = Split(list(samples.split(16)), 0, stretch=4)
    parts = {p: torch.cat([b.args[0] for b in split.part(p)]).flatten().tolist() for p in PARTS}
    assert {p: len(v) for p, v in parts.items()} == {"fit": 60, "validation": 48, "test": 12}
    for values in parts.values():
        assert all(values[k : k + 4] == [*range(4 * int(v // 4), 4 * int(v // 4) + 4)]
                   for k, v in list(enumerate(values))[::4])  # fmt: skip
    places = [place for part, found, _ in split.deal("fit") for place in found]
    assert places == list(range(60))


def read_twice(loader: Any) -> None:
    split = Split(loader, 0)
    for part in PARTS:
        list(split.part(part))


class Gone:
    """Loader whose second iterator is the first, used up."""

    def __init__(self, *batches: torch.Tensor) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from self.batches


class Shrinking:
    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.reads += 1
        return iter(list(torch.arange(40.0)[:, None].split(10))[: 5 - self.reads])


def test_a_loader_that_gives_other_samples_when_read_again_is_refused() -> None:
    data = TensorDataset(torch.arange(200.0)[:, None])
    shuffled = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(LoaderError, match=r"batch 0 is another one .* shuffles .* Pass shuffle=False"):
        read_twice(shuffled)
    with pytest.raises(LoaderError, match="a Gone, gives nothing when it is read again"):
        read_twice(Gone(torch.arange(40.0)[:, None]))
    with pytest.raises(LoaderError, match="gave 4 batches at first and another number when read again"):
        read_twice(Shrinking())
    read_twice(DataLoader(data, 16))


def test_labels_in_other_forms() -> None:
    for labels in (LABELS.tolist(), LABELS.numpy(), LABELS[:, None]):
        found = as_batch((X, labels)).labels
        assert found is not None
        assert found.tolist() == LABELS.tolist()
    for none in ("path", ["a"] * 6, torch.nn.functional.one_hot(LABELS), None):
        assert as_batch((X, none)).labels is None


def test_a_setting_beside_the_input_is_no_sample() -> None:
    batch = as_batch({"scale": torch.tensor(1.0), "x": X})
    assert len(batch) == 6
    assert batch.select([0]).kwargs["scale"].ndim == 0


def test_too_few_samples_to_hold_out_are_refused() -> None:
    with pytest.raises(LoaderError, match=r"has 1 samples, none of them dealt to .*: pass at least 10"):
        for part in PARTS:
            list(Split([X[:1]], 0).part(part))


def test_the_main_output() -> None:
    assert main_output(X) is X
    assert main_output((LABELS, X)) is X
    assert main_output({"hidden": LABELS.float(), "logits": X}) is X
    with pytest.raises(ModelError, match="a dict, holds no floating-point tensor"):
        main_output({"ids": LABELS})
