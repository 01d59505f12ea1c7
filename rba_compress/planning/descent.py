"""Descent of a search: from stage to stage, until the budget is met, and the refinement of the result.

Each stage starts from the cheapest plan of the one before whose prediction held, about a tenth of the
original's cost below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rba_compress.core.cost import Cost
from rba_compress.core.errors import ActivationError, BudgetError
from rba_compress.core.plan import Action, Replacement
from rba_compress.planning.context import SearchContext, evaluation_of
from rba_compress.planning.limits import Limits
from rba_compress.planning.progress import SearchProgress
from rba_compress.planning.refinement import (
    SOLVED,
    narrowed,
    outputs,
    refit,
    refit_together,
    settled,
    statistics,
)
from rba_compress.planning.schedules import scheduled
from rba_compress.planning.solver import rounded
from rba_compress.planning.stages import GRID, Verified, expected, stage
from rba_compress.planning.state import SearchState, Solution
from rba_compress.planning.trades import traded, widened
from rba_compress.profiling.search_record import EvaluatedNetwork
from rba_compress.units.registry import unit_of

TRUST = 4.0
"""Ratio of true to predicted rise up to which a plan's prediction counts as held."""


def descend(context: SearchContext, checkpoint: str | Path | None = None) -> Solution:
    """Go down in stages until the budget is met or, with limits of quality alone, while they hold; then
    refine the best network that was verified.

    Args:
        checkpoint: a file to resume from if it exists; it is written while the search runs, and removed
            at the end.

    Returns:
        The plan and its tensors; `points` are other verified networks on the way there, and it itself,
        or none where nothing was replaced.

    Raises:
        BudgetError: no combination of options leads further, or none holds the limits of quality.
        ActivationError: the output of every candidate holds NaN or infinity.
        ArtifactError: the checkpoint cannot be written, or is of another search.
    """
    with SearchProgress(context, checkpoint) as progress:
        descent, limits = Descent(context, progress), context.limits
        state = timed = descent.best()
        asked = dict(limits.costs)
        while "latency" in asked:
            timed = context.timed(state, seconds=3.0)
            limits.costs, tightened = asked, limits.costs
            if not limits.lacking(timed.cost):
                break
            limits.costs = tightened
            limits.tighten(state.cost.latency, timed.cost.latency)
            try:
                state = descent.best()
            except BudgetError:
                limits.costs = asked
                raise BudgetError(limits.unreached(timed, None, context.config)) from None
        if not state.solution.plan.replacements:
            return context.finished(replace(state, cost=timed.cost))
        progress.refine()
        before, state = state.mean, descent.refined(state, result=descent.staged)
        rival = descent.larger(state) if descent.staged else None
        if rival is not None:
            context.rebase(rival)
            steps, context.log.steps = context.log.steps, [*context.record.steps]
            rival = descent.refined(rival, result=True)
            if _order(rival) < _order(state):
                state = timed = rival
            else:
                context.log.steps = steps
        descent.write_record()
        context.log.decided("choose", state.solution.plan, state, before - state.mean)
        final = context.finished(replace(state, cost=timed.cost))
        front = []
        for each in descent.front(state):
            context.log.steps = list(context.record.steps)
            context.log.decided("choose", each.solution.plan, each, 0.0)
            front.append(context.finished(each))
        return replace(final, points=(*front, final))


def _refined(context: SearchContext, before: Verified, *, result: bool) -> SearchState:
    """Refine a network: the kept layers behind its maps, and of the result also those behind merges and
    narrower blocks, which are most of the network; then its BatchNorms. In a deep network all of them
    are re-solved at each stage, in one go.
    """
    state = before.state if before.settled else narrowed(context, before.state)
    for c, chain in enumerate(context.chains if context.refits else ()):
        own = [r for r in state.solution.plan.replacements if r.chain == chain.name]
        starts = [r.start for r in own if result or context.deep or _maps(r)]
        if starts:
            solve = refit_together if context.deep else refit
            state = solve(context, state, c, min(starts))
    state = state if before.settled and state is before.state else statistics(context, state)
    return outputs(context, state) if result and context.refits else state


