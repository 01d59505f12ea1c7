"""Candidates: fits of every level of every unit at every site, and corrections of kept layers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.cost import UNREACHABLE, Cost
from rba_compress.core.distributed import current
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.memory import out_of_memory
from rba_compress.core.plan import (
    STATISTICS,
    Block,
    Branch,
    Chain,
    Divergence,
    FoldRefit,
    LayerRefit,
    NormRefit,
    Plan,
    Replacement,
    Site,
    SolvedRefit,
)
from rba_compress.graph.rewrite import copy_model, replace_blocks
from rba_compress.linalg.maps import correction
from rba_compress.linalg.moments import PairMoments, Total
from rba_compress.planning.fit_statistics import (
    Rows,
    SpanRows,
    Walk,
    Wanted,
    batch_statistics,
    layer_moments,
    probed,
    span_rows,
)
from rba_compress.planning.output_layers import output_gap, output_layers
from rba_compress.planning.plan_cost import network_cost
from rba_compress.planning.state import (
    Candidate,
    SearchState,
    Solution,
    changed,
    keyed,
    replaced_blocks,
    with_candidate,
)
from rba_compress.profiling.profiler import Profile
from rba_compress.units.base import IDENTITY, Level
from rba_compress.units.block_variants import Thinned, thin
from rba_compress.units.registry import unit_of
from rba_compress.units.splice import forms_of, splice_shared
from rba_compress.units.token_merge import SIZED
from rba_compress.units.width import SHARES, UNIFORM, Levels, Reader, Seen, WidthUnit


class CandidateFitter:
    """Fitter of candidates on the fit samples, with the original and the current network side by side.

    `samples` counts the samples run; a run through a part of the blocks counts as that share. With
    several ranks, each holds its share of the samples, and fits are over all of them.
    """

    def __init__(self, model: nn.Module, profile: Profile, batches: Sequence[Batch]) -> None:
        self.model, self.profile, self.ranks = model, profile, current()
        self.held = int(self.ranks.sum(sum(map(len, batches))))
        """Number of samples to fit on."""
        self.weight = 1.0 if batches else 0.0
        # A rank without samples joins collectives with a zero-weight batch.
        self.batches = batches or [profile.example.select([0]).to(model)]
        self.config = profile.config
        self.chains = profile.in_order
        self.samples = 0.0
        self.traces = profile.traces
        self.times: list[list[float]] = []
        """Shares of each chain's blocks in the network's time; empty unless latency is limited."""
        self._costs: dict[Hashable, Cost] = {}
        """Costs of plans; the strength of a map changes none."""

    @cached_property
    def outputs(self) -> dict[str, Divergence]:
        """Linear layers that outputs come from, by path, and how the outputs are compared."""
        return output_layers(self.model, self.chains, self.profile.criterion, self.batches[0])

    @property
    def total(self) -> Total | None:
        """Sum over ranks; None on a single rank."""
        return self.ranks.total if self.ranks.count > 1 else None

    def compressed(self, solution: Solution) -> nn.Module:
        """Return the compressed network, which shares the original's weights."""
        return splice_shared(self.model, solution.plan, solution.tensors, self.traces)

    def cost(self, plan: Plan) -> Cost:
        """Return the cost of the network under a plan; the share of latency is an estimate."""
        parts = frozenset(
            (r.chain, r.start, r.stop, r.unit, r.map.kind, r.map.rank, r.level, r.kept, r.exact)
            for r in plan.replacements
        )
        key = parts, bool(self.times)
        if key not in self._costs:
            self._costs[key] = network_cost(self.profile, plan, times=self.times)
        return self._costs[key]

    def unfitted(self, site: Site, level: Level = IDENTITY) -> Replacement:
        """Return the replacement at a site, not fitted yet."""
        return unit_of(site.unit).choice(self.chains[site.chain], site.start, site.stop, level)

    def class_weight(self, chain: int) -> float:
        """Return the weight of a class token's row in fits."""
        return self.config.class_weight or float(self.chains[chain].positions)

    def candidates(self, state: SearchState, sites: Sequence[Site]) -> list[Candidate]:
        """Fit every level of every site, in one pass for each chain."""
        found: list[Candidate] = []
        for c, chain in enumerate(self.chains):
            wanted = [site for site in sites if site.chain == c]
            if not wanted:
                continue
            taken = replaced_blocks(state.solution.plan, chain)
            folds: dict[float, Branch] = {}
            if "folded" in self.config.maps:
                folds = {
                    float(b + 1): block.branches[-1]
                    for b, block in enumerate(chain.blocks)
                    if block.branches and b not in taken
                }
            inner = [site for site in wanted if unit_of(site.unit).inner]
            narrower = self._uniform if self.config.stock else self.narrower
            found += narrower(state.solution, c, inner)
            wanted = [s for s in wanted if not unit_of(s.unit).inner]
            for site in (s for s in wanted if not unit_of(s.unit).fitted):
                levels = unit_of(site.unit).levels(self.config, chain)
                found += [Candidate(c, self.unfitted(site, level)) for level in levels]
            wanted = [site for site in wanted if unit_of(site.unit).fitted]
            # Streams between sublayers are observed in a traced copy, whose layers are not modules.
            inner = [s for s in wanted if any(place % 1 for place in _ends(s))]
            found += self._of_chain(state.solution, c, inner, {})
            found += self._of_chain(state.solution, c, [s for s in wanted if s not in inner], folds)
        before = self.cost(state.solution.plan)
        costs = [self.cost(with_candidate(state.solution, each).plan) for each in found]
        return [
            replace(each, saving=before - cost)
            for each, cost in zip(found, costs, strict=True)
            if cost.macs < UNREACHABLE.macs
        ]

    def narrower(self, solution: Solution, c: int, sites: Sequence[Site]) -> list[Candidate]:
        """Fit every level of sites inside the blocks of one chain, in one pass of the network."""
        chain = self.chains[c]
        units = [unit for unit in (unit_of(s.unit) for s in sites) if isinstance(unit, WidthUnit)]
        if not units:
            return []
        model, wanted = self.compressed(solution), Wanted([], {}, {})
        for unit, site in zip(units, sites, strict=True):
            block = chain.blocks[site.start]
            wanted.inputs.extend(unit.observed(block))
            wanted.modules.update(unit.modules(block))
            wanted.heads.update({f"{block.path}.{rows.layer}": rows for rows in unit.head_rows(block)})
        observed = self._by_graph(model, solution, c, sites)
        weight = self.class_weight(c)
        rows, heads = layer_moments(observed, c, self.chains, wanted, self.batches, weight=weight)
        seen = Seen(
            {path: r.merged(self.total, self.weight).weighted(weight) for path, r in rows.items()},
            {path: h.merged(self.total, self.weight) for path, h in heads.items()},
        )
        self.samples += self.held * max(site.stop for site in sites) / len(chain)
        levels = Levels(UNIFORM if self.config.stock else SHARES, self.config.multiple)
        return [
            Candidate(c, new, keyed(new, tensors))
            for unit, site in zip(units, sites, strict=True)
            for new, tensors in unit.fits(model, chain, site.start, seen, levels)
        ]

    def _uniform(self, solution: Solution, c: int, sites: Sequence[Site]) -> list[Candidate]:
        """Fit every width that all kept blocks of a chain may have."""
        chain, found = self.chains[c], []
        left = set(range(len(chain))) - replaced_blocks(solution.plan, chain)
        for site in sites:
            unit = unit_of(site.unit)
            single = [Site(c, b, b + 1, site.unit) for b, _ in unit.sites(chain, None) if b in left]
            of_block: dict[int, dict[int, Candidate]] = {s.start: {} for s in single}
            for each in self.narrower(solution, c, single):
                new = each.replacement
                if unit.unfoldable(new) is None:
                    of_block[new.start][new.kept] = each
            if len(single) < len(left):
                continue
            for kept in set.intersection(*(set(levels) for levels in of_block.values())):
                first, *others = (levels[kept] for _, levels in sorted(of_block.items()))
                tensors = {k: v for each in (first, *others) for k, v in each.tensors.items()}
                also = tuple(each.replacement for each in others)
                found.append(replace(first, tensors=tensors, also=also))
        return sorted(found, key=lambda each: (each.site, -each.replacement.kept))

    def _by_graph(
        self, model: nn.Module, solution: Solution, c: int, sites: Sequence[Site]
    ) -> nn.Module:
        """Return the same network, with the blocks whose attention is observed run by their graphs: the
        code of some calls no modules of its layers.
        """
        chain = self.chains[c]
        at = {site.start for site in sites if _of_attention(chain, site)}
        done = {r.start for r in solution.plan.replacements if r.chain == chain.name and not r.inner}
        copy = copy_model(model, share=True)
        for b in sorted(at - done):
            block = chain.blocks[b]
            if not isinstance(copy.get_submodule(block.path), Thinned):
                thinned = thin(copy, block, nn.Identity(), self.traces, unit=SIZED)
                replace_blocks(copy, [block], thinned)
        return copy

    def _of_chain(
        self, solution: Solution, c: int, sites: Sequence[Site], folds: dict[float, Branch]
    ) -> list[Candidate]:
        """Fit every level of sites in one chain, in one pass."""
        if not sites:
            return []
        chain, ends = self.chains[c], [_ends(site) for site in sites]
        model = self.compressed(solution)
        forms = {block.path: form for block, form in forms_of(solution.plan)[1]}
        failed: Exception | None = None
        whole = _between(chain, (p for pair in ends for p in pair))
        part = _between(chain, (source for source, _ in ends))
        same = not (solution.plan.replacements or solution.plan.refits)
        try:
            rows = span_rows(
                None if same else probed(self.model, whole, self.traces),
                probed(model, whole if same else part, self.traces, forms),
                chain,
                self.batches,
                spans=ends,
                folds=folds,
                merges=_merges(chain, solution.plan),
            )
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = error
        if self.ranks.sum(failed is not None):  # on any rank: all ranks take the same branch
            return self._in_halves(solution, c, sites, folds, failed)
        rows = {source: seen.merged(self.total, self.weight) for source, seen in rows.items()}
        last = max(s.stop for s in sites) + (0 if same else max(s.start for s in sites))
        self.samples += self.held * last / len(chain)
        return self._fits(model, sites, rows, folds)

    def _fits(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        rows: dict[float, SpanRows],
        folds: dict[float, Branch],
    ) -> list[Candidate]:
        """Fit every level of sites in one chain, from its regression statistics."""
        found: list[Candidate] = []
        weight = self.class_weight(sites[0].chain)
        maps: dict[Hashable, PairMoments] = {}  # sites of one source share a spectrum
        gaps = {i: seen.folds.weighted(weight) for i, seen in rows.items() if seen.folds is not None}
        for site in sites:
            unit, (source, target) = unit_of(site.unit), _ends(site)
            seen, columns = rows[source], rows[source].columns(target)
            for level in unit.levels(self.config, self.chains[site.chain]):
                plain = isinstance(level, MapSpec) and level.kind == "linear"  # as in the paper
                key = source, unit.unread, plain
                if key not in maps:
                    weighted = seen.maps.weighted(1.0 if plain else weight)
                    maps[key] = (seen.maps.others if unit.unread else weighted).with_spectrum()
                new, tensors = unit.fit(self.unfitted(site, level), maps[key].targets(columns))
                if not unit.folds(level):
                    found.append(Candidate(site.chain, new, keyed(new, tensors)))
                elif source in gaps and source in folds:
                    gap = gaps[source].targets(columns)
                    found.append(_folded(model, Candidate(site.chain, new), gap, folds[source]))
        return found

    def _in_halves(
        self,
        solution: Solution,
        c: int,
        sites: Sequence[Site],
        folds: dict[float, Branch],
        failed: Exception | None,
    ) -> list[Candidate]:
        """Repeat `_of_chain` after memory ran out, with half of the sources in each of two passes."""
        sources = sorted({_ends(site)[0] for site in sites})
        if len(sources) == 1:
            raise failed or MemoryError("on another rank")
        early = [s for s in sites if _ends(s)[0] in sources[: len(sources) // 2]]
        late = [s for s in sites if s not in early]
        found = [each for part in (early, late) for each in self._of_chain(solution, c, part, folds)]
        order = {site: k for k, site in enumerate(sites)}
        return sorted(found, key=lambda candidate: order[candidate.site])

    def walk(self, chain: int, plan: Plan) -> Walk:
        """Return a walk down a chain under a plan, for `refits`."""
        merges = _merges(self.chains[chain], plan)
        return Walk(self.model, self.chains, chain, self.batches, merges)

    def corrected(
        self, walk: Walk, solution: Solution, of: tuple[int, int], *, damping: float, step: float
    ) -> tuple[LayerRefit, Solution]:
        """Correct the last layer of a kept block's branch, on a walk down its chain.

        Args:
            of: block and branch.
            damping, step: as in `LayerRefit`.
        """
        block, branch = of
        chain, c = walk.chain, walk.index
        model, branches = self.compressed(solution), chain.blocks[block].branches
        known, at, rows = walk.known or (None, -1, [])
        if known is not solution or at != block:
            before = walk.passes
            walk.to(model, block, unchanged=known is solution)
            rows = [r.merged(self.total, self.weight) for r in walk.gaps(model, branches)]
            walk.known = solution, block, rows
            ran = (walk.passes - before) * self.held * len(chain)
            self.samples += ran / sum(map(len, self.chains))
        gap = rows[branch].weighted(self.class_weight(c))
        path = branches[branch].path
        before_it = [r for r in solution.plan.refits if r.path == path]
        refit = LayerRefit(chain=chain.name, block=block, path=path, damping=damping, step=step)
        tensors = _corrected(model, refit, gap)
        return refit, changed(solution, drop=before_it, add=[refit], tensors=tensors)

    def outputs_corrected(
        self, solution: Solution, path: str, dampings: Iterable[float]
    ) -> Iterator[tuple[LayerRefit, Solution]]:
        """Yield corrections of a layer that an output comes from, one for each damping."""
        model, how = self.compressed(solution), self.outputs[path]
        gap = Rows(output_gap(self.model, model, path, self.batches, divergence=how))
        self.samples += 2 * self.held
        gap = gap.merged(self.total, self.weight)
        before = [r for r in solution.plan.refits if r.path == path]
        for damping in dampings:
            refit = LayerRefit(path=path, damping=damping, step=1.0)
            tensors = _corrected(model, refit, gap.others)
            yield refit, changed(solution, drop=before, add=[refit], tensors=tensors)

    def narrowed_again(self, solution: Solution, c: int) -> Solution:
        """Return the solution with the layers that read narrowed channels of a chain and end no branch
        solved anew, towards the original's stream, each behind those before it.
        """
        chain = self.chains[c]
        walk = self.walk(c, solution.plan)
        for b, unit, reader in readers(solution.plan, chain):
            model = self.compressed(solution)
            walk.to(model, b)
            (rows,) = walk.gaps(model, [reader])
            gap = rows.merged(self.total, self.weight).weighted(self.class_weight(c))
            tensors = unit.solved(model, chain.blocks[b], reader, gap)
            solution = changed(solution, tensors=tensors)
        self.samples += walk.passes * self.held * len(chain) / sum(map(len, self.chains))
        return solution

    def statistics(self, solution: Solution, path: str) -> Iterator[Solution]:
        """Yield the solution with re-estimated statistics of the BatchNorms behind the block at `path`,
        one for each step size; yield nothing without BatchNorms.
        """
        model = self.compressed(solution)
        seen = batch_statistics(model, path, self.batches)
        found = {name: each.merged(self.total, self.weight) for name, each in seen.items()}
        self.samples += self.held if found else 0
        before = [r for r in solution.plan.refits if isinstance(r, NormRefit)]
        for step in sorted(self.config.refit_steps) if found else ():
            tensors, refits = {}, []
            for name, spread in found.items():
                refit = NormRefit(path=name, step=step)
                layer = model.get_submodule(name)
                measured = spread.mean, spread.variance
                for key, new in zip(STATISTICS, measured, strict=True):
                    old = getattr(layer, key).to(new)
                    tensors[f"{refit.key}{key}"] = old + step * (new - old)
                refits.append(refit)
            yield changed(solution, drop=before, add=refits, tensors=tensors)


def readers(plan: Plan, chain: Chain) -> list[tuple[int, WidthUnit, Reader]]:
    """Return the layers of a chain that read narrowed channels and end no branch, in order."""
    found = []
    for new in plan.in_order:
        unit = unit_of(new.unit)
        if new.chain == chain.name and isinstance(unit, WidthUnit):
            block = chain.blocks[new.start]
            found += [(new.start, unit, reader) for reader in unit.readers(block)]
    return found


def _of_attention(chain: Chain, site: Site) -> bool:
    width = chain.blocks[site.start].width(site.unit)
    return width is not None and width.attention is not None


def _merges(chain: Chain, plan: Plan) -> list[int]:
    """Return the blocks of a chain that merge positions."""
    return [r.start for r in plan.in_order if r.chain == chain.name and not unit_of(r.unit).fitted]


def _ends(site: Site) -> tuple[float, float]:
    """Return the boundaries between which a site's map is fitted."""
    unit = unit_of(site.unit)
    return unit.source(site.start), unit.target(site.stop)


def _between(chain: Chain, places: Iterable[float]) -> list[Block]:
    """Return the blocks between whose sublayers some of the places lie."""
    return [chain.blocks[b] for b in sorted({int(place) for place in places if place % 1})]


def _folded(model: nn.Module, candidate: Candidate, gap: PairMoments, branch: Branch) -> Candidate:
    """Fold a candidate's map into the layer before its span, whose output lacks `gap`."""
    new = candidate.replacement
    assert new.map.shrink is not None
    refit = FoldRefit(
        chain=new.chain,
        block=new.start - 1,
        path=branch.path,
        damping=new.map.damping,
        step=new.map.shrink,
    )
    return replace(candidate, refit=refit, tensors=_corrected(model, refit, gap))


def _corrected(model: nn.Module, refit: SolvedRefit, gap: PairMoments) -> dict[str, Tensor]:
    """Return the tensors of a kept layer, moved by a share of its correction."""
    layer = model.get_submodule(refit.path)
    own = dict(layer.named_parameters(recurse=False))
    change, shift = correction(gap, refit.damping, bias="bias" in own)
    moved = {"weight": change, "bias": shift}
    return {
        f"{refit.key}{name}": value.detach().to(change) + refit.step * moved[name]
        for name, value in own.items()
    }
