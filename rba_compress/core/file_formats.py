"""Recognition of file formats by their first bytes, with a way to convert their tensors to safetensors.

A file is inspected only where safetensors were expected and not found; nothing in it is run.
"""

from __future__ import annotations

import json
import shlex
import zipfile
from pathlib import Path

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
_MAGIC = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"version https://git-lfs": "a git-lfs pointer without its content: run `git lfs pull`",
    b"<": "a web page or XML, perhaps of a download that failed",
    b"\x1f\x8b": "a gzip archive: unpack it",
}
_SUFFIXES = {
    ".onnx": "an ONNX model",
    ".h5": "an HDF5 file",
    ".gguf": "a GGUF file",
    ".msgpack": "a Flax checkpoint",
}
_READ = 1 << 16


def other_format(path: Path) -> str:
    """Return the format of a file that is not safetensors, and how to convert it; empty if unknown."""
    if path.is_dir():
        inside = sorted(each.name for each in path.glob("*.safetensors"))
        listed = f" (it holds {', '.join(inside[:3])})" if inside else ""
        return f"it is a directory: name a file{listed}"
    try:
        with path.open("rb") as file:
            start = file.read(_READ)
    except OSError:
        return ""
    # A truncated safetensors file starts with the length of its header, in eight bytes.
    protocol = start[:1] == b"\x80" and start[1:2] <= b"\x05" and start[4:8] != bytes(4)
    if start.startswith(b"PK\x03\x04"):
        return _of_zip(path)
    if protocol:
        return _pickled(path)
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            return f"it is {name}" if ":" in name else _of_library(path, name)
    if start.lstrip()[:1] == b"{" and b'"weight_map"' in start:
        return _sharded(path)
    if path.suffix.lower() in _SUFFIXES:
        return _of_library(path, _SUFFIXES[path.suffix.lower()])
    return _pickled(path) if path.suffix.lower() in _PICKLES else ""


def _of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        names = []
    if any(name.endswith(".npy") for name in names):
        return _of_library(path, "a NumPy archive")
    if not names or any(name.endswith("data.pkl") for name in names):
        return _pickled(path)
    return "it is a zip archive: unpack it"


def _written(path: Path) -> str:
    return json.dumps(str(path.with_suffix(".safetensors")))


def _command(code: str) -> str:
    return f"in a process of your own: {shlex.join(['python', '-c', code])}"


def _pickled(path: Path) -> str:
    code = (
        "import torch; from safetensors.torch import save_file; "
        f's = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=True); '
        's = s.get("state_dict", s); '
        f"save_file({{k: v.clone().contiguous() for k, v in s.items()}}, {_written(path)})"
    )
    return (
        "it is a pickle, as torch.save writes them, and pickles are never opened here, for they run "
        f"code. Convert it {_command(code)}"
    )


def _sharded(path: Path) -> str:
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        names = f" ({', '.join(map(str, shards[:3]))}{', ...' if shards[3:] else ''})"
    except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError):
        names = ""
    files, whole = (str(path.parent / name) for name in ("*-of-*.safetensors", "whole.safetensors"))
    code = (
        "import glob; from safetensors.torch import load_file, save_file; "
        f"files = glob.glob({json.dumps(files)}); "
        f"save_file({{k: v for f in files for k, v in load_file(f).items()}}, {json.dumps(whole)})"
    )
    return f"it is the index of weights in several files{names}. Join them {_command(code)}"


def _of_library(path: Path, name: str) -> str:
    return (
        f"it is {name}: load it with the library that wrote it, and save the state dict with "
        f"safetensors.torch.save_file(model.state_dict(), {_written(path)})"
    )
