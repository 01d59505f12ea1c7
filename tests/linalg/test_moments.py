from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rba_compress.core.map_spec import MapSpec
from rba_compress.core.memory import device_bytes, out_of_memory
from rba_compress.linalg.maps import fit_map
from rba_compress.linalg.moments import (
    Moments,
    PairMoments,
    PairSums,
    Spread,
    full_precision,
    moment_bytes,
)


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


def test_all_sums_are_on_the_device_that_is_asked_for() -> None:
    state = Moments(3, 4, device="meta").state()
    assert {tensor.device.type for name, tensor in state.items() if name != "n"} == {"meta"}


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


def merged(parts: list[Any]) -> list[Any]:
    """Return the moments of several processes, here threads, after a merge of each with the others."""
    barrier, given = threading.Barrier(len(parts), timeout=5), {}

    def of(k: int) -> Any:
        def total(own: Tensor) -> Tensor:
            given[k] = own
            barrier.wait()
            whole = torch.stack([given[other] for other in range(len(parts))]).sum(0)
            barrier.wait()
            return whole

        return parts[k].merged(total)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(of, range(len(parts))))


@pytest.mark.parametrize("ends", [(0, 30, 31, 80), (0, 1, 1, 1), (0, 5, 5, 9)])
@pytest.mark.parametrize("window", [None, 1])
def test_every_process_gets_the_moments_of_all_rows(ends: tuple[int, ...], window: int | None) -> None:
    whole = streams(ends[-1], boundaries=4)
    parts = [folded([h[a:b] for h in whole], window=window) for a, b in itertools.pairwise(ends)]
    expected = folded(whole, window=window)
    for found in merged(parts):
        assert_same(found, expected)
    assert_same((parts[0] + parts[1]) + parts[2], expected)
    pairs = merged([part.pair(1, 2) for part in parts])
    for name in ("n", "mean_x", "mean_y", "xx", "xy", "yy"):
        for pair in pairs:
            torch.testing.assert_close(getattr(pair, name), getattr(expected.pair(1, 2), name))


def test_moments_of_no_rows_are_zero_and_add_nothing() -> None:
    whole, none = streams(9), Moments(3, 4)
    for found in (none + none, *merged([none, none])):
        assert found.n == 0
        assert not found.mean.any()
        assert not any(c.any() for c in found.comoment)
    some, empty = folded(whole).pair(0, 1), none.pair(0, 1)
    for found in (some + empty, empty + some):
        assert found.n == 9
        assert torch.equal(found.xy, some.xy)
        assert torch.equal(found.mean_y, some.mean_y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pairs_of_rows_far_from_zero_equal_numpy_in_double(dtype: torch.dtype) -> None:
    whole = streams(500)
    x, y = (whole[0] + 300).to(dtype), (whole[2][:, :3] - 200).to(dtype)
    found, a, b = PairMoments.from_rows(x, y), x.double().numpy(), y.double().numpy()
    np.testing.assert_allclose(found.mean_x, a.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.mean_y, b.mean(0), rtol=1e-12)
    a, b = a - a.mean(0), b - b.mean(0)
    for name, exact in (("xx", a.T @ a), ("xy", a.T @ b), ("yy", np.square(b).sum(0))):
        assert getattr(found, name).dtype == torch.float64
        # Of what is summed in float32: how much of it cancels is the data's affair.
        scale = np.prod([np.linalg.norm({"x": a, "y": b}[rows]) for rows in name])
        assert np.linalg.norm(getattr(found, name).numpy() - exact) < 2.5e-6 * scale


@pytest.mark.parametrize(("x_by", "y_by"), [(-100, -100), (100, 100), (-100, 100), (0, 100), (60, 0)])
@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1), (torch.float64, 4)])
def test_a_power_of_two_on_the_rows_is_its_square_on_the_moments(
    x_by: int, y_by: int, dtype: torch.dtype, times: int
) -> None:
    """Moments are equal to the bit, with squares far outside the range that needs no scaling."""
    x_by, y_by = x_by * times, y_by * times
    plain = [h.to(dtype) for h in streams(40)[:2]]
    scaled = [plain[0] * 2.0**x_by, plain[1] * 2.0**y_by]
    for make in (lambda h: PairMoments.from_rows(*h), lambda h: folded(h).pair(0, 1)):
        before, after = make(plain), make(scaled)
        assert torch.equal(after.mean_y, before.mean_y * 2.0**y_by)
        assert torch.equal(after.xx, before.xx * 2.0 ** (2 * x_by))
        assert torch.equal(after.xy, before.xy * 2.0 ** (x_by + y_by))
        assert torch.equal(after.yy, before.yy * 2.0 ** (2 * y_by))


