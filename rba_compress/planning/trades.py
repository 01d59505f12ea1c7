"""Trades of levels between the sites of a unit that fits nothing, at the cost of the budget.

The table of a stage predicts what merges of positions do together least well, because each changes the
positions that the later ones see. So the result's levels are traded: one site goes down by a level or
two, or a narrowed block gets its channels back, which save less the more positions are merged; another
site goes up until the budget is met again, and the network is evaluated. Before that, all narrowed
blocks are widened at once, with a schedule of merges that meets the budget without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from rba_compress.core.config import mixed_seed
from rba_compress.core.cost import Cost
from rba_compress.core.plan import Chain, Replacement, Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.refinement import promises
from rba_compress.planning.schedules import scheduled
from rba_compress.planning.state import Candidate, SearchState, Solution, undone, with_candidate
from rba_compress.units.registry import unit_of

WIDTH = 3
"""Rank of trades that give channels back among all, by steps: they are tried first."""
FREE = 1e-4
"""Unexplained share of a fit below which channels were lost for nothing."""
SITES = 2
"""Sites that are tried to go up for each narrowed block."""


class Trade(NamedTuple):
    """Two blocks of a chain that trade levels of a unit."""

    chain: int
    unit: str
    down: int
    up: int
    steps: int
    """Number of levels that the block `down` goes down."""
    width: Replacement | None = None
    """Replacement that narrows the block `down` and is undone instead."""


def widened(context: SearchContext, state: SearchState, meets: Callable[[Cost], bool]) -> SearchState:
    """Return the network with the channels of narrowed blocks given back and a schedule of merges that
    meets the budget instead; unchanged where that is no better.
    """
    solution, merged = state.solution, [r for r in state.solution.plan.in_order if r.level is not None]
    chains = {r.chain for r in merged if unit_of(r.unit).scheduled}
    widths = [w for c in context.chains if c.name in chains for w in _widths(context, state, c)]
    if not widths:
        return state
    for width in widths:
        solution = undone(solution, width)
    evaluation = context.evaluation(state, solution, min(map(context.before, widths)))
    bare = SearchState(solution, context.fitter.cost(solution.plan), evaluation)
    found = scheduled(context, bare, context.start, meets, must=True)
    better = meets(found.cost) and found.mean < state.mean and not context.limits.broken(found)
    return found if better else state


def traded(context: SearchContext, state: SearchState, most: int) -> SearchState:
    """Trade levels for as long as the divergence falls, with at most `most` evaluations."""
    left, again = most, True
    known: set[str] = set()
    generator = np.random.default_rng(mixed_seed(context.config.seed))
    while again and left:
        again = False
        trades, tried = list(_trades(context, state)), Counter[str]()
        for k in sorted(generator.permutation(len(trades)), key=lambda k: -trades[k].steps):
            width = trades[k].width
            tried[str(width)] += width is not None
            if tried[str(width)] > SITES:
                continue
            solution = _with(context, state, trades[k])
            if solution is None or str(solution.plan) in known:
                continue
            known.add(str(solution.plan))
            at = trades[k].chain, min(trades[k].down, trades[k].up)
            before = state.evaluation.divergence
            screened = context.divergences(state, solution, at, screen=True)
            if promises(context, screened, before):
                evaluation = context.evaluation(state, solution, at)
                new = SearchState(solution, context.fitter.cost(solution.plan), evaluation)
                # Both networks cost the same, so that no margin is required.
                if new.mean < state.mean and not context.limits.broken(new):
                    state, again = new, True
            left -= 1
            if not left:
                break
    return state


def _trades(context: SearchContext, state: SearchState) -> Iterator[Trade]:
    """Yield every trade between blocks that nothing but the unit itself replaces."""
    for c, chain in enumerate(context.chains):
        own = [r for r in state.solution.plan.in_order if r.chain == chain.name and not r.inner]
        for unit in map(unit_of, context.config.units):
            if unit.fitted:  # another level asks for another fit
                continue
            others = {b for r in own if r.unit != unit.name for b in range(r.start, r.stop)}
            free = [start for start, _ in unit.sites(chain, None) if start not in others]
            for width in _widths(context, state, chain) if own else ():
                yield from (Trade(c, unit.name, width.start, up, WIDTH, width) for up in free)
            for down in _taken(state.solution, chain, unit.name):
                for up in free:
                    if up != down:
                        yield from (Trade(c, unit.name, down, up, steps) for steps in (1, 2))


def _widths(context: SearchContext, state: SearchState, chain: Chain) -> list[Replacement]:
    """Return what narrows blocks of a chain at a loss; none where all must have one width."""
    inner = [r for r in state.solution.plan.at(chain, 0, len(chain)) if r.inner]
    if context.config.stock:
        return []
    return [r for r in inner if r.diagnostics is None or r.diagnostics.r2 < 1 - FREE]


def _with(context: SearchContext, state: SearchState, trade: Trade) -> Solution | None:
    """Return the network after a trade that meets the budget; None where there is none."""
    c, name, down, up, steps, width = trade
    chain = context.chains[c]
    levels = [x for x in unit_of(name).levels(context.config, chain) if isinstance(x, float)]
    taken = _taken(state.solution, chain, name)
    if down not in taken if width is None else width not in state.solution.plan.replacements:
        return None

    def levelled(solution: Solution, block: int, level: float) -> Solution:
        new = context.fitter.unfitted(Site(c, block, block + 1, name), level)
        return with_candidate(solution, Candidate(c, new))

    solution = undone(state.solution, width or taken[down])
    if width is None:
        lower = [0.0, *(level for level in levels if level < (taken[down].level or 0))][-steps:][0]
        solution = levelled(solution, down, lower) if lower else solution
    before = taken[up].level or 0 if up in taken else 0
    for level in (level for level in levels if level > before):
        found = levelled(solution, up, level)
        if not context.limits.lacking(context.fitter.cost(found.plan)):
            return found
    return None


def _taken(solution: Solution, chain: Chain, unit: str) -> dict[int, Replacement]:
    """Return what a unit with levels replaces in a chain, by block."""
    own = [r for r in solution.plan.in_order if (r.chain, r.unit) == (chain.name, unit)]
    return {r.start: r for r in own if r.level is not None}
