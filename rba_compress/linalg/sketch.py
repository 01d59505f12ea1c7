"""Random projection of rows that keeps their inner products, so that few numbers stand for many."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rba_compress.core.config import mixed_seed


class Sketch:
    """Seeded random projection of rows to at most `size` numbers in all; short rows stay as they are.

    Each number of a row is given a random sign and added to one of `width` sums, which all have as many
    members (CountSketch; Charikar, Chen and Farach-Colton 2002). For rows x_r and y_r the sum over r of
    the inner products of their projections has the expectation sum_r <x_r, y_r>, and a variance of at
    most sum_r (||x_r||^2 ||y_r||^2 + <x_r, y_r>^2) / width.

    Args:
        rows: the number of rows that will be projected, which decides the width.
        size: numbers to keep of all rows together.
        seed: seed of the signs and of the order.
    """

    def __init__(self, rows: int, *, size: int = 1 << 16, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed
        self.width = max(1, size // max(rows, 1))
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, *, first: int = 0) -> Tensor:
        """Project rows (n, length) to (n, min(length, width)).

        Args:
            first: index of the first row among all rows; each row has signs of its own.
        """
        n, length = x.shape
        if length <= self.width:
            return x
        if length not in self._drawn:
            drawn = torch.Generator().manual_seed(mixed_seed(self.seed, length))
            signs = torch.randint(0, 2, (length + self.rows,), generator=drawn) * 2 - 1
            self._drawn[length] = signs, torch.randperm(length, generator=drawn)
        signs, order = (t.to(x.device) for t in self._drawn[length])
        # Row r takes the signs from its own place on: a view, no copies of as many signs as numbers.
        own = signs.unfold(0, length, 1)[first : first + n]
        members = -(-length // self.width)
        signed = pad((x * own)[:, order], (0, members * self.width - length))
        return signed.reshape(n, members, self.width).sum(1)
