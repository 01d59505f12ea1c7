"""Record of a search: the networks that it evaluated, so that a search for another budget, or one that
was interrupted, continues from there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field
from torch import Tensor

from rba_compress.core.errors import ArtifactError
from rba_compress.core.plan import AnyRefit, EvaluatedCandidate, Replacement, Site, Step
from rba_compress.core.schema import Frozen

_LARGEST = sys.float_info.max
"""In place of infinity, which JSON lacks."""
_PLAIN = (
    "replacements",
    "refits",
    "agreement",
    "accuracy_drop",
    "metric_drops",
    "predicted",
    "settled",
    "refined",
    "traded",
    "scheduled",
)
"""Fields of a network that hold no tensors."""


Refined = Literal["not", "start", "result"]
"""Extent to which kept layers of a network were re-solved: as the start of a stage behind maps alone,
as the result also behind merges of positions."""


@dataclass(frozen=True, eq=False)
class EvaluatedNetwork:
    """Network that a search evaluated on all validation samples."""

    replacements: tuple[Replacement, ...]
    refits: tuple[AnyRefit, ...]
    tensors: dict[str, Tensor]
    divergence: Tensor
    """Divergence of each sample, (samples,) float64."""
    agreement: float | None
    accuracy_drop: float | None
    predicted: float
    """Mean divergence that was predicted."""
    metric_drops: dict[str, float] = field(default_factory=dict)
    settled: bool = False
    """True where BatchNorms were re-estimated, or where that did not help."""
    refined: Refined = "not"
    traded: bool = False
    """True where trades of its levels were tried."""
    scheduled: bool = False
    """True where schedules were tried before a stage started from it."""


@dataclass(frozen=True, eq=False)
class OptionRun:
    """Run of one option of the stage under way."""

    rise: float
    row: Tensor
    """Sketched output change, (numbers,)."""
    dual: Tensor
    """The same tensor, or for a user-defined divergence its product with the second derivative."""


@dataclass(eq=False)
class SearchRecord:
    """State of a search, from which another search of the same profile continues; empty before one."""

    networks: list[EvaluatedNetwork] = field(default_factory=list)
    """All networks that were evaluated, the original first."""
    current: int = 0
    """Index of the network from which the next stage starts."""
    skipped: set[Site] = field(default_factory=set)
    """Sites that the next stage does not measure."""
    prices: dict[Site, float] = field(default_factory=dict)
    """Rise of the divergence over what is saved, of each site when it was last measured."""
    every: bool = False
    """True where the next stage measures every site, because those of interest led no further."""
    steps: list[Step] = field(default_factory=list)
    candidates: list[EvaluatedCandidate] = field(default_factory=list)
    runs: list[OptionRun] = field(default_factory=list)
    """Runs of the stage that is under way, in order."""

    def state(self) -> tuple[SavedRecord, dict[str, Tensor]]:
        """Return the JSON part and the tensors; tensors that networks share are held once."""
        index: dict[int, int] = {}
        tensors: dict[str, Tensor] = {}

        def held(tensor: Tensor) -> int:
            if id(tensor) not in index:
                index[id(tensor)] = len(index)
                tensors[str(index[id(tensor)])] = tensor
            return index[id(tensor)]

        networks = [
            SavedNetwork(
                **{name: getattr(n, name) for name in _PLAIN},
                tensors={name: held(t) for name, t in n.tensors.items()},
                divergence=held(n.divergence),
            )
            for n in self.networks
        ]
        saved = SavedRecord(
            networks=tuple(networks),
            current=self.current,
            skipped=tuple(sorted(self.skipped)),
            prices=tuple((site, min(price, _LARGEST)) for site, price in sorted(self.prices.items())),
            every=self.every,
            steps=tuple(self.steps),
            candidates=tuple(self.candidates),
            runs=tuple((run.rise, held(run.row), held(run.dual)) for run in self.runs),
        )
        return saved, tensors

    def restore(self, saved: SavedRecord, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned.

        Raises:
            ArtifactError: a tensor is missing.
        """

        def of(index: int) -> Tensor:
            if str(index) not in tensors:
                raise ArtifactError(f"the record of a search lacks its tensor {index}: search again")
            return tensors[str(index)]

        self.networks = [
            EvaluatedNetwork(
                **{name: getattr(n, name) for name in _PLAIN},
                tensors={name: of(k) for name, k in n.tensors.items()},
                divergence=of(n.divergence),
            )
            for n in saved.networks
        ]
        self.current, self.skipped = saved.current, {Site(*site) for site in saved.skipped}
        self.prices = {Site(*site): price for site, price in saved.prices}
        self.every = saved.every
        self.steps, self.candidates = list(saved.steps), list(saved.candidates)
        self.runs = [OptionRun(rise, of(row), of(dual)) for rise, row, dual in saved.runs]


class SavedNetwork(Frozen):
    """JSON part of an evaluated network; tensors are named by their numbers."""

    replacements: tuple[Replacement, ...]
    refits: tuple[AnyRefit, ...]
    tensors: dict[str, int]
    divergence: int
    agreement: float | None
    accuracy_drop: float | None
    metric_drops: dict[str, float] = Field(default_factory=dict)
    predicted: float
    settled: bool
    refined: Refined
    traded: bool = False
    scheduled: bool = False


class SavedRecord(Frozen):
    """JSON part of a record."""

    networks: tuple[SavedNetwork, ...] = ()
    current: int = 0
    skipped: tuple[tuple[int, int, int, str], ...] = ()
    prices: tuple[tuple[tuple[int, int, int, str], float], ...] = ()
    every: bool = False
    steps: tuple[Step, ...] = ()
    candidates: tuple[EvaluatedCandidate, ...] = ()
    runs: tuple[tuple[float, int, int], ...] = ()
