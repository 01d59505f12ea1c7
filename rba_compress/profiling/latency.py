"""Latency of two networks, as a paired ratio in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from rba_compress.core.batch import Batch
from rba_compress.core.inference import evaluating
from rba_compress.core.loader_form import batch_of
from rba_compress.core.offload import device_of
from rba_compress.core.plan import Chain
from rba_compress.core.schema import Frozen
from rba_compress.graph.activations import observe


class Latency(Frozen):
    """Latency of two networks, timed alternately: original, compressed, original, compressed, ..."""

    former: ClassVar[Mapping[str, str]] = {"dense_ms": "original_ms", "slim_ms": "compressed_ms"}

    original_ms: float
    """Median of the original runs."""
    compressed_ms: float
    ratio: float
    """Median of compressed/original, pair by pair."""
    ratio_low: float
    """Lower quartile of the ratio; `ratio_high` is the upper one."""
    ratio_high: float
    pairs: int
    batch: int
    """Number of samples in a run."""
    device: str


def benchmark(
    original: nn.Module, compressed: nn.Module, example: Any, *, seconds: float = 1.0, pairs: int = 7
) -> Latency:
    """Time two networks in pairs on one batch, after two warm-up runs of each.

    Args:
        original, compressed: on one device, in any mode; they run in eval mode.
        example: one batch in any form that a loader may yield.
        seconds: approximate duration.
        pairs: least number of pairs; at least 2 are timed.
    """
    batch = batch_of(original, example)
    inputs = {id(original): batch.to(original), id(compressed): batch.to(compressed)}
    device = device_of(original)
    clock = _clock(original)

    def once(model: nn.Module) -> float:
        start = clock()
        inputs[id(model)].run(model)
        return clock() - start

    times: list[tuple[float, float]] = []
    fast = torch.backends.mha.get_fastpath_enabled()
    with evaluating(original), evaluating(compressed):
        torch.backends.mha.set_fastpath_enabled(fast)  # timed as they will be run
        for _ in range(2):
            once(original), once(compressed)
        end = time.perf_counter() + seconds
        while len(times) < max(pairs, 2) or time.perf_counter() < end:
            times.append((once(original), once(compressed)))
    ratios = [compressed_time / original_time for original_time, compressed_time in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Latency(
        original_ms=1e3 * statistics.median(t for t, _ in times),
        compressed_ms=1e3 * statistics.median(t for _, t in times),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        pairs=len(times),
        batch=len(batch),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def block_times(
    model: nn.Module, chains: Sequence[Chain], batch: Batch, *, passes: int = 7
) -> list[list[float]]:
    """Return, for each chain, the share of each block in the network's time, the median over passes.

    A block's time is divided by that of its own pass, because a pass that other load slows down is slow
    as a whole. Together the shares are the median of what all blocks take of a pass: medians of single
    blocks, each of another pass, may add up to more.
    """
    moved, clock = batch.to(model), _clock(model)
    shares: list[list[list[float]]] = []
    with evaluating(model):
        for _ in range(passes + 1):
            start = clock()
            reached = observe(model, chains, moved, clock=clock).times
            whole = clock() - start
            shares.append([[(at[b + 1] - at[b]) / whole for b in range(len(at) - 1)] for at in reached])
    shares = shares[1:]  # the first pass is a warm-up
    medians = [
        [statistics.median(seen[c][b] for seen in shares) for b in range(len(chain))]
        for c, chain in enumerate(chains)
    ]
    whole = statistics.median(sum(map(sum, seen)) for seen in shares)
    scale = whole / sum(map(sum, medians))
    return [[share * scale for share in chain] for chain in medians]


def _clock(model: nn.Module) -> Callable[[], float]:
    """Return a clock, in seconds, that waits until the model's device has finished its work."""
    device = device_of(model)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
