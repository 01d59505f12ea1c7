"""Cost of a network: multiply-accumulates of one sample, and parameters.

MACs are counted in products of matrices and convolutions, attention included, on a recorded forward
pass.
"""

from __future__ import annotations

from torch import nn

from rba_compress.core.batch import Batch
from rba_compress.core.cost import Cost
from rba_compress.core.offload import undispatched
from rba_compress.graph.tracer import record


def cost(model: nn.Module, batch: Batch) -> Cost:
    """Return the MACs of one sample and the number of parameters (shared ones count once)."""
    model = undispatched(model)
    parameters = sum(p.numel() for p in model.parameters())
    sample = batch.to(model).select(list(range(min(2, len(batch)))))
    return Cost(macs=record(model, sample).macs, params=parameters)
