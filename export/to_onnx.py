"""An artefact as ONNX with its certificate; prints one JSON line.

python export/to_onnx.py slim/ --inputs images/
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from rba_compress import export_onnx, export_pt2, load
from rba_compress.images import ImageFiles


@dataclass
class Job:
    artefact: tyro.conf.Positional[Path]
    """What `rba-compress compress` wrote."""
    inputs: Path
    """Real inputs to compare on: a folder <class>/<image>, or a .npy of what the network takes."""
    out: Path | None = None
    """The file to write, .onnx or .pt2; by default model.onnx in the artefact."""
    samples: int = 32


def example(job: Job) -> Tensor:
    """The first samples of the inputs."""
    if job.inputs.suffix == ".npy":
        return torch.from_numpy(np.load(job.inputs, allow_pickle=False)[: job.samples])
    files = ImageFiles(job.inputs, None, load(job.artefact))
    items = (files[k] for k in range(min(job.samples, len(files))))
    return torch.stack([item[0] if isinstance(item, tuple) else item for item in items])


def main(job: Job) -> None:
    out = job.out or job.artefact / "model.onnx"
    export = export_pt2 if out.suffix == ".pt2" else export_onnx
    certificate = export(job.artefact, out, example(job))
    agreement = [p.argmax_agreement for p in certificate.parity if p.argmax_agreement is not None]
    line = {
        "file": str(out),
        "bytes": certificate.slim.bytes,
        "max_rel": max(parity.max_rel for parity in certificate.parity),
        "argmax_agreement": min(agreement, default=None),
        "latency_ratio": certificate.latency.ratio if certificate.latency else None,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main(tyro.cli(Job))
