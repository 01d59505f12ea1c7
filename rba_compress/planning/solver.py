"""Solver: which options to combine, for every cost at once, by a table of predicted divergences.

A plan takes at each block nothing or one option, which covers the blocks up to its end. Its predicted
divergence is quadratic in the options. Its cost is a walk over the blocks, because an option may
change the cost of all later ones. The walk is a beam search: partial plans go from block to block, and
of those with nearly the same final cost the ones with the least divergence are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rba_compress.core.cost import UNREACHABLE

Floats = NDArray[np.float64]

WIDTH = 16
"""Number of partial plans that are kept of one cost."""
RESOLUTION = 0.005
"""Partial plans whose costs differ by less than this share of the original's have one cost."""

Walked = tuple[Floats, int]
"""Cost of a step and the number of positions that it leaves."""


@dataclass(frozen=True)
class Move:
    """Step of a walk: to take an option, or to leave blocks as they are."""

    start: int
    stop: int
    """Blocks that the step covers, counted through all chains."""
    row: int | None
    """Row of the step in the quadratic form; None where it changes nothing."""
    cost: Callable[[int], Walked]
    """Cost of the blocks, for the positions before them."""
    taken: bool = True
    """False where the step leaves the blocks as they are in the original or the current network."""


@dataclass(frozen=True)
class Combination:
    """Rows of the form that go together, with their predicted rise and the size of the network."""

    rows: tuple[int, ...]
    rise: float
    size: float
    """Share of the original's cost that is left."""


def combinations(
    moves: Sequence[Move],
    linear: Floats,
    gram: Floats,
    *,
    size: Callable[[Floats], Floats],
    positions: Sequence[int],
    lowest: float,
) -> list[Combination]:
    """Return the best combinations of every cost, the most expensive first.

    Args:
        moves: every step, from each block that a walk may reach.
        linear, gram: rise of the divergence x' linear + x' gram x / 2, with x_k = 1 where a step with
            the row k is taken.
        size: sizes of costs (n, costs), of whole networks; it grows with each cost.
        positions: the number of positions before each block at which a chain starts, -1 inside of a
            chain; one more entry than blocks.
        lowest: combinations below this size are left out.
    """
    blocks = len(positions) - 1
    single = linear + np.diagonal(gram) / 2
    by_start: list[list[Move]] = [[m for m in moves if m.start == b] for b in range(blocks)]
    tails = _Tails(by_start, positions)
    waiting = [_Beam() for _ in range(blocks + 1)]
    nothing = np.zeros((1, len(linear))), np.zeros((1, tails.width))
    waiting[0].add(_Group([()], np.zeros(1), *nothing, positions[0]))
    for b in range(blocks):
        for group in waiting[b].best(size, partial(tails, b), lowest):
            at = positions[b] if positions[b] >= 0 else group.positions
            for move in by_start[b]:
                cost, left = move.cost(at)
                if cost[0] >= UNREACHABLE.macs:
                    continue
                rise, pull, chosen = group.rise, group.pull, group.chosen
                if move.row is not None:
                    rise = rise + single[move.row] + pull[:, move.row]
                    pull = pull + gram[move.row]
                    chosen = [(*rows, move.row) for rows in chosen]
                waiting[move.stop].add(_Group(chosen, rise, pull, group.cost + cost, left))
    found = [
        Combination(rows, float(rise), float(left))
        for group in waiting[blocks].best(size, partial(tails, blocks), lowest)
        for rows, rise, left in zip(group.chosen, group.rise, size(group.cost), strict=True)
    ]
    return sorted(found, key=lambda c: (-round(c.size, 9), rounded(c.rise), c.rows))


def rounded(value: float) -> float:
    """Round to six digits: values that are then equal are a tie, which other threads may reverse."""
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class _Group:
    """Partial plans that have the same number of positions."""

    chosen: list[tuple[int, ...]]
    """Rows that were chosen."""
    rise: Floats
    pull: Floats
    """Gram rows of what was chosen, summed, (plans, rows)."""
    cost: Floats
    positions: int


class _Beam:
    """Partial plans that reached one block."""

    def __init__(self) -> None:
        self._parts: dict[int, list[_Group]] = {}

    def add(self, group: _Group) -> None:
        """Add plans that reach the block."""
        self._parts.setdefault(group.positions, []).append(group)

    def best(
        self, size: Callable[[Floats], Floats], tail: Callable[[int], Floats], lowest: float
    ) -> list[_Group]:
        """Return the best plans of each size, a group for each number of positions."""
        parts = [p for _, same in sorted(self._parts.items()) for p in same]
        if not parts:
            return []
        left = np.concatenate([size(p.cost + tail(p.positions)) for p in parts])
        rise = np.concatenate([p.rise for p in parts])
        bucket = np.floor(left / RESOLUTION + 1e-9).astype(int)
        order = np.lexsort((rise, bucket))
        order = order[left[order] > lowest - 1e-9]
        counted = np.arange(len(order))
        begins = np.r_[True, np.diff(bucket[order]) != 0][: len(order)]
        rank = counted - np.maximum.accumulate(np.where(begins, counted, 0))
        kept = np.zeros(len(left), dtype=bool)
        kept[order[rank < WIDTH]] = True
        found, first = [], 0
        for p in parts:
            rows = np.flatnonzero(kept[first : first + len(p.chosen)])
            first += len(p.chosen)
            if len(rows):
                chosen = [p.chosen[k] for k in rows]
                found.append(_Group(chosen, p.rise[rows], p.pull[rows], p.cost[rows], p.positions))
        return _joined(found)


def _joined(groups: Sequence[_Group]) -> list[_Group]:
    """Join the groups that have the same number of positions."""
    found = []
    for positions in sorted({g.positions for g in groups}):
        same = [g for g in groups if g.positions == positions]
        rise, pull, cost = (
            np.concatenate([getattr(g, k) for g in same]) for k in ("rise", "pull", "cost")
        )
        found.append(_Group([c for g in same for c in g.chosen], rise, pull, cost, positions))
    return found


class _Tails:
    """Cost of the blocks from one block to the end without further options, by positions."""

    def __init__(self, by_start: Sequence[Sequence[Move]], positions: Sequence[int]) -> None:
        self._stay = [next(m for m in moves if not m.taken) for moves in by_start]
        self._positions = positions
        self._known: dict[tuple[int, int], Floats] = {}
        self.width = len(self._stay[0].cost(positions[0])[0])

    def __call__(self, b: int, at: int) -> Floats:
        """Return the cost of all blocks from `b` on, with `at` positions before it."""
        if b == len(self._stay):
            return np.zeros(self.width)
        at = self._positions[b] if self._positions[b] >= 0 else at
        if (b, at) not in self._known:
            stay = self._stay[b]
            cost, left = stay.cost(at)
            self._known[b, at] = cost + self(stay.stop, left)
        return self._known[b, at]
