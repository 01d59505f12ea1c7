"""Figures as matplotlib objects: nothing is shown, and no global state is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rba_compress.core.plan import boundary_names
from rba_compress.linalg.similarity import TITLES, Metric
from rba_compress.profiling.chain_statistics import ChainProfile
from rba_compress.profiling.fidelity import DIVERGENCES
from rba_compress.reporting.report_data import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED: tuple[Metric, ...] = ("cosine", "cka", "r2")


def plot_similarity(profiled: ChainProfile, metrics: tuple[Metric, ...] = PICTURED) -> Figure:
    """Plot block-to-block similarity heatmaps of one chain, side by side.

    Rows and columns are the chain's boundaries: its input, and the stream behind each block.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(metrics), 4.2), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    names = boundary_names(profiled.chain.paths)
    for axis, metric in zip(axes, metrics, strict=True):
        values = profiled.similarity(metric).numpy()
        image = axis.imshow(values, cmap="viridis", vmax=1 if metric in PICTURED else None)
        axis.set_title(TITLES[metric], fontsize=10)
        _set_ticks(axis, names, names)
        axis.set_xlabel("stream behind block")
        axis.set_ylabel("stream behind block")
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.suptitle(f"chain {profiled.chain.name}: {len(profiled.chain)} blocks", fontsize=11)
    return figure


def plot_span_errors(profiled: ChainProfile) -> Figure:
    """Plot the error of a skip and of the best affine map over every span, side by side.

    The error is the share of the target's variance that is missed, over all rows:
    E ||h_stop - W h_start - b||^2 / E ||h_stop - E h_stop||^2, with W = I, b = 0 on the left. White is
    0; above 1 is worse than the target's mean.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    skipped, fitted = span_errors(profiled)
    names = boundary_names(profiled.chain.paths)
    for axis, values, title in (
        (axes[0], skipped, "skipped"),
        (axes[1], fitted, "the best affine map"),
    ):
        image = axis.imshow(values, cmap="magma_r", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        _set_ticks(axis, ["", *names[1:]], [*names[1:], ""])
        axis.set_xlabel("last block of the span")
        axis.set_ylabel("first block of the span")
    figure.colorbar(image, ax=axes, shrink=0.8, extend="max", label="error, share of variance")
    figure.suptitle(f"chain {profiled.chain.name}: every span", fontsize=11)
    return figure


def _set_ticks(axis: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Label the columns and rows of a heatmap, at most thirteen of each."""
    places = range(0, len(columns), math.ceil(len(columns) / 13))
    axis.set_xticks(places, [columns[k] for k in places], rotation=90)
    axis.set_yticks(places, [rows[k] for k in places])


def span_errors(profiled: ChainProfile) -> tuple[list[list[float]], list[list[float]]]:
    """Return the errors of a skip and of the best affine map, (blocks + 1, blocks + 1), NaN where there
    is no span.
    """
    moments, size = profiled.moments, len(profiled.chain) + 1
    r2 = profiled.similarity("r2")
    skipped, fitted = ([[math.nan] * size for _ in range(size)] for _ in range(2))
    for start in range(size):
        for stop in range(start + 1, min(size, start + moments.window + 1)):
            own, target = (moments.comoments(b, b).trace() for b in (start, stop))
            # Comoments are about the means; a skip also leaves the difference of the means.
            shift = (moments.mean[start] - moments.mean[stop]).square().sum() * moments.n
            apart = own + target - 2 * moments.comoments(start, stop).trace() + shift
            skipped[start][stop] = float(apart / target)
            fitted[start][stop] = 1 - float(r2[start, stop])
    return skipped, fitted


def plot_pareto(front: Sequence[Summary], kind: str = "kl") -> Figure:
    """Plot divergence, and agreement or accuracy, over the kept share of MACs and latency.

    Args:
        front: `result.report.details.front`, or summaries of other networks.
        kind: the kind of divergence, `result.plan.divergence`.
    """
    from matplotlib.figure import Figure

    ours = [row for row in front if row.method == "ours"]
    scores = [n for n in ("agreement", "accuracy") if ours and getattr(ours[-1], n) is not None]
    figure = Figure(figsize=(4.8 * (1 + bool(scores)), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + bool(scores), squeeze=False)[0]
    divergence = [0.0, *(math.nan if row.divergence is None else row.divergence for row in ours)]
    macs, latency = ([1.0, *(getattr(row, n) for row in ours)] for n in ("macs_kept", "latency_ratio"))
    axes[0].plot(macs, divergence, "o-", label="MACs")
    axes[0].plot(latency, divergence, "s:", label="measured latency")
    known = [
        (row.macs_kept, row.divergence, row.divergence_low, row.divergence_high)
        for row in ours
        if row.divergence is not None and row.divergence_low is not None
    ]
    if known:
        x, y, low, high = zip(*known, strict=True)
        bars = [
            [v - a for v, a in zip(y, low, strict=True)],
            [b - v for v, b in zip(y, high, strict=True)],
        ]
        axes[0].errorbar(x, y, bars, fmt="none", ecolor="C0", capsize=3, label="95 % interval")
    for name in scores:
        first = 1.0 if name == "agreement" else ours[0].accuracy_original
        style = "o-" if name == "agreement" else "s:"
        axes[1].plot(macs, [first, *(getattr(row, name) for row in ours)], style, label=name)
        axes[1].set_ylabel("share of samples")
    others = {"paper": ("the paper's map", "X"), "healed": ("healed", "*")}
    for row in front:
        if row.method in others:
            label, marker = others[row.method]
            one: Any = {"marker": marker, "color": "C3", "ms": 9, "ls": "none"}
            axes[0].plot([row.macs_kept], [row.divergence], label=label, **one)
            for name in scores:
                axes[-1].plot([row.macs_kept], [getattr(row, name)], **one)
    axes[0].set_ylabel(DIVERGENCES[kind])
    for axis in axes:
        axis.legend(frameon=False)
        axis.set_xlabel("kept of the original network")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    return figure
