"""Cost of a network: multiply-accumulates of one sample, and parameters.

MACs are counted in products of matrices and convolutions, attention included, on a recorded forward
pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.cost import Cost
from rba_compress.core.inference import evaluating
from rba_compress.core.offload import undispatched
from rba_compress.graph.tracer import record


def cost(model: nn.Module, batch: Batch) -> Cost:
    """Return the MACs of one sample and the number of parameters (shared ones count once)."""
    model = undispatched(model)
    parameters = sum(p.numel() for p in model.parameters())
    sample = batch.to(model).select(list(range(min(2, len(batch)))))
    return Cost(macs=record(model, sample).macs, params=parameters)


def cache_bytes(model: nn.Module, batch: Batch) -> int | None:
    """Return the bytes of keys and values that a language model of transformers holds for each token;
    None for other networks.
    """
    config: Any = getattr(model, "config", None)
    generates: Any = getattr(model, "can_generate", None)
    if generates is None or not generates() or getattr(config, "is_encoder_decoder", False):
        return None
    sample = batch.to(model).select([0])
    ids = sample.args[0] if sample.args else sample.kwargs.get("input_ids")
    if not isinstance(ids, Tensor):
        return None
    with evaluating(model):
        output: Any = replace(sample, kwargs={**sample.kwargs, "use_cache": True}).run(model)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    tensors = [tensor for tensor in held if isinstance(tensor, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) // ids.shape[1] if layers else None
