"""Regression statistics on the partially compressed network, towards the original streams.

The current network and the original run side by side over the fit samples. `g` are the streams of the
current network, `h` those of the original. A map over the span (i, j) is fitted to (g_i, h_j), so that
it compensates for the changes before it. Class tokens have statistics of their own, so that one pass
serves every weight of class tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.call_signature import Signature
from rba_compress.core.inference import evaluating
from rba_compress.core.plan import Block, Branch, Chain, HeadRows
from rba_compress.core.schema import nested
from rba_compress.graph.activations import Observed, attention_mask, observe
from rba_compress.graph.rewrite import MERGE, copy_model, replace_blocks
from rba_compress.graph.token_merging import merge
from rba_compress.linalg.moments import PairMoments, PairSums, Spread, Total
from rba_compress.planning.partial_run import Resumed, Streams
from rba_compress.planning.state import Solution
from rba_compress.units.block_variants import Form, Traces, thin
from rba_compress.units.whole import WHOLE
from rba_compress.units.width import HeadMoments, Reader

ROWS = 32
"""Rows for each feature that moments of features are taken from, where there are more."""
PATCHES = 256
"""The same for patches of images, of which neighbours are much alike."""

Layers = Mapping[str, tuple[Tensor, Tensor]]
"""The input and the output of each layer that was observed."""


class Merge(NamedTuple):
    """Merge of positions, sample by sample."""

    places: Tensor
    """The new place of each position, (N, T)."""
    share: Tensor
    """Its share in the mean there, (N, T, 1)."""


@dataclass(frozen=True)
class Rows:
    """Moments of class tokens and of all other rows."""

    others: PairMoments
    class_tokens: PairMoments | None = None

    def __add__(self, other: Rows) -> Rows:
        if self.class_tokens is None or other.class_tokens is None:
            return Rows(self.others + other.others)
        return Rows(self.others + other.others, self.class_tokens + other.class_tokens)

    def merged(self, total: Total | None, weight: float) -> Rows:
        """Return the moments of all ranks, with those of this rank counted `weight` times."""
        if total is None:
            return self
        tokens = self.class_tokens
        return Rows(
            self.others.weighted(weight).merged(total),
            None if tokens is None else tokens.weighted(weight).merged(total),
        )

    def weighted(self, weight: float) -> PairMoments:
        """Return the moments of all rows, with a class token counted `weight` times."""
        if self.class_tokens is None:
            return self.others
        return self.others + self.class_tokens.weighted(weight)


class RowSums:
    """Sums of `Rows`, batch by batch."""

    def __init__(self) -> None:
        self.others, self.class_tokens = PairSums(), PairSums()

    def add(self, chain: Chain, x: Tensor, y: Tensor, mask: Tensor | None) -> None:
        """Add inputs x and targets y, channels on the chain's axis; widths may differ."""
        y = y.movedim(chain.axis, -1)
        x = x.movedim(chain.axis, -1).reshape(*y.shape[:-1], -1)
        counted = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device)
        if mask is not None and mask.shape == counted.shape:
            counted = mask
        read = sorted({*chain.class_tokens, *range(chain.reads)})
        if read:
            tokens = torch.zeros_like(counted)
            tokens[:, read] = True
            apart = counted & tokens
            self.class_tokens.add(x[apart], y[apart])
            counted = counted & ~tokens
        self.others.add(x[counted], y[counted])

    def rows(self) -> Rows:
        """Return the moments of all rows so far."""
        others, tokens = self.others.moments(), self.class_tokens.moments()
        assert others is not None
        return Rows(others, tokens)


@dataclass(frozen=True)
class SpanRows:
    """Regression statistics of one source i: (g_i, [h_j of every target j]), and those for folding."""

    targets: tuple[float, ...]
    width: int
    maps: Rows
    folds: Rows | None
    """Moments of (features of the last linear layer before the span, [(h_j - g_i) / scale])."""

    def columns(self, target: float) -> slice:
        """Return the columns of a target."""
        index = self.targets.index(target)
        return slice(index * self.width, (index + 1) * self.width)

    def __add__(self, other: SpanRows) -> SpanRows:
        folds = None if self.folds is None or other.folds is None else self.folds + other.folds
        return SpanRows(self.targets, self.width, self.maps + other.maps, folds)

    def merged(self, total: Total | None, weight: float) -> SpanRows:
        """Return the statistics of all ranks, as `Rows.merged`."""
        folds = None if self.folds is None else self.folds.merged(total, weight)
        return SpanRows(self.targets, self.width, self.maps.merged(total, weight), folds)


