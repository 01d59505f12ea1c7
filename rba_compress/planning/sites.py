"""Sites of the options of one stage: as many as the network is deep, times a constant."""

from __future__ import annotations

from rba_compress.core.plan import Plan, Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import overlapping, replaced_blocks
from rba_compress.units.registry import unit_of

LONGEST = 4
"""Blocks that a span may newly remove in one stage."""


def sites(context: SearchContext, plan: Plan) -> list[Site]:
    """Return every site of a state: single blocks of each unit, and spans of few new blocks."""
    found: list[Site] = []
    for c, chain in enumerate(context.chains):
        gone = replaced_blocks(plan, chain, cut=False)
        for unit in map(unit_of, context.config.units):
            if chain.after is not None and (context.config.stock or not unit.inner):
                continue
            if context.config.stock and unit.inner:
                # No configuration gives the stages of a network widths of their own.
                if len(context.chains) == 1 and unit.sites(chain, None):
                    found.append(Site(c, 0, len(chain), unit.name))
                continue
            for start, stop in unit.sites(chain, context.config.window):
                site = Site(c, start, stop, unit.name)
                over = overlapping(plan, unit.choice(chain, start, stop))
                new = sum(b not in gone for b in range(start, stop))
                if unit.removes:  # what is removed may become longer, and is not cut through
                    free = all(start <= other.start and other.stop <= stop for other in over)
                else:
                    at = plan.at(chain, start, stop) if unit.inner else over
                    free = not any(unit.excludes(site, other) for other in at)
                if new > LONGEST or not free:
                    continue
                if over or site not in context.skipped:
                    found.append(site)
    return found
