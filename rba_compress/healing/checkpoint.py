"""Checkpoint of a training: the best state, the current one, and that of the optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rba_compress.core.config import Healing
from rba_compress.core.errors import ArtifactError
from rba_compress.core.io import below, read_tensors, write_tensors
from rba_compress.core.schema import Frozen

FAR = ("rate", "step", "before", "best", "best_step", "since")
"""Fields of a checkpoint's header that record the progress of a training."""


class Training(Frozen):
    """The JSON header of a checkpoint: the identity of a training, and its progress."""

    schema_version: Literal[1] = 1
    original: str
    compressed: str
    data: str
    healing: Healing
    ranks: int
    rate: float = math.nan
    step: int = 0
    before: float = math.nan
    best: float = math.nan
    best_step: int = 0
    since: int = 0
    """Number of epochs without a new best state."""


def write_checkpoint(
    path: Path, header: Training, best: Mapping[str, Tensor], student: nn.Module, optimizer: Any
) -> None:
    """Write the state of a training.

    Raises:
        ArtifactError: the file cannot be written.
    """
    tensors = {f"best.{key}": weight for key, weight in best.items()}
    tensors |= {f"value.{name}": value for name, value in student.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    write_tensors(path, header, {name: t.detach() for name, t in tensors.items()})


def read_checkpoint(
    path: Path, expected: Training, student: nn.Module, optimizer: Any, device: torch.device
) -> tuple[Training, dict[str, Tensor]]:
    """Put a student and its optimiser back; return the header and the best state.

    Raises:
        ArtifactError: the checkpoint is of another training.
    """
    header, tensors = read_tensors(path, Training)
    far = {name: getattr(header, name) for name in FAR}
    if header != expected.model_copy(update=far):
        raise ArtifactError(
            f"{path} is the checkpoint of another training (of other networks, data, settings or "
            "number of processes): name another file, or remove it"
        )
    with torch.no_grad():
        for name, value in student.named_parameters():
            value.copy_(tensors[f"value.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in below("optimizer.", tensors).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return header, {key: t.to(device) for key, t in below("best.", tensors).items()}
