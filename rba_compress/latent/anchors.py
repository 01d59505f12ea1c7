"""Anchors: the samples by which a space is described, the same ones in every space.

A selector returns rows, not vectors, so that the same samples are taken from each space. None of them
touches torch's global random state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rba_compress.core.errors import SpaceError
from rba_compress.linalg.similarity import check_space

ROUNDS = 100
"""Largest number of k-means iterations."""


@dataclass(frozen=True)
class Anchors:
    """The anchors of one space.

    Args:
        vectors: (K, d), one or more, of floats.
        ids: sample ids of the anchors, the same in every space; without them the order is trusted.

    Raises:
        SpaceError: no matrix of numbers, another number of ids than of anchors, or an id twice.
    """

    vectors: Tensor
    ids: tuple[str | int, ...] | None = None

    def __post_init__(self) -> None:
        check_space(self.vectors, "the anchors")
        if self.ids is None:
            return
        if len(self.ids) != len(self.vectors):
            raise SpaceError(f"{len(self.vectors)} anchors with {len(self.ids)} ids: give each its id")
        if len(set(self.ids)) < len(self.ids):
            twice = next(i for k, i in enumerate(self.ids) if i in self.ids[:k])
            raise SpaceError(f"the anchor {twice!r} is there twice: take each sample once")

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def of(cls, space: Tensor, rows: Sequence[int]) -> Anchors:
        """Return rows of a space (N, d) as anchors, with the row numbers as ids."""
        return cls(space[list(rows)], tuple(int(row) for row in rows))

    def require_parallel(self, other: Anchors) -> None:
        """Check that both are the same samples in the same order.

        Raises:
            SpaceError: they are not, as far as can be told.
        """
        if len(self) != len(other):
            raise SpaceError(
                f"{len(self)} anchors of one space and {len(other)} of the other: take the same samples"
            )
        if self.ids is None or other.ids is None or self.ids == other.ids:
            return
        if set(self.ids) == set(other.ids):
            place = next(
                k for k, pair in enumerate(zip(self.ids, other.ids, strict=True)) if len({*pair}) > 1
            )
            raise SpaceError(
                f"the anchors are in another order, from place {place} on "
                f"({self.ids[place]!r} and {other.ids[place]!r}): sort both by their ids"
            )
        alone = sorted({*self.ids} ^ {*other.ids}, key=str)
        raise SpaceError(
            f"{len(alone) // 2} anchors are other samples in the other space (such as {alone[0]!r}): "
            "take the same samples"
        )


def _enough(space: Tensor, count: int) -> None:
    check_space(space, "the space")
    if not 1 <= count <= len(space):
        raise SpaceError(f"{count} anchors of {len(space)} samples: ask for 1 to {len(space)}")


def random_points(space: Tensor, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Draw `count` rows of (N, d), uniformly, without replacement.

    Raises:
        SpaceError: fewer samples than anchors.
    """
    _enough(space, count)
    order = torch.randperm(len(space), generator=torch.Generator().manual_seed(seed))
    return tuple(order[:count].tolist())


def farthest_points(space: Tensor, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Select `count` rows from a random one on, each the farthest from those before (Gonzalez 1985).

    The largest distance from a sample to the nearest anchor is at most twice the least possible.

    Raises:
        SpaceError: fewer different samples than anchors.
    """
    rows = [*random_points(space, 1, seed=seed)]
    _enough(space, count)
    near = torch.cdist(space, space[rows]).squeeze(1)
    while len(rows) < count:
        row = int(near.argmax())
        if near[row] == 0:
            raise SpaceError(f"{len(rows)} different samples: ask for no more anchors than these")
        rows.append(row)
        near = torch.minimum(near, torch.cdist(space, space[row : row + 1]).squeeze(1))
    return tuple(rows)


def k_means(space: Tensor, count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Select `count` rows, each the sample nearest to the mean of one cluster (Lloyd 1982).

    The clustering starts from `farthest_points`. Where two means are nearest to the same sample, the
    second takes its next nearest.

    Raises:
        SpaceError: fewer different samples than anchors.
    """
    means = space[[*farthest_points(space, count, seed=seed)]]
    owner = torch.cdist(space, means).argmin(1)
    for _ in range(ROUNDS):
        # A cluster that lost its last sample keeps its mean.
        sums = torch.zeros_like(means).index_add_(0, owner, space)
        sizes = owner.bincount(minlength=count).to(means)[:, None]
        means = torch.where(sizes > 0, sums / sizes.clamp_min(1), means)
        before, owner = owner, torch.cdist(space, means).argmin(1)
        if torch.equal(before, owner):
            break
    rows: list[int] = []
    for distance in torch.cdist(means, space):
        distance[rows] = torch.inf
        rows.append(int(distance.argmin()))
    return tuple(rows)
