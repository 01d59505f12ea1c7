"""An exported file in OpenVINO, without torch: writes its outputs for an array of inputs, and prints
the time of a run as one JSON line.

python export/in_openvino.py compressed/model.onnx --inputs x.npy --out scores.npy
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np


def certified(file: Path) -> bool:
    """Return whether a certificate beside the file has its hash."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = (json.loads(path.read_bytes()) for path in file.parent.glob("certificate*.json"))
    return any(each["sha256"].get(file.name) == digest for each in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="ONNX file, in float or int8")
    parser.add_argument("--inputs", type=Path, required=True, help=".npy file of the network's inputs")
    parser.add_argument("--out", type=Path, help=".npy file to write the first output to")
    given = parser.parse_args()
    if not certified(given.file):
        print(f"no certificate beside {given.file} is of this file", file=sys.stderr)
        return 4
    import openvino

    x = np.load(given.inputs, allow_pickle=False)
    # Without the hint, layers in float are computed in bfloat16 where the processor has it.
    how = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(given.file), "CPU", how)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        found = compiled([x])
        times.append(time.perf_counter() - start)
    if given.out is not None:
        np.save(given.out, found[0])
    print(json.dumps({"batch": len(x), "ms": round(1e3 * statistics.median(times[2:]), 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
