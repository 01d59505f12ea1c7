"""Levels of a front in one directory, and the dial between them."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from rba_compress import (
    ArtifactError,
    Budget,
    Config,
    ExportError,
    Levels,
    PlanError,
    Result,
    WeightsError,
    compress,
    export_onnx_levels,
    load,
    verify,
)
from tests.networks import images, seeded

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES, num_classes=5)


@pytest.fixture(scope="module")
def merged(original: nn.Module) -> Result:
    how = Config(units=("token_merge",), effort="quick")
    return compress(original, list(images(40).split(10)), budget=Budget(macs=0.65), config=how)


@pytest.fixture(scope="module")
def directory(merged: Result, original: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("levels") / "saved"
    merged.save_levels(path, original=original)
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Levels:
    found = load(directory)
    assert isinstance(found, Levels)
    return found


def test_each_level_is_bit_equal_to_its_network(loaded: Any, merged: Result, original: Any) -> None:
    x = images(4, seed=1)
    order = sorted(merged.front, key=lambda point: -point.report.compressed.macs)
    expected = [original, *(point.splice(original) for point in order)]
    assert len(loaded.table) == len(expected) > 2
    for k, network in enumerate(expected):
        loaded.set_level(k)
        assert loaded.level == k
        assert torch.equal(loaded(x), network(x))
        assert torch.equal(loaded.forward_features(x), network.forward_features(x))
    kept = [row.summary.macs_kept for row in loaded.table if row.summary is not None]
    assert kept == sorted(kept, reverse=True)
    assert loaded.table[0].summary is None


def test_levels_share_one_set_of_weights(directory: Path, loaded: Any) -> None:
    own = {name: tensor.data_ptr() for name, tensor in loaded.networks[0].named_parameters()}
    for network in loaded.networks[1:]:
        shared = [own[n] == p.data_ptr() for n, p in network.named_parameters() if n in own]
        assert len(shared) > 0.9 * len(own)
        assert all(shared)
    sizes = {p.parent.name: p.stat().st_size for p in directory.rglob("model.safetensors")}
    assert max(size for name, size in sizes.items() if name != "level-00") < sizes["level-00"] / 20
    moved = copy.deepcopy(loaded).double()
    assert moved.networks[1].head.weight is moved.networks[0].head.weight


def test_the_dial_turns_under_concurrent_calls(loaded: Any) -> None:
    x = images(4, seed=1)
    count = len(loaded.networks)
    with torch.no_grad():
        expected = [network(x) for network in loaded.networks]
        stop = threading.Event()

        def turn() -> int:
            turns = 0
            while not stop.wait(0.0005):
                loaded.set_level(turns % count)
                turns += 1
            return turns

        def call(_: int) -> bool:
            with torch.no_grad():
                found = loaded(x)
            return any(torch.equal(found, each) for each in expected)

        with ThreadPoolExecutor(5) as pool:
            turned = pool.submit(turn)
            calls = [pool.submit(call, k) for k in range(200)]
            assert all(done.result() for done in calls)
            stop.set()
            assert turned.result() > count


@pytest.mark.parametrize("level", [-1, 99, True, "1", 1.5])
def test_a_level_that_is_not_there_is_refused(loaded: Any, level: Any) -> None:
    before = loaded.level
    with pytest.raises(PlanError, match="there is no level"):
        loaded.set_level(level)
    assert loaded.level == before
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loaded.no_such_name


def test_what_cannot_be_saved_as_levels_is_refused(
    merged: Result, original: nn.Module, tmp_path: Path
) -> None:
    target = tmp_path / "levels"
    other = seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES, num_classes=6)
    with pytest.raises(ArtifactError, match="there are no levels to save"):
        merged.save_levels(target, points=[], original=original)
    with pytest.raises(PlanError, match="made from another VisionTransformer"):
        merged.save_levels(target, original=other)
    assert not target.exists()


def test_levels_are_verified_one_by_one(directory: Path) -> None:
    held = verify(directory)
    assert held[0] == "levels.json: intact, schema 1"
    for name in ("level-00", "level-01"):
        assert f"{name}: reload: the network is built anew, its outputs are as recorded" in held


def test_a_level_of_other_weights_is_refused(
    directory: Path, merged: Result, original: nn.Module, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(directory, copied)
    table = json.loads((copied / "levels.json").read_text())
    table["model"] = "Another"
    (copied / "levels.json").write_text(json.dumps(table))
    with pytest.raises(ArtifactError, match=r"levels\.json"):
        load(copied)
    shutil.copy(directory / "levels.json", copied / "levels.json")
    other = seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES | {"depth": 5}, num_classes=5)
    with pytest.raises(WeightsError):
        load(copied, original=other)
    (copied / "level-01" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="level-01"):
        load(copied)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, at export
def test_levels_are_onnx_files_that_share_their_weights(loaded: Any, tmp_path: Path) -> None:
    x, out = images(4, seed=1), tmp_path / "onnx"
    ends = Levels([loaded.networks[0], loaded.networks[-1]], [loaded.table[0], loaded.table[-1]])
    found = export_onnx_levels(ends, out, x, seconds=0.1)
    assert [each.file for each in found] == ["level-00.onnx", "level-01.onnx"]
    weights = (out / "weights.bin").stat().st_size
    count = sum(p.numel() * 4 for p in loaded.networks[0].parameters())
    assert weights > 0.9 * count
    for certificate, network in zip(found, ends.networks, strict=True):
        file = out / certificate.file
        inside = [len(t.raw_data) for t in onnx.load(file, load_external_data=False).graph.initializer]
        assert sum(inside) < 0.1 * weights  # of what differs from the original
        session = onnxruntime.InferenceSession(file)
        with torch.no_grad():
            expected = network(x)
        (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-4, atol=1e-5)
        assert [parity.batch for parity in certificate.parity] == [1, 3, 8]
        assert "weights.bin" in certificate.sha256
    held = verify(out)
    assert sum("SHA-256 is as written" in line for line in held) == len(found) + 1
    with pytest.raises(ArtifactError, match="not empty"):
        export_onnx_levels(ends, out, x)
    with (out / "weights.bin").open("r+b") as file:
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(ArtifactError, match=r"weights\.bin"):
        verify(out)
    assert found[1].latency is not None
    with pytest.raises(ExportError, match="has no levels"):
        export_onnx_levels(loaded.networks[0], tmp_path / "none", x)
    assert not (tmp_path / "none").exists()


class Own(nn.Module):
    """Network that no architecture builds."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("vit_tiny_patch16_224", **SIZES | {"depth": 3}, num_classes=5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(x)
        return found


def test_what_needs_the_original_is_left_out_without_it(tmp_path: Path) -> None:
    model, data = seeded(Own), list(images(40).split(10))
    how = Config(units=("token_merge",), effort="quick")
    result = compress(model, data, budget=Budget(macs=0.65), config=how)
    result.save_levels(tmp_path / "levels", original=model, points=result.front[:1])
    unchecked = "reload: not checked, it needs the "
    held = verify(tmp_path / "levels")
    assert sum(unchecked in line for line in held) == 2
    assert not any(unchecked in line for line in verify(tmp_path / "levels", original=model))
