"""Stage of a search: measure options, solve, evaluate the best plans.

A stage starts from a verified network. Options are fitted and their output changes measured on that
network, the solver combines them, and the plans that it predicts to be the best are evaluated on all
validation samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from rba_compress.core.cost import Cost
from rba_compress.core.plan import Chain, Replacement
from rba_compress.planning.context import SearchContext
from rba_compress.planning.output_changes import OutputChanges, output_changes
from rba_compress.planning.plan_cost import chain_cost, saving, step_cost
from rba_compress.planning.sites import sites
from rba_compress.planning.solver import Combination, Floats, Move, Walked, combinations, rounded
from rba_compress.planning.state import (
    Candidate,
    SearchState,
    Solution,
    removed_length,
    sets,
    taken_at,
    undone,
    with_candidate,
    without_unread,
)
from rba_compress.profiling.search_record import Refined
from rba_compress.units.base import keeps_layers
from rba_compress.units.registry import unit_of, width_unit_of

GRID = 0.02
"""Distance of sizes that count as alike."""
STEPS = 5
"""Sizes of a stage at which plans are evaluated, apart from its end."""
PROHIBITIVE = 1e12
"""Rise of the divergence by which a combination is never chosen."""
CAUTION = 0.1
"""Share of a change's own second-order term that the solver adds to its rise: the larger a change, the
less its interactions are known, and a solver finds those that are predicted too well."""


@dataclass(frozen=True, eq=False)
class Verified:
    """Network that was evaluated on all validation samples, with the divergence predicted for it."""

    state: SearchState
    size: float
    predicted: float
    settled: bool = False
    """True where its BatchNorms were re-estimated, or where that did not help."""
    refined: Refined = "not"
    traded: bool = False
    """True where trades of its levels were tried, or where it came out of them."""
    scheduled: bool = False
    """True where schedules were tried before a stage started from it, or where it came out of them."""
    beyond: bool = False
    """True where it was evaluated for the budget alone, below the end of its stage."""


def expected(context: SearchContext, state: SearchState) -> float:
    """Return about how many forward passes a stage takes: fits, single options, evaluations, and
    schedules.
    """
    price, blocks = context.evaluator.price, sum(map(len, context.chains))
    single = [s for s in sites(context, state.solution.plan) if removed_length(s) <= 1]
    options = [price(s.chain, s.start, screen=True) for s in single]
    further = 4 * context.spent.finer * blocks * sum(options) / max(len(options), 1)
    judged = (STEPS / 2 + context.spent.judged) * price(0, 0) / 2
    if any(unit_of(s.unit).scheduled for s in single):
        judged += context.spent.shapes * price(0, 0, screen=True) / 2
    return 2 + (sum(options) + further + judged) / context.held


def stage(context: SearchContext, state: SearchState, target: float) -> list[Verified]:
    """Evaluate the best plans of one stage, between the size of its state and the target."""
    limits = context.limits
    start = limits.size(state.cost)
    fitted = context.fitter.candidates(state, sites(context, state.solution.plan))
    useful = [c for c in fitted if limits.saved(state.cost, c.saving) > 0 or taken_at(state, c)]
    table = output_changes(context, state, useful)
    single = [limits.saved(state.cost, c.saving) for c in table.options if removed_length(c.site) <= 1]
    found = _solved(context, state, table, lowest=target - max([2 * GRID, *single]))
    verified = []
    for combination, solution, cost, beyond in _picked(context, found, start, target):
        at = _boundary(context, table, combination)
        evaluation = context.evaluation(state, solution, at)
        predicted = max(state.mean + table.rise(combination.rows), 0.0)
        new = SearchState(solution, cost, evaluation)
        verified.append(Verified(new, limits.size(cost), predicted, beyond=beyond))
    return verified


def _solved(
    context: SearchContext, state: SearchState, table: OutputChanges, *, lowest: float
) -> list[tuple[Combination, Solution, Cost]]:
    """Return the combinations of a table with their solutions and costs, the best of each size."""
    fitter, limits = context.fitter, context.limits
    own = without_unread(state.solution, context.profile).plan.replacements
    times = fitter.times or [[] for _ in context.chains]
    walked = [chain_cost(chain, own, times=t) for chain, t in zip(context.chains, times, strict=True)]
    # What is not in the blocks.
    offset = limits.vector(state.cost) - sum(map(limits.vector, walked))

    def size(costs: Floats) -> Floats:
        return limits.sizes(costs + offset)

    cautious = table.linear + CAUTION * np.diagonal(table.gram)
    of_size: dict[int, list[Combination]] = {}
    gram = table.gram + _conflicts(table)
    for uniform in _uniform(table):
        first = list(uniform)
        moves, positions = _moves(context, table, _uniformly(own, [table.options[k] for k in first]))
        linear = cautious + gram[first].sum(0)
        rise = float(cautious[first].sum() + gram[np.ix_(first, first)].sum() / 2)
        for each in combinations(moves, linear, gram, size=size, positions=positions, lowest=lowest):
            combination = Combination((*uniform, *each.rows), rise + each.rise, each.size)
            if combination.rise < PROHIBITIVE / 2:
                of_size.setdefault(int(combination.size / GRID + 1e-9), []).append(combination)
    found = []
    for alike in of_size.values():
        for combination in sorted(alike, key=lambda c: (rounded(c.rise), c.rows))[:6]:
            solution = _with(state.solution, table, combination)
            found.append((combination, solution, fitter.cost(solution.plan)))
    return found


def _uniform(table: OutputChanges) -> Iterator[tuple[int, ...]]:
    """Yield rows of options that narrow all blocks of a chain: none, or one of each unit and chain."""
    alike: dict[tuple[int, str], list[int]] = {}
    for k, option in enumerate(table.options):
        if option.also:
            alike.setdefault((option.chain, option.site.unit), []).append(k)
    for rows in product(*([None, *each] for each in alike.values())):
        yield tuple(k for k in rows if k is not None)


def _uniformly(own: Sequence[Replacement], options: Sequence[Candidate]) -> list[Replacement]:
    """Return the replacements of a state with some widths of whole chains."""
    news = [new for option in options for new in (option.replacement, *option.also)]
    units = {(new.chain, new.unit) for new in news}
    return [*(r for r in own if (r.chain, r.unit) not in units), *news]


def _conflicts(table: OutputChanges) -> Floats:
    """Return a prohibitive rise for pairs of options that narrow the same channels of a block, and for
    maps that are folded into a layer that the other option narrows.
    """
    found = np.zeros_like(table.gram)
    folded = [(k, o.refit) for k, o in enumerate(table.options) if o.refit is not None]
    inner = [(k, o) for k, o in enumerate(table.options) if o.replacement.inner]
    for k, one in inner:
        unit = unit_of(one.site.unit)
        for j, other in inner:
            same = (one.chain, one.site.start) == (other.chain, other.site.start)
            if k != j and same and unit.excludes(one.site, other.replacement):
                found[j, k] = found[k, j] = PROHIBITIVE
        for j, refit in folded:
            if any(sets(refit, new) for new in (one.replacement, *one.also)):
                found[j, k] = found[k, j] = PROHIBITIVE
    return found


def _with(solution: Solution, table: OutputChanges, combination: Combination) -> Solution:
    """Return a solution with a combination's options taken and replacements undone."""
    n = len(table.options)
    for k in combination.rows:
        if k >= n:
            solution = undone(solution, table.undone[k - n])
        else:
            solution = with_candidate(solution, table.options[k])
    return solution


