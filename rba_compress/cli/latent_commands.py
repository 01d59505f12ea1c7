"""Subcommands of `rba-compress latent`: spaces of networks that were trained apart, on digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from pydantic import JsonValue

from rba_compress.cli.commands import Command, Say
from rba_compress.cli.demo import free_directory
from rba_compress.cli.digits import digits_data
from rba_compress.cli.latent_demos.aggregation_trial import AggregationTrial, aggregating
from rba_compress.cli.latent_demos.anchor_trial import AnchorTrial, Pair, recovering
from rba_compress.cli.latent_demos.networks import Data, trained
from rba_compress.cli.latent_demos.pictures import plot_aggregated, plot_anchors, plot_spaces
from rba_compress.cli.latent_demos.stitching_trial import Trial, stitching
from rba_compress.core.io import written_whole
from rba_compress.core.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "picture.png"


@dataclass(kw_only=True)
class LatentStitch(Command):
    """Stitch the encoders of small networks to each other's heads, through every bridge."""

    out: Path = Path("latent-stitch")
    """Directory to write; a number is appended if it exists."""
    trial: tyro.conf.OmitArgPrefixes[Trial] = field(default_factory=lambda: Trial(seeds=(0, 1)))

    def run(self, say: Say) -> JsonValue:
        found = stitching(Data(*digits_data()), self.trial)
        unit = "accuracy" if self.trial.task == "classification" else "R² of the pixels"
        cells = [
            (r.method, r.pairs, f"{r.mean:.3f}", f"{r.spread:.3f}", f"{r.own:.3f}") for r in found.rows
        ]
        head = ("bridge", "pairs", unit, "spread", "own head")
        say("\n".join(text_table(head, cells)))
        return _kept(self.out, plot_spaces(found.spaces), found.rows, say)


@dataclass(kw_only=True)
class LatentAnchors(Command):
    """Find parallel anchors of a perceptron and a convolutional network from a few known pairs."""

    out: Path = Path("latent-anchors")
    """Directory to write; a number is appended if it exists."""
    trial: tyro.conf.OmitArgPrefixes[AnchorTrial] = field(
        default_factory=lambda: AnchorTrial(repetitions=2, samples=600, anchors=200)
    )

    def run(self, say: Say) -> JsonValue:
        data = Data(*digits_data())
        encoders = [
            trained(kind, data.train, data.classes, width=64, steps=600, seed=0)[0]
            for kind in ("mlp", "conv")
        ]
        with torch.no_grad():
            train, test = (
                (*(encoder(images) for encoder in encoders), labels)
                for images, labels in (data.train, data.test)
            )
        found = recovering(Pair("perceptron -> convolutional", train, test), self.trial)
        cells = [
            (
                r.anchors,
                *(f"{v:.3f}" for v in (r.jaccard, r.mrr, r.cosine, r.recovered, r.accuracy)),
                f"{r.seconds:.1f}",
            )
            for r in found.rows
        ]
        head = ("anchors", "Jaccard", "MRR", "cosine", "of the gap", "accuracy", "seconds")
        picture = plot_anchors(found.found, found.y_train, found.found.x_rows)
        say("\n".join(text_table(head, cells)))
        return _kept(self.out, picture, found.rows, say)


@dataclass(kw_only=True)
class LatentAggregate(Command):
    """Merge the spaces of networks that each learned a part of a task into one."""

    out: Path = Path("latent-aggregate")
    """Directory to write; a number is appended if it exists."""
    trial: tyro.conf.OmitArgPrefixes[AggregationTrial] = field(
        default_factory=lambda: AggregationTrial(seeds=(0,))
    )

    def run(self, say: Say) -> JsonValue:
        found = aggregating(Data(*digits_data()), self.trial)
        cells = [
            (r.setting, r.space, *(f"{value:.3f}" for value in asdict(r.mean).values()))
            for r in found.rows
        ]
        head = ("tasks share", "space", "k-NN", "linear", "separability", "CKA", "task told")
        say("\n".join(text_table(head, cells)))
        return _kept(self.out, plot_aggregated(found), found.rows, say)


def _kept(out: Path, picture: Figure, rows: Sequence[Any], say: Say) -> JsonValue:
    """Write the picture, print its path, and return the JSON value."""
    out = free_directory(out)
    with written_whole(out.absolute()) as folder:
        picture.savefig(folder / PICTURE, dpi=120)
    say(f"saved to {out / PICTURE}")
    return {"out": str(out), "rows": [asdict(row) for row in rows]}
