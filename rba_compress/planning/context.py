"""Shared context of one search: samples, fits, evaluations, limits and the log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rba_compress.core.config import Budget
from rba_compress.core.cost import Cost
from rba_compress.core.distributed import current
from rba_compress.core.loader import Dealt
from rba_compress.core.plan import Plan, Replacement, Site
from rba_compress.planning.candidates import CandidateFitter
from rba_compress.planning.evaluator import Evaluation, Evaluator
from rba_compress.planning.limits import Limits
from rba_compress.planning.log import SearchLog
from rba_compress.planning.state import (
    Candidate,
    SearchState,
    Solution,
    undone,
    with_candidate,
    without_unread,
)
from rba_compress.profiling.latency import benchmark, block_times
from rba_compress.profiling.profiler import Profile


class SearchContext:
    """Context of one search: samples, limits, and the network that candidates are evaluated against."""

    def __init__(
        self, model: nn.Module, profile: Profile, dealt: Iterable[Dealt], budget: Budget
    ) -> None:
        self.model, self.profile, self.config = model, profile, profile.config
        self.chains = [entry.chain for entry in profile.chains]
        self.order = {chain.name: k for k, chain in enumerate(self.chains)}
        self.limits, self.log = Limits(profile, budget), SearchLog()
        self.ranks = current()
        samples = list(dealt)
        fit = [batch.to(model) for part, _, batch in samples if part == "fit"]
        held = [(places, batch) for part, places, batch in samples if part == "validation"]
        self.fitter = CandidateFitter(model, profile, fit)
        self.evaluator = Evaluator(
            model,
            self.chains,
            profile.criterion,
            held,
            size=len(profile.example),
            memory=self.config.memory,
        )
        self._current: Solution | None = None
        self.rises: dict[Site, float] = {}
        """Rise of the divergence at each site when it was last screened."""
        self.skipped: set[Site] = set()
        """Sites that were measured in the last stage and are not measured again in the next one."""
        plan = Plan(
            refusals=profile.refusals,
            budget=budget,
            config=self.config,
            divergence=profile.criterion.kind,
            outputs=profile.criterion.outputs,
        )
        self.start = self.state(Solution(plan, {}), self.fitter.cost(plan))
        self.limits.require_measurable(self.start.evaluation)
        if budget.latency is not None:
            example = profile.example
            milliseconds = self.ranks.broadcast(lambda: benchmark(model, model, example).original_ms)
            share = budget.latency if budget.latency <= 1 else budget.latency / milliseconds
            self.limits.costs["latency"] = share
            self.fitter.times = self.ranks.broadcast(lambda: block_times(model, self.chains, example))
            self.start = replace(self.start, cost=self.fitter.cost(plan))

    @classmethod
    def read(
        cls, model: nn.Module, profile: Profile, loader: Iterable[Any], budget: Budget
    ) -> SearchContext:
        """Start a search on the samples of a loader."""
        return cls(model, profile, profile.split(loader).deal("fit", "validation"), budget)

    def state(self, solution: Solution, cost: Cost) -> SearchState:
        """Evaluate a solution, and make it the network that candidates are evaluated against."""
        self._current = solution
        model = self.fitter.compressed(solution)
        return SearchState(solution, cost, self.evaluator.rebase(model))

    def divergences(
        self, state: SearchState, solution: Solution, at: tuple[int, int], *, screen: bool = False
    ) -> Tensor:
        """Return the divergence of each validation sample under a solution, (samples,).

        Args:
            state: a state that equals the solution up to `at`.
            at: chain and boundary.
            screen: run a share of the samples alone.
        """
        self.rebase(state)
        return self.evaluator(self.fitter.compressed(solution), *at, screen=screen)

    def rebase(self, state: SearchState) -> None:
        """Make a state the network that candidates are evaluated against."""
        if self._current is not state.solution:
            self.state(state.solution, state.cost)

    def evaluation(self, state: SearchState, solution: Solution, at: tuple[int, int]) -> Evaluation:
        """Evaluate a solution on all validation samples; arguments as in `divergences`."""
        self.rebase(state)
        return self.evaluator.evaluation(self.fitter.compressed(solution), *at)

    def evaluate(self, state: SearchState, candidate: Candidate, *, screen: bool = False) -> Tensor:
        """Return the divergence of each validation sample with a candidate, (samples,)."""
        at = candidate.chain, candidate.boundary
        return self.divergences(state, with_candidate(state.solution, candidate), at, screen=screen)

    def timed(self, state: SearchState, *, seconds: float = 1.0) -> SearchState:
        """Return the state with its latency measured, where the budget asks for it."""
        if "latency" not in self.limits.costs:
            return state
        model = self.fitter.compressed(without_unread(state.solution, self.profile))
        example = self.profile.example
        ratio = self.ranks.broadcast(
            lambda: benchmark(self.model, model, example, seconds=seconds).ratio
        )
        return replace(state, cost=state.cost.model_copy(update={"latency": ratio}))

    def verified(self, state: SearchState) -> SearchState:
        """Return the state, timed for longer where it seems to meet the budget."""
        done = state is not self.start and not self.limits.lacking(state.cost)
        return self.timed(state, seconds=3.0) if done else state

    def before(self, old: Replacement) -> tuple[int, int]:
        """Return the chain and the boundary up to which undoing a replacement changes no stream."""
        return self.order[old.chain], max(old.start - 1, 0)

    def without(self, state: SearchState, old: Replacement) -> SearchState:
        """Return the state with a replacement, and what was folded for it, undone."""
        solution = undone(state.solution, old)
        saved = self.fitter.cost(solution.plan) - self.fitter.cost(state.solution.plan)
        return self.state(solution, state.cost + saved)

    def finished(self, state: SearchState) -> Solution:
        """Return the state's solution, with the log of the search so far in its plan."""
        total = self.fitter.held + self.evaluator.held
        passes = (self.evaluator.samples + self.fitter.samples) / total
        handed = without_unread(state.solution, self.profile)
        update = {
            "steps": tuple(self.log.steps),
            "candidates": tuple(self.log.candidates),
            "forward_passes": round(passes, 2),
        }
        return Solution(handed.plan.model_copy(update=update), handed.tensors)
