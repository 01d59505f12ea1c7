"""Claim: the shipped digits ViT is what this script trains, at the accuracy that it prints.

`python -m benchmarks.train_digits` evaluates the shipped weights; with `--train` it first trains
them anew (about ten minutes on two cores) and writes them.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from rba_compress.cli.digits import WEIGHTS, digits_data, digits_model


@dataclass
class Training:
    train: bool = False
    """Train anew and write the weights."""
    epochs: int = 150
    batch: int = 64
    rate: float = 1e-3
    drop_path_rate: float = 0.2
    """Stochastic depth makes neighbouring blocks interchangeable."""
    seed: int = 0


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotations up to 12 degrees, scales of 0.9 to 1.1, shifts up to 0.8 pixel, one draw a sample."""
    n = len(images)
    draw = torch.rand(4, n, generator=generator) * 2 - 1
    angle, scale = draw[0] * math.radians(12), 1 + 0.1 * draw[1]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack(
        [torch.stack([cos, -sin, draw[2] * 0.2], -1), torch.stack([sin, cos, draw[3] * 0.2], -1)], 1
    )  # (N, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def fit(model: nn.Module, images: Tensor, labels: Tensor, how: Training) -> None:
    generator = torch.Generator().manual_seed(how.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=how.rate,
    )
    steps = how.epochs * math.ceil(len(images) / how.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=how.rate, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in range(how.epochs):
        for part in torch.randperm(len(images), generator=generator).split(how.batch):
            logits = model(augment(images[part], generator))
            loss = F.cross_entropy(logits, labels[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(-1) == labels).float().mean())


def main(how: Training) -> None:
    train, test = digits_data()
    start = time.perf_counter()
    if how.train:
        with torch.random.fork_rng():  # initial weights and stochastic depth draw from it
            torch.manual_seed(how.seed)
            model = digits_model(pretrained=False, drop_path_rate=how.drop_path_rate)
            fit(model, *train, how)
        WEIGHTS.parent.mkdir(exist_ok=True)
        save_file(model.state_dict(), WEIGHTS)
    model = digits_model()
    print(
        json.dumps(
            {
                "benchmark": "train_digits",
                "train_accuracy": round(accuracy(model, *train), 4),
                "held_out_accuracy": round(accuracy(model, *test), 4),
                "parameters": sum(p.numel() for p in model.parameters()),
                "bytes": WEIGHTS.stat().st_size,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Training))
