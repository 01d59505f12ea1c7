"""Tensors of a model's output by name, and those on which a compressed model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from rba_compress.core.errors import ModelError
from rba_compress.core.schema import Path

_CACHES = {"cache", "mems", "states", "state"}
"""Names of key-value caches and recurrent states, beside all names with `past_key_value` in them."""


def key_path(path: tuple[Any, ...]) -> Path:
    """Return a pytree key path as plain strings and integers."""
    keys: list[str | int] = []
    for key in path:
        for name in ("key", "idx", "name"):
            if hasattr(key, name):
                keys.append(getattr(key, name))
                break
    return tuple(keys)


def _keyless(value: Any) -> bool:
    # transformers before version 5 registers its outputs, which are mappings, without their keys.
    known = pytree.SUPPORTED_NODES.get(type(value))
    return isinstance(value, Mapping) and known is not None and known.flatten_with_keys_fn is None


def with_paths(tree: Any) -> Iterator[tuple[Path, Any]]:
    """Yield the leaves of a pytree with their paths."""
    flat, _ = pytree.tree_flatten_with_path(tree, is_leaf=_keyless)
    for keys, leaf in flat:
        below = with_paths({**leaf}) if _keyless(leaf) else [((), leaf)]
        yield from ((key_path(keys) + path, value) for path, value in below)


def output_name(path: Path) -> str:
    """Return the name of an output leaf: its keys joined by dots, `output` for a bare tensor."""
    return ".".join(map(str, path)) or "output"


def is_compared(path: Path) -> bool:
    """Tell whether an output leaf is neither a loss nor part of a cache.

    A legacy cache is a tuple of tuples in a tuple: three integers in a row. Lists of feature maps have
    two at the most.
    """
    names = [str(key) for key in path if isinstance(key, str)]
    if any(n == "loss" or n.endswith(("_loss", "losses")) or n.startswith("loss_") for n in names):
        return False
    if any(n in _CACHES or "past_key_value" in n for n in names):
        return False
    return sum(isinstance(key, int) for key in path) < 3


def float_outputs(output: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors of an output by name, no losses or caches, `logits` first.

    Raises:
        ModelError: the output holds none.
    """
    leaves = {
        path: leaf
        for path, leaf in with_paths(output)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    chosen = {path: leaf for path, leaf in leaves.items() if is_compared(path)} or leaves
    if not chosen:
        raise ModelError(
            f"the model's output, a {type(output).__name__}, holds no floating-point tensor"
        )
    chosen = {path: leaf for path, leaf in chosen.items() if leaf.ndim} or chosen
    order = sorted(chosen, key=lambda path: path[-1:] != ("logits",))
    return {output_name(path): chosen[path] for path in order}


def main_output(output: Any) -> Tensor:
    """Return `logits`, or the first floating-point tensor of an output.

    Raises:
        ModelError: the output holds no floating-point tensor.
    """
    return next(iter(float_outputs(output).values()))


def per_sample(output: Tensor, samples: int) -> Tensor:
    """Return an output with one row a sample: consecutive rows of one sample are joined."""
    if output.ndim and len(output) != samples and samples and len(output) % samples == 0:
        return output.reshape(samples, -1, *output.shape[1:])
    return output
