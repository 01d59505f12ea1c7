"""`benchmarks.gpu` on a tiny ViT: the path that a machine with a card runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import TOLERANCE, Run, main
from rba_compress.graph.activations import as_rows
from rba_compress.profiling import chain_statistics as chain_profile


def tiny(out: Path, **settings: Any) -> Run:
    """Settings that take seconds on one core."""
    return Run(
        **{
            "networks": ("vit_tiny_patch16_224",),
            "device": "cpu",
            "batch": 32,
            "images": 96,
            "seconds": 0.05,
            "matmul": 128,
            "arguments": {"img_size": 64, "depth": 4},
            "out": out,
            **settings,
        }
    )


def numbers(value: Any) -> list[float]:
    """Return every number in a row, however nested."""
    if isinstance(value, dict):
        return [n for held in value.values() for n in numbers(held)]
    if isinstance(value, list):
        return [n for held in value for n in numbers(held)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
)
def test_a_row_for_each_dtype_with_every_figure(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(tiny(tmp_path / "gpu.json", device=device))
    written = json.loads((tmp_path / "gpu.json").read_text())
    rows = written["rows"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert [row["dtype"] for row in rows] == ["bf16", "fp32"]
    assert written["hardware"]["torch"] == torch.__version__
    assert ("cores" in written["hardware"]) == (device == "cpu")
    assert written["options"]["arguments"] == {"img_size": 64, "depth": 4}
    assert set(written["matrix_gmacs_s"]) == {"bf16", "fp32"}
    for row in rows:
        assert (row["loader_images"], row["images"], row["fits"]) == (96, 48, 10)
        assert 0 < row["parity"] < TOLERANCE
        assert set(row["images_s"]) == {"plain", "stream", "profile"}
        for share in (row["stream_share"], row["profile_share"]):
            assert share["low"] <= share["median"] <= share["high"]
        assert set(row["call_seconds"]) == {*row["images_s"], "discover", "fingerprint", "read"}
        assert (
            set(row["gmacs_s"])
            == set(row["of_matrix_rate"])
            == {"original", "compressed", "moments", "plain"}
        )
        assert [latency["batch"] for latency in row["latency"]] == [1, 32]
        assert all(latency["pairs"] >= 7 for latency in row["latency"])
        # 15 pairs of 5 boundaries, (192, 192) products over 17 positions
        assert row["gmacs"]["moments"] == pytest.approx(15 * 17 * 192**2 / 1e9, abs=1e-4)
        assert all(math.isfinite(n) and n > 0 for n in numbers(row))
        peaks = row["peak_mb"]
        assert set(peaks) == {"plain", "profile"}
        assert peaks == {"plain": None, "profile": None} or peaks["profile"] > peaks["plain"]


def test_coarser_products_are_noticed_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tf32(*args: Any) -> Tensor:
        bits = as_rows(*args).contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    monkeypatch.setattr(chain_profile, "as_rows", tf32)
    with pytest.raises(AssertionError, match="from least squares in float64"):
        main(tiny(tmp_path / "gpu.json", dtypes=("fp32",)))
    assert not (tmp_path / "gpu.json").exists()
