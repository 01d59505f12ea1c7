"""Forward passes in eval mode, whose failures are raised as `ModelError`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rba_compress.core.batch import Batch
from rba_compress.core.errors import ModelError
from rba_compress.core.loader import named_elsewhere
from rba_compress.core.offload import modules_of


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain module inside DataParallel, DistributedDataParallel or `torch.compile`.

    Raises:
        ModelError: the model is no `nn.Module`, or one whose forward pass cannot be rewritten.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is a ScriptModule, which cannot be rewritten: pass the original")
    if not isinstance(model, nn.Module):  # users pass other types despite the annotation
        kind = type(model).__name__  # type: ignore[unreachable]
        hint = ": pass its .module()" if kind == "ExportedProgram" else ": pass an nn.Module"
        raise ModelError(f"the model is a {kind}{hint}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrap(inner)
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in modules_of(model)):
        raise ModelError(
            "the model was compiled in place by its compile() method: pass a copy that was not, and "
            "compile the compressed one"
        )
    return model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; every module's own mode is restored afterwards.

    The flags are set directly: `eval()` of an exported program raises, and some modules change their
    weights in it. torch's attention fast path is disabled meanwhile: it runs a block as one operation,
    on nested tensors where there is padding, and both hide what happens inside.
    """
    modes = {module: module.training for module in modules_of(model)}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        _set_modes(dict.fromkeys(modes, False))
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        _set_modes(modes)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    """Set only the flags that differ: a module's `__setattr__` is slow, and a search calls it often."""
    for module, mode in modes.items():
        if module.training is not mode:
            module.training = mode


@contextlib.contextmanager
def running(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Raise a `ModelError` where a forward pass in the context fails.

    Errors that are specific already, or that an outer handler names (`named_elsewhere`), pass through.

    Raises:
        ModelError: the forward pass fails.
    """
    try:
        yield
    except Exception as error:
        if named_elsewhere(error):
            raise
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in batch.tensors.items())
        raise ModelError(
            f"the forward pass of {type(model).__name__} fails on a batch of {len(batch)} samples "
            f"({shapes}): {type(error).__name__}: {error}. Pass batches that the model accepts, of any "
            "number of samples"
        ) from error


def ran(model: nn.Module, batch: Batch) -> Any:
    """Return the model's output on a batch; a failure is raised as in `running`."""
    with running(model, batch):
        return batch.run(model)
