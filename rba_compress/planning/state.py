"""Values that a search works on: solutions, search states and candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rba_compress.core.cost import Cost
from rba_compress.core.plan import Chain, FoldRefit, Plan, Refit, Replacement, Site
from rba_compress.planning.evaluator import Evaluation
from rba_compress.profiling.profiler import Profile
from rba_compress.units.base import IDENTITY, beside
from rba_compress.units.read_out import READ_OUT
from rba_compress.units.registry import unit_of


@dataclass(frozen=True)
class Solution:
    """A plan and its tensors, keyed as in the compressed model's state dict."""

    plan: Plan
    tensors: dict[str, Tensor]
    points: tuple[Solution, ...] = ()
    """Solutions of the steps from the original to this one, in order."""

    def __repr__(self) -> str:
        return f"Solution({self.plan!r}; {len(self.tensors)} tensors, {len(self.points)} points)"


@dataclass(frozen=True, eq=False)
class SearchState:
    """Search state: a solution, its cost and its evaluation."""

    solution: Solution
    cost: Cost
    evaluation: Evaluation

    @property
    def mean(self) -> float:
        """Mean divergence on the validation samples."""
        return self.evaluation.mean


@dataclass(frozen=True, eq=False)
class Candidate:
    """Candidate: a unit at a site, fitted on the network of a search state."""

    chain: int
    replacement: Replacement
    tensors: dict[str, Tensor] = field(default_factory=dict)
    saving: Cost = field(default_factory=Cost)
    refit: Refit | None = None
    """Correction of the layer before the span, where the map is folded into that layer."""
    also: tuple[Replacement, ...] = ()
    """Replacements of the other blocks of a chain, where all get one width."""

    @property
    def site(self) -> Site:
        """Place and unit of the candidate."""
        new = self.replacement
        return Site(self.chain, new.start, (new, *self.also)[-1].stop, new.unit)

    @property
    def boundary(self) -> int:
        """Boundary up to which the stream equals that of the search state."""
        return self.replacement.start - (self.refit is not None)


