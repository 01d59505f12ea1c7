"""Files that are not safetensors are named, with what converts them; nothing in them is run."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rba_compress import Profile, load, verify
from rba_compress.artifacts.weights import load_weights
from rba_compress.cli.main import main
from rba_compress.core.errors import ArtifactError, WeightsError
from rba_compress.core.file_formats import other_format
from tests.networks import Chain, seeded

PICKLE = "it is a pickle, as torch.save writes them, and pickles are never opened here"
Write = Callable[[Path], Any]


def bytes_of(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")


FORMATS: list[tuple[str, Write, str]] = [
    ("state.pth", lambda p: torch.save(seeded(Chain).state_dict(), p), PICKLE),
    ("whole.pt", lambda p: torch.save(seeded(Chain), p), PICKLE),
    ("old.bin", lambda p: torch.save({}, p, _use_new_zipfile_serialization=False), PICKLE),
    ("named.safetensors", lambda p: torch.save({}, p), PICKLE),
    ("plain.pkl", lambda p: p.write_bytes(pickle.dumps({})), PICKLE),
    ("first.pickle", lambda p: p.write_bytes(pickle.dumps({}, protocol=0)), PICKLE),
    ("a.npz", lambda p: np.savez(p, a=np.ones(2)), "it is a NumPy archive: load it with the library"),
    ("a.npy", lambda p: np.save(p, np.ones(2)), "it is a NumPy array"),
    ("a.zip", zipped, "it is a zip archive: unpack it"),
    ("a.gguf", bytes_of(b"GGUF\x03\0\0\0"), "it is a GGUF file: load it with"),
    ("a.h5", bytes_of(b"\x89HDF\r\n\x1a\n"), "it is an HDF5 file"),
    ("a.onnx", bytes_of(b"\x08\x08"), "it is an ONNX model"),
    ("a.safetensors", bytes_of(b"version https://git-lfs.github.com/spec/v1\noid"), ".*git lfs pull"),
    ("b.safetensors", bytes_of(b"<!doctype html><html>"), "it is a web page"),
    ("folder", Path.mkdir, "it is a directory: name a file"),
    ("model.safetensors.index.json",
     bytes_of(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()),
     r".*the index of weights in several files .m-1.safetensors, m-2.safetensors.. Join them"),
    ("cut.safetensors", bytes_of((0x380).to_bytes(8, "little") + b"{"), "(?!.*pickle).*"),
    ("noise.safetensors", bytes_of(b"\x07" * 40), "(?!.*it is a )"),
    ("absent.pth", lambda p: None, "No such file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "message"), FORMATS, ids=[f[0] for f in FORMATS])
def test_other_formats_are_named(name: str, write: Write, message: str, tmp_path: Path) -> None:
    path, model = tmp_path / name, seeded(Chain)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    write(path)
    with pytest.raises(WeightsError, match=f"not a readable safetensors file: {message}"):
        load_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_the_lines_that_are_named_convert_a_checkpoint(nested: bool, tmp_path: Path) -> None:
    state = seeded(Chain).state_dict()
    path = tmp_path / "it's mine.pth"
    torch.save({"state_dict": state, "epoch": 3} if nested else state, path)
    line = other_format(path).partition("of your own: ")[2]
    command = shlex.split(line)
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True)
    model = Chain()
    load_weights(model, path.with_suffix(".safetensors"))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_lines_that_are_named_join_shards(tmp_path: Path) -> None:
    state = seeded(Chain).state_dict()
    names = sorted(state)
    for k, part in enumerate((names[:3], names[3:])):
        save_file({n: state[n] for n in part}, tmp_path / f"model-0000{k + 1}-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")})
    )
    command = shlex.split(other_format(index).partition("of your own: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    load_weights(Chain(), tmp_path / "whole.safetensors")


def test_the_command_names_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    torch.save({}, tmp_path / "w.pth")
    paths = {"weights": "w.pth", "images": "images", "out": "compressed"}
    options = [part for key, name in paths.items() for part in (f"--{key}", str(tmp_path / name))]
    assert main(["compress", "--model", "test_vit", "--device", "cpu", *options]) == 2
    assert PICKLE in capsys.readouterr().err


def test_what_is_no_artefact_is_named(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pth")
    (tmp_path / "hub").mkdir()
    torch.save({}, tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=f"w.pth is no directory that save wrote: {PICKLE}"):
        load(tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"hub is no directory that save wrote. Weights alone"):
        load(tmp_path / "hub")
    with pytest.raises(ArtifactError, match="is no directory that save wrote"):
        verify(tmp_path / "hub")
    with pytest.raises(ArtifactError, match=f"not a savedprofile that this version reads: {PICKLE}"):
        Profile.load(tmp_path / "w.pth")
    assert not re.search("header", other_format(tmp_path / "w.pth"))
