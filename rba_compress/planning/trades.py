"""Trades of levels between the sites of a unit that fits nothing, at the cost of the budget.

The table of a stage predicts what merges of positions do together least well, because each changes the
positions that the later ones see. So the result's levels are traded: one site goes down by a level or
two, another goes up until the budget is met again, and the network is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rba_compress.core.config import mixed_seed
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.refinement import wins
from rba_compress.planning.state import Candidate, SearchState, Solution, undone, with_candidate
from rba_compress.units.registry import unit_of

Trade = tuple[int, str, int, int, int]
"""The chain, the unit, the blocks that go down and up, and by how many levels the first goes down."""


def traded(context: SearchContext, state: SearchState) -> SearchState:
    """Trade levels for as long as the divergence falls, and at most as often as the effort allows."""
    left, again = context.spent.trades, True
    known: set[str] = set()
    generator = np.random.default_rng(mixed_seed(context.config.seed))
    while again and left:
        again = False
        trades = list(_trades(context, state))
        for k in sorted(generator.permutation(len(trades)), key=lambda k: -trades[k][-1]):
            solution = _with(context, state, trades[k])
            if solution is None or str(solution.plan) in known:
                continue
            known.add(str(solution.plan))
            chain, _, down, up, _ = trades[k]
            evaluation = context.evaluation(state, solution, (chain, min(down, up)))
            new = SearchState(solution, context.fitter.cost(solution.plan), evaluation)
            better = wins(context, evaluation.divergence, state.evaluation.divergence)
            if better and not context.limits.broken(new):
                state, again = new, True
            left -= 1
            if not left:
                break
    return state


def _trades(context: SearchContext, state: SearchState) -> Iterator[Trade]:
    """Yield every trade between blocks that nothing but the unit itself replaces."""
    for c, chain in enumerate(context.chains):
        own = [r for r in state.solution.plan.in_order if r.chain == chain.name]
        for unit in map(unit_of, context.config.units):
            if unit.fitted:  # another level asks for another fit
                continue
            name = unit.name
            taken = {r.start for r in own if r.unit == name and r.level is not None}
            others = {b for r in own if r.unit != name for b in range(r.start, r.stop)}
            last = max(others, default=-1)
            free = [start for start, _ in unit.sites(chain, None) if start > last]
            for down in sorted(taken):
                for up in free:
                    if up != down and up not in others:
                        yield from ((c, name, down, up, steps) for steps in (1, 2))


def _with(context: SearchContext, state: SearchState, trade: Trade) -> Solution | None:
    """Return the network after a trade that meets the budget; None where there is none."""
    c, name, down, up, steps = trade
    own_levels = unit_of(name).levels(context.config, context.chains[c])
    levels = [0.0, *(level for level in own_levels if isinstance(level, float))]
    own = [r for r in state.solution.plan.in_order if r.chain == context.chains[c].name]
    at = {r.start: r for r in own if r.unit == name and r.level is not None}
    if down not in at:
        return None
    lower = [level for level in levels if level < float(at[down].level or 0)][-steps:]
    before = float(at[up].level or 0) if up in at else 0.0
    solution = _levelled(context, state.solution, (c, name, down), lower[0])
    for level in (level for level in levels if level > before):
        found = _levelled(context, solution, (c, name, up), level)
        if not context.limits.lacking(context.fitter.cost(found.plan)):
            return found
    return None


def _levelled(
    context: SearchContext, solution: Solution, place: tuple[int, str, int], level: float
) -> Solution:
    """Return a solution with another level at a site, or without the unit where the level is 0."""
    c, name, b = place
    new = context.fitter.unfitted(Site(c, b, b + 1, name), level or 1.0)
    if level:
        return with_candidate(solution, Candidate(c, new))
    old = [r for r in solution.plan.replacements if (r.chain, r.start) == (new.chain, b)]
    return undone(solution, old[0]) if old else solution
