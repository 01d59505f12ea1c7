"""Order and compensation of narrower layers, against numpy and scipy in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rba_compress.linalg.moments import PairMoments
from rba_compress.linalg.narrowing import Removal, compensated, removal


def drawn(n: int, features: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated rows (n, features) with means, and weights (outputs, features), in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, features, generator=generator, dtype=torch.float64) @ mixed
    weight = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    return rows + torch.randn(features, generator=generator, dtype=torch.float64), weight


def moments(rows: Tensor) -> PairMoments:
    return PairMoments.from_rows(rows, rows[:, :0])


def error(rows: Tensor, weight: Tensor, kept: Tensor, columns: int, *, bias: bool) -> float:
    """The least squared error of a layer on some channels' columns, by numpy."""
    at = np.concatenate([np.arange(k * columns, (k + 1) * columns) for k in kept.tolist()])
    x, y = rows.numpy(), (rows @ weight.T).numpy()
    x = np.concatenate([x[:, at], np.ones((len(x), 1))], 1) if bias else x[:, at]
    solved = np.linalg.lstsq(x, y, rcond=None)[0]
    return float(((y - x @ solved) ** 2).sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_compensation_is_the_least_squares_solution(columns: int, bias: bool) -> None:
    rows, weight = drawn(400, 12, 5)
    kept = torch.tensor([0, 2] if columns == 3 else [0, 1, 4, 6, 7, 8, 11])
    found = compensated(weight, moments(rows), kept, 12 // columns, bias=bias)
    at = np.concatenate([np.arange(k * columns, (k + 1) * columns) for k in kept.tolist()])
    x = rows.numpy()[:, at]
    x = np.concatenate([x, np.ones((400, 1))], 1) if bias else x
    expected = scipy.linalg.lstsq(x, (rows @ weight.T).numpy())[0].T
    ours = torch.cat([found.weight, found.shift[:, None]], 1) if bias else found.weight
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    # The ridge is the only difference: with it, the normal equations agree to 1e-6.
    centred = rows - rows.mean(0) if bias else rows
    gram = (centred.T @ centred).numpy()
    ridge = 1e-6 * np.diag(gram).mean()
    damped = gram[np.ix_(at, at)] + ridge * np.eye(len(at))
    taken = np.setdiff1d(np.arange(12), at)
    change = scipy.linalg.solve(damped, gram[np.ix_(at, taken)] @ weight.numpy()[:, taken].T)
    np.testing.assert_allclose(found.weight.numpy(), weight.numpy()[:, at] + change.T, rtol=1e-6)
    best = error(rows, weight, kept, columns, bias=bias)
    assert found.diagnostics.residual * 400 == pytest.approx(best, rel=1e-5)


def greedy(rows: Tensor, weight: Tensor, channels: int, most: int, *, bias: bool) -> list[int]:
    """The order of the definition: always the channel without which the layer loses least."""
    left, order, columns = list(range(channels)), [], rows.shape[1] // channels
    for _ in range(most):
        without = {
            j: error(rows, weight, torch.tensor([k for k in left if k != j]), columns, bias=bias)
            for j in left
        }
        order.append(min(without, key=lambda j: without[j]))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [1, 2])
def test_the_order_takes_the_cheapest_channel_each_time(columns: int, bias: bool) -> None:
    rows, weight = drawn(300, 16, 4, seed=3)
    channels = 16 // columns
    found = removal(weight, moments(rows), channels, channels - 1, bias=bias)
    expected = greedy(rows, weight, channels, channels - 1, bias=bias)
    assert found.order.tolist() == expected
    y = rows @ weight.T
    total = float((y - y.mean(0) if bias else y).square().sum())
    for taken in (1, channels // 2, channels - 1):
        kept = found.kept(taken, channels)
        least = error(rows, weight, kept, columns, bias=bias) / total
        assert float(found.lost[taken - 1]) == pytest.approx(least, rel=1e-4)


def test_many_channels_are_taken_in_subsets_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = drawn(500, 60, 6, seed=1)
    whole = removal(weight, moments(rows), 60, 50, bias=True)
    monkeypatch.setattr("rba_compress.linalg.narrowing._SUBSET", 8)
    parts = removal(weight, moments(rows), 60, 50, bias=True)
    assert len(set(parts.order.tolist())) == 50
    # The least of the others is known from before: the order may differ by a little, the loss hardly.
    assert float(parts.lost[24]) <= 1.2 * float(whole.lost[24])
    assert parts.order[0] == whole.order[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_error_never_rises_when_one_more_channel_is_kept(seed: int, bias: bool) -> None:
    rows, weight = drawn(60, 10, 3, seed)
    order = removal(weight, moments(rows), 10, 9, bias=bias)
    errors = [
        compensated(weight, moments(rows), order.kept(taken, 10), 10, bias=bias).diagnostics.residual
        for taken in range(10)
    ]
    assert all(more <= less * (1 + 1e-6) + 1e-9 for more, less in itertools.pairwise(errors))
    assert errors[0] == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_planted_redundancy_is_taken_first_and_lost_for_nothing(seed: int, planted: int) -> None:
    """Duplicates, sums of others, constants and channels that nothing reads, to the last one."""
    generator = torch.Generator().manual_seed(seed)
    _, weight = drawn(1, 12, 4, seed)
    # Independent rows: of random mixtures, another channel may be redundant to 1e-5.
    rows = torch.randn(300, 12, generator=generator, dtype=torch.float64) + 1
    places = torch.randperm(12, generator=generator)
    gone, others = places[:planted], places[planted:]
    for k, j in enumerate(gone.tolist()):
        a, b = others[k].item(), others[k + 1].item()
        rows[:, j] = [rows[:, a], rows[:, a] - 2 * rows[:, b], torch.full((300,), 3.0), rows[:, j]][k]
        if k == 3:
            weight[:, j] = 0
    found = removal(weight, moments(rows.float()), 12, 11, bias=True)
    assert found.free == planted
    kept = found.kept(planted, 12)
    fit = compensated(weight, moments(rows.float()), kept, 12, bias=True)
    y = rows @ weight.T
    ours = rows[:, kept] @ fit.weight.T + fit.shift
    assert float((y - ours).abs().max() / y.abs().max()) < 1e-5


def test_nothing_taken_keeps_every_weight() -> None:
    rows, weight = drawn(50, 6, 3)
    found = compensated(weight, moments(rows), torch.arange(6), 6, bias=True)
    assert torch.equal(found.weight, weight)
    assert not found.shift.any()
    assert Removal(torch.tensor([2, 0]), torch.tensor([0.0, 0.5])).kept(1, 3).tolist() == [0, 1]