def _boundary(
    context: SearchContext, table: OutputChanges, combination: Combination
) -> tuple[int, int]:
    """Return the chain and the boundary up to which a combination leaves the streams as they are."""
    n, places = len(table.options), [(len(context.chains) - 1, len(context.chains[-1]))]
    for k in combination.rows:
        if k >= n:
            places.append(context.before(table.undone[k - n]))
        else:
            places.append((table.options[k].chain, table.options[k].boundary))
    return min(places)


def _picked(
    context: SearchContext,
    found: Sequence[tuple[Combination, Solution, Cost]],
    start: float,
    target: float,
) -> Iterator[tuple[Combination, Solution, Cost, bool]]:
    """Return the plans to evaluate: the one with the least predicted rise at each size of a grid, and
    the best few at the target and at the budget, also where that lies beyond the target.
    """
    sized = [(context.limits.size(cost), (each, solution, cost)) for each, solution, cost in found]
    sized = [(size, each) for size, each in sized if size < start - 1e-9]
    if not sized:
        return
    target = max(target, min(size for size, _ in sized))
    apart = context.spent.stage / STEPS
    grid = np.arange(math.floor(start / apart), 0, -1) * apart
    ends = context.limits.goal_size, target
    seen: set[tuple[int, ...]] = set()
    for goal in sorted({*grid[grid > target + 1e-9], *ends}, reverse=True):
        within = [each for size, each in sized if size <= goal + 1e-9]
        within.sort(key=lambda f: (rounded(f[0].rise), f[2].macs, f[0].rows))
        best = within[: context.spent.judged if goal in ends else 1]
        # A plan that saves far more than it must is seldom as good as it is predicted to be.
        near = [each for each in within if context.limits.size(each[2]) > goal - GRID]
        if len(best) > 1 and near and not any(each in near for each in best):
            best[-1] = near[0]
        for each in best:
            if each[0].rows not in seen:
                seen.add(each[0].rows)
                yield *each, bool(goal < target)


