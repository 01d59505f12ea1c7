"""Subcommands of `rba-compress latent`: spaces of networks that were trained apart, on digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import JsonValue

from rba_compress.cli.commands import Say, run
from rba_compress.cli.demo import free_directory
from rba_compress.cli.digits import digits_data
from rba_compress.cli.latent_demos.aggregation_trial import aggregating
from rba_compress.cli.latent_demos.anchor_trial import Pair, recovering
from rba_compress.cli.latent_demos.networks import Data, trained
from rba_compress.cli.latent_demos.pictures import plot_aggregated, plot_anchors, plot_spaces
from rba_compress.cli.latent_demos.stitching_trial import stitching
from rba_compress.cli.options import LatentAggregate, LatentAnchors, LatentStitch
from rba_compress.core.io import written_whole
from rba_compress.core.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]
PICTURE = "picture.png"


@run.register
def _stitch(options: LatentStitch, say: Say) -> JsonValue:
    found = stitching(Data(*digits_data()), options.trial)
    unit = "accuracy" if options.trial.task == "classification" else "R² of the pixels"
    cells = [
        (r.method, r.pairs, f"{r.mean:.3f}", f"{r.spread:.3f}", f"{r.own:.3f}") for r in found.rows
    ]
    head = ("bridge", "pairs", unit, "spread", "own head")
    say("\n".join(text_table(head, cells)))
    return _kept(options.out, plot_spaces(found.spaces), found.rows, say)


@run.register
def _anchors(options: LatentAnchors, say: Say) -> JsonValue:
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
    found = recovering(Pair("perceptron -> convolutional", train, test), options.trial)
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
    return _kept(options.out, picture, found.rows, say)


@run.register
def _aggregate(options: LatentAggregate, say: Say) -> JsonValue:
    found = aggregating(Data(*digits_data()), options.trial)
    cells = [
        (r.setting, r.space, *(f"{value:.3f}" for value in asdict(r.mean).values())) for r in found.rows
    ]
    head = ("tasks share", "space", "k-NN", "linear", "separability", "CKA", "task told")
    say("\n".join(text_table(head, cells)))
    return _kept(options.out, plot_aggregated(found), found.rows, say)


def _kept(out: Path, picture: Figure, rows: Sequence[Any], say: Say) -> JsonValue:
    """Write the picture, print its path, and return the JSON value."""
    out = free_directory(out)
    with written_whole(out.absolute()) as folder:
        picture.savefig(folder / PICTURE, dpi=120)
    say(f"saved to {out / PICTURE}")
    return {"out": str(out), "rows": [asdict(row) for row in rows]}
