"""Random projections against the exact inner products."""

import numpy as np
import pytest
import torch

from rba_compress.linalg.sketch import Sketch


def test_short_rows_stay_as_they_are() -> None:
    x = torch.randn(5, 8)
    assert Sketch(5, size=40)(x) is x


def test_the_error_is_what_theory_says() -> None:
    """The mean over seeds is the inner product; the variance is near the docstring's upper bound."""
    drawn = torch.Generator().manual_seed(0)
    rows, length, width = 6, 300, 20
    x, y = (torch.randn(rows, length, generator=drawn, dtype=torch.float64) for _ in range(2))
    y = y + x / 2
    exact = float((x * y).sum())
    found = []
    for seed in range(600):
        sketch = Sketch(rows, size=rows * width, seed=seed)
        a, b = sketch(x), sketch(y)
        assert a.shape == (rows, width)
        found.append(float((a * b).sum()))
    bound = float((x.square().sum(1) * y.square().sum(1) + (x * y).sum(1).square()).sum()) / width
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - exact) < 4 * error
    assert 0.75 * bound < np.var(found) < 1.1 * bound


def test_rows_of_later_batches_have_signs_of_their_own() -> None:
    """The projection is the same batch by batch and all at once."""
    x = torch.randn(9, 50, dtype=torch.float64)
    sketch = Sketch(9, size=9 * 7, seed=1)
    parts = [sketch(x[:4]), sketch(x[4:], first=4)]
    assert torch.equal(torch.cat(parts), sketch(x))
    assert not torch.allclose(sketch(x[:1]), sketch(x[:1], first=1))


@pytest.mark.parametrize("length", [7, 49, 50, 51])
def test_the_same_seed_gives_the_same_projection(length: int) -> None:
    x = torch.randn(3, length, dtype=torch.float64)
    assert torch.equal(Sketch(3, size=21, seed=5)(x), Sketch(3, size=21, seed=5)(x))
