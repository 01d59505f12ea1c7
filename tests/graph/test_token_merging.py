"""Token merging against an implementation in numpy, written from the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rba_compress.graph.token_merging import (
    attention_of_reads,
    merge,
    merged_sizes,
    most,
    places,
    shares,
    weights,
)


def merged(
    x: np.ndarray, size: np.ndarray, w: np.ndarray, mean: np.ndarray, *, count: int, protected: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge `count` positions of one sample: rows x (T, d); sizes, importance, weights in means (T,)."""
    first = [i for i in range(len(x)) if i % 2 == 0 and i >= protected]
    second = [j for j in range(len(x)) if j % 2 == 1 and j >= protected]
    pairs = []
    for i in first:
        costs = [w[i] * w[j] / (w[i] + w[j]) * float(((x[i] - x[j]) ** 2).sum()) for j in second]
        best = int(np.argmin(costs))
        pairs.append((costs[best], i, second[best]))
    groups = {i: [i] for i in range(len(x))}
    for _, i, j in sorted(pairs)[:count]:
        groups[j] += groups.pop(i)
    rows = [np.average(x[g], axis=0, weights=mean[g]) for _, g in sorted(groups.items())]
    return np.array(rows), np.array([size[g].sum() for _, g in sorted(groups.items())])


@given(st.integers(4, 21), st.integers(0, 3), st.integers(0, 1000), st.booleans(), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_merge_equals_its_definition(
    positions: int, protected: int, seed: int, sized: bool, share: float
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(3, positions, 5, generator=drawn, dtype=torch.float64)
    importance = torch.rand(3, positions, generator=drawn, dtype=torch.float64) + 0.1
    sizes = torch.randint(1, 5, (3, positions, 1), generator=drawn).double() if sized else None
    if sizes is not None:
        sizes[:, :protected] = 1  # what is never merged is one position
    count = round(share * most(positions, protected))
    before = torch.ones(3, positions, 1, dtype=torch.float64) if sizes is None else sizes
    of_mean = torch.rand(3, positions, generator=drawn, dtype=torch.float64) + 0.1
    new = places(x, importance if sized else None, count, protected)
    left = merged_sizes(before, new, count)
    found = merge(x, shares(new, of_mean, count), new, count)
    assert found.shape == (3, positions - count, 5)
    for n in range(3):
        size = np.ones(positions) if sizes is None else sizes[n, :, 0].numpy()
        w = importance[n].numpy() if sized else np.ones(positions)
        rows, wanted = merged(
            x[n].numpy(), size, w, of_mean[n].numpy(), count=count, protected=protected
        )
        np.testing.assert_allclose(found[n], rows, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(left[n, :, 0], wanted)
    np.testing.assert_array_equal(found[:, :protected], x[:, :protected])


def test_the_most_that_can_be_taken_leaves_no_partner_without_a_pair() -> None:
    assert [most(197, 1), most(198, 2), most(4, 0), most(5, 1), most(2, 1), most(2, 2), most(1, 0)] == [
        98,
        98,
        2,
        2,
        0,
        0,
        0,
    ]


def test_ties_go_to_the_first_position() -> None:
    equal = torch.ones(1, 6, 2)
    assert places(equal, None, 1, 0).tolist() == [[0, 0, 1, 2, 3, 4]]
    assert places(equal, None, 2, 1).tolist() == [[0, 1, 1, 2, 1, 3]]
    assert places(equal, None, 0, 0).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("times", [(1, 1, 2, 3, 1), (4, 1, 1, 1, 1)])
def test_attention_over_merged_equals_attention_over_repeated_positions(times: tuple[int, ...]) -> None:
    """The law of proportional attention."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=drawn, dtype=torch.float64) for _ in range(3))
    sizes = torch.tensor(times, dtype=torch.float64).view(1, -1, 1).expand(2, -1, 1)
    repeated = torch.repeat_interleave(torch.arange(5), torch.tensor(times))
    attention = torch.nn.functional.scaled_dot_product_attention
    found = attention(q, k, v, attn_mask=weights(sizes))
    torch.testing.assert_close(found, attention(q, k[:, :, repeated], v[:, :, repeated]))


@pytest.mark.parametrize("heads", [6, 2])
def test_the_attention_of_read_positions(heads: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 4, generator=drawn, dtype=torch.float64)
    k = torch.randn(2, heads, 5, 4, generator=drawn, dtype=torch.float64)
    sizes = torch.randint(1, 4, (2, 5, 1), generator=drawn).double()
    found = attention_of_reads(q, k, sizes, 2, 0.3)
    for n in range(2):
        rows = []
        for head in range(6):
            scores = 0.3 * q[n, head].numpy() @ k[n, head * heads // 6].numpy().T
            mass = np.exp(scores) * sizes[n, :, 0].numpy()
            rows.append((mass / mass.sum(1, keepdims=True))[:2])
        np.testing.assert_allclose(found[n], np.mean(rows, axis=(0, 1)), rtol=1e-12)
    assert torch.equal(
        attention_of_reads(q, k, torch.ones(2, 5, 1).double(), 2, 0.3),
        attention_of_reads(q, k, None, 2, 0.3),
    )
