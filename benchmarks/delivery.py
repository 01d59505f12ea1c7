"""Claim: what is delivered is small, computes what was measured, and no flipped byte goes unseen.

A real DeiT-tiny is compressed, saved whole and as a delta, exported to ONNX on real images, verified,
and damaged at 50 random places of each file; a ViT-B/16 with random weights and a plan written by hand
shows the sizes at scale. `python -m benchmarks.delivery` writes `benchmarks/results/delivery.json`.
"""

from __future__ import annotations

import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from torch import nn

from benchmarks.delivered_speed import networks, plans, spliced
from benchmarks.real_data import DEIT, deit_tiny, imagenet
from rba_compress import (
    Architecture,
    Budget,
    Config,
    RBAError,
    compress,
    export_onnx,
    supports,
    verify,
)
from rba_compress.artifacts.artifact import WEIGHTS, write_artifact
from rba_compress.core.batch import as_batch

FLIPS = 50


@dataclass
class Run:
    macs: float = 0.8
    images: int = 100
    """Of the calibration split."""
    out: Path = Path(__file__).parent / "results" / "delivery.json"


def flips(size: int, count: int = FLIPS) -> list[tuple[int, int]]:
    """Places in a file, first and last among them, each with a mask to xor."""
    generator = torch.Generator().manual_seed(size)
    places = torch.randint(0, size, (count - 2,), generator=generator).tolist()
    masks = torch.randint(1, 256, (count,), generator=generator).tolist()
    return list(zip([0, size - 1, *places], masks, strict=True))


def caught(folder: Path, path: Path) -> int:
    """Return how many of `FLIPS` single flipped bytes `verify` notices."""
    good, found = path.read_bytes(), 0
    for place, mask in flips(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :])
        try:
            verify(folder)
        except RBAError:
            found += 1
    path.write_bytes(good)
    return found


def sizes(folder: Path, original: nn.Module) -> dict[str, int]:
    """Bytes of weights: original, compressed, delta."""
    save_file(original.state_dict(), folder / "dense.safetensors")
    return {
        "dense": (folder / "dense.safetensors").stat().st_size,
        **{name: (folder / name / WEIGHTS).stat().st_size for name in ("slim", "delta")},
    }


def real(how: Run, folder: Path) -> dict[str, Any]:
    """The DeiT-tiny."""
    original = deit_tiny()
    loader = imagenet(original, "calibration")
    step = max(1, len(loader) * len(loader[0][0]) // how.images)
    config = Config(refit=False, shrinks=(0.7,))  # a quick search: its quality is not the claim
    result = compress(original, loader[::step], budget=Budget(macs=how.macs), config=config)
    result.save(folder / "slim", architecture=DEIT, hub=True)
    result.save(folder / "delta", delta=True)
    tests = torch.cat([x for x, _ in imagenet(original, "test")[::4]])
    onnx = folder / "slim" / "model.onnx"
    certificate = export_onnx(folder / "slim", onnx, tests, original=original, seconds=20)
    checks = verify(folder / "slim")
    names = (WEIGHTS, "plan.json", "report.json", "model.onnx", "certificate.json")
    return {
        "plan": str(result.plan),
        "macs_kept": result.report.compressed.macs / result.report.original.macs,
        "bytes": sizes(folder, original),
        "certificate": certificate.model_dump(mode="json"),
        "checks": checks,
        "flipped": FLIPS,
        "caught": {name: caught(folder / "slim", folder / "slim" / name) for name in names},
    }


def large(folder: Path) -> dict[str, Any]:
    """The ViT-B/16."""
    original, _ = networks("vit_base")
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plan = plans(supports(original, x).chains[0])["all kinds"]
    compressed = spliced(original, plan)
    known = Architecture(name="vit_base_patch16_224")
    for name, delta in (("slim", False), ("delta", True)):
        write_artifact(
            compressed,
            plan,
            folder / name,
            example=as_batch(x),
            original_weights="",
            architecture=None if delta else known,
            delta=delta,
        )
    return {"plan": str(plan), "bytes": sizes(folder, original)}


def main(how: Run) -> None:
    rows: dict[str, Any] = {}
    for name in ("deit_tiny", "vit_base"):
        with tempfile.TemporaryDirectory() as aside:
            folder = Path(aside)
            rows[name] = real(how, folder) if name == "deit_tiny" else large(folder)
            print(json.dumps({name: rows[name]}), flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    how.out.write_text(json.dumps({"hardware": machine, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Run))
