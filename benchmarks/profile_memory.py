"""Claim: the memory of `profile` does not depend on the number of calibration images.

Each count runs in a process of its own, on the real DeiT-tiny with images decoded as they are read.
`python -m benchmarks.profile_memory` prints one JSON line; the ratio is of peak resident memory.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tyro

from benchmarks.real_data import data_root, deit_tiny
from rba_compress import profile
from rba_compress.cli.images import ImageFiles, image_loader
from rba_compress.linalg.moments import moment_bytes


@dataclass
class Memory:
    counts: tuple[int, ...] = (100, 500, 2000)
    """Calibration images."""
    one: int | None = None
    """Measure this count in this process."""


@dataclass
class First:
    """The first `batches` batches of a loader that is read over and over."""

    loader: Any
    batches: int

    def __iter__(self) -> Iterator[Any]:
        again = itertools.chain.from_iterable(itertools.repeat(self.loader))
        return itertools.islice(again, self.batches)


def peak(images: int) -> dict[str, float]:
    """Peak resident memory in MB of profiling so many images, this process' start included."""
    model, root = deit_tiny(), data_root() / "imagenet_sample"
    loader = image_loader(ImageFiles(root, root / "calibration.txt", model), batch_size=20)
    seen = profile(model, First(loader, images // 20))
    (profiled,) = seen.chains
    moments = moment_bytes(len(profiled.chain) + 1, profiled.chain.width)
    return {
        "images": images,
        "profiled": seen.samples,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "predicted_mb": round(moments / 2**20, 1),
    }


def main(how: Memory) -> None:
    if how.one is not None:
        print(json.dumps(peak(how.one)))
        return
    rows = []
    for count in how.counts:
        command = [sys.executable, "-m", "benchmarks.profile_memory", "--one", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # nosec B603 # a number
        rows.append(json.loads(done.stdout))
    ratio = round(rows[-1]["peak_mb"] / rows[0]["peak_mb"], 4)
    print(json.dumps({"benchmark": "profile_memory", "runs": rows, "peak_ratio": ratio}))


if __name__ == "__main__":
    main(tyro.cli(Memory))
