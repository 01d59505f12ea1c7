"""Small networks that are trained apart, to be stitched, matched and merged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rba_compress.cli.latent_demos.trials import Kind


@dataclass(frozen=True)
class Data:
    """Images (N, C, S, S) in about -1..1, and labels (N,), to train on and to test on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def classes(self) -> int:
        return int(self.train[1].max()) + 1


def encoder(kind: Kind, image: Tensor, width: int) -> nn.Sequential:
    """Build an encoder, images (N, C, S, S) -> (N, width)."""
    channels, size = image.shape[0], image.shape[1]
    if kind == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(image.numel(), 256), nn.GELU(), nn.Linear(256, width)
        )
    side = -(-size // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 24, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(48 * side**2, width),
    )


def head(inputs: int, outputs: int) -> nn.Sequential:
    """Build a head, (N, inputs) -> (N, outputs)."""
    return nn.Sequential(
        nn.LayerNorm(inputs), nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, outputs)
    )


def fit(
    network: nn.Module,
    pairs: tuple[Tensor, Tensor],
    steps: int,
    *,
    seed: int,
    batch: int = 64,
    rate: float = 1e-3,
) -> None:
    """Train on inputs and targets by Adam: cross entropy of classes, squared error of others."""
    x, target = pairs
    loss = nn.functional.mse_loss if target.is_floating_point() else nn.functional.cross_entropy
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        optimizer.zero_grad()
        loss(network(x[rows]), target[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()


def score(output: Tensor, target: Tensor) -> float:
    """Return the accuracy, or R² over all pixels of all samples."""
    if not target.is_floating_point():
        return float((output.argmax(1) == target).double().mean())
    left = (output - target).double().square().sum()
    return float(1 - left / (target - target.mean(0)).double().square().sum())


def trained(
    kind: Kind,
    pairs: tuple[Tensor, Tensor],
    outputs: int,
    *,
    width: int,
    steps: int,
    seed: int,
) -> nn.Sequential:
    """Return an encoder and a head, trained together on inputs (N, C, S, S) and targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = encoder(kind, pairs[0][0], width)
        whole = nn.Sequential(body, head(width, outputs))
    fit(whole, pairs, steps, seed=seed)
    return whole
