"""Schedules: levels of a unit for all blocks of a chain at once, at a given cost of the network.

The table of a stage knows each level alone and the products of their changes. Merges of positions
interact in more ways, because each changes the positions that the later ones see. A schedule has few
numbers: a shape, and a strength, which is set so that the network costs what it may. Shapes are run on
the screened samples, first those of a coarse grid, then those around the best one; the best few of all
are evaluated on all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from rba_compress.core.cost import Cost
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import Candidate, SearchState, Solution, changed, with_candidate
from rba_compress.units.base import Schedule, Unit
from rba_compress.units.registry import unit_of

Shape = tuple[int, int]


def scheduled(
    context: SearchContext,
    state: SearchState,
    before: SearchState,
    meets: Callable[[Cost], bool],
    *,
    must: bool = False,
) -> SearchState:
    """Return the network with a schedule in place of a unit's levels, where the divergence rises less
    for what is saved.

    Args:
        state: the network.
        before: the network from which rises and savings count.
        meets: says whether a cost is low enough.
        must: take the best schedule that meets it, also where the rise is more for what is saved.
    """
    for c in range(len(context.chains)):
        for unit in (u for u in map(unit_of, context.config.units) if u.scheduled):
            state = _Schedules(context, state, c, unit).best(
                before, meets, must=must and not meets(state.cost)
            )
    return state


class _Schedules:
    """Schedules of one unit in one chain of a network, in place of the unit's levels there."""

    def __init__(self, context: SearchContext, state: SearchState, c: int, unit: Unit) -> None:
        self.context, self.state, self.c, self.unit = context, state, c, unit
        self.chain = context.chains[c]
        name, plan = self.chain.name, state.solution.plan
        own = [r for r in plan.replacements if r.chain == name and not r.inner]
        self.old = [r for r in own if r.unit == unit.name]
        others = {b for r in own if r not in self.old for b in range(r.start, r.stop)}
        free = [b for b, _ in unit.sites(self.chain, None) if b not in others]
        self.shapes = unit.schedules(self.chain, free) if self.old else {}
        self.bare = changed(state.solution, drop=self.old)

    def best(self, before: SearchState, meets: Callable[[Cost], bool], *, must: bool) -> SearchState:
        """Return the network with the best schedule, or the state where none is better; arguments as
        in `scheduled`.
        """
        context, state, limits = self.context, self.state, self.context.limits
        if not self.shapes:
            return state

        def saved(cost: Cost) -> float:
            return limits.size(before.cost) - limits.size(cost)

        def price(divergences: Tensor, cost: Cost) -> float:
            rise = divergences.mean() - before.evaluation.divergence[: len(divergences)].mean()
            return float(rise) / saved(cost)

        def low(solution: Solution) -> bool:
            cost = context.fitter.cost(solution.plan)
            return saved(cost) > 1e-9 and meets(cost)

        def run(solution: Solution) -> float:
            screened = context.divergences(state, solution, self._at(solution), screen=True)
            return price(screened, context.fitter.cost(solution.plan))

        divergences, best = state.evaluation.divergence, state
        screened = price(divergences[: context.evaluator.screened], state.cost)
        lowest = math.inf if must else price(divergences, state.cost)
        for expected, solution in self._screened(low, run)[: context.spent.judged]:
            if meets(state.cost) and expected >= screened:
                break
            evaluation = context.evaluation(state, solution, self._at(solution))
            new = SearchState(solution, context.fitter.cost(solution.plan), evaluation)
            found = price(evaluation.divergence, new.cost)
            if found < lowest and not limits.broken(new):
                best, lowest = new, found
        return best

    def _screened(
        self, low: Callable[[Solution], bool], run: Callable[[Solution], float]
    ) -> list[tuple[float, Solution]]:
        """Return the prices of the shapes that were run, and their networks, the lowest price first."""
        found: dict[Shape, tuple[float, Solution]] = {}
        plans = [self.state.solution.plan.replacements]

        def add(shape: Shape) -> None:
            solution = _weakest(partial(self._with, self.shapes[shape]), low)
            if (
                solution is None
                or solution.plan.replacements in plans
                or len(found) == self.context.spent.shapes
            ):
                return
            plans.append(solution.plan.replacements)
            found[shape] = run(solution), solution

        for shape in self.shapes:
            if shape[0] % 2 == 0 and shape[1] in (0, 3):
                add(shape)
        around: set[Shape] = set()
        while found and (best := min(found, key=lambda shape: found[shape][0])) not in around:
            around.add(best)
            for shape in self.shapes:
                if shape not in found and abs(shape[0] - best[0]) + abs(shape[1] - best[1]) == 1:
                    add(shape)
        return sorted(found.values(), key=lambda each: each[0])

    def _at(self, solution: Solution) -> tuple[int, int]:
        """Return the chain and the boundary up to which a network has the streams of the state."""
        of = self.chain.name, self.unit.name
        new = [r for r in solution.plan.replacements if (r.chain, r.unit) == of]
        return self.c, min(r.start for r in (*self.old, *new))

    def _with(self, schedule: Schedule, strength: float) -> Solution:
        """Return the network with a schedule."""
        solution = self.bare
        for b, level in schedule(strength).items():
            new = self.unit.choice(self.chain, b, b + 1, level)
            solution = with_candidate(solution, Candidate(self.c, new))
        return solution


def _weakest(build: Callable[[float], Solution], low: Callable[[Solution], bool]) -> Solution | None:
    """Return the network with the least strength that costs little enough; None where none does."""
    least, most, best = 0.0, 1.0, build(1.0)
    if not low(best):
        return None
    for _ in range(10):
        middle = (least + most) / 2
        solution = build(middle)
        if low(solution):
            most, best = middle, solution
        else:
            least = middle
    return best
