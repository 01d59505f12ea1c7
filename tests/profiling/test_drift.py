"""Later data: called shifted where they are, and not where they are not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rba_compress import ArtifactError, Budget, LoaderError, ModelError, Result, compress
from rba_compress.api import reopen
from rba_compress.core.batch import as_batch
from rba_compress.profiling.drift import Place
from tests.networks import LIGHT, Chain, loader, rows, seeded


@pytest.fixture(scope="module")
def chain() -> Result:
    return compress(seeded(Chain), loader(400, 50), budget=Budget(macs=0.8), config=LIGHT)


@pytest.mark.slow
def test_one_in_a_hundred_batches_of_data_alike_is_called_shifted(chain: Result) -> None:
    assert chain.reference is not None
    for n in (2, 10, 50):
        found = [
            chain.reference.shift(chain.model, as_batch(rows(n, seed=seed))) for seed in range(1, 151)
        ]
        assert sum(shift.shifted for shift in found) <= 6
        assert 0.5 < sum(shift.distance for shift in found) / len(found) < 1.5


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 0.6,
        lambda x: 2 * x,
        lambda x: 0.3 * x,
        torch.zeros_like,
        lambda x: x.abs(),
        lambda x: x[:1].expand_as(x),
        lambda x: x * torch.tensor([1.0, 1.0, 1.0, 3.0]),
        lambda x: x * torch.nan,
    ],
)
def test_other_data_are_told(chain: Result, change: Any) -> None:
    batch = change(rows(20, seed=1))
    with pytest.warns(
        UserWarning, match="20 samples lie outside of the calibration data: .* may not hold"
    ):
        assert chain.check(batch).shifted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not chain.check(rows(20, seed=1)).shifted


def test_the_numbers_are_those_of_whitened_rows(chain: Result) -> None:
    """Oracle: numpy on stored rows."""
    (profiled,) = chain.profile.chains
    x = rows(30, seed=3)
    stream = seeded(Chain).stem(x)  # type: ignore[operator]
    found = Place.of(profiled, 0).numbers(stream, 30, None).numpy()
    moments = profiled.moments
    covariance = (moments.comoments(0, 0) / moments.n).numpy()
    values, vectors = np.linalg.eigh(covariance)
    values = values + 1e-3 * values.mean()
    white = (stream.detach().double().numpy() - moments.mean[0].numpy()) @ vectors / np.sqrt(values)
    np.testing.assert_allclose(found[:, 0], np.log((white**2).mean(1)), rtol=1e-4, atol=1e-4)
    # Directions have no sign, and the widest one comes first.
    np.testing.assert_allclose(np.abs(found[:, 1:]), np.abs(white[:, ::-1]), rtol=1e-3, atol=1e-3)


def test_a_boundary_inside_of_a_span_is_not_looked_at(chain: Result) -> None:
    assert chain.reference is not None
    gone = {b for r in chain.plan.replacements for b in range(r.start + 1, r.stop)}
    assert {place.boundary for place in chain.reference.places} == {*range(5)} - gone


def test_what_cannot_be_checked_is_named(chain: Result, tmp_path: Any) -> None:
    with pytest.raises(LoaderError, match="whose input is a str"):
        chain.check("data")
    with pytest.raises(ModelError, match=r"fails on a batch of 2 samples \(input 0 \(2, 9\)\)"):
        chain.check(torch.ones(2, 9))
    chain.save(tmp_path / "compressed")
    opened = reopen(tmp_path / "compressed", loader(400, 50), original=seeded(Chain))
    with pytest.raises(ArtifactError, match="opened from a directory has no moments"):
        opened.check(rows(3))


def test_padding_does_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.chain = nn.Embedding(10, 4), Chain()

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.chain(self.table(ids)).mean(1)

    generator = torch.Generator().manual_seed(0)

    def batch(padding: int) -> dict[str, Tensor]:
        ids, mask = torch.randint(9, (40, 6), generator=generator), torch.ones(40, 6, dtype=torch.long)
        ids[:, 4:], mask[:, 4:] = padding, 0
        return {"ids": ids, "attention_mask": mask}

    result = compress(seeded(Tokens), [batch(9), batch(9)], budget=Budget(macs=0.9), config=LIGHT)
    assert not result.check(batch(9)).shifted
    assert not result.check(batch(3)).shifted


def test_corrupted_digits_are_told(result: Result, held_out: tuple[Tensor, Tensor]) -> None:
    x = held_out[0]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    assert sum(result.check(x[part]).shifted for part in order[:300].split(20)) <= 1
    noise = x + 0.5 * x.std() * torch.randn(x.shape, generator=generator)
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    for corrupted in (noise, blurred, x.flip(3), -x, 0.5 * x, x.roll(2, 3)):
        with pytest.warns(UserWarning, match="outside of the calibration data"):
            shifts = [result.check(corrupted[part]).shifted for part in order[:200].split(40)]
        assert all(shifts)
