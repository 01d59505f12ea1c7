"""Recipes of export/, each run as a platform engineer would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config

from rba_compress import Budget, Config, compress, export_gguf, load
from tests.networks import LIGHT, seeded
from tests.texts import TEXTS, byte_tokenizer, causal

ROOT = Path(__file__).parents[1]
EXPORT = ROOT / "export"

WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "rba_compress", "timm", "onnx"):
    sys.modules[name] = None  # importing them raises
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

WITHOUT_PACKAGE = WITHOUT_TORCH.replace('"torch", "rba_compress", "timm", "onnx"', '"rba_compress",')


def recipe(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == code, found.stderr
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a compressed ViT with its ONNX file."""
    folder = tmp_path_factory.mktemp("work")
    generator = torch.Generator().manual_seed(0)
    for index in range(8):
        path = folder / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (170 + 9 * index, 200, 3) if index % 2 else (200, 170 + 5 * index, 3)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    model = seeded(timm.create_model, "test_vit", num_classes=2)
    data = torch.randn(20, 3, 160, 160, generator=generator)
    found = compress(model, list(data.split(10)), budget=Budget(macs=0.95), config=LIGHT)
    found.save(folder / "compressed")
    line = recipe(EXPORT / "to_onnx.py", folder / "compressed", "--inputs", folder / "images").stdout
    (folder / "line.json").write_text(line)
    return folder


@pytest.mark.slow
def test_to_onnx_prints_one_json_line(work: Path) -> None:
    line = json.loads((work / "line.json").read_text())
    assert line["file"] == str(work / "compressed" / "model.onnx")
    assert line["bytes"] == (work / "compressed" / "model.onnx").stat().st_size
    assert 0 <= line["max_rel"] <= 1e-4
    assert line["argmax_agreement"] == 1
    assert line["latency_ratio"] > 0
    np.save(work / "x.npy", np.zeros((2, 3, 160, 160), np.float32))
    out = work / "program" / "compressed.pt2"
    again = recipe(
        EXPORT / "to_onnx.py", work / "compressed", "--inputs", work / "x.npy", "--out", out
    ).stdout
    assert json.loads(again)["file"] == str(out)
    assert out.is_file()


@pytest.mark.slow
def test_to_safetensors_writes_the_whole_state(work: Path) -> None:
    out = work / "compressed.safetensors"
    line = json.loads(recipe(EXPORT / "to_safetensors.py", work / "compressed", "--out", out).stdout)
    state = load(work / "compressed").state_dict()
    stored = load_file(out)
    assert line["tensors"] == len(state) == len(stored)
    assert all(torch.equal(stored[name], state[name]) for name in state)
    assert (
        "exists: name a new file"
        in recipe(EXPORT / "to_safetensors.py", work / "compressed", "--out", out, code=1).stderr
    )


@pytest.mark.slow
def test_the_runner_prepares_images_as_timm_does_and_needs_no_torch(work: Path) -> None:
    run = (EXPORT / "serve" / "run.py", work / "compressed")
    found = recipe(
        "-c", WITHOUT_TORCH, *run, "--images", work / "images", "--save", work / "y.npy", "--batch", 3
    )
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["input"] for line in lines] == sorted(line["input"] for line in lines)
    assert len(lines) == 8
    model = load(work / "compressed")
    transform = create_transform(**resolve_data_config({}, model=model))
    pictures = [Image.open(work / "images" / line["input"]).convert("RGB") for line in lines]
    x = torch.stack([transform(picture) for picture in pictures])
    with torch.no_grad():
        wanted = model(x)
    np.testing.assert_allclose(np.load(work / "y.npy"), wanted.numpy(), atol=1e-4)
    for line, row in zip(lines, wanted.softmax(-1), strict=True):
        assert line["classes"] == row.argsort(descending=True).tolist()
        assert line["probabilities"] == pytest.approx(
            row.sort(descending=True).values.tolist(), abs=1e-4
        )
    np.save(work / "z.npy", x.numpy())
    recipe("-c", WITHOUT_TORCH, *run, "--inputs", work / "z.npy", "--save", work / "w.npy")
    np.testing.assert_allclose(np.load(work / "w.npy"), wanted.numpy(), atol=1e-4)


@pytest.mark.slow
def test_the_runner_refuses_what_is_not_certified(work: Path, tmp_path: Path) -> None:
    runner = EXPORT / "serve" / "run.py"
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 10, 10), np.float32))
    given = ("--inputs", tmp_path / "x.npy")
    assert (
        "samples have the shape (3, 10, 10)"
        in recipe(runner, work / "compressed", *given, code=2).stderr
    )
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert (
        "allow_pickle"
        in recipe(runner, work / "compressed", "--inputs", tmp_path / "o.npy", code=2).stderr
    )
    (tmp_path / "none").mkdir()
    assert (
        "no images in"
        in recipe(runner, work / "compressed", "--images", tmp_path / "none", code=2).stderr
    )
    assert "certificate.json is missing" in recipe(runner, tmp_path, *given, code=2).stderr
    shutil.copytree(work / "compressed", tmp_path / "compressed")
    for name, message in (
        ("model.onnx", "is not the certified file"),
        ("certificate.json", "is not what"),
    ):
        path = tmp_path / "compressed" / name
        good = path.read_bytes()
        path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        assert message in recipe(runner, tmp_path / "compressed", *given, code=2).stderr
        path.write_bytes(good)


