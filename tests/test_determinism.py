"""Same inputs, seed and versions: the same bytes, in every process and on any number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifacts.test_delivery import script

COMPRESSED = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from rba_compress import Architecture, Budget, Config, compress
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS, batches, digits_data, digits_model
from tests.networks import Chain, loader, seeded
config = Config(maps=("folded", "shrunk"), shrinks=(0.6,))
if sys.argv[3] == "digits":
    (images, labels), _ = digits_data()
    found = compress(digits_model(), batches((images[:80], labels[:80]), 20), budget=Budget(macs=0.85), config=config)
    found.save(sys.argv[2], architecture=Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS)))
else:
    compress(seeded(Chain, 5, 64), loader(200, 50), budget=Budget(macs=0.7), config=config).save(sys.argv[2])
"""


@pytest.mark.parametrize(
    "network",
    [
        pytest.param("chain", marks=pytest.mark.slow),
        pytest.param("digits", marks=pytest.mark.catalogue),
    ],
)
def test_processes_and_threads_give_the_same_bytes(network: str, tmp_path: Path) -> None:
    # Strings hash otherwise in every process: a set of them comes in another order.
    for threads in (1, 2):
        script(COMPRESSED, threads, tmp_path / str(threads), network)
    for name in ("plan.json", "model.safetensors"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in "12")
        assert one == two, name
