"""Spans chosen by hand: maps fitted in place of exactly these blocks, without a search."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rba_compress.core.config import Budget, Config
from rba_compress.core.errors import ConfigError, PlanError
from rba_compress.core.loader import Dealt
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.plan import Chain, Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.solver import rounded
from rba_compress.planning.state import Candidate, SearchState, Solution, with_candidate
from rba_compress.profiling.profiler import Profile
from rba_compress.profiling.search_record import SearchRecord
from rba_compress.units.span import SPAN

Spans = Sequence[tuple[int, int]] | Mapping[str, Sequence[tuple[int, int]]]
"""Spans (start, stop) of blocks `start..stop-1`: of the only chain, or of each chain by its name."""

UNLIMITED = Budget(macs=1.0)


@dataclass(frozen=True)
class ByHand:
    """Spans that a user chose, by chain; "" is the only one."""

    spans: dict[str, list[tuple[int, int]]]

    @classmethod
    def given(cls, given: Spans | None, budget: Budget | None) -> ByHand | None:
        """Check spans, if any were given, as far as no network is needed.

        Raises:
            ConfigError: there is none, one is no pair of ascending integers, two overlap, or a budget
                was given beside them.
        """
        if given is None:
            return None
        if budget is not None:
            raise ConfigError("spans are replaced as they are, without a search: leave out the budget")
        named = given if isinstance(given, Mapping) else {"": given}
        found = {}
        for chain, pairs in named.items():
            spans = [_pair(each, given) for each in (pairs if isinstance(pairs, Iterable) else [pairs])]
            found[str(chain)] = sorted(spans)
            for (start, stop), (later, end) in zip(sorted(spans), sorted(spans)[1:], strict=False):
                if later < stop:
                    raise ConfigError(f"the spans {start}:{stop} and {later}:{end} share a block")
        if not any(found.values()):
            raise ConfigError("no span is given: pass spans=[(3, 6)] to replace blocks 3, 4 and 5")
        return cls(found)

    def config(self, config: Config) -> Config:
        """Return settings for spans alone, by default no longer than the longest that is given, and
        with every position computed.

        Raises:
            ConfigError: a span is longer than the window that is set.
        """
        longest = max(stop - start for pairs in self.spans.values() for start, stop in pairs)
        if config.window is not None and config.window < longest:
            raise ConfigError(f"a span of {longest} blocks is longer than window={config.window}")
        alone = {"units": ("span",), "keep_features": True, "window": config.window or longest}
        return config.model_copy(update=alone)

    def require(self, chains: Sequence[Chain]) -> None:
        """Require that a network has these spans.

        Raises:
            PlanError: it has other chains, or fewer blocks.
        """
        self.sites(chains)

    def sites(self, chains: Sequence[Chain]) -> list[Site]:
        """Return the site of each span.

        Raises:
            PlanError: as `require`.
        """
        names, found = [chain.name for chain in chains], []
        said = ", ".join(f"{chain.name!r} of {len(chain)} blocks" for chain in chains)
        for name, pairs in self.spans.items():
            if name not in names and (name or len(chains) > 1):
                wanted = f"spans={{{names[0]!r}: [(1, 3)]}}"
                what = f"there is no chain {name!r}" if name else "each span needs its chain"
                raise PlanError(f"{what}: the network has {said}; pass them as {wanted}")
            c = names.index(name) if name else 0
            for start, stop in pairs:
                if stop > len(chains[c]):
                    raise PlanError(f"the network has no span {start}:{stop}: it has {said}")
                found.append(Site(c, start, stop, SPAN.name))
        return sorted(found)


def _pair(each: Any, given: Any) -> tuple[int, int]:
    """Return a span as two integers.

    Raises:
        ConfigError: it is none.
    """
    numbered = isinstance(each, Sequence) and all(isinstance(n, numbers.Integral) for n in each)
    if not numbered or len(each) != 2 or not 0 <= each[0] < each[1]:
        raise ConfigError(
            f"{each!r} of spans={given!r} is no span: a pair (start, stop) replaces the blocks from "
            "start on and before stop, as in spans=[(3, 6)]"
        )
    return int(each[0]), int(each[1])


def replaced(model: nn.Module, profile: Profile, dealt: Iterable[Dealt], by_hand: ByHand) -> Solution:
    """Fit a map in place of each span on the original's streams, as the paper does.

    Where the settings allow several maps, all spans get the same one: that whose output diverges least
    on the validation samples.

    Args:
        profile: a profile with any units; its settings say which maps are fitted.

    Raises:
        ConfigError: a span is longer than those whose moments were kept.
        PlanError: the network does not have these spans, or a map cannot be fitted there.
    """
    window = profile.window or profile.config.window
    config = by_hand.config(profile.config.model_copy(update={"window": window}))
    profile = replace(profile, config=config, record=SearchRecord())
    context = SearchContext(model, profile, dealt, UNLIMITED)
    sites = by_hand.sites(context.chains)
    by_map: dict[MapSpec, list[Candidate]] = {}
    for each in context.fitter.candidates(context.start, sites):
        by_map.setdefault(each.replacement.map, []).append(each)
    found: list[SearchState] = []
    for spec, candidates in by_map.items():
        if spec.kind not in config.maps or len(candidates) < len(sites):
            continue
        solution = context.start.solution
        for each in candidates:
            solution = with_candidate(solution, each)
        at = min(each.chain for each in candidates), 0
        evaluation = context.evaluation(context.start, solution, at)
        found.append(SearchState(solution, context.fitter.cost(solution.plan), evaluation))
    if not found:
        raise PlanError(
            f"none of the maps {', '.join(config.maps)} can be fitted over every span: a folded map "
            "needs a kept block before it that ends in a linear layer"
        )
    best = min(found, key=lambda state: rounded(state.mean))
    context.log.decided("take", best.solution.plan, best, best.mean)
    whole = context.finished(best)
    whole = replace(whole, plan=whole.plan.model_copy(update={"budget": None}))
    return replace(whole, points=(whole,))
