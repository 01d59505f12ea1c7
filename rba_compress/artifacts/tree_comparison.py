"""Comparison of the settings of two module trees: all but weights that decides what a network computes.

A setting has the path of its module and a name: the module's class, a plain attribute, the shape of a
parameter, another parameter that is the same tensor, the values of a buffer that no state dict holds.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

Settings = dict[tuple[str, str], Any]
"""Values by the path of a module and the name of a setting."""

CLASS, LENGTH = "class", "length"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_IGNORED = {*nn.Module().__dict__, "hf_device_map"}
# Source of the weights, their precision and their initialisation.
_IGNORED |= {"pretrained_cfg", "default_cfg", "name_or_path", "architectures", "transformers_version"}
_IGNORED |= {"_model_args", "_traits", "pretrained_model_args"}
_IGNORED |= {"dtype", "torch_dtype", "weight_init_mode", "warnings_issued", "model_type"}
# Checkpointing trades time for memory in training; the gradients are the same.
_IGNORED |= {"grad_checkpointing", "gradient_checkpointing"}

_DEPTH = 6
"""Depth to which containers are read."""
_DEEPER = object()
"""A value below that depth, which is equal to every value: an object that several modules hold is read
where it is met first, and that need not be at the same depth in the two trees."""
_TOLD = 4
"""Number of differences that a message names."""


def settings(model: nn.Module) -> Settings:
    """Return every setting of a module tree."""
    values: Settings = {}
    first: dict[int, str] = {}
    saved = model.state_dict(keep_vars=True)
    known: dict[int, Any] = {}
    for path, module in model.named_modules():
        values[path, CLASS] = _name(type(module))
        if isinstance(module, CONTAINERS):
            values[path, LENGTH] = len(module)
        embeds = isinstance(module, nn.Embedding) or hasattr(module, "get_input_embeddings")
        # The padding row depends on a tokenizer that comes after the network.
        ignored = _IGNORED | {"padding_idx"} if embeds else _IGNORED
        for name, value in vars(module).items():
            if name not in ignored and not isinstance(value, RemovableHandle):
                values[path, name] = _plain(value, known)
        dot = "." if path else ""
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in tensors:
            key = f"{path}{dot}{name}"
            if tensor is None or key not in saved:
                values[path, name] = tensor
                continue
            values[path, name] = tuple(tensor.shape)
            if first.setdefault(id(tensor), key) != key:
                values[path, f"tensor of {name}"] = first[id(tensor)]
    return values


def differing(wanted: Settings, given: Settings) -> list[tuple[str, str]]:
    """Return the keys of the settings that differ, or that one side alone has.

    A private attribute that one side alone has does not count: it is a note of a library, such as on
    how weights were loaded.
    """
    both = wanted.keys() & given.keys()
    return [
        (path, name)
        for path, name in dict.fromkeys((*wanted, *given))
        if ((path, name) in both and not _same(wanted[path, name], given[path, name]))
        or ((path, name) not in both and not name.startswith("_"))
    ]


def differences(wanted: Settings, given: Settings, *, but: Collection[tuple[str, str]] = ()) -> str:
    """Return the differences as text, `path.name: value, value when rebuilt`; empty without any.

    Args:
        wanted: settings of the network that is saved.
        given: settings of the network that is built anew.
        but: keys that are not compared.
    """
    told: dict[tuple[str, str, str], str] = {}
    absent = ""
    for path, name in differing(wanted, given):
        if (path, name) in but or (absent and f"{path}.".startswith(absent)):
            continue
        ours, theirs = ((s.get((path, name), "absent")) for s in (wanted, given))
        if name == CLASS and "absent" in (ours, theirs):
            absent = f"{path}."  # its own settings are gone with it
        for inner, a, b in _leaves(name, ours, theirs):
            told.setdefault((inner, a, b), f"{path}.{inner}: {a}, {b} when rebuilt".lstrip("."))
    lines = list(told.values())
    more = f" and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
    return "; ".join(lines[:_TOLD]) + more


def _leaves(name: str, a: Any, b: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the differences of two values as text; for two mappings, entry by entry."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            if not _same(a.get(key), b.get(key)):
                yield from _leaves(f"{name}.{key}", a.get(key), b.get(key))
    else:
        texts = [f"a tensor {tuple(v.shape)}" if isinstance(v, Tensor) else str(v)[:80] for v in (a, b)]
        yield name, texts[0], texts[1]


def _same(a: Any, b: Any) -> bool:
    if a is _DEEPER or b is _DEEPER:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.is_meta or b.is_meta:
            return a.shape == b.shape
        # Rounded as the rest of the network may be, and computed on another device.
        return torch.allclose(a.double().cpu(), b.double().cpu(), rtol=1e-5, equal_nan=True)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return all(_same(a.get(k), b.get(k)) for k in {*a, *b})
    return bool(a == b)


def _plain(value: Any, known: dict[int, Any], depth: int = 0) -> Any:
    """Return a value in a comparable form: containers as tuples and dicts, code by its name."""
    if value is None or isinstance(value, bool | int | str | bytes | complex | Tensor):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}")  # a schedule of rates is computed in float32
    inner = functools.partial(_plain, known=known, depth=depth + 1)
    if depth > _DEPTH:
        return _DEEPER
    if isinstance(value, torch.device | RemovableHandle):
        return _name(type(value))
    if isinstance(value, list | tuple):
        return tuple(map(inner, value))
    if isinstance(value, Mapping):
        return {str(k): inner(v) for k, v in value.items() if str(k) not in _IGNORED}
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(str, value)))
    if isinstance(value, torch.dtype | Enum):
        return str(value)
    if callable(value) or not hasattr(value, "__dict__"):
        return _code(value, inner)
    if id(value) not in known:  # a config that every module holds
        kept = {k: v for k, v in vars(value).items() if not k.startswith("_") or "implementation" in k}
        known[id(value)] = {CLASS: _name(type(value)), **inner(kept)}
    return known[id(value)]


def _code(value: Any, inner: Callable[[Any], Any]) -> Any:
    """Return a function, class or module by its name, with the values that it holds."""
    if isinstance(value, functools.partial):
        return (inner(value.func), inner(value.args), inner(value.keywords))
    if isinstance(value, fx.GraphModule):
        return value.code
    cells = [c for c in getattr(value, "__closure__", None) or () if c != types.CellType()]
    held = tuple(inner(c.cell_contents) for c in cells if c.cell_contents is not value)
    name = _name(value if hasattr(value, "__qualname__") else type(value))
    return (name, held) if held else name


def _name(code: Any) -> str:
    return f"{getattr(code, '__module__', '')}.{code.__qualname__}"
