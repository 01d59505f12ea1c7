"""Measure how often `Result.check` calls corrupted images shifted, and how often clean ones.

    python -m benchmarks.shift

A DeiT-tiny whose usual streams are those of the held-out calibration images is given batches of 10 and
of 50 test images, every second of the list, ten times in another order: clean, and corrupted as in
Hendrycks and Dietterich 2019 (noise, blur, contrast, brightness, pixelation) or as a pipeline that went
wrong does it. Writes results/shift.jsonl and results/shift.md.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Plan, profile
from rba_compress.core.batch import as_batch
from rba_compress.profiling.drift import ReferenceStatistics

RESULTS = Path(__file__).with_name("results")
ORDERS = 10
SIZES = (10, 50)


def corruptions(mean: Tensor, std: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return corruptions of normalised images (N, 3, H, W), by name."""
    generator = torch.Generator().manual_seed(0)

    def pixels(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (change((x * std + mean).clamp(0, 1)).clamp(0, 1) - mean) / std

    def noise(scale: float) -> Callable[[Tensor], Tensor]:
        return pixels(lambda p: p + scale * torch.randn(p.shape, generator=generator))

    def contrast(share: float) -> Callable[[Tensor], Tensor]:
        return pixels(lambda p: torch.lerp(p.mean((1, 2, 3), keepdim=True), p, share))

    return {
        "clean": lambda x: x,
        "noise of 0.04": noise(0.04),
        "noise of 0.1": noise(0.1),
        "noise of 0.2": noise(0.2),
        "blurred by 3 pixels": pixels(lambda p: F.avg_pool2d(p, 3, 1, 1)),
        "blurred by 7 pixels": pixels(lambda p: F.avg_pool2d(p, 7, 1, 3)),
        "half the contrast": pixels(contrast(0.5)),
        "a fifth of the contrast": pixels(contrast(0.2)),
        "brighter by 0.3": pixels(lambda p: p + 0.3),
        "pixelated by 4": pixels(lambda p: F.interpolate(F.avg_pool2d(p, 4), scale_factor=4.0)),
        "grey": pixels(lambda p: p.mean(1, keepdim=True).expand_as(p)),
        "inverted": pixels(lambda p: 1 - p),
        "channels swapped": lambda x: x.flip(1),
        "upside down": lambda x: x.flip(2),
        "not normalised": lambda x: x * std + mean,
        "from 0 to 255": lambda x: 255 * (x * std + mean),
    }


def _keep(scores: list[Tensor], _: Any, __: Any, output: Tensor) -> None:
    scores.append(output.argmax(1))


def main() -> None:
    original = deit_tiny()
    known: Any = original.pretrained_cfg
    calibration = imagenet(original, "calibration", 50)
    seen = profile(original, calibration)
    held = (batch for _, _, batch in seen.split(calibration).deal("validation", "test"))
    reference = ReferenceStatistics.of(original, Plan(), seen.chains, held)
    assert reference is not None
    batches = imagenet(original, "test", 50)
    mean, std = (torch.tensor(known[name])[:, None, None] for name in ("mean", "std"))
    found = []
    for name, corrupt in corruptions(mean, std).items():
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        images, labels = corrupt(images[::2]), labels[::2]
        scores: list[Tensor] = []
        hook = original.register_forward_hook(partial(_keep, scores))
        numbers = torch.cat([reference.numbers(original, as_batch(x)) for x in images.split(50)])
        hook.remove()
        right = int((torch.cat(scores) == labels).sum())
        row: dict[str, Any] = {"images": name, "accuracy": right / len(labels)}
        for size in SIZES:
            shifts = [
                reference.shift_of(numbers[part])
                for seed in range(ORDERS)
                for part in torch.randperm(
                    len(images), generator=torch.Generator().manual_seed(seed)
                ).split(size)
            ]
            row[f"called shifted of {size}"] = sum(s.shifted for s in shifts) / len(shifts)
            row[f"distance over threshold of {size}"] = sum(
                s.distance / s.threshold for s in shifts
            ) / len(shifts)
        found.append(row)
        print(row, flush=True)
    (RESULTS / "shift.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    head = ["test images", "accuracy", *(f"{n} images" for n in SIZES), "distance / threshold, 50"]
    lines = [
        f"{len(reference.held)} held-out images, {len(reference.places)} boundaries; "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for row in found:
        shares = [f"{100 * row[f'called shifted of {n}']:.1f} %" for n in SIZES]
        ratio = f"{row[f'distance over threshold of {SIZES[-1]}']:.2f}"
        lines.append(f"| {row['images']} | {row['accuracy']:.3f} | {' | '.join(shares)} | {ratio} |")
    (RESULTS / "shift.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main()
