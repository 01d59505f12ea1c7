"""The search: which spans to replace by which maps, under a budget.

`stages` goes down from the original in steps of a tenth of its cost. In each stage every option is run
alone (`output_changes`), a solver combines the options by the inner products of their output changes
(`solver`), and the plans that are predicted to be the best are evaluated on all validation samples. The
best network that meets the budget trades levels between blocks (`trades`) and is refined
(`refinement`): the last linear layers of kept blocks are re-solved and BatchNorm statistics
re-estimated, each accepted only if the divergence falls.

Divergences that agree to six digits are a tie, because another device or number of threads may reverse
them. A tie goes to the network with the fewest multiply-accumulates, then to the first in the network's
order. The `margin` of a step says how close the next best was.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rba_compress.core.config import Budget
from rba_compress.core.errors import PlanError
from rba_compress.core.inference import unwrap
from rba_compress.core.loader import Dealt, workers_named
from rba_compress.core.memory import within_memory
from rba_compress.core.offload import undispatched
from rba_compress.planning.by_hand import ByHand, Spans, replaced
from rba_compress.planning.context import SearchContext
from rba_compress.planning.descent import descend
from rba_compress.planning.state import Solution
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
    spans: Spans | None = None,
    checkpoint: str | Path | None = None,
) -> Solution:
    """Choose spans and maps that meet the budget at the least divergence of the output.

    Args:
        model: the network that was profiled; not changed.
        profile: the profile of that network. Networks that this search evaluates are added to its
            record, so that a search for another budget takes a few forward passes.
        loader: the profiled loader. Of ten samples, five are fit samples and four are validation
            samples; both are kept in memory.
        budget: what the compressed network may cost and lose; by default three quarters of the MACs.
        spans: spans to replace by hand, without a search, as in `compress`; the maps are those of the
            profile's settings.
        checkpoint: a file that is written twice a minute, and removed at the end. If the file exists at
            the start, the search resumes from it, with the same result as without an interruption.

    Returns:
        The plan and its tensors; `points` are the front of the networks that were evaluated on the way
        there, and the result.

    Raises:
        BudgetError: no plan reaches the budget; the message names the best that is reachable.
        ConfigError: spans were given together with a budget, overlap, or are longer than the window.
        PlanError: the profile is of another network, or the network does not have the spans.
        ActivationError: the original output, or that of every candidate, holds NaN or infinity.
        ArtifactError: the checkpoint cannot be written, or is of another search.
        LoaderError, MemoryLimitError: as `profile`.
    """
    budget, model = Budget.of(budget), undispatched(unwrap(model))
    if type(model).__name__ != profile.model:
        raise PlanError(f"the profile is of a {profile.model}, the model is a {type(model).__name__}")
    if fingerprint(model) != profile.weights:
        raise PlanError(f"the profile is of a {profile.model} with other weights: profile this one")
    hand = ByHand.given(spans, budget)
    dealt = profile.split(loader).deal("fit", "validation")
    if hand is not None:
        return replaced(model, profile, dealt, hand)
    return searched(model, profile, dealt, budget, checkpoint)


def searched(
    model: nn.Module,
    profile: Profile,
    dealt: Iterable[Dealt],
    budget: Budget | None,
    checkpoint: str | Path | None = None,
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
        return descend(SearchContext(model, profile, dealt, budget or DEFAULT_BUDGET), checkpoint)
