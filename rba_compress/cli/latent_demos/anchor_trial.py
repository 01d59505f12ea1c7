"""Anchor trial: recovery of true anchors by bootstrapping, and stitching through the anchors found."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rba_compress.cli.latent_demos.networks import fit, head, score
from rba_compress.cli.latent_demos.trials import AnchorTrial
from rba_compress.latent.anchors import random_points
from rba_compress.latent.bootstrapping import EPSILON, Bootstrapped, bootstrap_anchors, retrieval
from rba_compress.linalg.similarity import relative

TRUE, SEEDS = "ground truth", "seeds alone"
RUNS: dict[str, dict[str, Any]] = {
    "adam, as published": {"solver": "adam", "start": EPSILON["adam"]},
    "adam": {"solver": "adam"},
    "least squares": {"solver": "least_squares"},
}
"""Ways to bootstrap; each is measured with its final vectors, and with the samples nearest to them."""


@dataclass(frozen=True)
class Pair:
    """Two spaces of the same samples in the same order, and labels, to train and to test on."""

    name: str
    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """Result of one way to have anchors, means over repetitions.

    `jaccard`, `mrr` and `cosine` are of `retrieval` on the test part; `accuracy` is that of x's head
    on y's relative space there; `recovered` is the recovered share of the MRR between seeds alone and
    ground truth; `right` is the share of anchors, without the seeds, whose pair is the true one.
    """

    pair: str
    samples: int
    """Number of samples that anchors were looked for in."""
    anchors: str
    jaccard: float
    mrr: float
    mrr_spread: float
    """The standard deviation over repetitions."""
    cosine: float
    recovered: float
    recovered_spread: float
    accuracy: float
    right: float
    seconds: float


@dataclass(frozen=True)
class Recovery:
    """Rows, and the anchors of the last run in the last repetition, for figures."""

    rows: tuple[Row, ...]
    found: Bootstrapped
    y_train: Tensor


def recovering(pair: Pair, how: AnchorTrial) -> Recovery:
    """Bootstrap anchors of a pair's training part, and measure them on its test part."""
    measured = []
    with tqdm(total=how.repetitions * len(how.runs), desc=pair.name, disable=None) as bar:
        for repetition in range(how.repetitions):
            ways, found = _ways(pair, how, repetition, bar.update)
            measured.append(_measured(pair, how, ways, found, repetition))
    rows = tuple(_row(pair.name, name, how.samples, measured) for name in measured[0])
    return Recovery(rows, found, pair.train[1][: how.samples])


@dataclass(frozen=True)
class _Way:
    """Vectors (K, d) of both spaces about their centres, the share that is right, and the time."""

    x: Tensor
    y: Tensor
    right: float = 1.0
    seconds: float = 0.0


def _ways(
    pair: Pair, how: AnchorTrial, repetition: int, progress: Callable[[], object]
) -> tuple[dict[str, _Way], Bootstrapped]:
    """Return every way to have anchors in one repetition, and the anchors of the last run."""
    x, y = (space[: how.samples] for space in pair.train[:2])
    seeds = [(row, row) for row in random_points(x, how.seeds, seed=repetition)]
    ways: dict[str, _Way] = {}
    for name in how.runs:
        began = time.perf_counter()
        found = bootstrap_anchors(x, y, seeds, how.anchors, seed=repetition, **RUNS[name])
        seconds = time.perf_counter() - began
        rows = [*found.x_rows]
        right = [a == b for a, b in zip(rows, found.y_rows, strict=True)][how.seeds :]
        share = statistics.fmean(right) if right else 1.0
        ours, theirs = x - found.x_centre, y - found.y_centre
        ways[SEEDS] = _Way(ours[rows[: how.seeds]], theirs[rows[: how.seeds]])
        ways[TRUE] = _Way(ours[rows], theirs[rows])
        ways[f"{name}, vectors"] = _Way(found.x_vectors, found.y_vectors, share, seconds)
        ways[f"{name}, samples"] = _Way(ours[rows], theirs[[*found.y_rows]], share, seconds)
        progress()
    return ways, found


def _measured(
    pair: Pair, how: AnchorTrial, ways: dict[str, _Way], found: Bootstrapped, repetition: int
) -> dict[str, dict[str, float]]:
    """Measure retrieval and stitching of every way, with one head for each number of anchors."""
    x, labels = pair.train[0] - found.x_centre, pair.train[2]
    test_x, test_y = pair.test[0] - found.x_centre, pair.test[1] - found.y_centre
    heads: dict[int, nn.Module] = {}
    measured: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        read = relative(test_y, way.y, "cosine")
        if len(way.x) not in heads:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(repetition)
                fresh = heads[len(way.x)] = head(len(way.x), int(labels.max()) + 1)
            fit(fresh, (relative(x, way.x, "cosine"), labels), how.head_steps, seed=repetition)
        with torch.no_grad():
            accuracy = score(heads[len(way.x)](read), pair.test[2])
        found_by = asdict(retrieval(relative(test_x, way.x, "cosine"), read))
        own = {"accuracy": accuracy, "right": way.right, "seconds": way.seconds}
        measured[name] = {**found_by, **own}
    return measured


def _share(value: float, low: float, high: float) -> float:
    """Return the share of the way from low to high; NaN if they are equal."""
    return math.nan if low == high else (value - low) / (high - low)


def _row(pair: str, name: str, samples: int, measured: list[dict[str, dict[str, float]]]) -> Row:
    each = [repetition[name] for repetition in measured]
    shares = [_share(*(r[way]["mrr"] for way in (name, SEEDS, TRUE))) for r in measured]
    return Row(
        pair=pair,
        samples=samples,
        anchors=name,
        mrr_spread=statistics.pstdev(one["mrr"] for one in each),
        recovered=statistics.fmean(shares),
        recovered_spread=statistics.pstdev(shares),
        **{key: statistics.fmean(one[key] for one in each) for key in each[0]},
    )
