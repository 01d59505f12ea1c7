"""Claim: minutes of label-free distillation bring a compressed network back to its original.

Three networks: the embedded digits ViT without six of its twelve blocks; the CIFAR ResNet-20 without
one, two and three of the seven blocks that can go; the real DeiT-tiny with 33 and 25 % of its MACs
gone, calibrated on 500 images. Each is measured on images that nothing was fitted, trained or chosen
on: as the search left it, healed with three seeds, and with the output layers of its kept blocks
re-solved by ridge towards the original streams instead, all of them. `--sweep` compares the ways to
heal the first of these by held-out divergence, `--counts` the given way on fewer images.

Each of these appends a JSON line a row to `benchmarks/results/healing.jsonl`:

    python -m benchmarks.healing --case digits --augment
    python -m benchmarks.healing --case resnet --augment flip crop mix --epochs 40 --patience 40
    python -m benchmarks.healing --case deit --augment flip
    python -m benchmarks.healing --case deit --augment flip --counts 125 250 --seeds 0

The plans of a DeiT-tiny take half an hour to search: they are kept as deltas in `--plans`, and read
from there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from benchmarks.quality import quality
from benchmarks.real_data import deit_tiny, imagenet, resnet20
from benchmarks.resnet import loaders
from rba_compress import Budget, Config, Healing, Result, compress, heal, profile
from rba_compress.api import reopen
from rba_compress.artifacts.pareto_front import write_front
from rba_compress.cli.digits import batches, digits_data, digits_model
from rba_compress.core.batch import as_batch
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import Solution, replaced_blocks, without_unread
from rba_compress.units.splice import splice

Loader = list[Any]

SWEEP: dict[str, dict[str, Any]] = {
    "maps": {"train": "maps", "augment": ()},
    "norms": {"train": "norms", "augment": ()},
    "adapters": {"train": "adapters", "augment": ()},
    "all": {"train": "all", "augment": ()},
    "all, flip": {"augment": ("flip",)},
    "all, flip, crop": {"augment": ("flip", "crop")},
    "all, flip, crop, mix": {"augment": ("flip", "crop", "mix")},
    "all, flip, crop, cut": {"augment": ("flip", "crop", "cut")},
    "adapters, flip, crop": {"train": "adapters", "augment": ("flip", "crop")},
    "maps, flip, crop": {"train": "maps", "augment": ("flip", "crop")},
    "all, features": {"features": 1.0},
}


@dataclass
class Run:
    """Settings of the benchmark."""

    case: Literal["digits", "resnet", "deit"] = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the order, the augmentation and the adapters."""
    healing: tyro.conf.OmitArgPrefixes[Healing] = Healing()  # noqa: RUF009
    sweep: bool = False
    counts: tuple[int, ...] = ()
    """Images to heal on, the others left away."""
    closed_form: bool = True
    plans: Path = Path("plans")
    """Of the DeiT-tiny: searched and written where it is not there."""
    out: Path = Path(__file__).parent / "results" / "healing.jsonl"


def digits_case() -> tuple[nn.Module, Loader, Loader, Iterator[tuple[str, Result]]]:
    model, (train, test) = digits_model(), digits_data()
    calibration = batches(train)

    def plans() -> Iterator[tuple[str, Result]]:
        config = Config(units=("span",))
        found = compress(model, calibration, budget=Budget(macs=0.46), config=config)
        (chain,) = (p.chain for p in found.profile.chains)
        gone = len(replaced_blocks(found.plan, chain, cut=False))
        yield f"{gone} of 12 blocks gone", found

    return model, calibration, batches(test), plans()


def resnet_case() -> tuple[nn.Module, Loader, Loader, Iterator[tuple[str, Result]]]:
    model, (calibration, test) = resnet20(), loaders(100)

    def plans() -> Iterator[tuple[str, Result]]:
        for macs in (0.9, 0.8, 0.7):
            found = compress(model, calibration, budget=Budget(macs=macs))
            kept = found.report.compressed.macs / found.report.original.macs
            yield f"{1 - kept:.1%} of MACs gone", found

    return model, calibration, test, plans()


