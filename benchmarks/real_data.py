"""The real networks and images of `RBA_DATA`, shared by the benchmarks and the slow tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from rba_compress.artifact import Architecture, load_weights
from rba_compress.images import ImageFiles

DEIT = Architecture(name="deit_tiny_patch16_224")


def data_root() -> Path:
    """The folder of `RBA_DATA`, by default ../shared/data."""
    return Path(os.environ.get("RBA_DATA", "../shared/data")).resolve()


def deit_tiny() -> nn.Module:
    """The ImageNet DeiT-tiny, dense top-1 .792 on the test split."""
    model = DEIT.build()
    load_weights(model, data_root() / "deit_tiny_patch16_224.safetensors")
    return model


def imagenet(model: nn.Module, split: str, batch_size: int = 25) -> list[tuple[Tensor, Tensor]]:
    """The `calibration` or `test` images, decoded once, as a loader of (images, labels)."""
    root = data_root() / "imagenet_sample"
    files = ImageFiles(root, root / f"{split}.txt", model)
    images, labels = zip(*(files[i] for i in range(len(files))), strict=True)
    return list(
        zip(
            torch.stack(images).split(batch_size),
            torch.stack(labels).split(batch_size),
            strict=True,
        )
    )
