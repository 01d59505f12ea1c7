"""Claim: importing the package costs little beside torch; help and usage errors do not load torch.

Fresh processes in pairs, after one that is not counted: `import torch` beside `import rba_compress`,
beside `from rba_compress import compress` (which loads torch), and beside the commands. Medians of CPU
seconds, and of the ratios within pairs with their quartiles.

`python -m benchmarks.start_up` writes `benchmarks/results/start_up.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
TORCH = [sys.executable, "-c", "import torch"]
COMMAND = [sys.executable, "-m", "rba_compress"]
OTHERS = {
    "import rba_compress": [sys.executable, "-c", "import rba_compress"],
    "from rba_compress import compress": [sys.executable, "-c", "from rba_compress import compress"],
    "rba-compress --help": [*COMMAND, "--help"],
    "rba-compress compress --help": [*COMMAND, "compress", "--help"],
    "a missing option": [*COMMAND, "compress", "--macs", "0.8"],
    "a file that is not there": [*COMMAND, "compress", "--model", "resnet18", "--weights", "absent",
                                 "--images", "absent", "--out", "absent"],
}  # fmt: skip


@dataclass
class StartUp:
    """Settings of the benchmark."""

    pairs: int = 7
    out: Path = RESULTS / "start_up.json"


def seconds(command: list[str]) -> float:
    """CPU seconds of a fresh process."""
    before = os.times()
    subprocess.run(command, capture_output=True, check=False)  # nosec B603 # its own commands
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(how: StartUp) -> None:
    """Print a line for each command."""
    found = {}
    for name, command in tqdm(OTHERS.items(), "commands", disable=None):
        seconds(command)
        pairs = [(seconds(TORCH), seconds(command)) for _ in range(how.pairs)]
        ratios = [own / torch for torch, own in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "torch_seconds": round(statistics.median(torch for torch, _ in pairs), 3),
            "seconds": round(statistics.median(own for _, own in pairs), 3),
            "ratio": [round(value, 3) for value in (low, middle, high)],
        }
        print(name, json.dumps(found[name]), flush=True)
    how.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(StartUp))
