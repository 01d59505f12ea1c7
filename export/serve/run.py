"""Run a certified ONNX file on images or arrays; needs numpy and onnxruntime, for images Pillow too.

    python run.py slim/ --images photos/            one JSON line for each image
    python run.py slim/ --inputs x.npy --save y.npy

The directory holds certificate.json and the file that it names. Neither is run where its hash is not
the one that was certified, and inputs must be of the certified shape.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


class RefusedError(Exception):
    """What is wrong with the model or the inputs, and what to do about it."""


class Model:
    """A certified ONNX file in ONNX Runtime."""

    def __init__(self, directory: Path, threads: int = 0) -> None:
        self.certificate = certificate(directory)
        for name, digest in self.certificate["sha256"].items():
            if not (directory / name).is_file() or sha256((directory / name).read_bytes()) != digest:
                raise RefusedError(f"{directory / name} is not the certified file: get it anew")
        probe = self.certificate["probe"]
        if probe is None or len(probe["inputs"]) != 1:
            raise RefusedError(
                f"the model takes {self.certificate['input_names']}: this runner feeds one input"
            )
        self.given = probe["inputs"][0]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(directory / self.certificate["file"]), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """The first output of a batch (N, ...).

        Raises:
            RefusedError: the samples are not of the certified shape.
        """
        wanted = tuple(self.given["shape"])
        sequence = len(wanted) == 1 and "float" not in self.given["dtype"]
        if batch.shape[1:] != wanted and not (sequence and batch.ndim == 2):
            raise RefusedError(f"samples have the shape {batch.shape[1:]}, the model takes {wanted}")
        feed = {self.certificate["input_names"][0]: batch.astype(self.given["dtype"])}
        return np.asarray(self.session.run(None, feed)[0])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def certificate(directory: Path) -> dict[str, Any]:
    """certificate.json, once its seal is checked: the hash of its text with zeros for the seal."""
    path = directory / "certificate.json"
    if not path.is_file():
        raise RefusedError(f"{path} is missing: export the model with export_onnx")
    content = path.read_bytes()
    seal = re.search(rb'"seal": "([0-9a-f]{64})"', content)
    if seal is None or sha256(content.replace(seal[1], b"0" * 64, 1)) != seal[1].decode():
        raise RefusedError(f"{path} is not what was written: export the model again")
    found: dict[str, Any] = json.loads(content)
    return found


def image(path: Path, how: dict[str, Any]) -> np.ndarray:
    """An image as timm prepares it: shorter side resized, centre cropped, normalised; (C, H, W)."""
    from PIL import Image

    _, height, width = how["input_size"]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    short = math.floor(min(height, width) / how["crop_pct"])
    w, h = picture.size
    size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    picture = picture.resize(size, filters.get(how["interpolation"], Image.Resampling.BICUBIC))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture, np.float32) / np.float32(255)
    mean, std = (np.asarray(how[name], np.float32) for name in ("mean", "std"))
    return np.asarray(((pixels - mean) / std).transpose(2, 0, 1))


def samples(args: argparse.Namespace, how: dict[str, Any] | None) -> Iterator[tuple[str, np.ndarray]]:
    """Each input's name and array."""
    if args.inputs is not None:
        for k, row in enumerate(np.load(args.inputs, allow_pickle=False)):
            yield f"{args.inputs.name}[{k}]", row
        return
    if how is None or how.get("crop_mode", "center") != "center":
        raise RefusedError("the certificate does not say how images are prepared: pass --inputs x.npy")
    paths = sorted(p for p in args.images.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise RefusedError(f"no images in {args.images}: expected {', '.join(sorted(SUFFIXES))}")
    for path in paths:
        yield str(path.relative_to(args.images)), image(path, how)


def run(args: argparse.Namespace) -> None:
    model = Model(args.model, args.threads)
    outputs: list[np.ndarray] = []
    names: list[str] = []
    waiting: list[np.ndarray] = []

    def flush() -> None:
        if waiting:
            found = model(np.stack(waiting))
            outputs.append(found)
            for name, row in zip(names[-len(waiting) :], found, strict=True):
                print(json.dumps({"input": name, **summary(row, args.top)}), flush=True)
            waiting.clear()

    for name, sample in samples(args, model.certificate["preprocessing"]):
        names.append(name)
        waiting.append(sample)
        if len(waiting) == args.batch:
            flush()
    flush()
    if args.save is not None and outputs:
        np.save(args.save, np.concatenate(outputs))


def summary(row: np.ndarray, top: int) -> dict[str, Any]:
    """The most likely classes of scores (classes,); of anything else its shape."""
    if row.ndim != 1:
        return {"shape": list(row.shape)}
    shares = np.exp(row.astype(np.float64) - row.max())
    shares /= shares.sum()
    best = np.argsort(-row)[:top]
    return {"classes": best.tolist(), "probabilities": [round(float(shares[k]), 6) for k in best]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of certificate.json and the ONNX file")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", type=Path, help="folder of images, searched to the bottom")
    given.add_argument("--inputs", type=Path, help=".npy (N, ...) of what the model takes")
    parser.add_argument("--save", type=Path, help=".npy to write the first output to")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    try:
        run(parser.parse_args(arguments))
    except (RefusedError, OSError, ValueError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