def keyed(new: Replacement, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a fit's tensors by their key in the compressed model's state dict."""
    return {f"{new.key}{name}": tensor for name, tensor in tensors.items()}


def with_read_outs(solution: Solution, chains: Sequence[Chain]) -> Solution:
    """Return the solution without the positions that its output does not read; the output is the same.

    In each chain, the last block that mixes positions computes the read positions alone; the blocks
    behind it treat each position separately.
    """
    for chain in chains:
        own = [r for r in solution.plan.replacements if r.chain == chain.name and not r.inner]
        at = {b: r for r in own for b in range(r.start, r.stop)}
        for b in reversed(range(len(chain)) if chain.reads else ()):
            old = at.get(b)
            if old is not None and not unit_of(old.unit).mixes:
                continue
            kept = None if old is None else unit_of(old.unit).exact(chain, old)
            new = kept or READ_OUT.exact_at(chain, b)
            if chain.blocks[b].offer(new.unit, narrow=True) is not None:
                tensors = {k: v for k, v in solution.tensors.items() if kept and k.startswith(new.key)}
                drop = [] if old is None else [old]
                solution = changed(solution, drop=drop, add=[new], tensors=tensors)
            break
    return solution


def without_unread(solution: Solution, profile: Profile) -> Solution:
    """Return the solution as it leaves the search: `with_read_outs`, unless all features are kept."""
    chains = () if profile.config.keep_features else [p.chain for p in profile.chains]
    return with_read_outs(solution, chains)


def replaced_blocks(plan: Plan, chain: Chain, *, cut: bool = True) -> set[int]:
    """Return the blocks of a chain that are removed; with `cut`, also those that are left in part."""
    wanted = [r for r in plan.replacements if r.chain == chain.name and not r.inner]
    return {b for r in wanted if cut or unit_of(r.unit).removes for b in range(r.start, r.stop)}


def changed(
    solution: Solution,
    *,
    drop: Sequence[Replacement | Refit] = (),
    add: Sequence[Replacement | Refit] = (),
    tensors: dict[str, Tensor] | None = None,
) -> Solution:
    """Return the solution without some of its parts and their tensors, and with others.

    Refits of layers that get their former size back are dropped as well. Where a refit of a narrowed
    layer is dropped, the layer keeps the refit's tensors.
    """
    plan = solution.plan
    sizes, still = ([r for r in x if isinstance(r, Replacement) and r.inner] for x in (drop, add))
    lost = [
        r
        for r in plan.refits
        if any(sets(r, old) for old in sizes) and not any(sets(r, new) for new in still)
    ]
    drop = [*drop, *(r for r in lost if r not in drop)]
    parts: list[Replacement | Refit] = [*plan.replacements, *plan.refits]
    parts = [p for p in parts if p not in drop]
    narrow = [p for p in parts if isinstance(p, Replacement) and p.inner]
    parts = [*parts, *add]
    kept = {
        k: v
        for k, v in solution.tensors.items()
        if any(p.owns(k) for p in narrow) or not any(part.owns(k) for part in drop)
    }
    plan = plan.model_copy(
        update={
            "replacements": tuple(p for p in parts if isinstance(p, Replacement)),
            "refits": tuple(p for p in parts if isinstance(p, Refit)),
        }
    )
    return Solution(plan, kept | (tensors or {}))


def sets(refit: Refit, new: Replacement) -> bool:
    """Return whether a refit sets tensors that a replacement narrows."""
    return any(refit.owns(f"{new.key}{name}") for name in new.narrowed)


def overlapping(plan: Plan, new: Replacement) -> list[Replacement]:
    """Return the replacements of a plan that share a block with another replacement, and cannot stand
    beside it.
    """
    return [
        r
        for r in plan.replacements
        if r.chain == new.chain and r.start < new.stop and new.start < r.stop and not beside(new, r)
    ]


def with_candidate(solution: Solution, candidate: Candidate) -> Solution:
    """Return a solution with a candidate.

    Cuts and re-solved layers of the blocks that the candidate replaces are dropped. A span that was
    folded into such a layer becomes the identity, unless the layer is narrowed, which keeps the map.
    """
    plan, news = solution.plan, (candidate.replacement, *candidate.also)
    over = [r for new in news for r in overlapping(plan, new)]
    inside = [f"{block.path}." for new in news for block in new.blocks]
    gone = [
        r
        for r in plan.refits
        if (r.path.startswith(tuple(inside)) and not (news[0].inner and isinstance(r, FoldRefit)))
        or (candidate.refit is not None and r.path == candidate.refit.path)
    ]
    bare = {"map": IDENTITY, "diagnostics": None}
    lost = [r for r in plan.replacements if r not in over and {*folded_for(plan, r)}.intersection(gone)]
    added: list[Replacement | Refit] = [*news, *(r.model_copy(update=bare) for r in lost)]
    if candidate.refit is not None:
        added.append(candidate.refit)
    return changed(solution, drop=[*gone, *lost, *over], add=added, tensors=candidate.tensors)


def undone(solution: Solution, old: Replacement) -> Solution:
    """Return a solution with a replacement, and what was folded for it, undone."""
    return changed(solution, drop=[old, *folded_for(solution.plan, old)])


def taken_at(state: SearchState, candidate: Candidate) -> Replacement | None:
    """Return the replacement that has the candidate's site and unit, and another map or level."""
    new = candidate.replacement
    for old in overlapping(state.solution.plan, new):
        if (old.start, old.stop, old.unit) == (new.start, new.stop, new.unit):
            same = old.level == new.level and old.map.kind == new.map.kind == "identity"
            return None if same else old
    return None


def removed_length(site: Site) -> int:
    """Return the number of blocks that a site removes; 0 where it cuts one."""
    return site.stop - site.start if unit_of(site.unit).removes else 0


def folded_for(plan: Plan, old: Replacement) -> list[Refit]:
    """Return the re-solved layer that a span's map was folded into."""
    place = (old.chain, old.start - 1)
    return [r for r in plan.refits if isinstance(r, FoldRefit) and (r.chain, r.block) == place]
