"""Claim: a change of the code's layout leaves plans and tensors of four networks as they were.

`python -m benchmarks.same_plans --write old.safetensors` in one checkout, the same with another file in
the other, then `python -m benchmarks.same_plans --compare old.safetensors new.safetensors`: exits with
code 1 where a plan differs, or a tensor by more than 1e-6 of its largest value. Each file holds the
tensors of the spliced maps, the plan (without the settings and the log of the search) and CPU seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from benchmarks.real_data import cifar10, deit_tiny, imagenet, resnet20
from rba_compress import Budget, Config, compress

TOLERANCE = 1e-6


@dataclass
class Run:
    """Files to write and to compare."""

    write: Path | None = None
    compare: tuple[Path, Path] | None = None
    networks: tuple[str, ...] = ("digits", "resnet20", "minilm", "deit_tiny")


def digits() -> tuple[nn.Module, Any, float]:
    """The default network of the package with 320 images."""
    from rba_compress.cli.digits import batches, digits_data, digits_model

    (images, labels), _ = digits_data()
    return digits_model(), batches((images[:320], labels[:320]), 64), 0.8


def deit() -> tuple[nn.Module, Any, float]:
    """DeiT-tiny with 200 images."""
    model = deit_tiny()
    return model, imagenet(model, "calibration")[:8], 0.75


def resnet() -> tuple[nn.Module, Any, float]:
    """ResNet-20 with 500 images."""
    images, labels = cifar10()
    return resnet20(), list(zip(images[:500].split(50), labels[:500].split(50), strict=True)), 0.8


def minilm() -> tuple[nn.Module, Any, float]:
    """MiniLM with 200 sentences."""
    from benchmarks.sentences import encoder, loader, sentences

    model, tokenizer = encoder()
    return model, loader(tokenizer, sentences("calibration", 200), 20), 0.83


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any, float]]] = {
    "digits": digits,
    "resnet20": resnet,
    "minilm": minilm,
    "deit_tiny": deit,
}


def chosen(plan: Any) -> list[dict[str, Any]]:
    """Return a plan's choices: units, blocks and maps, and the re-solved layers."""
    keys = ("chain", "start", "stop", "unit", "reads", "exact")
    parts = [{k: getattr(r, k) for k in keys} | {"map": str(r.map)} for r in plan.in_order]
    return parts + [{"refit": str(refit)} for refit in plan.refits]


def write(path: Path, networks: tuple[str, ...]) -> None:
    """Compress every network and keep what came of it."""
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, str] = {}
    for name in networks:
        model, loader, macs = NETWORKS[name]()
        started = time.process_time()
        result = compress(model, loader, budget=Budget(macs=macs), config=Config(seed=0))
        seconds = time.process_time() - started
        plan = {"seconds": round(seconds, 1), "plan": chosen(result.plan)}
        notes[name] = json.dumps(plan, sort_keys=True)
        tensors |= {f"{name}/{k}": v.detach().cpu().contiguous() for k, v in result.tensors.items()}
        print(f"{name}: {seconds:.1f} CPU seconds, {result.plan}", flush=True)
        save_file(tensors, path, metadata=notes)


def compare(old: Path, new: Path) -> bool:
    """Print how far two files are apart, network by network; return whether all are the same."""
    same = True
    with safe_open(old, "pt") as a, safe_open(new, "pt") as b:
        for name in a.metadata():
            plans = [json.loads(f.metadata()[name]) for f in (a, b)]
            keys = [{k for k in f.keys() if k.startswith(f"{name}/")} for f in (a, b)]  # noqa: SIM118
            apart = 0.0
            for key in keys[0] & keys[1]:
                x, y = a.get_tensor(key), b.get_tensor(key)
                apart = max(apart, float((x - y).abs().max() / x.abs().max().clamp_min(1e-30)))
            equal = plans[0]["plan"] == plans[1]["plan"] and keys[0] == keys[1] and apart <= TOLERANCE
            same &= equal
            ratio = plans[1]["seconds"] / plans[0]["seconds"]
            print(
                f"{name}: {'same' if equal else 'ANOTHER'} plan, tensors {apart:.1e}, CPU x {ratio:.2f}"
            )
    return same


if __name__ == "__main__":
    run = tyro.cli(Run)
    if run.write is not None:
        write(run.write, run.networks)
    if run.compare is not None and not compare(*run.compare):
        sys.exit(1)
