"""Small networks with known structure, and the real digits ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rba_compress import Config, Healing


def seeded(build: type[nn.Module] | object, *args: object, **kwargs: object) -> nn.Module:
    """A module with weights drawn from seed 0, in eval mode, without touching the global state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **kwargs).eval()  # type: ignore[operator]


def images(n: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


LIGHT = Config(maps=("folded",), shrinks=(0.6,), units=("span",), refit=False, keep_features=True)
"""A quick search, for tests of what comes before and behind it; no block is traced."""


BRIEF_SEARCH = Config(
    units=("span", "mlp_free", "read_out_mlp"),
    window=2,
    shrinks=(0.7,),
    refit_dampings=(1.0,),
    refit_steps=(0.5,),
)
"""A search with spans, cut blocks and re-solved layers in a quarter of the time."""


class Block(nn.Module):
    """x + W2 relu(W1 x)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Normed(Block):
    """A block behind a BatchNorm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Chain(nn.Module):
    """A stem, residual blocks, a head: the smallest network of the kind. (N, 4) -> (N, 3)."""

    def __init__(self, depth: int = 4, width: int = 8, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rows(n: int, seed: int = 0) -> Tensor:
    """Inputs of `Chain`."""
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def loader(samples: int = 40, batch: int = 10) -> list[Tensor]:
    return list(rows(samples).split(batch))


BRIEF = Healing(train="all", rate=1e-3, epochs=4, batch=32, augment=())


def to_heal() -> tuple[nn.Module, list[Tensor], nn.Module]:
    """A network, data, and a copy with a block zeroed to be trained, the same in every process."""
    original, compressed = seeded(Chain, 6), seeded(Chain, 6)
    with torch.no_grad():
        compressed.blocks[3].down.weight.zero_()  # type: ignore[union-attr]
    return original, loader(400, 50), compressed
