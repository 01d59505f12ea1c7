"""Selection of a candidate: all are screened, the best of them evaluated, and one is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from rba_compress.core.cost import Cost
from rba_compress.core.errors import ActivationError
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.limits import progress
from rba_compress.planning.solver import rounded
from rba_compress.planning.state import Candidate, SearchState, overlapping
from rba_compress.units.registry import unit_of

PROMISING = 16
"""Number of sites that are screened again in a step."""
FINALISTS = 4
"""Number of screened sites that are evaluated on all samples; half as many in a swap."""


class Selection:
    """Candidates of one search state, scored by the rise of the divergence over their progress.

    Args:
        context: the context of the search.
        state: the network that the candidates change.
        goal: the cost to reach; by default the budget's.
    """

    def __init__(self, context: SearchContext, state: SearchState, goal: Cost | None = None) -> None:
        self.context, self.state = context, state
        self.lacking = context.limits.lacking(state.cost, goal)

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
        return progress(self.context.fitter.saving(self.state, site), self.lacking) >= 1

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
            run = self.context.evaluate
            seen = [(c, run(self.state, c, screen=True)) for c in dict.fromkeys(ends)]
            self.context.rises[site] = min(self.rise(divergences) for _, divergences in seen)
            found[site] = min(self.score(*each) for each in seen)
        return sorted(found, key=lambda site: rounded(found[site]))

    def promising(self, candidates: Sequence[Candidate]) -> list[Site]:
        """Return the sites to screen: those that never were screened, and the best of the others.

        The others are ordered by their last screening, which later choices change little.
        """
        saved = {c.site: progress(c.saving, self.lacking) for c in candidates}
        rises = self.context.rises
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
            divergences = self.context.evaluate(self.state, candidate)
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
