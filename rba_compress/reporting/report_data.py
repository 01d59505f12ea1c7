"""Data behind a report: the network as it is drawn, the front, the decisions, the versions."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import ClassVar, Literal

from pydantic import Field

from rba_compress.core.config import Budget
from rba_compress.core.map_spec import Diagnostics
from rba_compress.core.plan import Chain, Plan, Refusal, SolvedRefit, Step
from rba_compress.core.schema import Frozen
from rba_compress.linalg.similarity import METRICS, Metric
from rba_compress.planning.plan_cost import positions_left
from rba_compress.profiling.profiler import Profile
from rba_compress.units.registry import unit_of

Method = Literal["ours", "paper", "healed"]
Matrix = tuple[tuple[float | None, ...], ...]


class Summary(Frozen):
    """Measurements of one network, under one name each; None if not measured."""

    former: ClassVar[Mapping[str, str]] = {"accuracy_dense": "accuracy_original"}

    macs: int
    macs_kept: float
    """Share of the original network's, as are `params_kept` and `latency_ratio`."""
    params: int
    params_kept: float
    latency_ratio: float
    latency_low: float
    """Lower quartile over the timed pairs; `latency_high` is the upper one."""
    latency_high: float
    divergence: float | None
    divergence_low: float | None
    """95 % interval, to `divergence_high`."""
    divergence_high: float | None
    agreement: float | None
    accuracy: float | None
    accuracy_original: float | None
    samples: int
    plan: str
    method: Method = "ours"
    """Origin of the network: this search, the paper's choice, or training afterwards."""


class DrawnBlock(Frozen):
    """Block of a chain, and its change."""

    path: str
    type: str
    macs: int
    params: int
    state: Literal["kept", "re-solved", "thinned", "replaced"] = "kept"
    change: str = ""
    """Description of the change."""
    gone: tuple[str, ...] = ()
    """Parts that are gone, in a few words each."""
    positions: int | None = None
    """Positions of a sample behind the block."""


class DrawnChain(Frozen):
    """Chain of blocks, and the similarity of the streams between them."""

    name: str
    blocks: tuple[DrawnBlock, ...]
    similarity: dict[Metric, Matrix] = Field(default_factory=dict)
    """Similarity matrices by metric; None where a pair was not measured."""


class Change(Frozen):
    """Replacement of a span, and how well it fits."""

    text: str
    diagnostics: Diagnostics | None
    """Diagnostics of the fit; None without a fit."""


class Details(Frozen):
    """Data behind the numbers of a report."""

    chains: tuple[DrawnChain, ...] = ()
    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    steps: tuple[Step, ...] = ()
    front: tuple[Summary, ...] = ()
    """Networks of the search, the last of which is the result, and the paper's choice at its cost."""
    front_samples: str = ""
    """Description of the samples that the front was measured on."""
    budget: Budget | None = None
    """Limits that were asked for; None without any."""
    options: str = ""
    """Options of a shell command on this network, if its timm name is known."""
    provenance: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(
        cls,
        seen: Profile,
        plan: Plan,
        front: Sequence[Summary] = (),
        *,
        front_samples: str = "",
        options: str = "",
    ) -> Details:
        """Collect the data of a plan and of the profile that it was searched on."""
        chains = []
        for profiled in seen.chains:
            alike = {metric: _rounded(profiled.similarity(metric).tolist()) for metric in METRICS}
            chains.append(
                DrawnChain(
                    name=profiled.chain.name,
                    blocks=_drawn(profiled.chain, plan),
                    similarity=alike,
                )
            )
        return cls(
            chains=tuple(chains),
            changes=tuple(Change(text=str(r), diagnostics=r.diagnostics) for r in plan.in_order),
            refusals=plan.refusals,
            budget=plan.budget,
            steps=plan.steps,
            front=tuple(front),
            front_samples=front_samples,
            options=options,
            provenance={
                "weights of the original, SHA-256": seen.weights,
                "samples profiled": str(seen.samples),
                "seed": str(plan.config.seed),
                **versions(),
            },
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a result."""
    packages = ("rba_compress", "torch", "timm", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _drawn(chain: Chain, plan: Plan) -> tuple[DrawnBlock, ...]:
    """Return the blocks of a chain, and how a plan changes each."""
    state: dict[int, tuple[str, str]] = {}
    gone: dict[int, list[str]] = {}
    left = positions_left(chain, plan.replacements)
    for refit in plan.refits:
        if isinstance(refit, SolvedRefit) and refit.chain == chain.name and refit.block >= 0:
            state[refit.block] = ("re-solved", str(refit))
    for new in plan.replacements:
        for b in range(new.start, new.stop) if new.chain == chain.name else ():
            kind = "replaced" if unit_of(new.unit).removes else "thinned"
            before = [state[b][1]] if b in state and state[b][0] == kind else []
            state[b] = kind, "; ".join((*before, str(new)))
            words = unit_of(new.unit).brief(new) if b == new.start else "left out"
            gone.setdefault(b, []).extend([words] if words else [])
    return tuple(
        DrawnBlock(
            path=block.path,
            type=block.type,
            macs=chain.macs[b],
            params=chain.params[b],
            gone=tuple(gone.get(b, ())),
            positions=left[b],
            **dict(zip(("state", "change"), state.get(b, ("kept", "")), strict=True)),
        )
        for b, block in enumerate(chain.blocks)
    )


def _rounded(values: list[list[float]]) -> Matrix:
    return tuple(tuple(float(f"{v:.4g}") if math.isfinite(v) else None for v in row) for row in values)
