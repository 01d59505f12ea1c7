"""The transformer made smaller without training: what that saves, and what that costs whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict

from benchmarks.clinical.intervals import Interval
from benchmarks.clinical.prediction import (
    MEASURES,
    OUTCOME,
    FTTransformer,
    Parts,
    Subgroup,
    interval,
    scored,
    subgroups,
)
from rba_compress import Budget, Config, Result, compress, export_onnx, load

SAMPLES = 6000
"""Stays of the choosing part that are calibrated on."""


class Compression(BaseModel):
    """Measures before and after compression."""

    model_config = ConfigDict(frozen=True)

    plan: str
    params: tuple[int, int]
    macs: tuple[int, int]
    latency_ratio: float
    agreement: float
    divergence: float
    auroc: tuple[float, float]
    brier: tuple[float, float]
    auroc_difference: Interval
    brier_difference: Interval
    subgroups: tuple[Subgroup, ...]
    """Slim less original."""
    onnx_bytes: tuple[int, int]
    onnx_latency_ratio: float | None
    onnx_difference: float
    """Largest relative difference of the compressed file from PyTorch."""


def shrink(
    model: FTTransformer, x: np.ndarray, y: np.ndarray, found: Parts, *, kept: float, seed: int = 0
) -> Result:
    """Compress to a share of the multiply-accumulates, on stays that the model was not trained on."""
    rows = np.random.default_rng(seed).permutation(found.choose)[:SAMPLES]
    pairs = (torch.from_numpy(v[rows]).split(250) for v in (x, y))
    loader = list(zip(*pairs, strict=True))
    return compress(model, loader, budget=Budget(macs=kept), config=Config(seed=seed))


def measured(
    result: Result, model: FTTransformer, x: np.ndarray, table: pd.DataFrame, directory: Path
) -> tuple[Compression, np.ndarray]:
    """Save, reload, export and compare with the original on the test part; with the compressed scores.

    Args:
        x: the encoded test part.
        table: the rows behind it.
        directory: where the compressed model goes; `load(directory, original=model)` reads it.
    """
    result.save(directory)
    compressed = load(directory, original=model)
    example = torch.from_numpy(x[:256])
    certificate = export_onnx(compressed, directory / "model.onnx", example, original=model)
    y, patients = table[OUTCOME].to_numpy(), table["patient"].to_numpy()
    original, after = scored(model, x), scored(compressed, x)
    report = result.report
    return Compression(
        plan=str(result.plan),
        params=(report.original.params, report.compressed.params),
        macs=(report.original.macs, report.compressed.macs),
        latency_ratio=report.latency.ratio,
        agreement=report.fidelity.agreement or 0.0,
        divergence=report.fidelity.divergence,
        auroc=tuple(float(MEASURES["auroc"](y, s)) for s in (original, after)),
        brier=tuple(float(MEASURES["brier"](y, s)) for s in (original, after)),
        auroc_difference=interval("auroc", y, after, patients, minus=original),
        brier_difference=interval("brier", y, after, patients, minus=original),
        subgroups=tuple(subgroups(table, after, minus=original)),
        onnx_bytes=(
            certificate.original.bytes if certificate.original else 0,
            certificate.compressed.bytes,
        ),
        onnx_latency_ratio=certificate.latency.ratio if certificate.latency else None,
        onnx_difference=max(parity.max_rel for parity in certificate.parity),
    ), after
