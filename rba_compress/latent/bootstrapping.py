"""Parallel anchors of two spaces from a few known pairs of samples.

Cannistraci et al. 2023 (arXiv 2303.00721): the anchors of one space are samples of it, those of the
other are free vectors on the sphere, optimised until both relative spaces are the same cloud of points
under the matching of optimal transport. The optimisation starts from a few known pairs, the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import mse_loss, normalize
from tqdm import tqdm

from rba_compress.core.errors import SpaceError
from rba_compress.latent.anchors import Anchors, random_points
from rba_compress.linalg.similarity import check_space, check_spaces, require

Solver = Literal["adam", "least_squares"]
STEPS: dict[Solver, int] = {"adam": 250, "least_squares": 40}
EPSILON: dict[Solver, float] = {"adam": 1e-4, "least_squares": 1e-3}
"""Final entropic regularisation of the transport. Least squares jumps to the best vectors, and needs a
softer match."""

START = 1e-2
"""Initial entropic regularisation of the transport."""

SWEEPS = 5
"""Sinkhorn sweeps in a step, from the potentials of the step before; ten times as many in the first."""

DAMPING = 0.1
"""Ridge of the least squares, as a share of the mean power of a channel."""


@dataclass(frozen=True)
class Bootstrapped:
    """Anchors of two spaces that are taken to be parallel.

    `x_vectors` and `y_vectors` are unit vectors about the centres: the optimisation matched the
    relative spaces `cos(x - x_centre, x_vectors)` and `cos(y - y_centre, y_vectors)`. `x_rows` are
    samples of x, `y_rows` the samples nearest to `y_vectors`, each taken once. `x` and `y` are these
    rows as anchors, for `stitch` and `aggregate`, with the rows of x as ids.
    """

    x: Anchors
    y: Anchors
    x_rows: tuple[int, ...]
    y_rows: tuple[int, ...]
    x_vectors: Tensor  # (K, d_x)
    y_vectors: Tensor  # (K, d_y)
    x_centre: Tensor  # (d_x,)
    y_centre: Tensor  # (d_y,)
    losses: tuple[float, ...] = field(repr=False)
    """Mean squared difference between y's relative space and its match, at every step."""


