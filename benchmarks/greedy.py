"""Rival: a greedy search, which judges its candidates anew at each step.

Each step fits its candidates on the partially compressed network, screens them, and takes the one with
the least rise of the divergence for its progress towards the budget. The step is then refined: maps
behind the new one are fitted again, kept layers behind it re-solved, and each replacement is undone and
chosen again. Passes grow with the cube of the depth. The package had this search before it searched by
output changes; here it is a row of `methods`, `stages` and `tradeoff`, for budgets of cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from weakref import WeakKeyDictionary

from torch import Tensor

from rba_compress.core.cost import Cost
from rba_compress.core.errors import ActivationError, BudgetError
from rba_compress.core.plan import FoldRefit, Refit, Replacement, Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.refinement import statistics, wins
from rba_compress.planning.solver import rounded
from rba_compress.planning.state import (
    Candidate,
    SearchState,
    Solution,
    overlapping,
    replaced_blocks,
    undone,
    with_candidate,
)
from rba_compress.units.registry import unit_of

PROMISING = 16
"""Number of sites that are screened again in a step."""
FINALISTS = 4
"""Number of screened sites that are evaluated on all samples; half as many in a swap."""


SWAPS = 1
"""Rounds in which each replacement of a step is undone and chosen again."""
RISES: WeakKeyDictionary[SearchContext, dict[Site, float]] = WeakKeyDictionary()
"""Rise of the divergence at each site of a search when it was last screened."""


class Selection:
    """Candidates of one search state, scored by the rise of the divergence over their progress.

    Args:
        context: the context of the search.
        state: the network that the candidates change.
        goal: the cost to reach; by default the budget's.
    """

    def __init__(self, context: SearchContext, state: SearchState, goal: Cost | None = None) -> None:
        self.context, self.state = context, state
        self.lacking = lacking(context, state.cost, goal)

    def sites(self) -> list[Site]:
        """Return the sites of candidates, none of them longer than the budget requires.

        A block that was cut may be removed, or be cut further.
        """
        context, plan = self.context, self.state.solution.plan
        found: list[Site] = []
        for c, chain in enumerate(context.chains):
            names = sorted(context.config.units, key=lambda name: not unit_of(name).removes)
            inner: dict[int, list[Site]] = {}
            for name in names:
                unit = unit_of(name)
                for start, stop in unit.sites(chain, context.config.window):
                    site = Site(c, start, stop, name)
                    over = overlapping(plan, unit.choice(chain, start, stop))
                    if any(unit.excludes(site, other) for other in over):
                        continue
                    if not unit.removes:
                        inner.setdefault(start, []).append(site)
                    elif stop - start == 1 or not self._enough(site._replace(stop=stop - 1)):
                        found.append(site)
            found += [site for b in sorted(inner) for site in inner[b]]
        return found

    def _enough(self, site: Site) -> bool:
        return progress(saving(self.context, self.state, site), self.lacking) >= 1

    def best(
        self, sites: Sequence[Site], *, finalists: int = FINALISTS
    ) -> tuple[Candidate, Tensor, float] | None:
        """Return the candidate with the lowest score; None without any.

        Returns:
            The candidate, its divergences, and how much higher the divergence would be at the score of
            the next best site.

        Raises:
            ActivationError: the output of every candidate holds NaN or infinity.
        """
        made = self.context.fitter.candidates(self.state, sites)
        candidates = [c for c in made if progress(c.saving, self.lacking) > 0]
        if not candidates:
            return None
        sites = list(dict.fromkeys(c.site for c in candidates))
        if len(sites) > finalists:
            sites = self.screened(candidates)[:finalists]
        results = self.evaluated([c for c in candidates if c.site in sites], self.score)
        won, _, candidate, divergences = results[0]
        if not math.isfinite(float(divergences.mean())):
            raise ActivationError("every candidate makes the model's output NaN or infinite")
        rest = next((other for other, _, c, _ in results if c.site != candidate.site), math.inf)
        return candidate, divergences, (rest - won) * progress(candidate.saving, self.lacking)

    def score(self, candidate: Candidate, divergences: Tensor) -> float:
        """Return the score of a candidate: the rise of the divergence over its progress."""
        return self.rise(divergences) / progress(candidate.saving, self.lacking)

    def rise(self, divergences: Tensor) -> float:
        """Return how much higher the divergence is than that of the state."""
        before = self.state.evaluation.divergence[: len(divergences)]
        return float(divergences.mean() - before.mean())

    def screened(self, candidates: Sequence[Candidate]) -> list[Site]:
        """Return the promising sites, best first, screened on a share of the validation samples."""
        found: dict[Site, float] = {}
        for site in self.promising(candidates):
            first = probes(self.context, [c for c in candidates if c.site == site])
            ends = (first[0], first[-1]) if unit_of(site.unit).removes else first[-1:]
            seen = [
                (c, evaluate(self.context, self.state, c, screen=True)) for c in dict.fromkeys(ends)
            ]
            lowest = min(self.rise(divergences) for _, divergences in seen)
            RISES.setdefault(self.context, {})[site] = lowest
            found[site] = min(self.score(*each) for each in seen)
        return sorted(found, key=lambda site: rounded(found[site]))

    def promising(self, candidates: Sequence[Candidate]) -> list[Site]:
        """Return the sites to screen: those that never were screened, and the best of the others.

        The others are ordered by their last screening, which later choices change little.
        """
        saved = {c.site: progress(c.saving, self.lacking) for c in candidates}
        rises = RISES.setdefault(self.context, {})
        known = sorted(
            (site for site in saved if site in rises), key=lambda site: rises[site] / saved[site]
        )
        best = known[:PROMISING]
        return [site for site in saved if site in best or site not in known]

    def evaluated(
        self, candidates: Sequence[Candidate], score: Callable[[Candidate, Tensor], float]
    ) -> list[tuple[float, int, Candidate, Tensor]]:
        """Evaluate each kind of map at each site, then every shrink of the best kind at the two best
        sites.

        Returns:
            (score, -macs saved, candidate, divergences), best first.
        """

        def run(candidate: Candidate) -> tuple[float, int, Candidate, Tensor]:
            divergences = evaluate(self.context, self.state, candidate)
            self.context.log.evaluated(self.state, candidate, divergences)
            return score(candidate, divergences), -candidate.saving.macs, candidate, divergences

        def order(result: tuple[float, int, Candidate, Tensor]) -> tuple[float, int]:
            return rounded(result[0]), result[1]

        first = probes(self.context, candidates)
        results = sorted(map(run, first), key=order)
        for site in list(dict.fromkeys(c.site for _, _, c, _ in results))[:2]:
            of_site = (c.replacement.map for _, _, c, _ in results if c.site == site)
            kind = next((used.kind for used in of_site if used.shrink is not None), None)
            rest = [c for c in candidates if c.site == site and c.replacement.map.kind == kind]
            results += [run(c) for c in rest if c not in first]
        return sorted(results, key=order)


def probes(context: SearchContext, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return one candidate for each site and kind of map: if the kind is shrunk, the middle shrink."""
    dial = sorted(context.config.shrinks)
    middle = (None, dial[len(dial) // 2])
    return [c for c in candidates if c.replacement.map.shrink in middle]


def lacking(context: SearchContext, cost: Cost, goal: Cost | None = None) -> dict[str, float]:
    """Return what must still be saved of each limited cost, down to the limits or a goal."""
    limits = context.limits.costs
    wanted = limits if goal is None else {k: getattr(goal, k) for k in limits}
    return {k: getattr(cost, k) - v for k, v in wanted.items() if getattr(cost, k) > v}


def progress(saving: Cost, lacking: dict[str, float]) -> float:
    """Return the share of the lacking costs that a saving covers, 0 to 1: the least over all limits."""
    return min(min(float(getattr(saving, k)) / v, 1.0) for k, v in lacking.items())


def refined(context: SearchContext, state: SearchState, newest: Candidate) -> SearchState:
    """Refine the network behind a candidate that was taken: maps, then layers, then BatchNorms."""
    chain, boundary = newest.chain, newest.replacement.stop
    state = settle(context, state, chain, boundary)
    if context.config.refit:
        state = refit(context, state, chain, boundary)
    return statistics(context, state)


def settle(context: SearchContext, state: SearchState, chain: int, boundary: int) -> SearchState:
    """Fit the maps behind a boundary again, because the network before them has changed."""
    places = sorted((context.order[r.chain], r.start) for r in state.solution.plan.replacements)
    for place in (p for p in places if p >= (chain, boundary)):
        (old,) = (
            r for r in state.solution.plan.replacements if (context.order[r.chain], r.start) == place
        )
        base = without(context, state, old)
        site = Site(place[0], old.start, old.stop, old.unit)
        cheap = [
            c
            for c in context.fitter.candidates(base, [site])
            if not lacking(context, base.cost - c.saving, state.cost)
        ]
        found = Selection(context, base).evaluated(
            cheap, lambda _, divergences: float(divergences.mean())
        )
        if found and wins(context, found[0][3], state.evaluation.divergence):
            candidate, before = found[0][2], state.mean
            state = context.state(
                with_candidate(base.solution, candidate), base.cost - candidate.saving
            )
            context.log.decided("settle", candidate.replacement, state, before - state.mean)
    return state


def swap(context: SearchContext, state: SearchState, newest: Site) -> SearchState:
    """Undo each replacement but the newest and choose again, at no higher cost."""
    goal = state.cost
    for old in state.solution.plan.replacements:
        site = Site(context.order[old.chain], old.start, old.stop, old.unit)
        if site == newest or old not in state.solution.plan.replacements:
            continue  # the newest, or replaced or settled meanwhile
        base = without(context, state, old)
        step = Selection(context, base, goal)
        if not step.lacking:
            continue
        sites = [
            other
            for other in step.sites()
            if other != site and progress(saving(context, base, other), step.lacking) >= 1
        ]
        found = step.best(sites, finalists=FINALISTS // 2)
        if found is None:
            continue
        candidate, divergences, _ = found
        cost = base.cost - candidate.saving
        enough = not lacking(context, cost, goal)
        if enough and wins(context, divergences, state.evaluation.divergence):
            before = state.mean
            state = context.state(with_candidate(base.solution, candidate), cost)
            change = f"{old} for {candidate.replacement}"
            context.log.decided("swap", change, state, before - state.mean)
            state = refined(context, state, candidate)
    return state


def refit(context: SearchContext, state: SearchState, chain: int, boundary: int) -> SearchState:
    """Re-solve the last linear layers of the kept blocks behind a boundary, one by one."""
    blocks = context.chains[chain].blocks
    taken = replaced_blocks(state.solution.plan, context.chains[chain])
    walk = context.fitter.walk(chain, state.solution.plan)
    dampings = sorted(context.config.refit_dampings)
    middle = dampings[len(dampings) // 2]
    dampings.sort(key=lambda damping: damping != middle)
    for b in range(boundary, len(blocks)):
        folded = {r.path for r in state.solution.plan.refits if isinstance(r, FoldRefit)}
        for k, branch in enumerate(blocks[b].branches if b not in taken else ()):
            if branch.path in folded:
                continue
            best: tuple[Tensor, Refit, Solution] | None = None
            for damping, step in product(dampings, sorted(context.config.refit_steps)):
                new, solution = context.fitter.corrected(
                    walk, state.solution, (b, k), damping=damping, step=step
                )
                divergences = context.divergences(state, solution, (chain, b))
                if wins(context, divergences, state.evaluation.divergence if best is None else best[0]):
                    best = divergences, new, solution
                if best is None:
                    break  # if the smallest step does not help, the others hardly ever do
            if best is not None:
                before = state.mean
                state = context.state(best[2], state.cost)
                context.log.decided("refit", best[1], state, before - state.mean)
    return state


def run(context: SearchContext) -> Solution:
    """Take steps until a budget of cost is met.

    Raises:
        BudgetError: no step leads further.
    """
    state, points = context.start, []
    while lacking(context, state.cost):
        after = take(context, state)
        if after is None:
            raise BudgetError("no step leads further")
        state = after
        points.append(context.finished(state))
    return replace(context.finished(state), points=tuple(points))


def take(context: SearchContext, state: SearchState) -> SearchState | None:
    """Take the best candidate and refine the new state; return None without candidates.

    Raises:
        ActivationError: the output of every candidate holds NaN or infinity.
    """
    step = Selection(context, state)
    found = step.best(step.sites())
    if found is None:
        return None
    candidate, _, margin = found
    state = context.state(with_candidate(state.solution, candidate), state.cost - candidate.saving)
    context.log.decided("take", candidate.replacement, state, margin)
    state = refined(context, state, candidate)
    for _ in range(SWAPS if len(state.solution.plan.replacements) > 1 else 0):
        state = swap(context, state, candidate.site)
    return state


def without(context: SearchContext, state: SearchState, old: Replacement) -> SearchState:
    """Return the state with a replacement, and what was folded for it, undone."""
    solution = undone(state.solution, old)
    saved = context.fitter.cost(solution.plan) - context.fitter.cost(state.solution.plan)
    return context.state(solution, state.cost + saved)


def saving(context: SearchContext, state: SearchState, site: Site) -> Cost:
    """Return the most that a site can save, which is with the identity as its map."""
    fitter = context.fitter
    candidate = Candidate(site.chain, fitter.unfitted(site))
    return fitter.cost(state.solution.plan) - fitter.cost(
        with_candidate(state.solution, candidate).plan
    )


def evaluate(
    context: SearchContext, state: SearchState, candidate: Candidate, *, screen: bool = False
) -> Tensor:
    """Return the divergence of each validation sample with a candidate, (samples,)."""
    at = candidate.chain, candidate.boundary
    return context.divergences(state, with_candidate(state.solution, candidate), at, screen=screen)
