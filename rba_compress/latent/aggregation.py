"""Aggregation of several networks' spaces: the mean of relative spaces about the same anchors.

Crisostomi et al. 2023 (arXiv 2311.06547): networks that were trained on parts of a task represent a
sample in coordinates of their own; its similarities to the same anchors can be averaged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rba_compress.core.errors import SpaceError
from rba_compress.latent.anchors import Anchors
from rba_compress.linalg.similarity import (
    INVARIANTS,
    Invariant,
    check_space,
    check_spaces,
    relative,
    require,
)

Id = str | int


@dataclass(frozen=True)
class Aggregate:
    """Joint space of all samples that any network saw."""

    space: Tensor
    """Mean relative space, (N, K)."""
    ids: tuple[Id, ...]
    """Sample ids of the rows, in the order in which the spaces first hold them."""
    held: Tensor
    """Number of spaces that hold each sample, (N,)."""


def aggregate(
    spaces: Sequence[Tensor],
    anchors: Sequence[Anchors],
    *,
    ids: Sequence[Sequence[Id]] | None = None,
    metric: Invariant = "cosine",
    weights: Sequence[float] | None = None,
) -> Aggregate:
    """Compute relative spaces, and each sample's mean over the spaces that hold it.

    Args:
        spaces: (N_s, d_s) each, of any widths.
        anchors: the same samples in every space.
        ids: sample ids of the rows of each space; without them all spaces hold the same samples in the
            same order.
        metric: of the relative spaces.
        weights: of each space in the mean, 1 by default.

    Raises:
        SpaceError: no spaces; another number of anchors, ids or weights than of spaces; a weight that
            is no positive number; anchors that are not parallel; another number of ids than of
            samples, or an id twice; without ids, spaces of different sample counts; NaN, two devices,
            an unknown metric.
    """
    require(metric, INVARIANTS, "the metric")
    given: dict[str, Sequence[object] | None] = {"anchors": anchors, "ids": ids, "weights": weights}
    for name, each in given.items():
        if not spaces or (each is not None and len(each) != len(spaces)):
            raise SpaceError(
                f"{len(spaces)} spaces with {0 if each is None else len(each)} {name}: pass one or "
                "more, and as many of each"
            )
    weights = [1.0] * len(spaces) if weights is None else weights
    for k, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise SpaceError(f"space {k} has the weight {weight}: leave it out, or weigh it above zero")
    if ids is None:
        check_spaces(spaces)
        ids = [range(len(spaces[0]))] * len(spaces)
    for k, (space, own) in enumerate(zip(spaces, ids, strict=True)):
        check_space(space, f"space {k}")
        if len(own) != len(space) or len(set(own)) < len(own):
            raise SpaceError(
                f"space {k} has {len(space)} samples and {len(set(own))} different ids in {len(own)}: "
                "give each sample its own"
            )
        anchors[0].require_parallel(anchors[k])
    places = {name: place for place, name in enumerate(dict.fromkeys(itertools.chain(*ids)))}
    total = spaces[0].new_zeros(len(places), len(anchors[0]))
    weighed, held = spaces[0].new_zeros(len(places), 1), torch.zeros(len(places), dtype=torch.int64)
    for space, own, weight, parallel in zip(spaces, ids, weights, anchors, strict=True):
        rows = torch.tensor([places[name] for name in own])
        described = relative(space, parallel.vectors, metric).to(total)
        total.index_add_(0, rows.to(total.device), weight * described)
        weighed[rows] += weight
        held[rows] += 1
    return Aggregate(total / weighed, tuple(places), held)


def class_separability(space: Tensor, labels: Tensor) -> float:
    """Return the distance of classes relative to their width: the mean over pairs of classes a, b of

        ||m_a - m_b|| / ((s_a + s_b) / 2)

    with the mean m of a class and the mean distance s of its samples to it (the source's definition).

    Args:
        space: (N, d).
        labels: (N,) of two classes or more.

    Raises:
        SpaceError: fewer classes, or another number of labels than of samples.
    """
    check_space(space, "the space")
    found = labels.unique()
    if len(labels) != len(space) or len(found) < 2:
        raise SpaceError(
            f"{len(labels)} labels of {len(found)} classes for {len(space)} samples: give each sample "
            "its label, of two classes or more"
        )
    means = torch.stack([space[labels == c].mean(0) for c in found])
    widths = torch.stack(
        [(space[labels == c] - mean).norm(dim=1).mean() for c, mean in zip(found, means, strict=True)]
    )
    a, b = torch.triu_indices(len(found), len(found), offset=1)
    return float(((means[a] - means[b]).norm(dim=1) / ((widths[a] + widths[b]) / 2)).mean())
