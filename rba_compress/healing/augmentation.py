"""Random augmentation of image tensors, from a generator that is passed in."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rba_compress.core.batch import Batch
from rba_compress.core.config import Augmentation

_SMALLEST = 0.35
"""Least share of an image's area that a crop keeps."""


@dataclass(frozen=True)
class Mixed:
    """Batch of images and, if they were mixed, the partner of each image and its own share."""

    batch: Batch
    order: Tensor | None = None  # (N,)
    share: Tensor | None = None  # (N,)

    def cross_entropy(self, scores: Tensor, smoothing: float) -> Tensor:
        """Return the cross entropy of class scores (N, classes) with the labels, by share: (N,)."""
        assert self.batch.labels is not None
        labels = self.batch.labels.to(scores.device)
        each = functools.partial(F.cross_entropy, scores, reduction="none", label_smoothing=smoothing)
        if self.order is None or self.share is None:
            return each(labels)
        return self.share * each(labels) + (1 - self.share) * each(labels[self.order])


def augmented(batch: Batch, how: Sequence[Augmentation], generator: torch.Generator) -> Mixed:
    """Return a batch of images (N, C, H, W), augmented at random; a batch without images is unchanged.

    A crop has at least `_SMALLEST` of the image's area and a ratio of 3/4 to 4/3, and is resized to the
    image's size (Szegedy et al. 2015). `mix` is mixup (Zhang et al. 2018) and `cut` CutMix (Yun et al.
    2019), both with uniform shares; if both are chosen, one of them is drawn for the batch.
    """
    name, x = next(
        ((n, t) for n, t in batch.tensors.items() if t.ndim == 4 and t.is_floating_point()), ("", None)
    )
    if x is None or not how:
        return Mixed(batch)
    n, _, height, width = x.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(shape or (n,), generator=generator)
        return (low + (high - low) * drawn).to(x)

    if "flip" in how:
        x = torch.where((uniform(0, 1) < 0.5)[:, None, None, None], x.flip(-1), x)
    if "crop" in how:
        area, ratio = uniform(_SMALLEST, 1), uniform(-math.log(4 / 3), math.log(4 / 3)).exp()
        across, down = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        theta = x.new_zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 0, 2] = across, uniform(-1, 1) * (1 - across)
        theta[:, 1, 1], theta[:, 1, 2] = down, uniform(-1, 1) * (1 - down)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    mixes = [m for m in ("mix", "cut") if m in how]
    order = share = None
    if mixes:
        order = torch.randperm(n, generator=generator).to(x.device)
        which = mixes[int(torch.randint(len(mixes), (), generator=generator))]
        if which == "mix":
            share = uniform(0, 1)
            of_own = share[:, None, None, None]
            x = of_own * x + (1 - of_own) * x[order]
        else:
            side = float(uniform(0, 1, 1).sqrt())
            h, w = round(height * side), round(width * side)
            top, left = (
                int(torch.randint(whole - part + 1, (), generator=generator))
                for whole, part in ((height, h), (width, w))
            )
            mask = torch.zeros(height, width, dtype=torch.bool, device=x.device)
            mask[top : top + h, left : left + w] = True
            x = torch.where(mask, x[order], x)
            share = x.new_full((n,), 1 - h * w / (height * width))
    return Mixed(batch.with_tensor(name, x), order, share)