class Descent:
    """Descent from the original in stages, and all networks that were verified on the way.

    Stages do not depend on the budget, which says only where the descent ends: with a looser one at an
    earlier stage. The profile's record holds them, so that another budget costs no further stage, or
    those below the last one alone.
    """

    def __init__(self, context: SearchContext, progress: SearchProgress) -> None:
        self.context, self.limits, self.progress = context, context.limits, progress
        record = context.record
        if not record.networks:
            record.networks.append(_recorded(Verified(context.start, 1.0, context.start.mean)))
        self.verified = [_restored(context, network) for network in record.networks]
        self._current = record.current
        context.log.steps, context.log.candidates = list(record.steps), list(record.candidates)

    @property
    def state(self) -> SearchState:
        """Network from which the next stage starts."""
        return self.verified[self._current].state

    def refined(self, state: SearchState, *, result: bool) -> SearchState:
        """Return a verified network with kept layers re-solved and BatchNorms re-estimated, and add it
        to the verified ones.
        """
        k = self._index(state)
        done, replacements = self.verified[k].refined, state.solution.plan.replacements
        if not replacements or done == "result" or (done == "start" and not result):
            return state
        if self.context.deep:  # where a result is refined as the start of a stage is
            again = [v.state for v in self.verified if v.refined == "result"]
            again = [s for s in again if s.solution.plan.replacements == replacements]
            if again:
                return again[0]
        whole = result or self.context.deep or all(map(_maps, replacements))
        state = _refined(self.context, self.verified[k], result=result)
        new = replace(
            self.verified[k], state=state, settled=True, refined="result" if whole else "start"
        )
        if state is self.verified[k].state:  # nothing helped
            self.verified[k] = new
        else:
            self.verified.append(new)
        return state

    def _settled(
        self, states: Sequence[SearchState], order: Callable[[SearchState], tuple[float, int]]
    ) -> SearchState:
        """Return the best of some verified networks, after BatchNorms of the first few of them were
        re-estimated: that may change which is the best.
        """
        first, best = sorted(states, key=order)[: self.context.spent.judged], []
        for state in first:
            k, log = self._index(state), self.context.log
            if len(first) > 1 and not self.verified[k].settled:
                steps, log.steps = log.steps, []
                new = settled(self.context, state)
                log.steps = steps
                self.verified[k] = replace(self.verified[k], state=new, settled=True)
            best.append(self.verified[k].state)
        return min(best, key=order)

    def larger(self, state: SearchState) -> SearchState | None:
        """Return the best network that just meets the budget, where a state is far below it: it was not
        refined on the way down, and may be the better one once it is.
        """
        limits = self.limits
        if limits.size(state.cost) > limits.goal_size - 2 * GRID or "latency" in limits.costs:
            return None
        near = [v.state for v in self.verified if v.size > limits.goal_size - GRID]
        met = [s for s in near if not (limits.lacking(s.cost) or limits.broken(s))]
        return min(met, key=_order, default=None)

    def _index(self, state: SearchState) -> int:
        return next(k for k, v in enumerate(self.verified) if v.state is state)

    @property
    def staged(self) -> bool:
        """True where this search has evaluated networks, and not an earlier one of the same profile."""
        return len(self.context.record.networks) > self.progress.before

    def write_record(self) -> None:
        """Write all verified networks to the record; an interrupted search goes on from there."""
        self.context.record.networks[:] = map(_recorded, self.verified)

    def _target(self) -> float:
        """Return the size to which the next stage goes down: a stage below, rounded to a tenth of the
        original, since budgets often are.
        """
        size = self.limits.size(self.state.cost)
        return round(10 * (size - self.context.spent.stage)) / 10

    def best(self) -> SearchState:
        """Go down until the budget is met; return the best network that meets it.

        Raises:
            BudgetError: no combination of options leads further, or none holds the limits of quality.
        """
        limits, context = self.limits, self.context
        while True:
            held = [v.state for v in self.verified if not limits.broken(v.state)]
            met = [state for state in held if not limits.lacking(state.cost)]
            # A whole stage is not worth the rest of the way where a network was evaluated at its end.
            near = context.spent.stage / 4 if met else 1e-9
            deep = limits.size(self.state.cost) <= limits.goal_size + near
            if deep and met:
                self.progress.refine()
                return self._traded(self._settled(met, _order))
            if self._schedule_current():
                continue  # a schedule may meet the budget
            cheapest = min(held, key=lambda state: (limits.size(state.cost), _order(state)))
            if limits.costs and deep:
                beyond = [v.state for v in self.verified if v.size < limits.size(cheapest.cost)]
                after = max(beyond, key=lambda state: limits.size(state.cost))
                raise BudgetError(limits.unreached(cheapest, after, context.config))
            done = len(self.verified)
            further = self._stage()
            if limits.costs and not further:
                if met:
                    self.progress.refine()
                    return self._settled(met, _order)
                raise BudgetError(limits.unreached(cheapest, None, context.config))
            new = self.verified[done:]
            if not limits.costs and (not further or all(limits.broken(v.state) for v in new)):
                if further:
                    after = max(new, key=lambda v: v.size).state
                    said = " and ".join(limits.broken(after))
                    context.log.decided("stop", said, after, after.mean - cheapest.mean)
                return cheapest

    def _traded(self, state: SearchState) -> SearchState:
        """Try schedules and trades of levels of the network that met the budget, and add the best to
        the verified ones.

        A search that took no stage tries half as many trades.
        """
        k = self._index(state)
        before = self.verified[k]
        if before.traded:
            return state
        most = self.context.spent.trades

        def meets(cost: Cost) -> bool:
            return not self.limits.lacking(cost)

        start = self._scheduled(before, self.context.start, meets).state
        wide = widened(self.context, start, meets) if most else start
        if wide is not start:
            gain = start.mean - wide.mean
            start = self.context.log.decided("schedule", wide.solution.plan, wide, gain)
        new = traded(self.context, start, most if self.staged else most // 2)
        self.verified[k] = replace(before, traded=True)
        if new is not state:
            size = self.limits.size(new.cost)
            self.verified.append(Verified(new, size, before.predicted, traded=True))
        if new is not start:
            self.context.log.decided("trade", new.solution.plan, new, start.mean - new.mean)
        return new

    def _scheduled(
        self, network: Verified, before: SearchState, meets: Callable[[Cost], bool]
    ) -> Verified:
        """Try schedules in place of a network's levels, which cost little enough."""
        state = scheduled(self.context, network.state, before, meets)
        if state is network.state:
            return network
        gain = network.state.mean - state.mean
        self.context.log.decided("schedule", state.solution.plan, state, gain)
        return Verified(state, self.limits.size(state.cost), network.predicted)

    def _schedule_current(self) -> bool:
        """Try schedules of the network from which the next stage would start; return False where that
        was done before.
        """
        k, size = self._current, self.limits.size
        network = self.verified[k]
        if network.scheduled or not network.state.solution.plan.replacements:
            return False
        self.context.rebase(network.state)
        self.progress.refine()
        # What the last stage should have come down to, where it is near.
        end = min(network.size, self._target() + self.context.spent.stage)
        starts = [v.state for v in self.verified[:k] if v.scheduled and v.size > network.size]
        before = starts or [self.context.start]
        new = self._scheduled(network, before[-1], lambda cost: size(cost) <= end + 1e-9)
        self.verified[k] = replace(network, scheduled=True)
        if new is not network:
            self._current = len(self.verified)
            self.verified.append(replace(new, scheduled=True))
        return True

    def _stage(self) -> bool:
        """Take one stage; return False where no option leads further.

        Raises:
            ActivationError: the output of every plan holds NaN or infinity.
        """
        context, record, before = self.context, self.context.record, self.state
        context.rebase(before)
        self.progress.refine()
        before = self.refined(before, result=False)
        self._current = record.current = self._index(before)
        self.write_record()
        record.steps = list(context.log.steps)
        self.progress.stage(before, expected(context, before))
        size = self.limits.size(before.cost)
        skipped = bool(context.skipped)
        target = self._target()
        judged = stage(context, before, target)
        judged = [v for v in judged if v.size < size - 1e-9]
        finite = [v for v in judged if math.isfinite(v.state.mean)]
        if judged and not finite:
            raise ActivationError("every candidate makes the model's output NaN or infinite")
        if not finite and not record.every and (skipped or context.skipped):
            context.skipped, record.skipped = set(), set()
            context.prices, record.prices = {}, {}
            record.every = True
            record.runs.clear()
            return self._stage()
        if not finite:
            return False
        self.verified += finite
        within = [v for v in finite if not v.beyond] or finite
        alike = trusted(before, within, size - context.spent.stage / 4, context.evaluator.screened)
        order = partial(_price, before, self.limits)
        self._current = self._index(self._settled([v.state for v in alike], order))
        new, chosen = self.verified[-len(finite) :], self.verified[self._current]
        others = [v.state.mean for v in new if v is not chosen and v.size <= chosen.size + GRID]
        margin = min(others, default=math.inf) - chosen.state.mean
        taken = finite[new.index(chosen)].state
        context.log.decided("stage", taken.solution.plan, taken, margin, chosen.predicted)
        if chosen.state is not taken:
            gain = taken.mean - chosen.state.mean
            refits = chosen.state.solution.plan.refits
            normed = refits != taken.solution.plan.refits
            action: Action = "statistics" if normed else "solve"
            context.log.decided(action, refits[-1] if normed else SOLVED, chosen.state, gain)
        self.write_record()
        record.current, record.skipped = self._current, set(context.skipped)
        record.prices = dict(context.prices)
        record.every = False
        record.runs.clear()
        record.steps, record.candidates = list(context.log.steps), list(context.log.candidates)
        return True

    def front(self, last: SearchState, most: int = 6) -> list[SearchState]:
        """Return at most `most` verified networks that no other beats in cost and divergence, from the
        original down to the cost of `last`, which is not among them.
        """
        end, lowest = self.limits.size(last.cost), math.inf
        kept: list[Verified] = []
        for each in sorted(self.verified[1:], key=lambda v: (v.size, _order(v.state))):
            if each.size > end + GRID / 2 and each.state.mean < lowest:
                lowest = each.state.mean
                kept.append(each)
        kept.reverse()
        step = max(len(kept) / most, 1.0)
        places = dict.fromkeys(int(k * step) for k in range(most) if int(k * step) < len(kept))
        return [kept[k].state for k in places]


def _maps(new: Replacement) -> bool:
    """Return whether a replacement holds a map, whose error the layers behind it may correct."""
    return unit_of(new.unit).fitted and not new.inner


def _recorded(verified: Verified) -> EvaluatedNetwork:
    """Return what a record holds of a network."""
    solution, seen = verified.state.solution, verified.state.evaluation
    return EvaluatedNetwork(
        replacements=solution.plan.replacements,
        refits=solution.plan.refits,
        tensors=solution.tensors,
        divergence=seen.divergence,
        agreement=seen.agreement,
        accuracy_drop=seen.accuracy_drop,
        metric_drops=seen.metric_drops,
        predicted=verified.predicted,
        settled=verified.settled,
        refined=verified.refined,
        traded=verified.traded,
        scheduled=verified.scheduled,
    )


def _restored(context: SearchContext, network: EvaluatedNetwork) -> Verified:
    """Return a recorded network, with its cost and its size under the limits of this search."""
    parts = {"replacements": network.replacements, "refits": network.refits}
    plan = context.start.solution.plan.model_copy(update=parts)
    cost = context.fitter.cost(plan)
    state = SearchState(Solution(plan, network.tensors), cost, evaluation_of(network))
    size = context.limits.size(cost)
    return Verified(
        state,
        size,
        network.predicted,
        settled=network.settled,
        refined=network.refined,
        traded=network.traded,
        scheduled=network.scheduled,
    )


def _order(state: SearchState) -> tuple[float, int]:
    """Return the key by which networks are compared: divergences equal to six digits are a tie."""
    return rounded(state.mean), state.cost.macs


def _price(before: SearchState, limits: Limits, state: SearchState) -> tuple[float, int]:
    """Return the key by which networks of several sizes are compared: the rise for what they save."""
    saved = limits.size(before.cost) - limits.size(state.cost)
    return rounded((state.mean - before.mean) / saved), state.cost.macs


def trusted(
    before: SearchState, verified: Sequence[Verified], size: float, screened: int
) -> list[Verified]:
    """Return the networks to go on from: those as cheap as the cheapest whose predicted rise held, or
    else the nearest one.

    Args:
        size: the least step; without it, predictions that never hold make stages ever smaller.
        screened: the number of samples that predictions were made on. On them a prediction fails for
            its interactions alone; the mean of all samples differs by chance, too.
    """

    def rise(v: Verified) -> float:
        gap = v.state.evaluation.divergence[:screened] - before.evaluation.divergence[:screened]
        return float(gap.mean())

    held = [v for v in verified if rise(v) <= TRUST * max(v.predicted - before.mean, 0.0) + 1e-6]
    if not held:
        far = [v for v in verified if v.size <= size + 1e-9]
        return [max(far, key=lambda v: v.size) if far else min(verified, key=lambda v: v.size)]
    lowest = min(v.size for v in held)
    return [v for v in held if v.size <= lowest + GRID]
