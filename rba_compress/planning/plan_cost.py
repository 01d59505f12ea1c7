"""Cost of a network under a plan, and what a plan saves, by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rba_compress.core.cost import Cost
from rba_compress.core.plan import Chain, Plan, Replacement, macs_at
from rba_compress.planning.state import Solution, without_unread
from rba_compress.profiling.profiler import Profile
from rba_compress.units.registry import unit_of, width_unit_of


def chain_cost(
    chain: Chain, replacements: Sequence[Replacement], *, times: Sequence[float] = ()
) -> Cost:
    """Return the cost of a chain's blocks with some of them replaced.

    The chain is walked from its start, because a unit may leave fewer positions and so change the cost
    of the blocks behind it.

    Args:
        times: the share of each block in the network's time; a block that is left in part is assumed to
            take as long, per MAC, as the whole block.
    """
    own = [r for r in replacements if r.chain == chain.name]
    starts = {r.start: r for r in own if not r.inner}
    positions, b, total = chain.positions, 0, np.zeros(3)
    while b < len(chain):
        inner = [r for r in own if r.inner and r.start == b]
        cost, b, positions = step_cost(chain, starts.get(b), b, positions, inner=inner, times=times)
        total += cost
    return Cost(macs=int(total[0]), params=int(total[1]), latency=float(total[2]))


def positions_left(chain: Chain, replacements: Sequence[Replacement]) -> list[int]:
    """Return the number of positions of a sample behind each block of a chain."""
    starts = {r.start: r for r in replacements if r.chain == chain.name and not r.inner}
    found: list[int] = []
    while len(found) < len(chain):
        before = found[-1] if found else chain.positions
        _, end, positions = step_cost(chain, starts.get(len(found)), len(found), before)
        found += [positions] * (end - len(found))
    return found


def step_cost(
    chain: Chain,
    new: Replacement | None,
    b: int,
    positions: int,
    *,
    inner: Sequence[Replacement] = (),
    times: Sequence[float] = (),
) -> tuple[NDArray[np.float64], int, int]:
    """Return the cost of one step of the walk, the block behind it, and the positions left there.

    Args:
        new: the replacement that starts at block `b`; None leaves the block as it is.
        inner: what narrows the block from the inside.
        times: as in `chain_cost`.
    """
    merged = chain.merged(positions)
    macs = macs_at(chain.blocks[b].by_positions, positions) if merged else chain.macs[b]
    costs = [Cost(macs=macs, params=chain.params[b])]
    before, narrow = positions, new is not None and new.exact
    if new is not None:
        costs, positions = unit_of(new.unit).cost(chain, new, positions)
    for each in inner:
        costs[0] -= saving(chain, each, before, positions, narrow=narrow)
    widths = [width for width in (chain.blocks[b].width(each.unit) for each in inner) if width]
    lost = [width.narrow_bias if narrow else width.bias for width in widths]
    costs[0] -= Cost(params=max(lost, default=0))
    stop = b + len(costs)
    latency = 0.0
    if times:
        per_mac = zip(times[b:stop], costs, chain.macs[b:stop], strict=True)
        latency = sum(t * c.macs / m for t, c, m in per_mac if m)
    total = [sum(c.macs for c in costs), sum(c.params for c in costs), latency]
    return np.array(total, dtype=np.float64), stop, positions


def saving(chain: Chain, new: Replacement, before: int, behind: int, *, narrow: bool) -> Cost:
    """Return the cost that narrowing a block from the inside saves.

    Args:
        before, behind: number of positions before the block and behind it; a merge lies between its
            sublayers.
        narrow: True where the block computes the read positions alone.
    """
    unit = width_unit_of(new.unit)
    positions = behind if unit.second and not narrow else before
    return unit.saving(chain, new, positions, narrow=narrow)


def plan_saving(
    chains: Sequence[Chain],
    replacements: Sequence[Replacement],
    *,
    times: Sequence[Sequence[float]] = (),
) -> Cost:
    """Return the cost that a network saves with some of its blocks replaced.

    Args:
        times: as in `chain_cost`, of every chain.
    """
    total = Cost()
    for chain, shares in zip(chains, times or [()] * len(chains), strict=True):
        before = chain_cost(chain, (), times=shares)
        total += before - chain_cost(chain, replacements, times=shares)
    return total


def network_cost(profile: Profile, plan: Plan, *, times: Sequence[Sequence[float]] = ()) -> Cost:
    """Return the cost of the network under a plan; the share of latency is an estimate."""
    replacements = without_unread(Solution(plan, {}), profile).plan.replacements
    original = profile.original.model_copy(update={"latency": 1.0})
    return original - plan_saving(profile.in_order, replacements, times=times)
