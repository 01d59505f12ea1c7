"""The main job on the real networks and images of `RBA_DATA`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import profile_memory
from benchmarks.real_data import data_root, deit_tiny, imagenet
from rba_compress import Config, Plan, Report, load, profile, search, splice, supports
from rba_compress.artifacts.artifact import read_manifest
from rba_compress.cli.main import main
from rba_compress.core.batch import as_batch
from rba_compress.core.loader import read
from rba_compress.planning.state import Solution, with_read_outs
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity

pytestmark = [
    pytest.mark.skipif(
        not (data_root() / "deit_tiny_patch16_224.safetensors").is_file(),
        reason=f"RBA_DATA ({data_root()}) holds no DeiT-tiny",
    ),
]


@pytest.mark.catalogue
def test_the_command_line_compresses_the_real_deit_tiny(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = data_root() / "imagenet_sample"
    options = {
        "model": "deit_tiny_patch16_224",
        "weights": data_root() / "deit_tiny_patch16_224.safetensors",
        "images": images,
        "split": images / "calibration.txt",
        "test-split": images / "test.txt",
        "macs": 0.9,
        "out": tmp_path / "compressed",
        "device": "cpu",
    }
    assert main(["compress", *(str(p) for k, v in options.items() for p in (f"--{k}", v))]) == 0
    assert "on 500 samples (test split test.txt)" in capsys.readouterr().out
    report = Report.model_validate_json((tmp_path / "compressed" / "report.json").read_text())
    assert report.fidelity.accuracy_original == 0.792
    assert report.compressed.macs <= 0.9 * report.original.macs
    assert report.latency.ratio < 0.98
    assert report.fidelity.accuracy_compressed is not None
    assert report.fidelity.accuracy_compressed > 0.772  # 97.5 % of original
    assert report.fidelity.agreement is not None
    assert report.fidelity.agreement > 0.92
    compressed, original = load(tmp_path / "compressed"), deit_tiny()
    again = fidelity(original, compressed, read(imagenet(original, "test")), "kl")
    assert again.accuracy_compressed == report.fidelity.accuracy_compressed
    assert again.divergence == pytest.approx(report.fidelity.divergence, rel=1e-4)
    assert read_manifest(tmp_path / "compressed").architecture is not None


@pytest.mark.slow
def test_the_exact_read_out_is_exact_on_real_images() -> None:
    """The network costs 8 % less: its last block computes the class token alone, no keys and values."""
    model = deit_tiny()
    x = imagenet(model, "test", 25)[0][0]
    (chain,) = supports(model, x).chains
    plan = with_read_outs(Solution(Plan(), {}), [chain]).plan
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        original = copy.deepcopy(model).to(dtype)
        compressed = splice(original, plan, {})
        with torch.no_grad():
            expected, found = original(x.to(dtype)), compressed(x.to(dtype))
        torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed)
    batch = as_batch(x)
    assert cost(compressed, batch).macs < 0.93 * cost(original, batch).macs


@pytest.mark.slow
def test_the_committed_baseline_is_reproduced_on_one_span() -> None:
    committed = Path(__file__).parents[1] / "benchmarks" / "results" / "paper_baseline.jsonl"
    rows = [json.loads(line) for line in committed.read_text().splitlines()]
    (row,) = (r for r in rows if r["blocks"] == ["blocks.5"] and r["method"] == "least squares")
    model = deit_tiny()
    calibration = imagenet(model, "calibration")
    config = Config(maps=("linear",), units=("span",), keep_features=True, window=1)
    seen = profile(model, calibration, config=config)
    assert seen.samples == row["fit_images"]
    planned = search(model, seen, calibration, spans=[(5, 6)])
    compressed = splice(model, planned.plan, planned.tensors)
    found = fidelity(model, compressed, read(imagenet(model, "test")), "kl")
    assert found.accuracy_original == 0.792  # the published network
    assert found.accuracy_compressed == pytest.approx(row["top1"], abs=0.005)
    assert found.divergence == pytest.approx(row["kl"], rel=0.02)


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    profile_memory.main(profile_memory.Memory(counts=(80, 320)))
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"][1]["profiled"] == 4 * printed["runs"][0]["profiled"]
    assert printed["peak_ratio"] < 1.05
