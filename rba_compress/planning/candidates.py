"""Makes moves: fits every map over every span, and every refit of a kept layer, behind a draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.distributed import current
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.memory import out_of_memory
from rba_compress.core.plan import Branch, Plan, Refit, Replacement
from rba_compress.graph.rewrite import STATISTICS, splice_shared
from rba_compress.linalg.maps import correction, fit_map
from rba_compress.linalg.moments import PairMoments, Total
from rba_compress.planning.fit_statistics import Walk, batch_statistics, probed, span_rows
from rba_compress.planning.state import (
    Draft,
    Load,
    Move,
    Site,
    Solution,
    changed,
    keyed,
    network_load,
    replaced_blocks,
    replacement_of,
    skip,
    with_move,
)
from rba_compress.profiling.profiler import Profile


class Fitter:
    """Fits on its samples, with the dense network and the network in work side by side.

    `samples` counts those that were sent through a whole network's worth of blocks. Where several ranks
    work together each holds its share of the samples, and what is fitted is of all.
    """

    def __init__(self, model: nn.Module, profile: Profile, batches: Sequence[Batch]) -> None:
        self.model, self.profile, self.ranks = model, profile, current()
        self.held = int(self.ranks.sum(sum(map(len, batches))))
        """Samples to fit on."""
        self.weight = 1.0 if batches else 0.0
        # A rank that has none goes along with a sample that counts for nothing.
        self.batches = batches or [profile.example.select([0]).to(model)]
        self.config = profile.config
        self.chains = [entry.chain for entry in profile.chains]
        self.samples = 0.0
        self.traces = profile.traces
        self.times: list[list[float]] = []
        """Of each chain, the shares of its blocks in the network's time, where they are needed."""

    @property
    def total(self) -> Total | None:
        """Sums over ranks; None where there is one."""
        return self.ranks.total if self.ranks.count > 1 else None

    def slim(self, solution: Solution) -> nn.Module:
        """The rewritten network, on the original's weights."""
        return splice_shared(self.model, solution.plan, solution.tensors, self.traces)

    def load(self, plan: Plan) -> Load:
        """What the network costs under a plan; the share of latency is an estimate."""
        return network_load(self.profile, plan, times=self.times)

    def skipped(self, site: Site) -> Replacement:
        """What is at a site with the identity for a map."""
        c, start, stop, unit = site
        return skip(self.chains[c], start, stop, unit)

    def class_weight(self, chain: int) -> float:
        """How often a class token's row counts in fits."""
        return self.config.class_weight or float(self.chains[chain].positions)

    def saving(self, draft: Draft, site: Site) -> Load:
        """What the identity at a site would save, at the most."""
        move = Move(site[0], self.skipped(site), {}, Load(0, 0))
        return self.load(draft.solution.plan) - self.load(with_move(draft, move).plan)

    def moves(self, draft: Draft, sites: Sequence[Site]) -> list[Move]:
        """Every map of every site, fitted in one pass for each chain."""
        slim, found = self.slim(draft.solution), []
        for c, chain in enumerate(self.chains):
            wanted = [site for site in sites if site[0] == c]
            if not wanted:
                continue
            taken, folds = replaced_blocks(draft.solution.plan, chain), {}
            if "folded" in self.config.maps:
                folds = {
                    float(b + 1): block.branches[-1]
                    for b, block in enumerate(chain.blocks)
                    if block.branches and b not in taken
                }
            # Between its sublayers a block is seen in a traced copy; its layers are no modules there.
            inner = [s for s in wanted if self.skipped(s).between]
            found += self._chain_moves(slim, c, inner, {})
            found += self._chain_moves(slim, c, [s for s in wanted if s not in inner], folds)
        before = self.load(draft.solution.plan)
        return [replace(m, saving=before - self.load(with_move(draft, m).plan)) for m in found]

    def _chain_moves(
        self, slim: nn.Module, c: int, sites: Sequence[Site], folds: dict[float, Branch]
    ) -> list[Move]:
        """Every map of sites in one chain, fitted in one pass."""
        if not sites:
            return []
        chain, bare, found = self.chains[c], [self.skipped(site) for site in sites], []
        inner = [chain.blocks[b] for b in sorted({r.start for r in bare if r.between})]
        sources = [chain.blocks[b] for b in sorted({r.start for r in bare if r.source % 1})]
        failed: Exception | None = None
        try:
            rows = span_rows(
                probed(self.model, inner, self.traces),
                probed(slim, sources, self.traces),
                chain,
                self.batches,
                spans=[(r.source, r.target) for r in bare],
                folds=folds,
            )
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = error
        if self.ranks.sum(failed is not None):  # on any rank: all go the same way
            return self._in_halves(slim, c, sites, folds, failed)
        rows = {source: seen.merged(self.total, self.weight) for source, seen in rows.items()}
        last = max(r.stop for r in bare) + max(r.start for r in bare)
        self.samples += self.held * last / len(chain)
        # What the sites of one source share.
        maps: dict[tuple[float, bool], PairMoments] = {}
        gaps: dict[float, PairMoments] = {}
        weight = self.class_weight(c)
        for source, seen in rows.items():
            if seen.folds is not None:
                gaps[source] = seen.folds.weighted(weight)
        for site, new in zip(sites, bare, strict=True):
            seen, key = rows[new.source], (new.source, new.reads > 0)
            if key not in maps:
                # In a read-out the map is of the positions that are not read.
                pair = seen.maps.others if new.reads else seen.maps.weighted(weight)
                maps[key] = pair.with_spectrum()
            columns, gap = seen.columns(new.target), gaps.get(new.source)
            found += self._site_moves(
                slim,
                site,
                maps[key].targets(columns),
                None if gap is None else gap.targets(columns),
                folds.get(new.source),
            )
        return found

    def _in_halves(
        self,
        slim: nn.Module,
        c: int,
        sites: Sequence[Site],
        folds: dict[float, Branch],
        failed: Exception | None,
    ) -> list[Move]:
        """As `_chain_moves`, where memory ran out: half of the sources at a time, at a pass more."""
        sources = sorted({self.skipped(site).source for site in sites})
        if len(sources) == 1:
            raise failed or MemoryError("on another rank")
        early = [s for s in sites if self.skipped(s).source in sources[: len(sources) // 2]]
        late = [s for s in sites if s not in early]
        found = [move for part in (early, late) for move in self._chain_moves(slim, c, part, folds)]
        order = {site: k for k, site in enumerate(sites)}
        return sorted(found, key=lambda move: order[move.site])

    def _site_moves(
        self,
        slim: nn.Module,
        site: Site,
        pair: PairMoments,
        lacking: PairMoments | None,
        fold: Branch | None,
    ) -> list[Move]:
        """Every map of one site; `lacking` is of the layer before it, `fold`, where that may move."""
        found = []
        for spec in self.config.specs(self.chains[site[0]].width, site[3]):
            if spec.kind != "folded":
                found.append(self._map(site, spec, pair))
            elif lacking is not None and fold is not None:
                found.append(self._folded(slim, self._map(site, spec, pair), lacking, fold))
        return found

    def _map(self, site: Site, spec: MapSpec, pair: PairMoments) -> Move:
        c, start, stop, unit = site
        fit = fit_map(spec, pair)
        replacement = replacement_of(self.chains[c], start, stop, fit, unit)
        return Move(c, replacement, keyed(replacement, fit), Load(0, 0))

    def _folded(self, slim: nn.Module, move: Move, gap: PairMoments, branch: Branch) -> Move:
        """The move with its map folded into the layer before its span, whose output lacks the gap."""
        new = move.replacement
        assert new.map.shrink is not None
        refit = Refit(
            chain=new.chain,
            block=new.start - 1,
            path=branch.path,
            damping=new.map.damping,
            step=new.map.shrink,
            folded=True,
        )
        return replace(move, refit=refit, tensors=_corrected(slim, refit, gap))

    def walk(self, chain: int) -> Walk:
        """A walk down a chain, for `refits`."""
        return Walk(self.model, self.chains, chain, self.batches)

    def refits(
        self, walk: Walk, solution: Solution, block: int, branch: int
    ) -> Iterator[tuple[Refit, Solution]]:
        """Every correction of the last layer of a kept block's branch, on a walk down its chain; the
        first is of the middle damping and the least step.
        """
        chain, c = walk.chain, walk.index
        before, slim = walk.passes, self.slim(solution)
        walk.to(slim, block)
        branches = chain.blocks[block].branches[: branch + 1]
        rows = walk.gaps(slim, branches).merged(self.total, self.weight)
        gap = rows.weighted(self.class_weight(c))
        self.samples += (walk.passes - before) * self.held * len(chain) / sum(map(len, self.chains))
        path = branches[-1].path
        before_it = [r for r in solution.plan.refits if r.path == path]
        dampings = sorted(self.config.refit_dampings)
        middle = dampings[len(dampings) // 2]
        for damping in sorted(dampings, key=lambda damping: damping != middle):
            for step in sorted(self.config.refit_steps):
                refit = Refit(chain=chain.name, block=block, path=path, damping=damping, step=step)
                tensors = _corrected(slim, refit, gap)
                yield refit, changed(solution, drop=before_it, add=[refit], tensors=tensors)

    def statistics(self, solution: Solution, path: str) -> Iterator[Solution]:
        """The solution with BatchNorms behind the block at `path` that know what reaches them by now,
        for every share of the way there; none where there are no BatchNorms.
        """
        slim = self.slim(solution)
        seen = batch_statistics(slim, path, self.batches)
        found = {name: each.merged(self.total, self.weight) for name, each in seen.items()}
        self.samples += self.held if found else 0
        before = [r for r in solution.plan.refits if r.statistics]
        for step in sorted(self.config.refit_steps) if found else ():
            tensors, refits = {}, []
            for name, spread in found.items():
                refit = Refit(path=name, step=step, statistics=True)
                layer = slim.get_submodule(name)
                measured = spread.mean, spread.variance
                for key, new in zip(STATISTICS, measured, strict=True):
                    old = getattr(layer, key).to(new)
                    tensors[f"{refit.key}{key}"] = old + step * (new - old)
                refits.append(refit)
            yield changed(solution, drop=before, add=refits, tensors=tensors)


def _corrected(slim: nn.Module, refit: Refit, gap: PairMoments) -> dict[str, Tensor]:
    """The tensors of a kept layer, moved by a share of its correction."""
    layer = slim.get_submodule(refit.path)
    own = dict(layer.named_parameters(recurse=False))
    change, shift = correction(gap, refit.damping, bias="bias" in own)
    moved = {"weight": change, "bias": shift}
    return {
        f"{refit.key}{name}": value.detach().to(change) + refit.step * moved[name]
        for name, value in own.items()
    }