def scale_of(model: nn.Module, branch: Branch) -> Tensor | float:
    """Return the layer scale of a branch, or 1."""
    if branch.scale is None:
        return 1.0
    parent, _, name = branch.scale.rpartition(".")
    scale: Tensor = getattr(model.get_submodule(parent), name)
    return scale.detach()


def _lacking(model: nn.Module, branch: Branch, layers: Layers, gap: Tensor) -> Tensor:
    """Return the change of a branch layer's output that moves the stream behind it by `gap`.

    Through a LayerNorm the change is of first order: that of its input x is `gap` times the standard
    deviation of x over its weight. The change is zero where a layer scale, or that weight, is zero.
    """
    scale = scale_of(model, branch)
    if branch.norm is not None:
        norm: Any = model.get_submodule(branch.norm)
        given = layers[branch.norm][0]
        gap = gap * (given.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        scale = scale * norm.weight.detach()
    if isinstance(scale, float):
        return gap
    return gap / torch.where(scale.abs() > 1e-6, scale, torch.inf)


def observed(branches: Iterable[Branch | Reader]) -> list[str]:
    """Return the layers whose inputs and outputs are needed to compute what branches lack."""
    named = [
        (each.path, each.norm, each.skip if isinstance(each, Reader) else None) for each in branches
    ]
    return [path for paths in named for path in paths if path is not None]


def probed(
    model: nn.Module,
    blocks: Sequence[Block],
    traces: Traces,
    forms: Mapping[str, Form] = MappingProxyType({}),
) -> nn.Module:
    """Return the same network, in which `<block>.map` sees the stream between a block's sublayers.

    Args:
        forms: the forms of blocks whose stream carries sizes, by path.
    """
    if not blocks:
        return model
    copy = copy_model(model, share=True)
    for block in blocks:
        form = forms.get(block.path, Form())
        thinned = thin(copy, block, nn.Identity(), traces, unit=WHOLE, form=form)
        replace_blocks(copy, [block], thinned)
    return copy


def span_rows(
    original: nn.Module | None,
    compressed: nn.Module,
    chain: Chain,
    batches: Iterable[Batch],
    *,
    spans: Sequence[tuple[float, float]],
    folds: dict[float, Branch],
    merges: Sequence[int],
) -> dict[float, SpanRows]:
    """Return the moments of every pair of source and target, by source, in one pass of both networks.

    Where the compressed network merges positions before a source, the targets are merged as well.

    Args:
        original, compressed: the networks, `probed` where a source or target lies between sublayers;
            None for the original if the other one is equal to it.
        spans: (source, target): boundaries of the chain, or halves between the sublayers of a block.
        folds: the last branch before a source, where that can be refitted.
        merges: the blocks in which the compressed network merges positions.
    """
    targets = {i: tuple(sorted({j for start, j in spans if start == i})) for i, _ in spans}
    found: dict[float, tuple[RowSums, RowSums]] = {i: (RowSums(), RowSums()) for i in targets}
    middles = sorted({place for span in spans for place in span if place % 1})
    paths = {place: f"{chain.blocks[int(place)].path}.map" for place in middles}
    of_compressed = observed(folds[i] for i in targets if i in folds)
    of_compressed += [paths[i] for i in targets if i in paths]
    before = {i: [_merge_at(chain, b) for b in sorted(merges) if b < i] for i in targets}
    of_compressed += before[max(before)]
    last_h = math.ceil(max(j for _, j in spans))
    last_g = last_h if original is None else math.ceil(max(targets))
    of_compressed += [*paths.values()] if original is None else []

    def streams(seen: Observed) -> dict[float, Tensor]:
        between = {i: seen.layers[path][0] for i, path in paths.items() if path in seen.layers}
        return {float(i): h for i, h in seen.streams[0].items()} | between

    with evaluating(original or compressed), evaluating(compressed):
        for moved in batches:
            seen = observe(compressed, [chain], moved, layers=of_compressed, stop=(0, last_g))
            # Targets are the original network's streams, sources the compressed network's.
            h = g = streams(seen)
            if original is not None:
                h = streams(
                    observe(original, [chain], moved, layers=[*paths.values()], stop=(0, last_h))
                )
            mask = attention_mask(moved, chain)
            for i, ends in targets.items():
                own, aims = g[i], [h[j] for j in ends]
                if before[i]:
                    own, left = own[..., : chain.width], own.shape[1]
                    by = reduce(_behind, (Merge(*seen.layers[path]) for path in before[i]), None)
                    aims = [_merged(aim, by, left) for aim in aims]
                maps, gaps = found[i]
                maps.add(chain, own, torch.cat(aims, chain.axis), mask)
                if i in folds:
                    lacking = [_lacking(compressed, folds[i], seen.layers, aim - own) for aim in aims]
                    gap = torch.cat(lacking, chain.axis)
                    gaps.add(chain, seen.layers[folds[i].path][0], gap, mask)
    return {
        i: SpanRows(ends, chain.width, found[i][0].rows(), found[i][1].rows() if i in folds else None)
        for i, ends in targets.items()
    }


class Wanted(NamedTuple):
    """Layers of which moments are wanted, by path in the network."""

    inputs: list[str]
    heads: dict[str, HeadRows]
    """Layers with heads, of whose outputs the moments are wanted."""
    modules: dict[str, Signature]
    """Modules of whose inputs and outputs they are wanted, with the way in which they are called."""


def layer_moments(
    model: nn.Module,
    c: int,
    chains: Sequence[Chain],
    wanted: Wanted,
    batches: Sequence[Batch],
    *,
    weight: float,
) -> tuple[dict[str, Rows], dict[str, HeadMoments]]:
    """Return the moments of inputs and outputs of layers in one chain, in one pass of a network.

    Of a convolution's input the rows are patches. Of more rows than the moments need, some positions
    are left out.

    Args:
        c: index of the chain.
        weight: weight of a class token among the outputs.
    """
    chain, samples = chains[c], sum(map(len, batches))
    rows: dict[str, RowSums] = {}
    heads: dict[str, HeadMoments] = {}
    # A part of a layer is a layer of its own where it is narrowed already.
    sources: dict[str, list[str]] = {}
    for path, part in wanted.heads.items():
        sources.setdefault(_source(model, path, part), []).append(path)
    inputs, modules = set(wanted.inputs), dict(model.named_modules())
    layers = [*dict.fromkeys([*wanted.inputs, *sources, *wanted.modules])]
    last = max(b for b, block in enumerate(chain.blocks) if any(nested(p, block.path) for p in layers))
    classes = sorted({*chain.class_tokens, *range(chain.reads)})
    mask: Tensor | None = None

    def add(path: str, given: Tensor, output: Any) -> None:
        if path in wanted.modules:
            target = wanted.modules[path].stream_out(output)
            sums = rows.setdefault(path, RowSums())
            _add_rows(sums, given, classes, mask, rate=_Rate(samples, ROWS), target=target)
        if path in inputs:
            rate = _Rate(samples, PATCHES if given.ndim == 4 else ROWS)
            features = _features(modules.get(path), given)
            _add_rows(rows.setdefault(path, RowSums()), features, classes, mask, rate=rate)
        for name in sources.get(path, ()):
            part = wanted.heads[name]
            own = output if path == name else output[..., part.rows]
            moments = _head_moments(own, part, classes, weight, mask)
            heads[name] = heads[name] + moments if name in heads else moments

    with evaluating(model):
        for batch in batches:
            mask = attention_mask(batch, chain)
            observe(model, chains, batch, layers=layers, stop=(c, last + 1), on_layer=add)
    return {path: sums.rows() for path, sums in rows.items()}, heads


def _source(model: nn.Module, path: str, part: HeadRows) -> str:
    """Return the path of the layer that computes some heads in a network as it is."""
    if not part.part or isinstance(dict(model.named_modules()).get(path), nn.Linear):
        return path
    return path.removesuffix(part.layer) + part.source.removesuffix(".weight")


class _Rate(NamedTuple):
    """Rows that moments are taken from."""

    samples: int
    """Number of samples of all batches."""
    most: int
    """Rows for each feature."""


def _add_rows(
    sums: RowSums,
    x: Tensor,
    classes: Sequence[int],
    mask: Tensor | None,
    *,
    rate: _Rate,
    target: Tensor | None = None,
) -> None:
    """Add rows (..., features), class tokens apart; of many rows, some that count for all.

    Args:
        target: (..., outputs) of the same rows.
    """
    features, x = x.shape[-1], x if target is None else torch.cat([x, target], -1)
    counted = mask if mask is not None and mask.shape == x.shape[:-1] else None
    if classes and x.ndim == 3:
        tokens = x[:, classes].flatten(0, 1)
        sums.class_tokens.add(tokens[:, :features], tokens[:, features:])
        others = [t for t in range(x.shape[1]) if t not in classes]
        x = x[:, others]
        counted = None if counted is None else counted[:, others]
    rows = x.flatten(0, -2) if counted is None else x[counted]
    step = _step(len(rows) * rate.samples // len(x), features, rate.most)
    rows = rows[::step]
    sums.others.add(rows[:, :features], rows[:, features:], step)


def _step(rows: int, features: int, most: int) -> int:
    """Return the stride over rows of which there are many.

    Args:
        rows: number of rows in all batches.
        most: rows for each feature.
    """
    return max(rows // (most * features), 1)


def _head_moments(
    y: Tensor, part: HeadRows, classes: Sequence[int], weight: float, mask: Tensor | None
) -> HeadMoments:
    """Return the moments of the heads of a layer's output (N, T, rows), or with positions first."""
    y = y.movedim(1, 0) if part.positions_first else y
    y = y.unflatten(-1, (part.heads, -1)).double()  # (N, T, heads, d)
    counts = torch.ones(y.shape[:2], dtype=y.dtype, device=y.device)
    if mask is not None and mask.shape == counts.shape:
        counts = mask.to(counts)
    total = counts.sum(1).clamp_min(1)[:, None, None]
    centred = y - torch.einsum("nt,nthd->nhd", counts, y)[:, None] / total[:, None]
    within = torch.einsum("nt,nthd,nthe->hde", counts, centred, centred)
    number = counts.sum()
    counts[:, [t for t in classes if t < y.shape[1]]] *= weight
    return HeadMoments(torch.einsum("nt,nthd,nthe->hde", counts, y, y), within, number)


def _features(layer: Any, x: Tensor) -> Tensor:
    """Return the rows that a layer multiplies, (..., features); of a convolution its patches."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x
    if prod(layer.kernel_size) == 1 and prod(layer.stride) == 1:
        return x.movedim(1, -1)
    assert isinstance(layer, nn.Conv2d), "hidden_width offers no other"
    padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
    patches = nn.functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return patches.movedim(1, -1)


def batch_statistics(model: nn.Module, path: str, batches: Iterable[Batch]) -> dict[str, Spread]:
    """Return the mean and spread of the input of each BatchNorm behind the module at `path`.

    In the one pass every such layer normalises by its batch, as in training, so that the next BatchNorm
    receives the input that it will have once the statistics are set. Counts, means and variances of the
    batches are merged exactly (Chan et al. 1979).

    Args:
        model: a network with tensors and buffers of its own, which are changed: pass a copy.
    """
    seen: dict[str, Spread] = {}
    reached = False

    def behind(*_: Any) -> None:
        nonlocal reached
        reached = True

    def before(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any) -> None:
            if not reached:
                return
            new = Spread.of(args[0].detach().double().movedim(1, -1).flatten(0, -2))
            layer.running_mean = new.mean.to(layer.running_mean)
            layer.running_var = new.variance.to(layer.running_var)
            seen[name] = seen[name] + new if name in seen else new

        return hook

    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }
    handles = [model.get_submodule(path).register_forward_hook(behind)]
    handles += [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in batches if layers else ():
                reached = False
                batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@dataclass(frozen=True)
class _Pass:
    """Partial run of one model over batches, from cached streams to a boundary."""

    resumed: Resumed
    held: Sequence[Streams]
    chains: Sequence[Chain]
    batches: Sequence[Batch]
    stop: tuple[int, int]
    layers: Sequence[str]

    def __call__(self, k: int) -> Observed:
        """Run batch `k`; to be called within `evaluating(self.resumed.model)`."""
        model = self.resumed.start(self.held[k])
        return observe(model, self.chains, self.batches[k], layers=self.layers, stop=self.stop)


@dataclass(frozen=True)
class _Reached:
    """Streams of both networks at a boundary, by batch."""

    original: list[Streams]
    compressed: list[Streams]
    merges: list[Merge | None]
    """All merges of the compressed network up to there as one; None where it merges nothing."""


def _at(streams: Streams, boundaries: Sequence[int]) -> Streams:
    """Return one stream of each chain, where a run reached it."""
    return [{b: s[b]} if b in s else {} for s, b in zip(streams, boundaries, strict=True)]


def _merge_at(chain: Chain, block: int) -> str:
    return f"{chain.blocks[block].path}.{MERGE}"


def _behind(before: Merge | None, new: Merge) -> Merge:
    """Return two merges, one behind the other, as one."""
    if before is None:
        return new
    share = before.share * new.share.gather(1, before.places[..., None])
    return Merge(new.places.gather(1, before.places), share)


def _merged(x: Tensor, by: Merge | None, left: int) -> Tensor:
    """Return a stream, or a part of it, merged to `left` positions; unchanged without a merge."""
    return x if by is None else merge(x, by.share, by.places, x.shape[1] - left)


class Walk:
    """Walk down a chain with both networks, which caches the samples' streams at one boundary.

    Where the compressed network merges positions, the original's are merged in the same way, sample by
    sample: a mean of original positions is what a position behind the merge stands for.
    """

    def __init__(
        self,
        original: nn.Module,
        chains: Sequence[Chain],
        chain: int,
        batches: Sequence[Batch],
        merges: Sequence[int] = (),
    ) -> None:
        self.original, self.chains, self.index = original, chains[: chain + 1], chain
        self.batches, self._merges = batches, merges
        self.boundary = 0
        self.passes = 0.0
        """Number of passes of all samples through the whole chain, in either network."""
        self._now = _Reached([], [], [None] * len(batches))
        self._ahead: _Reached | None = None
        """Streams behind the block at the boundary, as `gaps` saw them."""
        self.known: tuple[Solution, int, list[Rows]] | None = None
        """The gaps of a block under a solution, of the last one that was asked for."""

    @property
    def chain(self) -> Chain:
        return self.chains[self.index]

    def to(self, compressed: nn.Module, boundary: int, *, unchanged: bool = False) -> None:
        """Advance to a boundary; `compressed` must not have changed before the current one.

        Args:
            unchanged: it has not changed since `gaps` either, whose streams are taken over.
        """
        theirs: list[Streams] = []
        if self._ahead is not None and boundary > self.boundary:
            if unchanged:
                self._now, self.boundary = self._ahead, self.boundary + 1
            elif boundary == self.boundary + 1:
                theirs = self._ahead.original
        self._ahead = None
        if self._now.original and boundary == self.boundary:
            return
        last = [*(len(chain) for chain in self.chains[: self.index]), boundary]
        merges = [_merge_at(self.chain, b) for b in self._merges if self.boundary <= b < boundary]
        original = None if theirs else self._pass(self.original, self._now.original, boundary)
        light = self._pass(compressed, self._now.compressed, boundary, merges)
        reached = _Reached([], [], list(self._now.merges))
        whole = self.original if original is None else original.resumed.model
        with evaluating(whole), evaluating(light.resumed.model):
            for k in range(len(self.batches)):
                seen = light(k)
                own = theirs[k] if original is None else _at(original(k).streams, last)
                reached.original.append(own)
                reached.compressed.append(_at(seen.streams, last))
                for path in merges:
                    reached.merges[k] = _behind(reached.merges[k], Merge(*seen.layers[path]))
        self._now, self.boundary = reached, boundary

    def _pass(
        self, model: nn.Module, held: list[Streams], stop: int, layers: Sequence[str] = ()
    ) -> _Pass:
        """Return a partial run from the cached streams to the boundary `stop`."""
        first = self.boundary if held else 0
        self.passes += (stop - first) / len(self.chain)
        streams = held or [[{} for _ in self.chains]] * len(self.batches)
        copy = copy_model(model, share=True)
        resumed = Resumed(copy, self.chains, self.index, first, streams[0])
        return _Pass(resumed, streams, self.chains, self.batches, (self.index, stop), layers)

    def gaps(self, compressed: nn.Module, branches: Sequence[Branch | Reader]) -> list[Rows]:
        """Return for each branch of the block at the boundary the moments of (features of its last
        layer, what that layer's output lacks), in one pass of the block.

        The gap is the original stream behind the branch minus the current stream there; for a reader of
        channels that ends no branch, that of its own output.
        """
        found = [RowSums() for _ in branches]
        stop, b = self.boundary + 1, self.boundary
        last = [*(len(chain) for chain in self.chains[: self.index]), stop]
        merge_at = [_merge_at(self.chain, b)] if b in self._merges else []
        paths = observed(branches)
        original = self._pass(self.original, self._now.original, stop, paths)
        light = self._pass(compressed, self._now.compressed, stop, [*paths, *merge_at])
        ahead = _Reached([], [], [])
        with evaluating(original.resumed.model), evaluating(light.resumed.model):
            for k, batch in enumerate(self.batches):
                theirs, ours = original(k), light(k)
                new = Merge(*ours.layers[merge_at[0]]) if merge_at else None
                mask = attention_mask(batch, self.chain)
                for index, branch in enumerate(branches):
                    # A merge of this block lies between its sublayers: behind its first branch.
                    if isinstance(branch, Reader):
                        seen = theirs.layers, ours.layers
                        found[index].others.add(*self._local(k, compressed, *seen, branch))
                        continue
                    own = [b for b in branches[: index + 1] if isinstance(b, Branch)]
                    gap = self._gap(k, theirs.layers, ours.layers, own, new)
                    lacking = _lacking(compressed, branch, ours.layers, gap)
                    features = ours.layers[branch.path][0]
                    found[index].add(self.chain, features, lacking, mask)
                ahead.original.append(_at(theirs.streams, last))
                ahead.compressed.append(_at(ours.streams, last))
                before = self._now.merges[k]
                ahead.merges.append(before if new is None else _behind(before, new))
        self._ahead = ahead
        return [sums.rows() for sums in found]

    def _local(
        self, k: int, compressed: nn.Module, theirs: Layers, ours: Layers, reader: Reader
    ) -> tuple[Tensor, Tensor]:
        """Return a reader's input rows, and what its output lacks in each.

        Where a BatchNorm's output is added to a stream, the sum is compared, and the gap divided by the
        norm's factor.
        """
        layer: Any = compressed.get_submodule(reader.path)
        if reader.norm is None:
            gap = theirs[reader.path][1] - ours[reader.path][1]
        else:
            gap = theirs[reader.norm][1] - ours[reader.norm][1]
            if reader.skip is not None:
                gap = gap + theirs[reader.skip][1] - ours[reader.skip][1]
            elif reader.summed:
                held = self._now.original, self._now.compressed
                h, g = (streams[k][self.index][self.boundary] for streams in held)
                gap = gap + h - g
            norm: Any = compressed.get_submodule(reader.norm)
            factor = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
            factor = torch.where(factor.abs() > 1e-6, factor, torch.inf)
            gap = gap / factor.view(1, -1, *[1] * (gap.ndim - 2))
        channels = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1
        features = _features(layer, ours[reader.path][0]).flatten(0, -2)
        y = gap.movedim(channels, -1).flatten(0, -2)
        most = PATCHES if channels == 1 else ROWS
        step = _step(len(features) * len(self.batches), features.shape[1], most)
        return features[::step], y[::step]

    def _gap(
        self,
        k: int,
        theirs: Layers,
        ours: Layers,
        branches: Sequence[Branch],
        new: Merge | None,
    ) -> Tensor:
        """Return the original stream behind the last of some branches minus the current one."""
        held = self._now.original, self._now.compressed
        h, g = (streams[k][self.index][self.boundary] for streams in held)
        merges, last = self._now.merges[k], branches[-1]
        g = g if merges is None else g[..., : self.chain.width]
        if len(branches) == 1:
            new = None
        elif new is not None:
            merges = _behind(merges, new)
        left = ours[last.path][1].shape[1]
        if last.norm is not None:
            return _merged(theirs[last.norm][1], merges, left) - ours[last.norm][1]
        gap = _merged(h, merges, left) - _merged(g, new, left)
        for branch in branches:
            moved = _merged(theirs[branch.path][1].reshape(h.shape), merges, left)
            own = ours[branch.path][1]
            if branch is not last:
                own = _merged(own.reshape(g.shape), new, left)
            gap = gap + (moved - own.reshape(gap.shape)) * scale_of(self.original, branch)
        return gap
