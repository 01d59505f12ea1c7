"""Shared context of one search: samples, fits, evaluations, limits and the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rba_compress.core.config import Budget
from rba_compress.core.cost import Cost
from rba_compress.core.distributed import current
from rba_compress.core.inference import evaluating, ran
from rba_compress.core.loader import Dealt
from rba_compress.core.outputs import per_sample
from rba_compress.core.plan import Plan, Replacement
from rba_compress.planning.candidates import CandidateFitter
from rba_compress.planning.effort import SPENT
from rba_compress.planning.evaluator import Evaluation, Evaluator, fewer
from rba_compress.planning.limits import Limits
from rba_compress.planning.log import SearchLog
from rba_compress.planning.state import (
    SearchState,
    Solution,
    without_unread,
)
from rba_compress.profiling.latency import benchmark, block_times
from rba_compress.profiling.profiler import Profile
from rba_compress.profiling.search_record import EvaluatedNetwork

TOKENS = 8_192
"""Tokens that are validated on at most: choosing needs fewer of them than fitting does."""
SEQUENCES = 32
"""Samples that are validated on nevertheless."""
DEEP = 16
"""Blocks above which a network is deep: each run is long there, and sites are many."""
SCREENED = 2_048
"""Tokens that are screened on at least."""


class SearchContext:
    """Context of one search: samples, limits, and the network that candidates are evaluated against."""

    def __init__(
        self, model: nn.Module, profile: Profile, dealt: Iterable[Dealt], budget: Budget
    ) -> None:
        self.model, self.profile, self.config = model, profile, profile.config
        self.chains = profile.in_order
        self.order = {chain.name: k for k, chain in enumerate(self.chains)}
        self.limits, self.log = Limits(profile, budget), SearchLog()
        self.ranks, self.spent = current(), SPENT[self.config.effort]
        self.blocks = sum(map(len, self.chains))
        self.deep = self.blocks > DEEP
        """True where levels and re-solved layers are too many to run each."""
        self.record = profile.record
        """Networks of earlier searches of the profile, to which this search adds its own."""
        samples = list(dealt)
        fit = [batch.to(model) for part, _, batch in samples if part == "fit"]
        held = [(places, batch) for part, places, batch in samples if part == "validation"]
        tokens = _tokens(model, profile)
        held = fewer(held, max(SEQUENCES, TOKENS // tokens), self.ranks)
        self.fitter = CandidateFitter(model, profile, fit)
        self.evaluator = Evaluator(
            model,
            self.chains,
            profile.criterion,
            held,
            size=len(profile.example),
            memory=self.config.memory,
            effort=replace(self.spent, fewest=min(self.spent.fewest, max(SCREENED // tokens, 4))),
        )
        self.ran: Callable[[], None] = lambda: None
        """Called after each run, for the progress."""
        self.skipped = set(self.record.skipped)
        """Sites that the next stage does not measure: those with the highest prices."""
        self.prices = dict(self.record.prices)
        """Rise of the divergence over what is saved, of each site when it was last measured."""
        plan = Plan(
            refusals=profile.refusals,
            budget=budget,
            config=self.config,
            divergence=profile.criterion.kind,
            outputs=profile.criterion.outputs,
        )
        self.notes: tuple[str, ...] = ()
        """Facts about the search for the reader of a report."""
        original, cost = Solution(plan, {}), self.fitter.cost(plan)
        self.start = SearchState(original, cost, self.evaluator.start)
        self._current = original
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

    def state(self, solution: Solution, cost: Cost, at: tuple[int, int] = (0, 0)) -> SearchState:
        """Evaluate a solution, and make it the network that candidates are evaluated against.

        Args:
            at: chain and boundary up to which the solution equals that network so far.
        """
        self._current = solution
        model = self.fitter.compressed(solution)
        return SearchState(solution, cost, self.evaluator.rebase(model, *at))

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
        found = self.evaluator(self.fitter.compressed(solution), *at, screen=screen)
        self.ran()
        return found

    def rebase(self, state: SearchState) -> None:
        """Make a state the network that candidates are evaluated against."""
        if self._current is not state.solution:
            self.state(state.solution, state.cost)

    def evaluation(self, state: SearchState, solution: Solution, at: tuple[int, int]) -> Evaluation:
        """Evaluate a solution on all validation samples; arguments as in `divergences`."""
        self.rebase(state)
        found = self.evaluator.evaluation(self.fitter.compressed(solution), *at)
        self.ran()
        return found

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

    def before(self, old: Replacement) -> tuple[int, int]:
        """Return the chain and the boundary up to which undoing a replacement changes no stream."""
        return self.order[old.chain], max(old.start - 1, 0)

    @property
    def refits(self) -> bool:
        """True where kept layers are re-solved."""
        return self.config.refit and self.spent.refits

    @property
    def samples(self) -> float:
        """Number of samples that were run; a partial run counts as its share."""
        return self.evaluator.samples + self.fitter.samples

    @property
    def held(self) -> int:
        """Number of fit and validation samples."""
        return self.fitter.held + self.evaluator.held

    def finished(self, state: SearchState) -> Solution:
        """Return the state's solution, with the log of the search so far in its plan."""
        passes = self.samples / self.held
        handed = without_unread(state.solution, self.profile)
        update = {
            "steps": tuple(self.log.steps),
            "candidates": tuple(self.log.candidates),
            "forward_passes": round(passes, 2),
            "notes": self.notes,
        }
        return Solution(handed.plan.model_copy(update=update), handed.tensors)


def evaluation_of(network: EvaluatedNetwork) -> Evaluation:
    """Return the evaluation of a recorded network."""
    return Evaluation(
        network.divergence, network.agreement, network.accuracy_drop, network.metric_drops
    )


def _tokens(model: nn.Module, profile: Profile) -> int:
    """Return the number of tokens in a sample's output (N, tokens, classes); 1 for other outputs."""
    if profile.criterion.kind != "kl":
        return 1
    with evaluating(model):
        output = profile.criterion.kept(ran(model, profile.example.select([0]).to(model)))
    main = per_sample(next(iter(output.values())), 1)
    return main.shape[1] if main.ndim == 3 else 1
