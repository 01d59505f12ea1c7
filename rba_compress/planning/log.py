"""Log of a search: evaluated candidates, and decisions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rba_compress.core.plan import Action, EvaluatedCandidate, Step
from rba_compress.planning.state import Candidate, SearchState

NOT_FINITE = "its output holds NaN or infinity"


class SearchLog:
    """Steps and evaluated candidates of a search, in order."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.candidates: list[EvaluatedCandidate] = []

    def decided(
        self,
        action: Action,
        change: object,
        state: SearchState,
        margin: float,
        predicted: float | None = None,
    ) -> SearchState:
        """Log a decision and return the state that it led to."""
        self.steps.append(
            Step(
                action=action,
                change=str(change),
                divergence=state.mean,
                margin=margin,
                predicted=predicted,
                macs=state.cost.macs,
                params=state.cost.params,
            )
        )
        return state

    def evaluated(self, state: SearchState, candidate: Candidate, divergences: Tensor) -> None:
        """Log a candidate that was evaluated on all validation samples."""
        new, cost = candidate.replacement, state.cost - candidate.saving
        mean = float(divergences.mean())
        self.candidates.append(
            EvaluatedCandidate(
                step=len(self.steps),
                chain=new.chain,
                start=new.start,
                stop=new.stop,
                unit=new.unit,
                map=new.map,
                level=new.level,
                divergence=mean,
                macs=cost.macs,
                params=cost.params,
                dropped="" if math.isfinite(mean) else NOT_FINITE,
            )
        )

    def measured(self, state: SearchState, candidate: Candidate, divergence: float) -> None:
        """Log an option that was run alone on the screened samples."""
        self.evaluated(state, candidate, torch.tensor([divergence], dtype=torch.float64))