def deit_case(folder: Path) -> tuple[nn.Module, Loader, Loader, Iterator[tuple[str, Result]]]:
    model = deit_tiny()
    calibration, test = (imagenet(model, part, 16) for part in ("calibration", "test"))

    def plans() -> Iterator[tuple[str, Result]]:
        for limit in (0.67, 0.75):
            kept = folder / str(limit)
            if not kept.exists():
                found = compress(model, calibration, budget=Budget(macs=limit))
                write_front(found.front, model, found.profile, kept)
            row = json.loads((kept / "front.json").read_text())[-1]
            point = reopen(kept / row["point"], calibration, original=model)
            yield f"{1 - row['macs_kept']:.1%} of MACs gone", point

    return model, calibration, test, plans()


def resolved(model: nn.Module, calibration: Loader, compressed: Result) -> nn.Module:
    """The compressed network with the last layer of every branch of its kept blocks re-solved by ridge
    towards the original streams, from the first that was replaced on, whether that helps or not.
    """
    seen = profile(model, calibration, config=compressed.plan.config)
    run = SearchContext.read(model, seen, calibration, Budget(macs=0.5))
    solution = Solution(
        compressed.plan.model_copy(update={"steps": (), "candidates": ()}), compressed.tensors
    )
    for c, chain in enumerate(run.chains):
        taken = replaced_blocks(solution.plan, chain)
        walk = run.fitter.walk(c, solution.plan)
        for b in (b for b in range(min(taken, default=len(chain)), len(chain)) if b not in taken):
            for k in range(len(chain.blocks[b].branches)):
                # The search tries the middle damping and half a step first.
                _, solution = run.fitter.corrected(walk, solution, (b, k), damping=1.0, step=0.5)
    solution = without_unread(solution, seen)
    return splice(model, solution.plan, solution.tensors)


def fewer(loader: Loader, count: int) -> Loader:
    """About `count` samples of a loader, spread evenly."""
    total = sum(len(as_batch(item)) for item in loader)
    images, labels = ([t for item in loader for t in item[k]] for k in (0, 1))
    kept = [round(k * total / count) for k in range(count)]
    size = len(loader[0][0])
    rows = torch.stack([images[k] for k in kept]), torch.stack([labels[k] for k in kept])
    return list(zip(rows[0].split(size), rows[1].split(size), strict=True))


def main(how: Run) -> None:
    """Print and append a row for each plan and way."""
    cases = {"digits": digits_case, "resnet": resnet_case}
    case = deit_case(how.plans) if how.case == "deit" else cases[how.case]()
    model, calibration, test, plans = case
    tests = [as_batch(item) for item in test]

    def row(plan: str, method: str, compressed: nn.Module, **more: Any) -> None:
        found = quality(model, compressed, tests)
        values = {
            "case": how.case,
            "cores": os.cpu_count(),
            "plan": plan,
            "method": method,
            **more,
            **found,
            "share": round(found["top1"] / found["top1_dense"], 4),
        }
        print(json.dumps(values), flush=True)
        with how.out.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def healed(plan: str, method: str, compressed: Result, loader: Loader, healing: Healing) -> None:
        start = time.perf_counter()
        found = heal(compressed, loader, original=model, healing=healing)
        record = found.plan.healed
        more = (
            {}
            if record is None
            else {
                "rate": record.rate,
                "before": round(record.before, 4),
                "after": round(record.after, 4),
            }
        )
        steps = 0 if record is None else record.steps
        took = round(time.perf_counter() - start)
        asked = healing.model_dump(mode="json", exclude_defaults=True, exclude={"seed"})
        known = {"seed": healing.seed, "healing": asked, "seconds": took, "steps": steps}
        row(plan, method, found.model, **known, **more)

    for plan, compressed in plans:
        row(plan, "as searched", compressed.model)
        if how.sweep:
            for name, ways in SWEEP.items():
                healed(plan, name, compressed, calibration, how.healing.model_copy(update=ways))
            return
        for count in how.counts:
            # Of fewer images the deal is another one.
            bare = replace(compressed, profile=replace(compressed.profile, order=(), lengths=()))
            for seed in how.seeds:
                asked = how.healing.model_copy(update={"seed": seed})
                healed(plan, f"{count} images", bare, fewer(calibration, count), asked)
        if how.counts:
            return
        if how.closed_form:
            row(plan, "re-solved", resolved(model, calibration, compressed))
        for seed in how.seeds:
            asked = how.healing.model_copy(update={"seed": seed})
            healed(plan, "healed", compressed, calibration, asked)


if __name__ == "__main__":
    main(tyro.cli(Run))
