"""Worker, one of several processes that tests/core/test_distributed.py starts.

`python -m tests.core.rank_worker JOB FOLDER`
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from rba_compress import Budget, compress, heal, profile
from rba_compress.cli.digits import batches, digits_data, digits_model
from rba_compress.core.distributed import current, launched
from rba_compress.healing import loop as healing
from tests.networks import BRIEF, BRIEF_SEARCH, LIGHT, Chain, loader, rows, seeded, to_heal


class Deadly:
    """Loader of five batches that kills the last process before the fourth."""

    def __iter__(self) -> Iterator[Tensor]:
        for index, batch in enumerate(loader(50)):
            if index == 3 and current().rank == current().count - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def heal_together(*, deadly: bool) -> tuple[str, dict[str, Tensor]]:
    """Heal a network across processes, the last of which may die in its fourth step."""
    step = healing._Run.step

    def killed(self: Any, number: int, rate: float) -> bool:
        if number == 3 and current().rank == current().count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, rate)

    if deadly:
        healing._Run.step = killed  # type: ignore[method-assign]
    original, data, compressed = to_heal()
    return "", heal(compressed, data, original=original, healing=BRIEF).state_dict()


def run(job: str) -> tuple[str, dict[str, Tensor]]:
    if job == "digits":
        (images, labels), _ = digits_data()
        data: Any = batches((images[:192], labels[:192]), 64)
        result = compress(digits_model(), data, budget=Budget(macs=0.85), config=BRIEF_SEARCH)
        return result.plan.model_dump_json(), result.tensors
    sizes = {"uneven": 9, "empty": 40}
    model = seeded(Chain)
    if job in sizes:
        data = DataLoader(TensorDataset(rows(40)), batch_size=sizes[job])
        result = compress(model, data, budget=Budget(macs=0.7), config=LIGHT)
        fidelity = result.report.fidelity.model_dump_json()
        return result.plan.model_dump_json() + "\n" + fidelity, result.tensors
    if job == "other":
        data = loader() if current().leads else list(rows(40, seed=1).split(10))
        return str(profile(model, data)), {}
    if job.startswith("heal"):
        return heal_together(deadly=job == "heal_dies")
    assert job == "dies"
    return str(profile(model, Deadly())), {}


def main(job: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with launched() as ranks:
        own = folder / str(ranks.rank)
        text, tensors = run(job)
        own.with_suffix(".json").write_text(text)
        save_file({key: t.contiguous() for key, t in tensors.items()}, own.with_suffix(".safetensors"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
