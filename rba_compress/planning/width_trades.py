"""Trades of channels between narrowed blocks: one gets a level back, another one loses some instead.

A search takes channels stage by stage and gives none back, so that blocks which were narrowed early may
have lost too many. Both levels of a trade are fitted anew, and so is every layer behind them that reads
narrowed channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rba_compress.core.plan import Replacement, Site
from rba_compress.planning.candidates import readers
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import Candidate, SearchState, Solution, undone, with_candidate
from rba_compress.units.registry import unit_of
from rba_compress.units.width import WidthUnit

FREE = 1e-4
"""Unexplained share of a fit below which channels were lost for nothing."""


class WidthTrade(NamedTuple):
    """Two narrowed blocks, or one that is to be narrowed, in the order of the network's chains."""

    down: Site
    up: Site
    steps: int = 1

    @property
    def at(self) -> tuple[int, int]:
        """Chain and boundary up to which the trade changes nothing."""
        return min((site.chain, site.start) for site in (self.down, self.up))


def width_trades(context: SearchContext, state: SearchState) -> Iterator[WidthTrade]:
    """Yield every trade between blocks whose channels a unit takes one by one."""
    plan = state.solution.plan
    if (
        context.deep
        or context.config.stock
        or any(unit_of(r.unit).scheduled for r in plan.replacements)
    ):
        return  # too many; one width for all; merges are traded instead
    for unit in map(unit_of, context.config.units):
        if not isinstance(unit, WidthUnit) or unit.whole:
            continue
        found: list[tuple[Site, Replacement | None]] = []
        for c, chain in enumerate(context.chains):
            own = plan.at(chain, 0, len(chain))
            taken = {r.start: r for r in own if r.unit == unit.name}
            gone = {
                b
                for r in own
                if unit.excludes(Site(c, r.start, r.stop, unit.name), r)
                for b in range(r.start, r.stop)
            }
            found += [
                (Site(c, b, b + 1, unit.name), taken.get(b))
                for b, _ in unit.sites(chain, None)
                if b not in gone
            ]
        for down, old in found:
            if old is not None and not lost_nothing(old):
                yield from (WidthTrade(down, up) for up, _ in found if up != down)


def lost_nothing(width: Replacement) -> bool:
    """Return whether what narrows a block took dead or dependent channels alone."""
    return width.diagnostics is not None and width.diagnostics.r2 >= 1 - FREE


def with_width_trade(context: SearchContext, state: SearchState, trade: WidthTrade) -> Solution | None:
    """Return the network after a trade that meets the budget; None where there is none."""
    chain = context.chains[trade.down.chain]
    at = state.solution.plan.at(chain, trade.down.start, trade.down.stop)
    old = next((r for r in at if r.unit == trade.down.unit), None)
    if old is None:
        return None  # given back by an earlier trade
    solution = undone(state.solution, old)
    wider = [
        each for each in _levels(context, solution, trade.down) if each.replacement.kept > old.kept
    ]
    if wider:
        solution = with_candidate(solution, min(wider, key=lambda each: each.replacement.kept))
    for each in _levels(context, solution, trade.up):
        found = with_candidate(solution, each)
        if not context.limits.lacking(context.fitter.cost(found.plan)):
            for c, other in enumerate(context.chains):
                if readers(found.plan, other):
                    found = context.fitter.narrowed_again(found, c)
            return found
    return None


def _levels(context: SearchContext, solution: Solution, site: Site) -> list[Candidate]:
    """Return the levels of a site on a network, those that keep most first."""
    found = context.fitter.narrower(solution, site.chain, [site])
    return sorted(found, key=lambda each: -each.replacement.kept)
