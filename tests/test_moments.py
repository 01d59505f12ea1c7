from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rba_compress.moments import Moments, PairMoments


def streams(rows: int, boundaries: int = 3, width: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offset = 5 * torch.randn(width, generator=generator, dtype=torch.float64)
    return [
        torch.randn(rows, width, generator=generator, dtype=torch.float64) * (j + 1) + offset
        for j in range(boundaries)
    ]


def folded(*batches: list[Tensor], window: int | None = None) -> Moments:
    moments = Moments(len(batches[0]), batches[0][0].shape[1], window=window)
    for batch in batches:
        moments.update(batch)
    return moments


def assert_same(a: Moments, b: Moments, tolerance: float = 1e-10) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    for x, y in zip(a.comoment, b.comoment, strict=True):
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance * max(1.0, float(x.abs().max()))
        )


def test_every_pair_equals_numpy_on_stored_rows() -> None:
    whole = streams(101)
    moments = folded(*[[h[a:b] for h in whole] for a, b in ((0, 17), (17, 18), (18, 101))])
    assert moments.n == 101
    for i in range(3):
        for j in range(3):
            x, y = whole[i].numpy(), whole[j].numpy()
            expected = (x - x.mean(0)).T @ (y - y.mean(0))
            np.testing.assert_allclose(moments.comoments(i, j), expected, rtol=1e-10, atol=1e-9)
            pair = moments.pair(i, j) if i <= j else None
            if pair is not None:
                np.testing.assert_allclose(pair.raw_xy, x.T @ y, rtol=1e-10, atol=1e-9)
                np.testing.assert_allclose(pair.raw_xx, x.T @ x, rtol=1e-10, atol=1e-9)


def test_pair_moments_of_rows_agree_with_the_stream() -> None:
    whole = streams(50)
    ours, stored = folded(whole).pair(0, 2), PairMoments.from_rows(whole[0], whole[2])
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(ours, name), getattr(stored, name))


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.integers(0, 100))
def test_merge_is_associative_and_commutative_and_equals_one_pass(sizes: list[int], seed: int) -> None:
    whole = streams(sum(sizes), seed=seed)
    ends = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    a, b, c = (folded([h[s:e] for h in whole]) for s, e in itertools.pairwise(ends))
    assert_same((a + b) + c, a + (b + c))
    assert_same(a + b, b + a)
    assert_same((a + b) + c, folded(whole))


def test_an_empty_batch_changes_nothing() -> None:
    whole = streams(10)
    moments = folded(whole)
    moments.update([h[:0] for h in whole])
    assert_same(moments, folded(whole), 0)


def test_a_window_keeps_near_pairs_and_names_the_far() -> None:
    whole = streams(20, boundaries=5)
    full, narrow = folded(whole), folded(whole, window=2)
    torch.testing.assert_close(narrow.comoments(1, 3), full.comoments(1, 3))
    assert sum(c.numel() for c in narrow.comoment) == 12 * 16
    with pytest.raises(ValueError, match="0 and 3 are further apart than the window 2"):
        narrow.pair(0, 3)
    with pytest.raises(ValueError, match=r"\(5, 4, 4\) and \(5, 4, 2\)"):
        full + narrow


def test_weighted_rows_equal_repeated_rows() -> None:
    a, b = streams(7, seed=1), streams(9, seed=2)
    assert_same(folded(a).weighted(3) + folded(b), folded(a, a, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_float32_or_better_whatever_the_streams_and_the_global_setting(
    dtype: torch.dtype,
) -> None:
    whole = [h.to(dtype) for h in streams(4000, width=16)]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 products where the CPU has them
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = folded(whole)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    exact = folded([h.double() for h in whole])
    for x, y in zip(found.comoment, exact.comoment, strict=True):
        assert float((x - y).norm() / y.norm()) < 1e-6


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9")
def test_the_newer_precision_setting_is_kept() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert folded(streams(10)).n == 10
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_a_large_mean_costs_no_precision() -> None:
    whole = [h.float() + 1000 for h in streams(500)]
    found, exact = folded(whole), folded([h.double() for h in whole])
    for x, y in zip(found.comoment, exact.comoment, strict=True):
        assert float((x - y).norm() / y.norm()) < 1e-6


def test_distance_between_boundaries() -> None:
    whole = streams(30)
    expected = (whole[0] - whole[2]).square().sum(1).mean()
    assert folded(whole).mean_square_distance(0, 2) == pytest.approx(float(expected))
