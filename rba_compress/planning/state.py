"""Networks in work, as values: what a search has chosen so far, and what it may do next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rba_compress.core.config import Unit
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.plan import Chain, Plan, Refit, Replacement
from rba_compress.linalg.maps import Fit, fit_map, map_macs, map_parameters
from rba_compress.planning.evaluator import Judged
from rba_compress.profiling.chain_statistics import ChainProfile
from rba_compress.profiling.profiler import Profile

Site = tuple[int, int, int, Unit]
"""(chain, start, stop, unit): where something may be done, and what."""


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
    """A unit at a site and its map, fitted behind a draft."""

    chain: int
    replacement: Replacement
    tensors: dict[str, Tensor]
    saving: Load
    refit: Refit | None = None
    """Of the layer before the span, where the map is folded into it."""

    @property
    def site(self) -> Site:
        new = self.replacement
        return self.chain, new.start, new.stop, new.unit

    @property
    def boundary(self) -> int:
        """Up to here the stream is the draft's."""
        return self.replacement.start - (self.refit is not None)


def fit_span(profiled: ChainProfile, start: int, stop: int, spec: MapSpec) -> tuple[Replacement, Fit]:
    """Fit one map over the span `start:stop` of a profiled chain, on the original streams."""
    fit = fit_map(spec, profiled.moments.pair(start, stop, spectrum=True))
    return replacement_of(profiled.chain, start, stop, fit), fit


def fit_spans(profiled: ChainProfile, spans: Iterable[tuple[int, int]], spec: MapSpec) -> Solution:
    """One map in place of each span of a profiled chain, each fitted on the original streams."""
    fits = [fit_span(profiled, start, stop, spec) for start, stop in spans]
    tensors = {key: tensor for fitted in fits for key, tensor in keyed(*fitted).items()}
    return Solution(Plan(replacements=tuple(replacement for replacement, _ in fits)), tensors)


def papers_span(profile: Profile, macs: int) -> Solution | None:
    """What the paper would do at that cost: one plain linear map over one span (arXiv 2410.04941).

    Of the shortest spans that bring the network to `macs`, or else of those that save most, the one
    whose ends are most alike by the paper's measure, -mean ||h_stop - h_start||^2 on read-out rows.
    None where no span saves anything.
    """
    spec, sites = MapSpec(kind="linear"), []
    for profiled in profile.chains:
        chain, alike = profiled.chain, profiled.similarity("redundancy")
        for start, stop in chain.spans(profile.window):
            mapped = skip(chain, start, stop, "span").model_copy(update={"map": spec})
            left = profile.dense.macs - saving([chain], [mapped]).macs
            order = max(left - macs, 0), stop - start, -float(alike[start, stop])
            if left < profile.dense.macs:
                sites.append((order, profiled, (start, stop)))
    if not sites:
        return None
    _, profiled, span = min(sites, key=lambda site: site[0])
    return fit_spans(profiled, [span], spec)


def keyed(replacement: Replacement, fit: Fit) -> dict[str, Tensor]:
    """The fit's tensors by their key in the slim model's state dict."""
    return {f"{replacement.key}{name}": tensor for name, tensor in fit.tensors.items()}


def skip(chain: Chain, start: int, stop: int, unit: Unit) -> Replacement:
    """A unit whose map is the identity."""
    return Replacement(
        chain=chain.name,
        start=start,
        stop=stop,
        blocks=chain.blocks[start:stop],
        map=MapSpec(kind="identity"),
        width=chain.width,
        ndim=chain.ndim,
        axis=chain.axis,
        unit=unit,
        reads=chain.reads if unit in ("read_out", "read_out_mlp") else 0,
    )


def chain_load(
    chain: Chain, replacements: Sequence[Replacement], *, times: Sequence[float] = ()
) -> Load:
    """What the blocks of a chain cost with some of them replaced.

    `times` are the shares of each block in the network's time; what is left of a block is taken to run
    as fast, per MAC, as the block.
    """
    own = [r for r in replacements if r.chain == chain.name]
    at = {b: r for r in own for b in range(r.start, r.stop)}
    # Behind an exact read-out the stream carries the read positions alone.
    exact = max((r.start for r in own if r.exact), default=len(chain))
    macs, params, latency = 0, 0, 0.0
    for b in range(len(chain)):
        new, cost = at.get(b), (chain.macs[b], chain.params[b])
        if new is not None:
            left = None
            if new.unit != "span":
                left = chain.blocks[b].cost(new.unit, narrow=new.exact or b > exact)
            cost = (0, 0) if left is None else (left.macs, left.params)
            if b == new.start and not (new.exact and new.unit == "read_out"):
                read = chain.reads * max(chain.rows, 1)
                positions = read if new.exact or b > exact else chain.positions
                mapped = positions * map_macs(new.map, chain.width)
                cost = cost[0] + mapped, cost[1] + map_parameters(new.map, chain.width)
        macs, params = macs + cost[0], params + cost[1]
        if times and chain.macs[b]:
            latency += times[b] * cost[0] / chain.macs[b]
    return Load(macs, params, latency)