def _moves(
    context: SearchContext, table: OutputChanges, own: Sequence[Replacement]
) -> tuple[list[Move], list[int]]:
    """Return the steps of the solver's walk, and the positions before each of its places.

    A block is a place for itself, with one more before it or behind it for each unit that may narrow
    the block besides: there the walk takes one of the unit's options, or none. Whatever cuts the block
    or removes it goes past all of these.

    Args:
        own: the replacements of the state as it is handed out, with exact read-outs, which save less
            where fewer positions reach them, and with widths of whole chains.
    """
    moves: list[Move] = []
    positions: list[int] = []
    n = len(table.options)
    for c, chain in enumerate(context.chains):
        walk = partial(_walked, chain, context.fitter.times[c] if context.fitter.times else ())
        options = [(k, o) for k, o in enumerate(table.options) if o.chain == c]
        old = [(k, r) for k, r in enumerate(table.undone, n) if r.chain == chain.name]
        outer = {r.start: (k, r) for k, r in old if not r.inner}
        rows = {id(r): k for k, r in old}
        inner = [(rows.get(id(r)), r) for r in own if r.chain == chain.name and r.inner]
        handed = {r.start: r for r in own if r.chain == chain.name and not r.inner}
        slots = [_Slots.of(b, options, inner) for b in range(len(chain))]
        first = [len(positions)]
        for each in slots:
            first.append(first[-1] + each.places)
        positions += [chain.positions, *[-1] * (first[-1] - first[0] - 1)]
        for b, each in enumerate(slots):
            main = first[b] + len(each.before)
            row, replaced = outer.get(b, (None, None))
            stop = b + 1 if replaced is None else replaced.stop
            end = main + 1 if stop == b + 1 else first[stop]
            keep = partial(walk, b, handed.get(b))
            if replaced is not None:
                moves.append(Move(main, end, None, keep, taken=False))
                keep = partial(walk, b, None)
            # A block that comes back would have another width than the others.
            if replaced is None or not (context.config.stock and inner):
                moves.append(Move(main, main + 1, row, keep, taken=False))
            narrow = b in handed and handed[b].exact
            for k, slot in enumerate((*each.before, *each.behind)):
                at = first[b] + k + (k >= len(each.before))
                moves += slot.moves(at, chain, narrow=narrow)
        for k, option in options:
            new, begin = option.replacement, option.boundary
            if not new.inner:
                cost = partial(walk, begin, new)
                beside = keeps_layers(new)
                start = first[begin] + (len(slots[begin].before) if beside else 0)
                end = start + 1 if beside else first[new.stop]
                moves.append(Move(start, end, k, cost))
    return moves, [*positions, -1]


@dataclass(frozen=True)
class _Slot:
    """Place of a walk at which a block is narrowed, or not."""

    options: list[tuple[int, Replacement]]
    """Options, with the rows of the quadratic form."""
    old: tuple[int | None, Replacement] | None = None
    """Replacement that narrows the block in the network as it is, with the row of undoing it, or None.
    """

    def moves(self, at: int, chain: Chain, *, narrow: bool) -> Iterator[Move]:
        """Yield the steps from a place to the next one; arguments as in `saving`."""
        now = None if self.old is None else self.old[1]
        cost = partial(_saved, chain, narrow=narrow)
        yield Move(at, at + 1, None, partial(cost, now), taken=False)
        if self.old is not None and self.old[0] is not None:
            yield Move(at, at + 1, self.old[0], partial(cost, None))
        for row, new in self.options:
            yield Move(at, at + 1, row, partial(cost, new))


@dataclass(frozen=True)
class _Slots:
    """Places of a walk beside a block, before it and behind it."""

    before: list[_Slot]
    behind: list[_Slot]

    @classmethod
    def of(
        cls,
        b: int,
        options: Iterable[tuple[int, Candidate]],
        old: Sequence[tuple[int | None, Replacement]],
    ) -> _Slots:
        """Return the slots of a block, one for each unit."""
        new = [(k, o.replacement) for k, o in options if not o.also]
        inner = {r.unit: None for _, r in (*old, *new) if r.inner and r.start == b}
        found: dict[bool, list[_Slot]] = {False: [], True: []}
        for name in inner:
            taken = next(((k, r) for k, r in old if r.start == b and r.unit == name), None)
            slot = _Slot([(k, r) for k, r in new if r.start == b and r.unit == name], taken)
            found[width_unit_of(name).second].append(slot)
        return cls(found[False], found[True])

    @property
    def places(self) -> int:
        return len(self.before) + 1 + len(self.behind)


def _saved(chain: Chain, new: Replacement | None, positions: int, *, narrow: bool) -> Walked:
    """Return minus the saving of what narrows a block."""
    if new is None:
        return np.zeros(3), positions
    saved = saving(chain, new, positions, positions, narrow=narrow)
    return -np.array([saved.macs, saved.params, saved.latency], dtype=np.float64), positions


def _walked(
    chain: Chain, times: Sequence[float], begin: int, new: Replacement | None, positions: int
) -> Walked:
    """Return the cost of the blocks from `begin` to the end of a replacement, or of one block."""
    total = np.zeros(3)
    for b in range(begin, begin if new is None else new.start):
        cost, _, positions = step_cost(chain, None, b, positions, times=times)
        total += cost
    start = begin if new is None else new.start
    cost, _, positions = step_cost(chain, new, start, positions, times=times)
    return total + cost, positions
