"""Rows of results: what a compressed network saves, and what it loses on test samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rba_compress.core.batch import Batch
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity


def quality(model: nn.Module, compressed: nn.Module, test: Sequence[Batch]) -> dict[str, Any]:
    """Return the share of MACs kept, both top-1, the agreement, and the KL divergence with its 95 %
    interval.
    """
    found = fidelity(model, compressed, test, "kl")
    return {
        "macs_kept": round(cost(compressed, test[0]).macs / cost(model, test[0]).macs, 4),
        "top1_dense": found.accuracy_original,
        "top1": found.accuracy_compressed,
        "agreement": found.agreement,
        "kl": float(f"{found.divergence:.4g}"),
        "kl_low": float(f"{found.divergence_low or 0.0:.4g}"),
        "kl_high": float(f"{found.divergence_high or 0.0:.4g}"),
    }