def saving(
    chains: Sequence[Chain],
    replacements: Sequence[Replacement],
    *,
    times: Sequence[Sequence[float]] = (),
) -> Load:
    """What a network no longer costs with some of its blocks replaced; `times` of every chain."""
    total = Load(0, 0)
    for chain, shares in zip(chains, times or [()] * len(chains), strict=True):
        before = chain_load(chain, (), times=shares)
        total += before - chain_load(chain, replacements, times=shares)
    return total


def with_read_outs(solution: Solution, chains: Sequence[Chain]) -> Solution:
    """The solution without what its output does not read; the output is the same.

    In each chain, the last block that mixes positions computes the read ones alone. Maps behind it, and
    blocks without their attention, treat positions apart.
    """
    for chain in chains:
        own = [r for r in solution.plan.replacements if r.chain == chain.name]
        at = {b: r for r in own for b in range(r.start, r.stop)}
        for b in reversed(range(len(chain)) if chain.reads else ()):
            old = at.get(b)
            if old is not None and old.unit in ("span", "attention_free"):
                continue
            exact = {"exact": True, "reads": chain.reads}
            if old is not None and old.unit == "mlp_free":
                new, tensors = old.model_copy(update=exact), solution.tensors
            else:
                new, tensors = skip(chain, b, b + 1, "read_out").model_copy(update=exact), {}
            if chain.blocks[b].cost(new.unit, narrow=True) is not None:
                kept = {key: value for key, value in tensors.items() if key.startswith(new.key)}
                drop = [] if old is None else [old]
                solution = changed(solution, drop=drop, add=[new], tensors=kept)
            break
    return solution


def handed_out(solution: Solution, profile: Profile) -> Solution:
    """The solution as it leaves the search: what the output does not read is not computed, unless all
    of it is asked for. The output is the same.
    """
    chains = () if profile.config.keep_features else [p.chain for p in profile.chains]
    return with_read_outs(solution, chains)


def network_load(profile: Profile, plan: Plan, *, times: Sequence[Sequence[float]] = ()) -> Load:
    """What the network costs under a plan; the share of latency is an estimate."""
    replacements = handed_out(Solution(plan, {}), profile).plan.replacements
    dense = Load(profile.dense.macs, profile.dense.params, 1.0)
    return dense - saving([p.chain for p in profile.chains], replacements, times=times)


def replaced_blocks(plan: Plan, chain: Chain, *, thinned: bool = True) -> set[int]:
    """Blocks of a chain that are replaced, or thinned."""
    replaced = [r for r in plan.replacements if r.chain == chain.name]
    wanted = [r for r in replaced if thinned or r.unit == "span"]
    return {b for r in wanted for b in range(r.start, r.stop)}


def replacement_of(chain: Chain, start: int, stop: int, fit: Fit, unit: Unit = "span") -> Replacement:
    """The decision behind a fit."""
    update = {"map": fit.spec, "diagnostics": fit.diagnostics}
    return skip(chain, start, stop, unit).model_copy(update=update)


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
    """The draft's solution with a move; what was thinned or refitted of blocks that it replaces is
    dropped, and a span that was folded into them is skipped from then on.
    """
    new = move.replacement
    over = [
        r
        for r in draft.solution.plan.replacements
        if r.chain == new.chain and r.start < new.stop and new.start < r.stop
    ]
    gone = [
        r
        for r in draft.solution.plan.refits
        if any(r.path.startswith(f"{block.path}.") for block in new.blocks)
        or (move.refit is not None and r.path == move.refit.path)
    ]
    bare = {"map": MapSpec(kind="identity"), "diagnostics": None}
    lost = [
        r
        for r in draft.solution.plan.replacements
        if r not in over and set(folded_for(draft.solution.plan, r)).intersection(gone)
    ]
    added: list[Replacement | Refit] = [new, *(r.model_copy(update=bare) for r in lost)]
    if move.refit is not None:
        added.append(move.refit)
    return changed(draft.solution, drop=[*gone, *lost, *over], add=added, tensors=move.tensors)


def folded_for(plan: Plan, old: Replacement) -> list[Refit]:
    """The refit that a folded span stands on."""
    return [r for r in plan.refits if r.folded and r.chain == old.chain and r.block == old.start - 1]
