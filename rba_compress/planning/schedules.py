"""Schedules: levels of a unit for all blocks of a chain at once, at a given cost of the network.

The table of a stage knows each level alone and the products of their changes. Merges of positions
interact in more ways, because each changes the positions that the later ones see. A schedule has few
numbers: a shape, and a strength, which is set so that the network costs what it may. Shapes are run on
the screened samples, first those of a coarse grid, then those around the best one; the best of all is
evaluated on all samples.
"""

from __future__ import annotations

from collections.abc import Callable

from rba_compress.core.cost import Cost
from rba_compress.core.plan import Chain
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import Candidate, SearchState, Solution, changed, with_candidate
from rba_compress.units.base import Unit
from rba_compress.units.registry import unit_of

MOST = 14
"""Shapes that are run at most."""
Shape = tuple[int, int]


def scheduled(context: SearchContext, state: SearchState, meets: Callable[[Cost], bool]) -> SearchState:
    """Return the network with a schedule in place of a unit's levels, where that has less divergence.

    Args:
        meets: says whether a cost is low enough.
    """
    for c in range(len(context.chains)):
        for unit in (u for u in map(unit_of, context.config.units) if not u.fitted):
            state = _scheduled(context, state, c, unit, meets)
    return state


def _scheduled(
    context: SearchContext, state: SearchState, c: int, unit: Unit, meets: Callable[[Cost], bool]
) -> SearchState:
    """Try schedules of one unit in one chain."""
    chain = context.chains[c]
    own = [r for r in state.solution.plan.replacements if r.chain == chain.name]
    old = [r for r in own if r.unit == unit.name]
    if not old:
        return state
    others = {b for r in own if r not in old for b in range(r.start, r.stop)}
    free = [b for b, _ in unit.sites(chain, None) if b not in others]
    bare, found = changed(state.solution, drop=old), dict[Shape, tuple[float, Solution]]()
    shapes, plans = unit.schedules(chain, free), [state.solution.plan.replacements]

    def at(solution: Solution) -> tuple[int, int]:
        new = [r for r in solution.plan.replacements if (r.chain, r.unit) == (chain.name, unit.name)]
        return c, min(r.start for r in (*old, *new))

    def run(shape: Shape) -> None:
        solution = _weakest(
            lambda strength: _with(bare, c, chain, unit, shapes[shape](strength)),
            lambda solution: meets(context.fitter.cost(solution.plan)),
        )
        new = solution is not None and solution.plan.replacements not in plans
        if solution is not None and new and len(found) < MOST:
            plans.append(solution.plan.replacements)
            screened = context.divergences(state, solution, at(solution), screen=True)
            found[shape] = float(screened.mean()), solution

    for shape in shapes:
        if shape[0] % 2 == 0 and shape[1] in (0, 3):
            run(shape)
    around: set[Shape] = set()
    while found and (best := min(found, key=lambda shape: found[shape][0])) not in around:
        around.add(best)
        for shape in shapes:
            if shape not in found and abs(shape[0] - best[0]) + abs(shape[1] - best[1]) == 1:
                run(shape)
    screened = state.evaluation.divergence[: context.evaluator.screened]
    if not found or found[best][0] >= float(screened.mean()):
        return state
    solution = found[best][1]
    evaluation = context.evaluation(state, solution, at(solution))
    new = SearchState(solution, context.fitter.cost(solution.plan), evaluation)
    return new if new.mean < state.mean and not context.limits.broken(new) else state


def _with(solution: Solution, c: int, chain: Chain, unit: Unit, levels: dict[int, float]) -> Solution:
    """Return a solution with levels of a unit, by block."""
    for b, level in levels.items():
        solution = with_candidate(solution, Candidate(c, unit.choice(chain, b, b + 1, level)))
    return solution


def _weakest(build: Callable[[float], Solution], meets: Callable[[Solution], bool]) -> Solution | None:
    """Return the network with the least strength that costs little enough; None where none does."""
    low, high, best = 0.0, 1.0, build(1.0)
    if not meets(best):
        return None
    for _ in range(10):
        middle = (low + high) / 2
        solution = build(middle)
        if meets(solution):
            high, best = middle, solution
        else:
            low = middle
    return best
