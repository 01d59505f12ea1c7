"""Claim: a search in stages by output changes takes half to a third of the greedy search's passes.

Both searches on the same network, profile and budgets, in one run: forward passes, CPU seconds, the
share of MACs that is left, and on test samples the KL divergence to the original and the agreement. For
each stage the divergence that was predicted and the true one. `python -m benchmarks.stages` appends a
JSON line for each search to `benchmarks/results/stages.jsonl`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from benchmarks.greedy import run
from benchmarks.real_data import deit_tiny, imagenet
from benchmarks.same_plans import digits
from rba_compress import Budget, Config, profile
from rba_compress.cli.digits import digits_data
from rba_compress.core.loader import read
from rba_compress.planning.context import SearchContext
from rba_compress.planning.stages import descend
from rba_compress.planning.state import Solution
from rba_compress.profiling.fidelity import fidelity
from rba_compress.units.splice import splice_shared

SEARCHES: dict[str, Callable[[SearchContext], Solution]] = {"greedy": run, "stages": descend}


@dataclass
class Run:
    """Networks, budgets and searches."""

    networks: tuple[str, ...] = ("digits",)
    """Among digits and deit_tiny."""
    macs: tuple[float, ...] = (0.8, 0.6)
    searches: tuple[str, ...] = ("greedy", "stages")
    seed: int = 0
    out: Path = Path(__file__).parent / "results" / "stages.jsonl"


def case(network: str) -> tuple[nn.Module, list[Any], list[Any]]:
    """Return a network, its calibration batches and its test batches."""
    if network == "deit_tiny":
        model = deit_tiny()
        return model, imagenet(model, "calibration"), imagenet(model, "test", 50)
    model, calibration, _ = digits()
    return model, calibration, [digits_data()[1]]


def row(name: str, context: SearchContext, test: Sequence[Any]) -> dict[str, Any]:
    """Return what one search takes and what its network loses."""
    started = time.process_time()
    found = SEARCHES[name](context)
    seconds = time.process_time() - started
    network = splice_shared(context.model, found.plan, found.tensors)
    measured = fidelity(context.model, network, list(read(test)), "kl")
    stages = [(s.predicted, s.divergence) for s in found.plan.steps if s.action == "stage"]
    return {
        "search": name,
        "passes": found.plan.forward_passes,
        "cpu_seconds": round(seconds, 1),
        "macs_kept": round(found.plan.steps[-1].macs / context.profile.original.macs, 4),
        "kl": float(f"{measured.divergence:.4g}"),
        "agreement": measured.agreement,
        "top1": measured.accuracy_compressed,
        "stages": [[float(f"{each:.3g}") for each in pair if each is not None] for pair in stages],
        "plan": str(found.plan),
    }


def main(how: Run) -> None:
    """Print and append a row for each search."""
    torch.set_num_threads(1)
    for network in how.networks:
        model, calibration, test = case(network)
        seen = profile(model, calibration, config=Config(seed=how.seed))
        for macs in how.macs:
            for name in how.searches:
                context = SearchContext.read(model, seen, calibration, Budget(macs=macs))
                found = {"network": network, "seed": how.seed, "budget": macs} | row(
                    name, context, test
                )
                print(json.dumps(found), flush=True)
                with how.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Run))
