"""What a compression costs and what it loses, as a value, as a table, and as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rba_compress.chain_profile import ChainProfile
from rba_compress.measure import Cost, Fidelity, Latency
from rba_compress.plan import Frozen
from rba_compress.similarity import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURED: tuple[Metric, ...] = ("cosine", "cka", "r2")


class Report(Frozen):
    """Cost and fidelity, before and after, on samples that nothing was chosen on."""

    model: str
    plan: str
    samples: str
    """Which samples: the held-out part of the loader, or a test set."""
    dense: Cost
    slim: Cost
    fidelity: Fidelity
    latency: Latency
    forward_passes: float | None = None
    """Of the search, over the whole loader."""
    warnings: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Each measure: its name, before, after, and what is left of it."""
        f, t = self.fidelity, self.latency
        rows = []
        if f.accuracy_dense is not None and f.accuracy_slim is not None:
            share = f.accuracy_slim / f.accuracy_dense if f.accuracy_dense else None
            rows.append(_row("accuracy", f"{f.accuracy_dense:.4f}", f"{f.accuracy_slim:.4f}", share))
        if f.agreement is not None:
            rows.append(_row("agreement", "1", f"{f.agreement:.4f}"))
        rows += [
            _row(_divergence(f), "0", f"{f.divergence:.4f}"),
            _row("output cosine", "1", f"{f.cosine:.4f}"),
            _row("parameters", f"{self.dense.params:,}", f"{self.slim.params:,}",
                 self.slim.params / self.dense.params),
            _row("MACs", f"{self.dense.macs:,}", f"{self.slim.macs:,}",
                 self.slim.macs / self.dense.macs),
            _row(f"latency, batch {t.batch}", f"{t.dense_ms:.2f} ms", f"{t.slim_ms:.2f} ms", t.ratio),
        ]  # fmt: skip
        return rows

    def table(self) -> str:
        """One table for a terminal."""
        f, t = self.fidelity, self.latency
        rows = [("", "before", "after", "after/before"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines += [
            f"{self.model}: {self.plan}",
            f"on {f.samples} samples ({self.samples}); latency on {t.device}, median of {t.pairs} "
            f"pairs, quartiles {t.ratio_low:.3f} to {t.ratio_high:.3f}",
        ]
        if f.divergence_low is not None and f.divergence_high is not None:
            low, high = f"{f.divergence_low:.4f}", f"{f.divergence_high:.4f}"
            lines.append(f"95 % interval of the {_divergence(f)}: {low} to {high}")
        if self.forward_passes is not None:
            lines.append(f"the search took {self.forward_passes:.1f} forward passes over the loader")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _divergence(fidelity: Fidelity) -> str:
    names = {
        "kl": "KL divergence",
        "nse": "squared error",
        "cosine": "1 - cosine",
        "given": "divergence",
    }
    return names[fidelity.kind]


def _row(name: str, before: str, after: str, ratio: float | None = None) -> tuple[str, str, str, str]:
    return name, before, after, "" if ratio is None else f"{ratio:.3f}"


def plot_similarity(profiled: ChainProfile, metrics: tuple[Metric, ...] = PICTURED) -> Figure:
    """Block-to-block similarity heatmaps of one chain, side by side; a matplotlib figure.

    Boundary 0 is the chain's input, boundary b the output of block b - 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(metrics), 4.2), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    titles = {
        "cosine": "cosine",
        "cka": "linear CKA",
        "r2": "R² of the best affine map, row to column",
        "angular": "angular distance / π",
        "redundancy": "-mean squared distance (block redundancy)",
    }
    for axis, metric in zip(axes, metrics, strict=True):
        values = profiled.similarity(metric).numpy()
        image = axis.imshow(values, cmap="viridis", vmax=1 if metric in PICTURED else None)
        axis.set_title(titles[metric], fontsize=10)
        axis.set_xlabel("boundary")
        axis.set_ylabel("boundary")
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.suptitle(f"chain {profiled.chain.name}: {len(profiled.chain)} blocks", fontsize=11)
    return figure
