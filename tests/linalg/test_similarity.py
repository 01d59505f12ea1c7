from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from rba_compress import SpaceError
from rba_compress.core.plan import Block, Chain
from rba_compress.linalg.moments import Moments
from rba_compress.linalg.similarity import (
    INVARIANTS,
    KEPT,
    METRICS,
    RowSimilarity,
    matrix,
    relative_similarity,
)
from rba_compress.profiling.chain_statistics import started


def streams(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(120, 6, generator=generator, dtype=torch.float64) + 1
    second = first + 0.3 * torch.randn(120, 6, generator=generator, dtype=torch.float64)
    third = second @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return [h.to(dtype) for h in (first, second, third)]


def seen(whole: list[Tensor], window: int | None = None) -> tuple[Moments, RowSimilarity]:
    moments, rows = Moments(3, 6, window=window), RowSimilarity(3, 6)
    for part in (slice(0, 50), slice(50, 120)):
        batch = [h[part] for h in whole]
        moments.update(batch)
        rows.update(batch, [h[::10] for h in batch], first=part.start // 10)
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
            left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
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
        half = RowSimilarity(3, 6)
        half.update([h[part] for h in whole], [h[part][::10] for h in whole], first=part.start // 10)
        halves.append(half)
    merged = halves[0] + halves[1]
    for name in ("cosine", "angle", "distance", "rows", "read_rows", "kept", "places"):
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
    for metric in METRICS:
        upper = matrix(metric, *seen(same)).triu()
        alike = 0.0 if metric in ("redundancy", "angular") else 1.0
        target = torch.full((3, 3), alike, dtype=torch.float64).triu()
        torch.testing.assert_close(upper, target, atol=3e-4, rtol=0)


SCIPY = {"cosine": "cosine", "euclidean": "euclidean", "l1": "cityblock", "linf": "chebyshev"}


@pytest.mark.parametrize("metric", INVARIANTS)
@pytest.mark.parametrize("anchors", [None, (3, 0, 7)])
def test_relative_similarity_equals_a_direct_correlation(metric: Any, anchors: Any) -> None:
    spaces = [h[:40] for h in streams()]
    spaces[1] = spaces[1][:, :4]  # of another width, as another network's
    found = relative_similarity(spaces, metric, anchors=anchors)
    rows = list(range(40)) if anchors is None else list(anchors)
    others = np.arange(40)[:, None] != np.array(rows)
    entries = []
    for space in spaces:
        distance = cdist(space.numpy(), space[rows].numpy(), SCIPY[metric])
        entries.append((1 - distance if metric == "cosine" else distance)[others])
    np.testing.assert_allclose(found.numpy(), np.corrcoef(entries), atol=1e-12)


def moves() -> dict[str, Tensor]:
    """A stream, and its images under maps of each class."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(150, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    swap = torch.eye(8, dtype=torch.float64)[torch.randperm(8, generator=generator)]
    swap[:, ::2] *= -1
    return {
        "identity": 3 * first,
        "signed permutation": 2 * first @ swap + 1,
        "orthogonal map": 0.5 * first @ torch.linalg.qr(noise).Q - 2,
        "affine map": first @ noise + 1,
        "none of these": (3 * first @ noise).sin(),
    }


def test_a_profile_says_which_class_of_maps_connects_two_blocks() -> None:
    first = moves()["identity"] / 3
    stream = {"macs": (1, 1), "params": (1, 1), "width": 8, "axis": 1, "ndim": 2, "positions": 1}
    blocks = tuple(Block(path=str(k), type="B") for k in range(2))
    for name, other in moves().items():
        (seen,) = started([Chain(name="c", blocks=blocks, **stream)], None, "cpu")  # type: ignore[arg-type]
        for at in range(0, 150, 50):
            seen.update([h[at : at + 50] for h in (first, other, other)], None, first=at)
        assert seen.connection(0, 1) == name
        assert seen.connection(1, 2) == "identity"


def test_the_first_samples_are_kept_whoever_sees_them() -> None:
    rows = torch.arange(2 * KEPT * 3, dtype=torch.float64).reshape(1, 2 * KEPT, 3)
    whole, parts = RowSimilarity(1, 3), [RowSimilarity(1, 3) for _ in range(2)]
    for at in range(0, 2 * KEPT, 40):
        read = [rows[0, at : at + 40]]
        whole.update(read, read, first=at)
        parts[at // 40 % 2].update(read, read, first=at)
    assert torch.equal(whole.spaces()[0], rows[0, :KEPT])
    assert torch.equal((parts[1] + parts[0]).spaces()[0], rows[0, :KEPT])
    assert len(parts[1].spaces()[0]) < KEPT


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ([torch.ones(4, 2), torch.ones(5, 2)], "space 0 has 4 samples and space 1 has 5"),
        ([torch.ones(4, 2), torch.ones(4, 2, device="meta")], "on cpu and space 1 on meta"),
        ([torch.ones(4, 2), torch.ones(4, 2) / 0], "space 1: 4 of 4 rows hold NaN or infinity"),
        ([torch.ones(4, 2, dtype=torch.int64)], "where \\(samples, channels\\) of floats"),
    ],
)
def test_spaces_of_other_samples_are_refused(spaces: list[Tensor], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        relative_similarity(spaces)
    with pytest.raises(SpaceError, match="metric 'l3' is not known"):
        relative_similarity(spaces, "l3")  # type: ignore[arg-type]