@pytest.mark.slow
def test_the_runner_in_an_environment_of_its_own(work: Path, tmp_path: Path) -> None:
    serve = EXPORT / "serve"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-r", serve / "requirements.txt"]
    subprocess.run([str(part) for part in install], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode
    command = [python, serve / "run.py", work / "compressed", "--images", work / "images"]
    found = subprocess.run([str(p) for p in command], capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 8


def test_the_dockerfile_copies_what_is_there() -> None:
    lines = (EXPORT / "serve" / "Dockerfile").read_text().splitlines()
    instructions = [line.split() for line in lines if line and not line.startswith("#")]
    assert instructions[0][0] == "FROM"
    assert ":" in instructions[0][1]  # a version, not whatever is latest
    assert {"USER", "ENTRYPOINT"} <= {line[0] for line in instructions}
    for _, source, _ in (line for line in instructions if line[0] == "COPY"):
        assert (EXPORT / "serve" / source).is_file()


@pytest.mark.slow
def test_the_dockerfile_builds() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        pytest.skip("docker does not run here")
    subprocess.run([docker, "build", "-q", str(EXPORT / "serve")], check=True)


@pytest.mark.slow
def test_a_delta_becomes_one_file(tmp_path: Path) -> None:
    model = seeded(timm.create_model, "test_vit")  # the recipe builds a network by its name alone
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    data = torch.randn(20, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    config = Config(maps=("shrunk",), units=("span",), shrinks=(0.6,), refit=False)
    found = compress(model, list(data.split(10)), budget=Budget(macs=0.95), config=config)
    found.save(tmp_path / "delta", delta=True)
    out = tmp_path / "compressed.safetensors"
    original = ("--original", "test_vit", "--weights", tmp_path / "dense.safetensors")
    recipe(EXPORT / "to_safetensors.py", tmp_path / "delta", *original, "--out", out)
    stored, wanted = load_file(out), found.model.state_dict()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_file_runs_in_openvino_without_torch(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    x = np.random.default_rng(0).standard_normal((3, 3, 160, 160)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    file, out = work / "compressed" / "model.onnx", tmp_path / "scores.npy"
    given = (EXPORT / "in_openvino.py", file, "--inputs", tmp_path / "x.npy", "--out", out)
    told = json.loads(recipe("-c", WITHOUT_TORCH, *given).stdout)
    assert told["batch"] == 3
    assert told["ms"] > 0
    with torch.no_grad():
        wanted = load(work / "compressed")(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(np.load(out), wanted, rtol=1e-4, atol=1e-4)
    changed = tmp_path / "model.onnx"
    changed.write_bytes(file.read_bytes() + b" ")
    shutil.copy(work / "compressed" / "certificate.json", tmp_path)
    recipe(EXPORT / "in_openvino.py", changed, "--inputs", tmp_path / "x.npy", code=4)


@pytest.mark.slow
def test_a_stock_language_model_runs_in_transformers_and_in_llama_cpp(tmp_path: Path) -> None:
    """One stock checkpoint, continued by each without this package: both give the same text."""
    pytest.importorskip("xllamacpp")
    ids = torch.randint(3, 330, (30, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "use_cache": False} for part in ids.split(10)]
    found = compress(
        causal(initializer_range=0.1),
        data,
        budget=Budget(macs=0.85),
        config=Config(stock=True, effort="quick"),
    )
    directory = tmp_path / "stock"
    found.save(directory, fold=True, hub=True)
    byte_tokenizer().save_pretrained(directory)
    export_gguf(directory, directory / "model.gguf", TEXTS, type="f32")
    asked = "--prompt", TEXTS[0], "--tokens", 12
    given = EXPORT / "in_transformers.py", directory, *asked
    ours = json.loads(recipe("-c", WITHOUT_PACKAGE, *given).stdout)
    file = directory / "model.gguf"
    given = EXPORT / "in_llama_cpp.py", file, *asked
    theirs = json.loads(recipe("-c", WITHOUT_TORCH, *given).stdout)
    assert ours["text"] == theirs["text"] != ""
    assert ours["tokens_per_second"] > 0 < theirs["tokens_per_second"]
    file.write_bytes(file.read_bytes() + b" ")
    recipe(EXPORT / "in_llama_cpp.py", file, *asked, code=4)
    recipe(EXPORT / "in_transformers.py", tmp_path, *asked, code=4)
