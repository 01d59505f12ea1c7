"""Figures of spaces as matplotlib objects: nothing is shown, and no global state is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rba_compress.cli.latent_demos.aggregation_trial import SEVERAL, Aggregation
from rba_compress.latent.bootstrapping import Bootstrapped
from rba_compress.linalg.similarity import INVARIANTS, RELATIVE, TITLES, Invariant, relative_similarity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "os^Dvp*X"
"""Markers of the tasks, in turn."""

WRITTEN = 10
"""Largest number of spaces for which the numbers are written into a heatmap."""


def plot_spaces(spaces: Mapping[str, Tensor], metrics: Sequence[Invariant] = INVARIANTS) -> Figure:
    """Plot the relative similarity of every two spaces of the same samples, a heatmap per invariance.

    Raises:
        SpaceError: as `relative_similarity`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.1 * len(metrics), 4.4), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    titles = {invariant: TITLES[name] for name, invariant in RELATIVE.items()}
    for axis, metric in zip(axes, metrics, strict=True):
        values = relative_similarity([*spaces.values()], metric).numpy()
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=1)
        axis.set_title(titles[metric].replace(": ", ":\n"), fontsize=10)
        axis.set_xticks(range(len(spaces)), [*spaces], rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(spaces)), [*spaces], fontsize=8)
        for i, row in enumerate(values if len(spaces) <= WRITTEN else ()):
            for j, value in enumerate(row):
                ink = "black" if value > 0.6 else "white"
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=axes, shrink=0.8, label="correlation of relative spaces")
    return figure


def plot_anchors(found: Bootstrapped, y_space: Tensor, truth: Sequence[int]) -> Figure:
    """Plot the found and the true anchors in y, on the two main axes of its samples.

    Args:
        y_space: the space in which anchors were looked for, (M, d_y).
        truth: the row of y that is each anchor's sample.
    """
    from matplotlib.figure import Figure

    samples = normalize(y_space - found.y_centre, dim=1)
    axes_of = _main_axes(samples)
    flat, vectors = samples @ axes_of, found.y_vectors @ axes_of
    real, nearest = flat[[*truth]], flat[[*found.y_rows]]
    right = [a == b for a, b in zip(truth, found.y_rows, strict=True)]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axis, ends, title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True),
        (vectors, nearest),
        (
            "the vectors that were found",
            f"the samples nearest to them: {sum(right)} of {len(right)} are the true ones",
        ),
        strict=True,
    ):
        axis.scatter(*flat.T, s=5, c="0.8", label="samples")
        for a, b in zip(real.tolist(), ends.tolist(), strict=True):
            axis.plot([a[0], b[0]], [a[1], b[1]], c="0.6", lw=0.6, zorder=1)
        axis.scatter(*real.T, s=16, facecolors="none", edgecolors="C0", label="true anchors")
        axis.scatter(*ends.T, s=12, marker="x", c="C3", lw=0.9, label="found")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def plot_aggregated(
    merged: Aggregation,
    names: Sequence[str] = ("end to end", "naive", "aggregated", "aggregated, task hidden"),
) -> Figure:
    """Plot spaces of the test samples on their two main axes, a row for each setting.

    Each class has a colour and each task a marker; dots are samples that several tasks hold.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(names), 3.6 * len(merged.spaces)), layout="constrained")
    figure.suptitle("colour: class; marker: task, dots where several hold a sample", fontsize=11)
    grid = figure.subplots(len(merged.spaces), len(names), squeeze=False)
    for row, (setting, spaces) in zip(grid, merged.spaces.items(), strict=True):
        owners = merged.owners[setting]
        for axis, name in zip(row, names, strict=True):
            space = spaces[name] - spaces[name].mean(0)
            flat = space @ _main_axes(space)
            for task in owners.unique().tolist():
                own = owners == task
                marker = "." if task == SEVERAL else MARKERS[task % len(MARKERS)]
                style = {"marker": marker, "s": 14, "lw": 0, "alpha": 0.7, "cmap": "tab10"}
                axis.scatter(*flat[own].T, c=merged.labels[own], vmin=0, vmax=9, **style)
            axis.set_title(f"{setting}: {name}", fontsize=10)
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def _main_axes(samples: Tensor) -> Tensor:
    """Return the two axes of largest variance, (d, 2)."""
    axes: Tensor = torch.linalg.svd(samples - samples.mean(0), full_matrices=False).Vh[:2].T
    return axes
