"""The search: which spans to replace by which maps, under a budget.

Greedy over the sites of every unit, in every chain. Each step fits its candidates on the partially
compressed network, towards the original streams, screens them on a share of the validation samples, and
takes the one with the least rise of the *output's* divergence for its progress towards the budget. A
step is then refined: maps behind the new one are settled (fitted again), the last linear layers of the
kept blocks behind it are re-solved one by one, and each replacement is undone and chosen again. Each
change is accepted only if the divergence falls. Every step gives a point of the front between cost and
divergence.

Scores that agree to six digits are a tie, because another device or number of threads may reverse them.
A tie goes to the candidate that saves the most multiply-accumulates, then to the first in the network's
order, and within one span to the identity. The `margin` of a step says how close the next best was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rba_compress.core.config import Budget
from rba_compress.core.errors import BudgetError, PlanError
from rba_compress.core.inference import unwrap
from rba_compress.core.loader import Dealt, workers_named
from rba_compress.core.memory import within_memory
from rba_compress.core.offload import undispatched
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.refinement import refined, swap
from rba_compress.planning.selection import Selection
from rba_compress.planning.state import SearchState, Solution, removed_length, with_candidate
from rba_compress.profiling.profiler import Profile, fingerprint

DEFAULT_BUDGET = Budget(macs=0.75)


@workers_named()
@torch.inference_mode(False)
def search(
    model: nn.Module,
    profile: Profile,
    loader: Iterable[Any],
    *,
    budget: Budget | None = None,
) -> Solution:
    """Choose spans and maps that meet the budget at the least divergence of the output.

    Args:
        model: the network that was profiled; not changed.
        profile: the profile of that network.
        loader: the profiled loader. Of ten samples, five are fit samples and four are validation
            samples; both are kept in memory.
        budget: what the compressed network may cost and lose; by default three quarters of the MACs.

    Returns:
        The plan and its tensors; `points` are the networks on the way there, one for each step.

    Raises:
        BudgetError: no plan reaches the budget; the message names the best that is reachable.
        PlanError: the profile is of another network.
        ActivationError: the original output, or that of every candidate, holds NaN or infinity.
        LoaderError, MemoryLimitError: as `profile`.
    """
    budget, model = Budget.of(budget), undispatched(unwrap(model))
    if type(model).__name__ != profile.model:
        raise PlanError(f"the profile is of a {profile.model}, the model is a {type(model).__name__}")
    if fingerprint(model) != profile.weights:
        raise PlanError(f"the profile is of a {profile.model} with other weights: profile this one")
    return searched(model, profile, profile.split(loader).deal("fit", "validation"), budget)


def searched(
    model: nn.Module, profile: Profile, dealt: Iterable[Dealt], budget: Budget | None
) -> Solution:
    """Search as `search` does, on samples that were read already.

    Args:
        dealt: fit and validation samples, of a split of the profile; others are passed over.
    """
    chains = [profiled.chain for profiled in profile.chains]
    streams = sum((len(chain) + 1) * chain.positions * chain.width for chain in chains) * 4
    widest = max(chains, key=lambda chain: chain.width * len(chain))
    with within_memory(
        f"the streams of a sample take {streams:,} bytes, of which up to "
        f"{profile.config.memory or 'half of it'} are kept, and a fit of every span from one boundary "
        f"takes {8 * len(widest) * widest.width**2:,}. Pass fewer or smaller samples, or "
        "Config(memory=...), or Config(window=...)"
    ):
        return run(SearchContext(model, profile, dealt, budget or DEFAULT_BUDGET))


def run(context: SearchContext) -> Solution:
    """Take steps until the budget is met or, with limits of quality alone, for as long as they hold.

    Raises:
        BudgetError: no step leads further, or the next one breaks a limit of quality.
    """
    state, points, limits, log = context.start, [], context.limits, context.log
    with context.ranks.bar(total=100, desc="search", unit="%") as bar:
        while limits.lacking((state := context.verified(state)).cost):
            decided = len(log.steps)
            after = _next(context, state)
            broken = [] if after is None else limits.broken(after)
            if after is None or broken:
                if limits.costs:
                    raise BudgetError(limits.unreached(state, after, context.config.maps))
                if after is not None:
                    del log.steps[decided:]
                    log.decided("stop", " and ".join(broken), after, after.mean - state.mean)
                break
            state = after
            points.append(context.finished(state))
            bar.update(round(100 * (1 - limits.share(state.cost))) - bar.n)
        bar.update(100 - bar.n)
    return replace(context.finished(state), points=tuple(points))


def _next(context: SearchContext, state: SearchState) -> SearchState | None:
    """Return the state after the best step; if it breaks a limit of quality, try fewer blocks."""
    log, longest = context.log, sum(map(len, context.chains))
    decided = len(log.steps)
    after = take(context, state)
    while after is not None and context.limits.broken(after):
        longest = min(longest, _longest_new(state, after))
        if longest == 0:
            break
        longest //= 2
        tried = log.steps[decided:]
        del log.steps[decided:]
        shorter = take(context, state, longest=longest)
        if shorter is None:
            log.steps += tried
            break
        after = shorter
    return after


def _longest_new(before: SearchState, after: SearchState) -> int:
    """Return the length of the longest span that a step took; 0 where it only cut blocks."""
    old = before.solution.plan.replacements
    new = [r for r in after.solution.plan.replacements if r not in old]
    return max(removed_length(Site(0, r.start, r.stop, r.unit)) for r in new)


def take(
    context: SearchContext, state: SearchState, *, longest: int | None = None
) -> SearchState | None:
    """Take the best candidate over at most `longest` blocks (0: cut one) and refine the new state;
    return None without candidates.

    Raises:
        ActivationError: the output of every candidate holds NaN or infinity.
    """
    step = Selection(context, state)
    sites = [s for s in step.sites() if longest is None or removed_length(s) <= longest]
    found = step.best(sites)
    if found is None:
        return None
    candidate, _, margin = found
    state = context.state(with_candidate(state.solution, candidate), state.cost - candidate.saving)
    context.log.decided("take", candidate.replacement, state, margin)
    state = refined(context, state, candidate)
    for _ in range(context.config.swaps if len(state.solution.plan.replacements) > 1 else 0):
        state = swap(context, state, candidate.site)
    return context.timed(state)