def test_denormal_rows_count_too() -> None:
    """Whole multiples of the smallest positive number of float32."""
    units = (100 * torch.stack(streams(50)[:2])).round()
    tiny = [(h.double() * 2.0**-149).float() for h in units]
    a, b = units.numpy() - units.numpy().mean(1, keepdims=True)
    for found in (PairMoments.from_rows(*tiny), folded(tiny).pair(0, 1)):
        np.testing.assert_allclose(found.xx * 2.0**298, a.T @ a, rtol=1e-5, atol=1e-2)
        np.testing.assert_allclose(found.xy * 2.0**298, a.T @ b, rtol=1e-5, atol=1e-2)


def test_a_weight_is_how_often_a_row_counts() -> None:
    first, second = streams(7, seed=1), streams(9, seed=2)
    often = torch.arange(7)
    repeated = [h.repeat_interleave(often, 0) for h in first]
    found = Moments(3, 4)
    found.update(first, often)
    found.update(second)
    assert_same(found, folded(repeated, second))
    single = Moments(3, 4)
    single.update([h.float() for h in second], torch.full((9,), 2))
    assert_same(single, folded([h.float() for h in second]).weighted(2), 1e-6)
    assert single.comoment[0].dtype == torch.float64


def test_rows_are_held_until_there_are_four_a_channel() -> None:
    moments, whole = Moments(3, 4), streams(16)
    moments.update([h[:8] for h in whole])
    moments.update([h[8:15] for h in whole])
    assert moments.state()["held"].shape == (3, 15, 4)
    assert not moments.state()["mean"].any()
    moments.update([h[15:] for h in whole])
    assert "held" not in moments.state()
    assert float(moments.state()["n"]) == 16


def test_another_process_goes_on_from_a_state_to_the_bit() -> None:
    first, second, third = streams(20, seed=1), streams(5, seed=2), streams(6, seed=3)
    one, other = Moments(3, 4, window=1), Moments(3, 4, window=1)
    one.update(first)
    one.update(second, torch.arange(1, 6))
    other.update(third)
    other.pair(0, 1, spectrum=True)
    other.restore({name: tensor.clone() for name, tensor in one.state().items()})
    for moments in (one, other):
        moments.update(third)
        assert moments.n == 20 + 15 + 6
    assert_same(one, other, 0)
    assert torch.equal(
        other.pair(0, 1, spectrum=True).spectrum, torch.linalg.eigvalsh(one.comoments(0, 0))
    )
    other.restore(Moments(3, 4, window=1).state())
    assert other.n == 0


def test_a_state_of_others_is_refused() -> None:
    moments = folded(streams(20))
    for other in (Moments(3, 5), Moments(4, 4), Moments(3, 4, window=1)):
        with pytest.raises(ValueError, match=r"has shape \("):
            moments.restore(other.state())
    with pytest.raises(KeyError):
        moments.restore({})
    assert moments.n == 20


def test_a_spectrum_is_that_of_the_rows_so_far() -> None:
    first, second = streams(20, seed=1), streams(20, seed=2)
    moments = folded(first)
    assert moments.pair(0, 1).spectrum is None
    before = moments.pair(0, 1, spectrum=True)
    np.testing.assert_allclose(before.spectrum, np.linalg.eigvalsh(before.xx.numpy()), rtol=1e-9)
    assert moments.pair(0, 2).spectrum is before.spectrum
    moments.update(second)
    after = moments.pair(0, 1, spectrum=True)
    np.testing.assert_allclose(after.spectrum, np.linalg.eigvalsh(after.xx.numpy()), rtol=1e-9)
    assert moments.weighted(2).pair(0, 1).spectrum is None
    assert torch.equal(moments.pair(0, 2).with_spectrum().spectrum, after.spectrum)


def test_a_fit_of_weighted_moments_is_that_of_rows_that_come_as_often() -> None:
    x, y = streams(20)[:2]
    once, thrice = PairMoments.from_rows(x, y), PairMoments.from_rows(x.repeat(3, 1), y.repeat(3, 1))
    for pair in (once, once.with_spectrum()):
        for spec in (MapSpec(kind="linear", damping=1.0), MapSpec(kind="affine", damping=1.0)):
            found, expected = (fit_map(spec, p).diagnostics for p in (pair.weighted(3), thrice))
            assert found.model_dump() == pytest.approx(expected.model_dump(), rel=1e-9)


def test_some_targets_are_columns_of_all() -> None:
    x, y = streams(20)[:2]
    some, expected = (
        PairMoments.from_rows(x, y).targets(slice(1, 3)),
        PairMoments.from_rows(x, y[:, 1:3]),
    )
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(some, name), getattr(expected, name))


