"""Embedded network of the demo, a 12-block vision transformer on scikit-learn's digits, and its data.

The weights are shipped beside this file; `benchmarks/train_digits.py` made them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights" / "digits_vit.safetensors"
ARCHITECTURE = "vit_tiny_patch16_224"
ARGUMENTS = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 12,
    "num_heads": 4,
}

Split = tuple[Tensor, Tensor]


def digits_model(*, pretrained: bool = True, drop_path_rate: float = 0.0) -> nn.Module:
    """Return a timm `VisionTransformer` for (N, 1, 8, 8) digits, in eval mode."""
    model: nn.Module = timm.create_model(ARCHITECTURE, drop_path_rate=drop_path_rate, **ARGUMENTS)
    if pretrained:
        model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def digits_data() -> tuple[Split, Split]:
    """Return the 1,078 training and 719 held-out digits: images (N, 1, 8, 8) in -1..1, labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8.0 - 1.0).astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.4, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return (train_x, train_y), (test_x, test_y)


def batches(split: Split, size: int = 128) -> list[Split]:
    """Return `split` as a loader: a list of (images, labels) batches."""
    return list(zip(split[0].split(size), split[1].split(size), strict=True))
