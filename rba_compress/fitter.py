"""Makes moves: fits every map over every span, and every refit of a kept layer, behind a draft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from rba_compress.batches import Batch
from rba_compress.drafts import (
    Draft,
    Load,
    Move,
    Solution,
    Span,
    changed,
    keyed,
    replaced_blocks,
    replacement_of,
    span_saving,
)
from rba_compress.fitting import Walk, span_rows
from rba_compress.maps import MapSpec, correction, fit_map
from rba_compress.moments import PairMoments
from rba_compress.plan import Branch, Chain, Config, Refit
from rba_compress.surgery import splice_shared


class Fitter:
    """Fits on its samples, with the dense network and the network in work side by side.

    `samples` counts those that were sent through a whole network's worth of blocks.
    """

    def __init__(
        self, model: nn.Module, chains: Sequence[Chain], config: Config, batches: Sequence[Batch]
    ) -> None:
        self.model, self.chains, self.config, self.batches = model, chains, config, batches
        self.samples = 0.0
        self.times: list[list[float]] = []
        """Of each chain, the shares of its blocks in the network's time, where they are needed."""

    @property
    def held(self) -> int:
        """Samples to fit on."""
        return sum(len(batch) for batch in self.batches)

    def slim(self, solution: Solution) -> nn.Module:
        """The rewritten network, on the original's weights."""
        return splice_shared(self.model, solution.plan, solution.tensors)

    def class_weight(self, chain: int) -> float:
        """How often a class token's row counts in fits."""
        return self.config.class_weight or float(self.chains[chain].positions)

    def saving(self, span: Span, spec: MapSpec) -> Load:
        """What the network no longer costs with a span replaced."""
        c, start, stop = span
        times = self.times[c] if self.times else ()
        return span_saving(self.chains[c], start, stop, spec, times=times)

    def moves(self, draft: Draft, spans: Sequence[Span]) -> list[Move]:
        """Every map over every span, fitted in one pass for each chain."""
        slim, found = self.slim(draft.solution), []
        for c, chain in enumerate(self.chains):
            wanted = [(start, stop) for k, start, stop in spans if k == c]
            if not wanted:
                continue
            taken, folds = replaced_blocks(draft.solution.plan, chain), {}
            if "folded" in self.config.maps:
                folds = {
                    b + 1: block.branches[-1]
                    for b, block in enumerate(chain.blocks)
                    if block.branches and b not in taken
                }
            rows = span_rows(self.model, slim, chain, self.batches, spans=wanted, folds=folds)
            last = max(stop for _, stop in wanted) + max(start for start, _ in wanted)
            self.samples += self.held * last / len(chain)
            for start, stop in wanted:
                of_start, columns, weight = rows[start], rows[start].columns(stop), self.class_weight(c)
                pair = of_start.maps.weighted(weight).targets(columns)
                lacking = None
                if of_start.folds is not None:
                    lacking = of_start.folds.weighted(weight).targets(columns)
                for spec in self.config.specs(chain.width):
                    if spec.kind != "folded":
                        found.append(self._map((c, start, stop), spec, pair))
                    elif lacking is not None:
                        mapped = self._map((c, start, stop), spec, pair)
                        found.append(self._folded(slim, mapped, lacking, folds[start]))
        return found

    def _map(self, span: Span, spec: MapSpec, pair: PairMoments) -> Move:
        c, start, stop = span
        fit = fit_map(spec, pair)
        replacement = replacement_of(self.chains[c], start, stop, fit)
        return Move(c, replacement, keyed(replacement, fit), self.saving(span, spec))

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
        before, slim = walk.samples, self.slim(solution)
        walk.to(slim, block)
        branches = chain.blocks[block].branches[: branch + 1]
        gap = walk.gaps(slim, branches).weighted(self.class_weight(c))
        self.samples += (walk.samples - before) * len(chain) / sum(map(len, self.chains))
        path = branches[-1].path
        before_it = [r for r in solution.plan.refits if r.path == path]
        dampings = sorted(self.config.refit_dampings)
        middle = dampings[len(dampings) // 2]
        for damping in sorted(dampings, key=lambda damping: damping != middle):
            for step in sorted(self.config.refit_steps):
                refit = Refit(chain=chain.name, block=block, path=path, damping=damping, step=step)
                tensors = _corrected(slim, refit, gap)
                yield refit, changed(solution, drop=before_it, add=[refit], tensors=tensors)


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