@pytest.mark.parametrize(("boundaries", "window"), [(5, None), (5, 2), (3, 9), (4, 0)])
def test_the_memory_is_that_of_what_is_held(boundaries: int, window: int | None) -> None:
    width, moments = 6, Moments(boundaries, 6, window=window)
    folding = torch.empty(boundaries, 4 * width, width)
    product = torch.empty(max(len(c) for c in moments.comoment), width, width)
    sums = sum(c.nbytes for c in moments.comoment)
    assert moment_bytes(boundaries, width, window) == sums + 2 * folding.nbytes + product.nbytes


def test_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {0: SimpleNamespace(total_memory=5e9), 1: SimpleNamespace(total_memory=7e9)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: drawn[device.index])
    assert device_bytes(torch.device("cuda", 1)) == 7_000_000_000
    said = Path("/proc/meminfo")
    if not said.exists():
        pytest.skip("not Linux")
    total = int(said.read_text().split()[1]) * 1024
    assert device_bytes(torch.device("cpu")) == pytest.approx(total, rel=0.05)


def test_what_says_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as ran_out:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (ran_out.value, MemoryError(), torch.OutOfMemoryError()):
        assert out_of_memory(error)
    for error in (RuntimeError("of another kind"), ValueError("allocate memory")):
        assert not out_of_memory(error)


def test_networks_can_be_traced_while_products_are_precise() -> None:
    """A trace asks whether cuDNN may use TF32, and fails where torch cannot tell."""
    with full_precision(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 in (True, False)
        torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))


@pytest.mark.parametrize("newer", [True, False])
def test_the_callers_precision_is_back_after_an_error(
    newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = [SimpleNamespace(fp32_precision=kind) for kind in ("tf32", "bf16", "none")]
    cuda, mkldnn, inner = backends if newer else [SimpleNamespace() for _ in range(3)]
    mkldnn.matmul = inner
    monkeypatch.setattr(torch.backends.cuda, "matmul", cuda)
    monkeypatch.setattr(torch.backends, "mkldnn", mkldnn)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), full_precision(torch.device("cpu")):
            if newer:
                # The middle one is that of all backends and operations.
                assert [b.fp32_precision for b in backends] == ["ieee", "bf16", "ieee"]
            else:
                assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert [b.fp32_precision for b in backends] == ["tf32", "bf16", "none"]


def test_spreads_of_parts_add_up_to_that_of_all_rows() -> None:
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    whole, parts = Spread.of(rows), Spread.of(rows[:13]) + Spread.of(rows[13:])
    for found in (whole, parts):
        assert found.n == 50
        torch.testing.assert_close(found.mean, rows.mean(0))
        torch.testing.assert_close(found.variance, rows.var(0, correction=0))
    flat = parts.flat()
    assert flat.n == 200
    torch.testing.assert_close(flat.variance[0], rows.var(correction=0))


def test_a_spectrum_is_that_of_the_inputs() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pair = PairMoments.from_rows(rows, rows[:, :2]).with_spectrum()
    assert pair.spectrum is not None
    centred = (rows - rows.mean(0)).numpy()
    wanted = np.linalg.eigvalsh(centred.T @ centred)
    np.testing.assert_allclose(pair.spectrum.numpy(), wanted, rtol=1e-9)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([1.0, 1e-22, 1e20]),
)
def test_sums_of_batches_are_the_moments_of_their_rows(
    sizes: list[int], dtype: torch.dtype, scale: float
) -> None:
    draw = torch.Generator().manual_seed(len(sizes))
    batches = [(scale * (torch.randn(n, 5, generator=draw) + 3)).to(dtype) for n in sizes]
    sums, weights = PairSums(), [1.0 + k for k in range(len(sizes))]
    for rows, weight in zip(batches, weights, strict=True):
        sums.add(rows[:, :3], rows[:, 3:], weight)
    found = sums.moments()
    assert found is not None
    if not sum(sizes):
        assert found.n == 0
        return
    rows = np.concatenate([b.double().numpy() for b in batches])
    w = np.repeat(weights, sizes)[:, None]
    x, y = rows[:, :3], rows[:, 3:]
    mean_x, mean_y = (w * x).sum(0) / w.sum(), (w * y).sum(0) / w.sum()
    bound = (1e-5 if dtype != torch.float64 else 1e-10) * scale**2 * w.sum() * 10
    assert found.n == pytest.approx(w.sum())
    np.testing.assert_allclose(found.mean_x, mean_x, rtol=1e-6)
    np.testing.assert_allclose(found.xx, (w * (x - mean_x)).T @ (x - mean_x), atol=bound)
    np.testing.assert_allclose(found.xy, (w * (x - mean_x)).T @ (y - mean_y), atol=bound)
    np.testing.assert_allclose(found.yy, (w * (y - mean_y) ** 2).sum(0), atol=bound)
