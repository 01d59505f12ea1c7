"""The search: which span to replace by which map, under a budget.

Every span is a candidate where it is the shortest from its first block that meets the budget. Its maps
are fitted in closed form from the profile and each candidate is judged by what it does to the
network's *output* on held-out samples; the error of the stream misleads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rba_compress.batches import Batch, main_output
from rba_compress.calibration import ChainProfile, Profile, fingerprint
from rba_compress.errors import ActivationError, BudgetError, PlanError
from rba_compress.maps import Fit, MapSpec, fit_map, map_macs, map_parameters
from rba_compress.measure import Cost, divergence
from rba_compress.plan import Budget, Candidate, Chain, Plan, Replacement
from rba_compress.recorder import evaluating, unwrap
from rba_compress.surgery import splice_shared

DEFAULT_BUDGET = Budget(macs=0.75)


@dataclass(frozen=True)
class Solution:
    """A plan and the fitted tensors of its maps, keyed as in the slim model's state dict."""

    plan: Plan
    tensors: dict[str, Tensor]


def fit_span(profiled: ChainProfile, start: int, stop: int, spec: MapSpec) -> tuple[Replacement, Fit]:
    """Fit one map over the span `start:stop` of a profiled chain."""
    chain = profiled.chain
    fit = fit_map(spec, profiled.moments.pair(start, stop))
    return (
        Replacement(
            chain=chain.name,
            start=start,
            stop=stop,
            blocks=chain.blocks[start:stop],
            map=spec,
            width=chain.width,
            ndim=chain.ndim,
            axis=chain.axis,
            diagnostics=fit.diagnostics,
        ),
        fit,
    )


def keyed(replacement: Replacement, fit: Fit) -> dict[str, Tensor]:
    """The fit's tensors by their key in the slim model's state dict."""
    return {f"{replacement.key}{name}": tensor for name, tensor in fit.tensors.items()}


def span_cost(dense: Cost, chain: Chain, start: int, stop: int, spec: MapSpec) -> Cost:
    """What the network costs with that span replaced."""
    return Cost(
        macs=dense.macs - sum(chain.macs[start:stop]) + chain.positions * map_macs(spec, chain.width),
        params=dense.params - sum(chain.params[start:stop]) + map_parameters(spec, chain.width),
    )


class Judge:
    """Holds the batches to choose on and the dense outputs, and counts what it runs."""

    def __init__(self, model: nn.Module, batches: Iterable[Batch], profile: Profile) -> None:
        self.model, self.kind = model, profile.divergence
        self.batches = [batch.to(model) for batch in batches]
        self.samples = sum(len(batch) for batch in self.batches)
        self.passes = 1
        with evaluating(model):
            self.dense = [main_output(batch.run(model)) for batch in self.batches]
        if not all(bool(torch.isfinite(output).all()) for output in self.dense):
            raise ActivationError("the model's output holds NaN or infinity on held-out samples")

    def __call__(self, slim: nn.Module) -> float:
        """The mean divergence of a rewritten model's output; infinity where it is not finite."""
        self.passes += 1
        total = 0.0
        with evaluating(slim):
            for batch, dense in zip(self.batches, self.dense, strict=True):
                output = main_output(batch.run(slim))
                total += float(divergence(self.kind, dense, output).sum())
        mean = total / self.samples
        return mean if math.isfinite(mean) else math.inf


@torch.inference_mode(False)
def search(
    model: nn.Module,
    profile: Profile,
    loader: Iterable[Any],
    *,
    budget: Budget | None = None,
) -> Solution:
    """The single contiguous span, and its map, that meets the budget at the least divergence.

    Args:
        model: the network that was profiled; left as it is.
        profile: what `profile` returned for it.
        loader: the same loader; two samples of ten are chosen on. They are kept in memory.
        budget: what the slim network may cost; by default three quarters of the MACs.

    Raises:
        BudgetError: no span reaches the budget; the message names the cheapest that is reachable.
        ActivationError: the dense output holds NaN or infinity.
        LoaderError: as `profile`.
    """
    budget, config = budget or DEFAULT_BUDGET, profile.config
    model = unwrap(model)
    if type(model).__name__ != profile.model:
        raise PlanError(f"the profile is of a {profile.model}, the model is a {type(model).__name__}")
    if fingerprint(model) != profile.weights:
        raise PlanError(f"the profile is of a {profile.model} with other weights: profile this one")
    limits = budget.limits(profile.dense.macs, profile.dense.params)
    base = Plan(refusals=profile.refusals, budget=budget, config=config, divergence=profile.divergence)
    if _meets(profile.dense, limits):
        return Solution(base, {})
    options = list(_options(profile, limits))
    judge = Judge(model, profile.split(loader).part("choose"), profile)
    judged: list[tuple[Candidate, Solution]] = []
    for profiled, start, stop, spec in tqdm(options, "search", unit="span", disable=None):
        replacement, fit = fit_span(profiled, start, stop, spec)
        plan = base.model_copy(update={"replacements": (replacement,)})
        solution = Solution(plan, keyed(replacement, fit))
        reached = span_cost(profile.dense, profiled.chain, start, stop, spec)
        candidate = Candidate(
            chain=profiled.chain.name,
            start=start,
            stop=stop,
            map=spec,
            divergence=judge(splice_shared(model, plan, solution.tensors)),
            macs=reached.macs,
            params=reached.params,
        )
        judged.append((candidate, solution))
    # On a tie the cheaper map, hence the identity, is taken.
    judged.sort(key=lambda pair: (pair[0].divergence, pair[0].macs))
    if not math.isfinite(judged[0][0].divergence):
        raise ActivationError("every candidate makes the model's output NaN or infinite")
    best = judged[0][1]
    plan = best.plan.model_copy(
        update={
            "candidates": tuple(candidate for candidate, _ in judged),
            "forward_passes": judge.passes,
        }
    )
    return Solution(plan, best.tensors)


def _meets(cost: Cost, limits: dict[str, float]) -> bool:
    return all(getattr(cost, name) <= limit for name, limit in limits.items())


def _options(
    profile: Profile, limits: dict[str, float]
) -> Iterator[tuple[ChainProfile, int, int, MapSpec]]:
    """For every first block and map, the shortest span that meets the limits.

    Raises:
        BudgetError: there is none.
    """
    found = False
    reachable: list[Cost] = []
    kinds = dict.fromkeys(("identity", *profile.config.maps))
    for profiled in profile.chains:
        chain = profiled.chain
        for kind in kinds:
            spec = profile.config.spec(kind, chain.width)
            done: set[int] = set()
            for start, stop in chain.spans(profiled.moments.window):
                cost = span_cost(profile.dense, chain, start, stop, spec)
                reachable.append(cost)
                if start not in done and _meets(cost, limits):
                    done.add(start)
                    found = True
                    yield profiled, start, stop, spec
    if not found:
        wanted = ", ".join(f"{name} <= {limit:,.0f}" for name, limit in limits.items())
        cheapest = min(reachable, key=lambda c: max(getattr(c, n) / v for n, v in limits.items()))
        raise BudgetError(
            f"no single span reaches {wanted} (of {profile.dense.macs:,} macs, "
            f"{profile.dense.params:,} params): the cheapest reachable is {cheapest.macs:,} macs "
            f"({cheapest.macs / profile.dense.macs:.3f}) and {cheapest.params:,} params "
            f"({cheapest.params / profile.dense.params:.3f})"
            + (". An int is absolute: 1.0 keeps all" if 1 in limits.values() else "")
        )
