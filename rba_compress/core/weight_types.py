"""Refusal of weights that are not plain tensors: quantised, packed or sharded ones.

Moments, fits and fingerprints read weights as numbers of an ordinary dtype. A tensor of a class of its
own (torchao, DTensor) or a packed parameter (bitsandbytes, GGUF) would fail in the middle of a run, or
have its codes read as values.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from rba_compress.core.errors import ModelError
from rba_compress.core.offload import Offloaded

_PACKING = {"bitsandbytes", "hqq", "gptqmodel", "auto_gptq", "awq", "aqlm"}
"""Packages whose modules hold codes in plain tensors."""
_REMEDY = (
    "compress and save the network first, and quantise or shard what comes out (docs/ecosystem.md)"
)


def require_plain_weights(model: nn.Module) -> None:
    """Check that all weights of a model are plain tensors.

    Raises:
        ModelError: a parameter or buffer is no plain tensor, or a module holds packed weights.
    """
    for name, kind in _others(model):
        raise ModelError(f"{name} is a {kind}, which cannot be read as a plain tensor: {_REMEDY}")


def of_peft(module: nn.Module) -> bool:
    """Return True if a module is of PEFT: a layer with adapters, or a network around them."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def _others(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names and kinds of weights that are not plain tensors."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind, dtype = type(tensor), str(tensor.dtype).removeprefix("torch.")
        own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
        derived = kind not in (Tensor, nn.Parameter, nn.Buffer)
        packed = derived and isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()
        if not isinstance(tensor, Offloaded) and (own or (packed and not tensor.is_complex())):
            yield name, f"{kind.__module__.partition('.')[0]} {kind.__name__}"
        elif tensor.is_quantized or dtype.startswith(("float8", "float4")):
            yield name, f"tensor of {dtype}"
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] in _PACKING:
            yield path or "the model", f"{type(module).__name__} with packed weights"
