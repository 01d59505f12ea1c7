"""Networks in work, as values: what a search has chosen so far, and what it may do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rba_compress.calibration import ChainProfile
from rba_compress.judge import Judged
from rba_compress.maps import Fit, MapSpec, fit_map, map_macs, map_parameters
from rba_compress.plan import Chain, Plan, Refit, Replacement

Span = tuple[int, int, int]
"""(chain, start, stop)."""


@dataclass(frozen=True)
class Solution:
    """A plan and the tensors beside it, keyed as in the slim model's state dict."""

    plan: Plan
    tensors: dict[str, Tensor]
    points: tuple[Solution, ...] = ()
    """The networks on the way from the dense one, in the order in which they were found."""


@dataclass(frozen=True)
class Load:
    """What a network costs, or what a move saves."""

    macs: int
    params: int
    latency: float = 0.0
    """Share of the dense network's time; followed only where the budget asks for it."""

    def __sub__(self, saving: Load) -> Load:
        return Load(self.macs - saving.macs, self.params - saving.params, self.latency - saving.latency)

    def __add__(self, saving: Load) -> Load:
        return Load(self.macs + saving.macs, self.params + saving.params, self.latency + saving.latency)


@dataclass(frozen=True)
class Draft:
    """A network in work: a point between the dense one and the budget."""

    solution: Solution
    load: Load
    judged: Judged

    @property
    def mean(self) -> float:
        return self.judged.mean


@dataclass(frozen=True, eq=False)
class Move:
    """A span and a map for it, fitted behind a draft."""

    chain: int
    replacement: Replacement
    tensors: dict[str, Tensor]
    saving: Load
    refit: Refit | None = None
    """Of the layer before the span, where the map is folded into it."""

    @property
    def span(self) -> Span:
        return self.chain, self.replacement.start, self.replacement.stop

    @property
    def boundary(self) -> int:
        """Up to here the stream is the draft's."""
        return self.replacement.start - (self.refit is not None)


def fit_span(profiled: ChainProfile, start: int, stop: int, spec: MapSpec) -> tuple[Replacement, Fit]:
    """Fit one map over the span `start:stop` of a profiled chain, on the original streams."""
    fit = fit_map(spec, profiled.moments.pair(start, stop))
    return replacement_of(profiled.chain, start, stop, fit), fit


def keyed(replacement: Replacement, fit: Fit) -> dict[str, Tensor]:
    """The fit's tensors by their key in the slim model's state dict."""
    return {f"{replacement.key}{name}": tensor for name, tensor in fit.tensors.items()}


def span_saving(
    chain: Chain, start: int, stop: int, spec: MapSpec, *, times: Sequence[float] = ()
) -> Load:
    """What the network no longer costs with that span replaced.

    `times` are the shares of each block in the network's time; a map is taken to run as fast, per MAC,
    as the blocks it replaces.
    """
    blocks = sum(chain.macs[start:stop])
    macs = blocks - chain.positions * map_macs(spec, chain.width)
    return Load(
        macs=macs,
        params=sum(chain.params[start:stop]) - map_parameters(spec, chain.width),
        latency=sum(times[start:stop]) * macs / blocks if times and blocks else 0.0,
    )


def replaced_blocks(plan: Plan, chain: Chain) -> set[int]:
    """Blocks of a chain that are replaced."""
    replaced = [r for r in plan.replacements if r.chain == chain.name]
    return {b for r in replaced for b in range(r.start, r.stop)}


def replacement_of(chain: Chain, start: int, stop: int, fit: Fit) -> Replacement:
    """The decision behind a fit."""
    return Replacement(
        chain=chain.name,
        start=start,
        stop=stop,
        blocks=chain.blocks[start:stop],
        map=fit.spec,
        width=chain.width,
        ndim=chain.ndim,
        axis=chain.axis,
        diagnostics=fit.diagnostics,
    )


def changed(
    solution: Solution,
    *,
    drop: Sequence[Replacement | Refit] = (),
    add: Sequence[Replacement | Refit] = (),
    tensors: dict[str, Tensor] | None = None,
) -> Solution:
    """The solution without some of its parts and their tensors, and with others."""
    plan, keys = solution.plan, tuple(part.key for part in drop)
    parts = [p for p in (*plan.replacements, *plan.refits) if p not in drop] + list(add)
    kept = {k: v for k, v in solution.tensors.items() if not k.startswith(keys)}
    plan = plan.model_copy(
        update={
            "replacements": tuple(p for p in parts if isinstance(p, Replacement)),
            "refits": tuple(p for p in parts if isinstance(p, Refit)),
        }
    )
    return Solution(plan, kept | (tensors or {}))


def with_move(draft: Draft, move: Move) -> Solution:
    """The draft's solution with a move; what was refitted in blocks that it replaces is dropped, and a
    span that was folded into them is skipped from then on.
    """
    new = move.replacement
    gone = [
        r
        for r in draft.solution.plan.refits
        if (r.chain == new.chain and new.start <= r.block < new.stop)
        or (move.refit is not None and r.path == move.refit.path)
    ]
    skip = {"map": MapSpec(kind="identity"), "diagnostics": None}
    lost = [
        r
        for r in draft.solution.plan.replacements
        if set(folded_for(draft.solution.plan, r)).intersection(gone)
    ]
    added: list[Replacement | Refit] = [new, *(r.model_copy(update=skip) for r in lost)]
    if move.refit is not None:
        added.append(move.refit)
    return changed(draft.solution, drop=[*gone, *lost], add=added, tensors=move.tensors)


def folded_for(plan: Plan, old: Replacement) -> list[Refit]:
    """The refit that a folded span stands on."""
    return [r for r in plan.refits if r.folded and r.chain == old.chain and r.block == old.start - 1]
