from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rba_compress.moments import Moments
from rba_compress.similarity import METRICS, RowSimilarity, matrix


def streams(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(120, 6, generator=generator, dtype=torch.float64) + 1
    second = first + 0.3 * torch.randn(120, 6, generator=generator, dtype=torch.float64)
    third = second @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return [h.to(dtype) for h in (first, second, third)]


def seen(whole: list[Tensor], window: int | None = None) -> tuple[Moments, RowSimilarity]:
    moments, rows = Moments(3, 6, window=window), RowSimilarity(3)
    for part in (slice(0, 50), slice(50, 120)):
        batch = [h[part] for h in whole]
        moments.update(batch)
        rows.update(batch, [h[::10] for h in batch])
    return moments, rows


def test_cka_equals_a_direct_computation_to_1e_8() -> None:
    whole = streams()
    found = matrix("cka", *seen(whole)).numpy()
    for i in range(3):
        for j in range(3):
            x, y = (whole[k].numpy() - whole[k].numpy().mean(0) for k in (i, j))
            kx, ky = x @ x.T, y @ y.T  # the kernel form, from the stored activations
            direct = (kx * ky).sum() / np.sqrt((kx * kx).sum() * (ky * ky).sum())
            assert found[i, j] == pytest.approx(direct, abs=1e-8)


def test_r2_equals_a_direct_regression() -> None:
    whole = streams()
    found = matrix("r2", *seen(whole)).numpy()
    for i in range(3):
        for j in range(i, 3):
            x, y = (whole[k].numpy() - whole[k].numpy().mean(0) for k in (i, j))
            left = y - x @ np.linalg.lstsq(x, y)[0]
            assert found[i, j] == pytest.approx(1 - (left**2).sum() / (y**2).sum(), abs=1e-9)
    assert np.isnan(found[2, 0])


def test_row_metrics_equal_a_direct_computation() -> None:
    whole = streams()
    moments, rows = seen(whole)
    for i in range(3):
        for j in range(3):
            cosine = torch.cosine_similarity(whole[i], whole[j]).clamp(-1, 1)
            angle = (cosine.arccos() / torch.pi).mean()
            read = [torch.cat([h[:50:10], h[50::10]]) for h in (whole[i], whole[j])]
            distance = (read[0] - read[1]).square().sum(1).mean()
            assert matrix("cosine", moments, rows)[i, j] == pytest.approx(
                float(cosine.mean()), abs=1e-6
            )
            assert matrix("angular", moments, rows)[i, j] == pytest.approx(float(angle), abs=1e-7)
            assert matrix("redundancy", moments, rows)[i, j] == pytest.approx(-float(distance))


def test_cosines_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rows = seen(streams(torch.float32))
    exact = matrix("cosine", *seen(streams()))
    torch.testing.assert_close(rows.cosine / rows.rows, exact, atol=1e-6, rtol=0)


def test_halves_merge_to_the_whole() -> None:
    whole = streams()
    _, rows = seen(whole)
    halves = []
    for part in (slice(0, 50), slice(50, 120)):
        half = RowSimilarity(3)
        half.update([h[part] for h in whole], [h[part][::10] for h in whole])
        halves.append(half)
    merged = halves[0] + halves[1]
    for name in ("cosine", "angle", "distance", "rows", "read_rows"):
        assert torch.allclose(
            torch.as_tensor(getattr(merged, name)), torch.as_tensor(getattr(rows, name))
        )


def test_a_window_leaves_far_pairs_unknown() -> None:
    moments, rows = seen(streams(), window=1)
    for metric in ("cka", "r2"):
        values = matrix(metric, moments, rows)
        assert torch.isnan(values[0, 2])
        assert not torch.isnan(values[0, 1])


def test_every_metric_knows_an_identical_stream() -> None:
    same = [streams()[0]] * 3
    expected = {"redundancy": 0.0, "cosine": 1.0, "angular": 0.0, "cka": 1.0, "r2": 1.0}
    for metric in METRICS:
        upper = matrix(metric, *seen(same)).triu()
        target = torch.full((3, 3), expected[metric], dtype=torch.float64).triu()
        torch.testing.assert_close(upper, target, atol=3e-4, rtol=0)
