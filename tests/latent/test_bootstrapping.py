"""Parallel anchors from a few pairs, against assignments, hand-made spaces and direct computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rba_compress import SpaceError
from rba_compress.cli.latent_demos.anchor_trial import SEEDS, TRUE, Pair, recovering
from rba_compress.cli.latent_demos.pictures import plot_anchors
from rba_compress.cli.latent_demos.trials import AnchorTrial
from rba_compress.latent import bootstrap_anchors, retrieval, sinkhorn, stitch
from rba_compress.linalg.similarity import relative
from tests.latent.test_stitching import broken, rotation, space
from tests.networks import seeded

SOLVERS = ("adam", "least_squares")


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 12), columns=st.integers(2, 12))
def test_a_transport_moves_all_of_both_masses(seed: int, rows: int, columns: int) -> None:
    cost = space(rows, columns, seed).abs()
    plan, v = sinkhorn(cost, 1.0, sweeps=500)
    torch.testing.assert_close(plan.sum(0), torch.full((columns,), 1 / columns).double())
    torch.testing.assert_close(
        plan.sum(1), torch.full((rows,), 1 / rows).double(), atol=1e-6, rtol=1e-4
    )
    shifted, _ = sinkhorn(cost + space(rows, 1, seed + 1), 1.0, sweeps=500)
    torch.testing.assert_close(shifted, plan, atol=1e-6, rtol=1e-3)
    again, _ = sinkhorn(cost, 1.0, sweeps=1, potential=v)
    torch.testing.assert_close(again, plan, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_without_entropy_it_is_the_best_assignment(seed: int) -> None:
    cost = space(12, 12, seed).abs()
    plan, _ = sinkhorn(cost, 2e-3, sweeps=5000)
    rows, best = linear_sum_assignment(cost.numpy())
    assert np.array_equal(plan.argmax(1).numpy(), best)
    least = cost[torch.from_numpy(rows), torch.from_numpy(best)].sum() / 12
    assert float((plan * cost).sum()) == pytest.approx(float(least), abs=2e-3)


def hidden(count: int = 160) -> tuple[Tensor, Tensor, list[int]]:
    """Return a space, a copy with other coordinates and order, and each sample's row in the copy."""
    centres = 3 * space(8, 12, 7)
    x = (centres[torch.arange(count) % 8] + space(count, 12)).float()
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(count, generator=generator)
    noise = 0.01 * torch.randn(count, 12, generator=generator)
    y = (2 * x @ rotation(12, 1).float() + 5 + noise)[order]
    return x, y, order.argsort().tolist()


@pytest.mark.parametrize("solver", [pytest.param("adam", marks=pytest.mark.slow), "least_squares"])
def test_a_hidden_order_is_found(solver: Any) -> None:
    x, y, truth = hidden()
    seeds = [(row, truth[row]) for row in range(0, 150, 10)]
    state = torch.random.get_rng_state()
    found = bootstrap_anchors(x, y, seeds, 60, solver=solver)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(a, b) for a, b in zip(found.x_rows, found.y_rows, strict=True)][:15] == seeds
    assert len(set(found.x_rows)) == len(set(found.y_rows)) == len(found.x) == 60
    right = [truth[a] == b for a, b in zip(found.x_rows, found.y_rows, strict=True)]
    assert sum(right) >= 57
    torch.testing.assert_close(found.y_vectors.norm(dim=1), torch.ones(60))
    assert found.losses[-1] < 0.05 * found.losses[0]
    torch.testing.assert_close(found.y.vectors, y[[*found.y_rows]])
    again = bootstrap_anchors(x, y, seeds, 60, solver=solver)
    assert torch.equal(again.y_vectors, found.y_vectors)
    assert bootstrap_anchors(x, y, seeds, 60, solver=solver, seed=1).x_rows != found.x_rows


def test_one_space_may_have_more_samples_and_another_width() -> None:
    x, y, truth = hidden()
    wide = y @ rotation(12, 5).float()[:, :10] @ torch.eye(10, 14)
    seeds = [(row, truth[row]) for row in range(0, 120, 8)]
    found = bootstrap_anchors(x[:130], wide, seeds, 40, solver="least_squares")
    assert found.y_vectors.shape == (40, 14)
    right = [truth[a] == b for a, b in zip(found.x_rows, found.y_rows, strict=True)]
    assert sum(right) >= 25  # of 15 that were known


def test_seeds_alone_are_kept_as_they_are() -> None:
    x, y, truth = hidden()
    seeds = [(row, truth[row]) for row in range(20)]
    for solver in SOLVERS:
        found = bootstrap_anchors(x, y, seeds, 20, solver=solver)  # type: ignore[arg-type]
        assert found.losses == ()
        assert found.y_rows == tuple(truth[:20])


