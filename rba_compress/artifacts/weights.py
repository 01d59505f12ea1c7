"""State dicts, read from networks and loaded strictly, in every dtype, with shared tensors once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rba_compress.core.errors import WeightsError
from rba_compress.core.file_formats import other_format


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file strictly into `model`; the model is unchanged if the file does not fit.

    Raises:
        WeightsError: the file is missing, damaged, not safetensors, or does not fit the architecture.
    """
    state = read_state(Path(path))
    require_fit(model.state_dict(), state, str(path), type(model).__name__)
    model.load_state_dict(state)


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        WeightsError: the file is missing, damaged, or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = other_format(path) or error
        raise WeightsError(f"{path} is not a readable safetensors file: {reason}") from error


def require_fit(
    wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, target: str
) -> None:
    """Require that one state dict fits another.

    Raises:
        WeightsError: the names, the shapes or the kinds of numbers of two state dicts differ.
    """
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    found = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    kinds = [
        f"{name} {state[name].dtype} for {wanted[name].dtype}"
        for name in wanted
        if name in state and _kind(state[name]) != _kind(wanted[name])
    ]
    found["of another kind"] = kinds
    flaws = [f"{len(n)} {what} ({', '.join(n[:3])})" for what, n in found.items() if n]
    if flaws:
        raise WeightsError(f"{source} does not fit a {target}: {'; '.join(flaws)}")


def _kind(tensor: Tensor) -> object:
    """Return the kind of a tensor's numbers: one for every floating-point precision, else the dtype."""
    return "floating point" if tensor.is_floating_point() else tensor.dtype


def fill(
    model: nn.Module, state: Mapping[str, Tensor], buffers: Mapping[str, str], source: str
) -> None:
    """Load a whole state dict strictly, in its own dtypes; tied weights stay tied.

    Args:
        model: takes the weights.
        state: one entry for each of the model's own.
        buffers: dtypes of buffers that no state dict holds, as `unsaved_buffers` returns them.
        source: the name of the weights in an error.

    Raises:
        WeightsError: the weights do not fit.
    """
    own = model.state_dict(keep_vars=True)
    require_fit(own, state, source, type(model).__name__)
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.data = buffer.data.to(getattr(torch, buffers[name]))
    for name, tensor in own.items():
        tensor.data = tensor.data.to(state[name].dtype)  # in place, so that tied weights stay tied
    model.load_state_dict(state)


def unique(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous CPU copies of the distinct tensors, and aliases: key -> the stored key."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            kept[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept, tied


def unsaved_buffers(model: nn.Module) -> dict[str, str]:
    """Return the dtypes of the buffers that no state dict holds."""
    saved = model.state_dict()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved
    }
