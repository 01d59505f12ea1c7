"""The solver against brute force on small networks."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rba_compress.core.cost import UNREACHABLE
from rba_compress.planning.solver import Floats, Move, Walked, combinations


def network(seed: int, blocks: int) -> tuple[list[Move], Floats, Floats, list[int]]:
    """Moves of random options, and a random form whose changes interact.

    Some options cover two blocks, and some leave fewer positions, so that costs do not add up.
    """
    draw = np.random.default_rng(seed)
    moves, rows = [], 0

    def cost(share: float, kept: float) -> object:
        def of(positions: int) -> Walked:
            return np.array([share * positions]), round(positions * kept)

        return of

    for b in range(blocks):
        moves.append(Move(b, b + 1, None, cost(1.0, 1.0), taken=False))
        for _ in range(int(draw.integers(1, 4))):
            wide = b + 2 <= blocks and draw.random() < 0.3
            share = float(draw.uniform(0, 0.7))
            kept = 0.8 if draw.random() < 0.3 else 1.0
            moves.append(Move(b, b + 1 + wide, rows, cost(share, kept)))
            rows += 1
    changes = draw.normal(size=(rows, 12)) * draw.lognormal(-1, 1, size=(rows, 1))
    linear = np.abs(draw.normal(size=rows)) * np.square(changes).sum(1) / 4
    return moves, linear, changes @ changes.T, [100, *[-1] * blocks]


def walks(moves: list[Move], blocks: int, at: int = 0) -> Iterator[list[Move]]:
    if at == blocks:
        yield []
        return
    for move in (m for m in moves if m.start == at):
        for rest in walks(moves, blocks, move.stop):
            yield [move, *rest]


def brute(moves: list[Move], linear: Floats, gram: Floats, blocks: int) -> list[tuple[float, float]]:
    """Size and rise of every combination."""
    found = []
    for walk in walks(moves, blocks):
        positions, total = 100, 0.0
        for move in walk:
            cost, positions = move.cost(positions)
            total += float(cost[0])
        rows = [m.row for m in walk if m.row is not None]
        rise = linear[rows].sum() + gram[np.ix_(rows, rows)].sum() / 2
        found.append((total / (100 * blocks), float(rise)))
    return found


def solved(moves: list[Move], linear: Floats, gram: Floats, positions: list[int]) -> list:
    blocks = len(positions) - 1
    return combinations(
        moves,
        linear,
        gram,
        size=lambda costs: costs[:, 0] / (100 * blocks),
        positions=positions,
        lowest=0.0,
    )


def test_it_finds_the_optimum_that_brute_force_finds() -> None:
    """100 random networks of up to 7 blocks, each under a random limit: at least 95 optima, the others
    within 1 %."""
    exact, worst = 0, 1.0
    for seed in range(100):
        blocks = 3 + seed % 5
        moves, linear, gram, positions = network(seed, blocks)
        every = brute(moves, linear, gram, blocks)
        limit = float(np.random.default_rng(seed).uniform(0.4, 0.95))
        best = min((rise for size, rise in every if size <= limit), default=None)
        within = [c.rise for c in solved(moves, linear, gram, positions) if c.size <= limit]
        if best is None:
            assert not within
            exact += 1
            continue
        ratio = min(within) / best if best > 1e-12 else 1.0
        exact += ratio < 1 + 1e-9
        worst = max(worst, ratio)
    assert exact >= 95, f"{exact} optima of 100"
    assert worst <= 1.01


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_what_it_says_of_a_combination_is_so(seed: int, blocks: int) -> None:
    """Rises and sizes are those of brute force, no two options overlap, and sizes fall."""
    moves, linear, gram, positions = network(seed, blocks)
    known = {(round(s, 9), round(r, 9)) for s, r in brute(moves, linear, gram, blocks)}
    found = solved(moves, linear, gram, positions)
    by_row = {m.row: m for m in moves if m.row is not None}
    for each in found:
        assert (round(each.size, 9), round(each.rise, 9)) in known
        taken = [by_row[row] for row in each.rows]
        assert all(a.stop <= b.start for a, b in itertools.pairwise(taken))
    assert [c.size for c in found] == sorted((c.size for c in found), reverse=True)


def test_nothing_below_the_lowest_size() -> None:
    moves, linear, gram, positions = network(3, 6)
    found = combinations(
        moves,
        linear,
        gram,
        size=lambda costs: costs[:, 0] / 600,
        positions=positions,
        lowest=0.7,
    )
    assert found
    assert min(c.size for c in found) >= 0.7


@pytest.mark.parametrize("seed", range(3))
def test_the_same_input_gives_the_same_combinations(seed: int) -> None:
    moves, linear, gram, positions = network(seed, 6)
    assert solved(moves, linear, gram, positions) == solved(moves, linear, gram, positions)


def test_what_cannot_be_built_is_not_combined() -> None:
    moves, linear, gram, positions = network(0, 4)
    never = Move(1, 2, 0, lambda left: (np.array([float(UNREACHABLE.macs)]), left))
    kept = [m for m in moves if m.start != 1 or m.row is None]
    found = combinations(
        [*kept, never],
        linear,
        gram,
        size=lambda costs: costs[:, 0] / 400,
        positions=positions,
        lowest=0.0,
    )
    assert found
    assert all(c.size < 2 for c in found)