def test_a_head_reads_through_what_was_found() -> None:
    x, y, truth = hidden()
    seeds = [(row, truth[row]) for row in range(0, 150, 10)]
    found = bootstrap_anchors(x, y, seeds, 60, solver="least_squares")
    head = seeded(nn.Linear, 60, 3)
    own = stitch(nn.Identity(), head, found.x, found.x, "euclidean")
    read = stitch(nn.Identity(), head, found.y, found.x, "euclidean")
    ours, theirs = own(x), read(y[truth] / 2)
    assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.5


def test_retrieval_is_what_a_loop_says() -> None:
    x, y = space(30, 6), space(30, 6) + 0.6 * space(30, 6, 1)
    found = retrieval(x, y, neighbours=4)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / a.norm() / b.norm())

    ranks, cosines, overlaps = [], [], []
    for k in range(30):
        theirs = [cosine(y[k], row) for row in x]
        ours = [cosine(x[k], row) for row in x]
        ranks.append(1 / (1 + sum(value > theirs[k] for value in theirs)))
        cosines.append(theirs[k])
        a, b = (set(np.argsort(values)[-4:]) for values in (theirs, ours))
        overlaps.append(len(a & b) / len(a | b))
    assert found.mrr == pytest.approx(np.mean(ranks))
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.jaccard == pytest.approx(np.mean(overlaps))
    perfect = retrieval(x, x)
    assert (perfect.jaccard, perfect.mrr, perfect.cosine) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x, y: bootstrap_anchors(x, y, [(0, 0)]), "1 seeds: pass two or more pairs"),
        (
            lambda x, y: bootstrap_anchors(x, y, [(0, 0), (1, 9)], 4),
            "seed 9 is no row of y, which has 8",
        ),
        (lambda x, y: bootstrap_anchors(x, y, [(-1, 0), (1, 1)], 4), "seed -1 is no row of x"),
        (lambda x, y: bootstrap_anchors(x, y, [(0, 0), (0, 1)], 4), "a row of x is in two seeds"),
        (
            lambda x, y: bootstrap_anchors(x, y, [(0, 0), (1, 1)], 9),
            "9 anchors from 2 seeds, of 8 and 8",
        ),
        (lambda x, y: bootstrap_anchors(x, y, [(0, 0), (1, 1)], 1), "as many as there are seeds"),
        (
            lambda x, y: bootstrap_anchors(x, broken(y, 3), [(0, 0), (1, 1)], 4),
            "y: 1 of 8 rows hold NaN",
        ),
        (
            lambda x, y: bootstrap_anchors(x, y.to("meta"), [(0, 0), (1, 1)], 4),
            "x is on cpu and y on meta",
        ),
        (
            lambda x, y: bootstrap_anchors(x, y, [(0, 0), (1, 1)], 4, solver="sgd"),  # type: ignore[arg-type]
            "the solver 'sgd' is not known: choose one of adam, least_squares",
        ),
        (lambda x, y: retrieval(x, y[:5]), "space 0 has 8 samples and space 1 has 5"),
    ],
)
def test_what_cannot_be_bootstrapped_is_refused(what: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        what(space(8, 4).float(), space(8, 5, 1).float())


def test_a_trial_measures_what_a_bootstrap_recovers() -> None:
    x, y, truth = hidden(240)
    y, labels = y[truth] + space(240, 12, 4).float(), torch.arange(240) % 8
    parts = [(x[part], y[part], labels[part]) for part in (slice(160), slice(160, None))]
    how = AnchorTrial(
        repetitions=2, seeds=4, anchors=40, samples=160, head_steps=80, runs=("least squares",)
    )
    found = recovering(Pair("hidden", *parts), how)  # type: ignore[arg-type]
    rows = {row.anchors: row for row in found.rows}
    assert set(rows) == {SEEDS, TRUE, "least squares, vectors", "least squares, samples"}
    assert rows[SEEDS].recovered == 0
    assert rows[TRUE].recovered == 1
    assert rows[TRUE].right == 1
    assert rows["least squares, vectors"].mrr > rows[SEEDS].mrr
    assert rows["least squares, vectors"].accuracy > 0.8
    centred = x[160:] - found.found.x_centre, y[160:] - found.found.y_centre
    spaces = [
        relative(a, v, "cosine")
        for a, v in zip(centred, (found.found.x_vectors, found.found.y_vectors), strict=True)
    ]
    assert retrieval(*spaces).mrr == pytest.approx(rows["least squares, vectors"].mrr, abs=0.1)
    figure = plot_anchors(found.found, found.y_train, found.found.x_rows)
    right = sum(a == b for a, b in zip(found.found.x_rows, found.found.y_rows, strict=True))
    assert figure.axes[1].get_title() == f"the samples nearest to them: {right} of 40 are the true ones"