def sinkhorn(
    cost: Tensor, epsilon: float, *, sweeps: int, potential: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the transport (N, M) of uniform masses over a cost with entropy epsilon (Cuturi 2013).

    In the log domain: u_i = -log N - logsumexp_j(v_j - c_ij / epsilon), v_j likewise.

    Args:
        sweeps: updates of both potentials; rows that add up to 1 / N are met in the limit, columns that
            add up to 1 / M always.
        potential: v (M,) to start from, zero by default.

    Returns:
        The transport, and v.
    """
    scaled = -cost / epsilon
    u, v = _swept(scaled, cost.new_zeros(cost.shape[1]) if potential is None else potential, sweeps)
    return (scaled + u[:, None] + v).exp(), v


def _swept(scaled: Tensor, v: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Return the potentials u and v after `sweeps` updates, for `scaled` = -c / epsilon."""
    rows, columns = scaled.shape
    for _ in range(sweeps):
        u = -math.log(rows) - torch.logsumexp(scaled + v, dim=1)
        v = -math.log(columns) - torch.logsumexp(scaled + u[:, None], dim=0)
    return u, v


@torch.no_grad()
def bootstrap_anchors(
    x_space: Tensor,
    y_space: Tensor,
    seeds: Sequence[tuple[int, int]],
    n_anchors: int = 300,
    *,
    solver: Solver = "adam",
    steps: int | None = None,
    lr: float = 0.02,
    epsilon: float | None = None,
    start: float = START,
    seed: int = 0,
) -> Bootstrapped:
    """Find anchors of y that are parallel to samples of x, from a few pairs that are known.

    Both spaces are centred and put on the unit sphere. Of x, the seeds and other random samples are
    the anchors A_x; of y, the seeds and free unit vectors. Each step matches the relative spaces,
    X A_x^T and Y A_y^T, by optimal transport (`sinkhorn`, the first time by the seeds' columns alone),
    and brings Y A_y^T nearer to what it was matched with:

        adam            a step of Adam on A_y, then back onto the sphere, as in the paper
        least_squares   the A_y that is the best for this match, put onto the sphere

    The paper keeps epsilon constant (`start=epsilon`); here it falls from `start`, without which spaces
    that are not close to each other are matched wrongly from the first step on. The paper reports that
    15 seeds take the place of 300 pairs, on word vectors and on images; `benchmarks/results/anchors.md`
    says what they recover here.

    Args:
        x_space, y_space: (N, d_x) and (M, d_y): samples of the same kind in no common order. A step
            takes N M numbers: pass some thousand of each.
        seeds: pairs (row of x, row of y), two or more; the paper takes 15.
        n_anchors: number of anchors, seeds included.
        solver: see above; `least_squares` takes an eighth of the time.
        steps: 250 of Adam and 40 of least squares by default.
        lr: learning rate of Adam.
        epsilon: final entropy, 1e-4 for Adam and 1e-3 for least squares by default, in squared cosines.
        seed: of the draw of the other anchors and the initial free vectors.

    Raises:
        SpaceError: a space that is no matrix of numbers; the two on two devices; fewer than two seeds,
            one that is no row, or a row twice; fewer anchors than seeds, or more than samples.
    """
    # Long by its parameters: the settings of both solvers.
    require(solver, get_args(Solver), "the solver")
    x_rows, y_rows = _checked(x_space, y_space, seeds, n_anchors)
    known, steps = len(x_rows), STEPS[solver] if steps is None else steps
    x_centre, y_centre = x_space.mean(0), y_space.mean(0)
    x, y = normalize(x_space - x_centre, dim=1), normalize(y_space - y_centre, dim=1)
    drawn = [row for row in random_points(x, len(x), seed=seed) if row not in set(x_rows)]
    x_rows += drawn[: n_anchors - known]
    target = x @ x[x_rows].T  # (N, K)
    fixed = y[y_rows]
    free = y[[*random_points(y, n_anchors - known, seed=seed + 1)]] if n_anchors > known else y[:0]
    moved = _least_squares(y) if solver == "least_squares" else _adam(y, free, lr)
    potential, losses = x.new_zeros(len(x)), []
    end = EPSILON[solver] if epsilon is None else epsilon
    bar = tqdm(range(steps if len(free) else 0), desc="anchors", unit="step", disable=None, leave=False)
    for step in bar:
        seen = y @ torch.cat([fixed, free]).T  # (M, K)
        by = known if step == 0 else n_anchors
        cost = torch.cdist(seen[:, :by], target[:, :by]).square() / by
        eased = start * (end / start) ** (step / max(steps - 1, 1))
        sweeps = 10 * SWEEPS if step == 0 else SWEEPS
        scaled = -cost / eased
        _, potential = _swept(scaled, potential, sweeps)
        # Normalise each row of the transport by softmax: its sum may be too small to divide by.
        matched = torch.softmax(scaled + potential, dim=1) @ target
        losses.append(float((seen - matched).square().mean()))
        free = moved(matched[:, known:])
    vectors = torch.cat([fixed, free])
    y_rows += _nearest(free, y, y_rows)
    return Bootstrapped(
        x=Anchors(x_space[x_rows], tuple(x_rows)),
        y=Anchors(y_space[y_rows], tuple(x_rows)),
        x_rows=tuple(x_rows),
        y_rows=tuple(y_rows),
        x_vectors=x[x_rows],
        y_vectors=vectors,
        x_centre=x_centre,
        y_centre=y_centre,
        losses=tuple(losses),
    )


def _checked(
    x_space: Tensor, y_space: Tensor, seeds: Sequence[tuple[int, int]], n_anchors: int
) -> tuple[list[int], list[int]]:
    """The seeds' rows of x, and of y."""
    if x_space.device != y_space.device:
        raise SpaceError(
            f"x is on {x_space.device} and y on {y_space.device}: move both spaces to one device"
        )
    check_space(x_space, "x")
    check_space(y_space, "y")
    if len(seeds) < 2:
        raise SpaceError(f"{len(seeds)} seeds: pass two or more pairs that are known, better 15")
    rows = [int(pair[0]) for pair in seeds], [int(pair[1]) for pair in seeds]
    for name, space, own in (("x", x_space, rows[0]), ("y", y_space, rows[1])):
        outside = [row for row in own if not 0 <= row < len(space)]
        if outside:
            raise SpaceError(f"the seed {outside[0]} is no row of {name}, which has {len(space)}")
        if len(set(own)) < len(own):
            raise SpaceError(f"a row of {name} is in two seeds: pass each pair once")
    if not len(seeds) <= n_anchors <= min(len(x_space), len(y_space)):
        raise SpaceError(
            f"{n_anchors} anchors from {len(seeds)} seeds, of {len(x_space)} and {len(y_space)} "
            "samples: ask for as many as there are seeds at least, and no more than there are samples"
        )
    return rows


def _adam(y: Tensor, free: Tensor, lr: float) -> Callable[[Tensor], Tensor]:
    """Return a function that takes Adam steps from `free` on the mean squared error, on the sphere."""
    vectors = free.clone().requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=lr)

    def step(matched: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            mse_loss(y @ vectors.T, matched).backward()
        optimizer.step()
        with torch.no_grad():
            vectors.copy_(normalize(vectors, dim=1))
        return vectors.detach()

    return step


def _least_squares(y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that solves for the damped best vectors of a match, put onto the sphere."""
    power = y.T @ y
    power.diagonal().add_(DAMPING * power.trace() / len(power))
    inverse = torch.linalg.solve(power, y.T)
    return lambda matched: normalize((inverse @ matched).T, dim=1)


def _nearest(vectors: Tensor, space: Tensor, taken: Sequence[int]) -> list[int]:
    """Assign each vector a row of a space that is not taken, with the largest sum of cosines."""
    cosines = (vectors @ space.T).cpu()
    cosines[:, [*taken]] = -torch.inf
    left = [row for row in range(len(space)) if row not in set(taken)]
    _, found = linear_sum_assignment(cosines[:, left].numpy(), maximize=True)
    return [left[k] for k in found]


@dataclass(frozen=True)
class Retrieval:
    """Quality of retrieval: y's relative space finds each sample's counterpart in x's. Sample means.

    `jaccard` compares the ten nearest neighbours of y's sample in x's space with those of its
    counterpart there; `mrr` is the mean reciprocal rank of the counterpart by cosine; `cosine` is the
    cosine to it.
    """

    jaccard: float
    mrr: float
    cosine: float


def retrieval(x_relative: Tensor, y_relative: Tensor, *, neighbours: int = 10) -> Retrieval:
    """Measure retrieval of relative spaces (N, K) of the same samples in order, about parallel anchors.

    Raises:
        SpaceError: they are not of the same samples.
    """
    check_spaces([x_relative, y_relative])
    x, y = normalize(x_relative, dim=1), normalize(y_relative, dim=1)
    found, own = y @ x.T, x @ x.T
    same = found.diagonal()
    rank = (found > same[:, None]).sum(1) + 1
    near, true = (sims.topk(min(neighbours, len(x))).indices for sims in (found, own))
    shared = (near[:, :, None] == true[:, None]).sum((1, 2)).double()
    jaccard = shared / (2 * near.shape[1] - shared)
    return Retrieval(float(jaccard.mean()), float((1 / rank.double()).mean()), float(same.mean()))
