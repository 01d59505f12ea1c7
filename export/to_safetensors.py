"""The whole state dict of an artefact, or of a delta and its original, as one file; one JSON line.

    python export/to_safetensors.py compressed/ --out compressed.safetensors
    python export/to_safetensors.py delta/ --original deit_tiny_patch16_224 --weights deit.safetensors \
        --out compressed.safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors.torch import save_model

from rba_compress import Architecture, load
from rba_compress.artifacts.weights import load_weights
from rba_compress.core.io import sha256


@dataclass
class Job:
    artefact: tyro.conf.Positional[Path]
    """What `rba-compress compress` or `search` wrote."""
    out: Path
    """The file to write; must not exist."""
    original: str | None = None
    """The timm name of the original, for a delta."""
    weights: Path | None = None
    """Its weights, a safetensors file."""


def main(job: Job) -> None:
    if job.out.exists():
        raise SystemExit(f"{job.out} exists: name a new file")
    original = None if job.original is None else Architecture(name=job.original).build()
    if original is not None and job.weights is not None:
        load_weights(original, job.weights)
    model = load(job.artefact, original=original)
    temporary = job.out.with_name(f".{job.out.name}.tmp")
    save_model(model, str(temporary))  # tied weights once
    temporary.rename(job.out)
    line = {
        "file": str(job.out),
        "bytes": job.out.stat().st_size,
        "tensors": len(model.state_dict()),
        "sha256": sha256(job.out),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main(tyro.cli(Job))
