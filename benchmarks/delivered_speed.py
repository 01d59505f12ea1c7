"""Claim: a compressed network is as much faster as it is smaller: latency falls as MACs do.

The original and the compressed network are timed in turn in one run, at batch 1 and 32, in eager mode,
compiled, and in ONNX Runtime: the real DeiT-tiny with three plans, each of one kind of replacement, and
a ViT-B/16 with random weights and all kinds at once; both with merged positions at three costs, and
with narrower blocks. `excess` is the ratio of latencies over the share of MACs that is kept; 1 is
ideal. The plans are written by hand: time does not depend on weights.

`python -m benchmarks.delivered_speed` writes `benchmarks/results/delivered_speed.json`.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from torch import Tensor, nn

from benchmarks.real_data import deit_tiny
from rba_compress import Plan, export_onnx, splice, supports
from rba_compress.artifacts.certificate import OnnxModel
from rba_compress.core.batch import as_batch
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.plan import Chain, Replacement
from rba_compress.profiling.cost import cost
from rba_compress.profiling.latency import benchmark
from rba_compress.units.registry import unit_of
from rba_compress.units.width import WidthUnit, narrowed

MERGES = {
    "25 % off by merges": {4: 25, 7: 33, 8: 25, 9: 33},
    "40 % off by merges": {3: 33, 4: 33, 6: 33, 8: 25},
    "50 % off by merges": {1: 16, 2: 25, 3: 33, 4: 33, 5: 25, 7: 16},
}
"""Positions that blocks merge; the last block computes the read positions alone."""
WIDTHS = {
    "hidden channels halved": ("hidden_width",),
    "ranks of attention halved": ("qk_rank", "vo_rank"),
    "heads taken": ("head_width",),
}
"""Units that narrow every block, about by half."""


@dataclass
class Run:
    networks: tuple[str, ...] = ("deit_tiny", "vit_base")
    plans: tuple[str, ...] = ()
    """Plans to time; by default all of a network."""
    seconds: float = 20.0
    """For each comparison, and at least seven pairs."""
    out: Path = Path(__file__).parent / "results" / "delivered_speed.json"


def plans(chain: Chain) -> dict[str, Plan]:
    """A plan for each kind of replacement."""

    def mapped(start: int, stop: int, unit: str = "span") -> Replacement:
        return unit_of(unit).choice(chain, start, stop, MapSpec(kind="shrunk", shrink=0.7))

    last = len(chain) - 1
    exact = unit_of("read_out").choice(chain, last, last + 1).model_copy(update={"exact": True})

    def merged(counts: dict[int, int]) -> Plan:
        unit = unit_of("token_merge")
        merges = (unit.choice(chain, b, b + 1, float(count)) for b, count in counts.items())
        return Plan(replacements=(*merges, exact))

    return {
        "blocks skipped": Plan(
            replacements=tuple(unit_of("span").choice(chain, b, b + 1) for b in (4, 6, 8))
        ),
        "spans mapped": Plan(replacements=(mapped(3, 5), mapped(7, 9))),
        "blocks thinned": Plan(
            replacements=(
                mapped(4, 5, "attention_free"),
                mapped(6, 7, "mlp_free"),
                mapped(8, 9, "mlp_free"),
                mapped(last - 1, last, "read_out"),
                exact,
            )
        ),
        "all kinds": Plan(
            replacements=(
                unit_of("span").choice(chain, 3, 4),
                mapped(5, 7),
                mapped(8, 9, "attention_free"),
                mapped(9, 10, "mlp_free"),
                exact,
            )
        ),
    } | {name: merged(counts) for name, counts in MERGES.items()}


def narrower(model: nn.Module, chain: Chain, units: tuple[str, ...]) -> tuple[Plan, dict[str, Tensor]]:
    """A plan that narrows every block by some units, and its tensors, parts of the original's."""
    replacements: list[Replacement] = []
    tensors: dict[str, Tensor] = {}
    for b, block in enumerate(chain.blocks):
        for name in units:
            unit, width = unit_of(name), block.width(name)
            assert isinstance(unit, WidthUnit)
            assert width is not None
            kept, parts, _ = unit.tried(model, block, width)
            new = narrowed(unit.choice(chain, b, b + 1), kept, parts, None)
            replacements.append(new)
            tensors |= {f"{new.key}{part}": tensor for part, tensor in parts.items()}
    return Plan(replacements=tuple(replacements)), tensors


def goals(plan: str, form: str) -> dict[int, float]:
    """Return the highest `excess` that is wanted, by batch size."""
    if plan in WIDTHS:
        return {32: 1.06}
    if plan not in MERGES:
        return {1: 1.08, 32: 1.03}
    return {1: 1.15 if form == "eager" else 1.08, 32: 1.06}


def networks(name: str) -> tuple[nn.Module, list[str]]:
    """A network, and the plans to time."""
    if name == "deit_tiny":
        own = ["blocks skipped", "spans mapped", "blocks thinned"]
        return deit_tiny().eval(), [*own, *MERGES, *WIDTHS]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("vit_base_patch16_224").eval(), ["all kinds", *MERGES, *WIDTHS]


def spliced(model: nn.Module, plan: Plan) -> nn.Module:
    """The compressed network, its maps near the identity."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for replacement in plan.replacements:
        if replacement.map.kind == "shrunk":
            d = replacement.width
            noise = torch.randn(d, d, generator=generator)
            tensors[f"{replacement.key}weight"] = torch.eye(d) + 0.02 * noise / d**0.5
            tensors[f"{replacement.key}bias"] = torch.zeros(d)
    return splice(model, plan, tensors)


def forms(folder: Path, example: Tensor) -> dict[str, Callable[[nn.Module, str], Any]]:
    """Ways to run a network, by what builds it under a name of its own."""

    def onnx(net: nn.Module, name: str) -> nn.Module:
        path = folder / name / "model.onnx"
        export_onnx(net, path, example)
        return OnnxModel(path)

    return {
        "eager": lambda net, _: net,
        "compiled": lambda net, _: torch.compile(net, dynamic=False),
        "ONNX Runtime": onnx,
    }


def main(how: Run) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, 224, 224, generator=generator)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for network in how.networks:
            model, wanted = networks(network)
            (chain,) = supports(model, x[:2]).chains
            for form, build in forms(Path(folder), x[:2]).items():
                torch.compiler.reset()
                original = build(model, f"{network} original")
                for name in (name for name in wanted if not how.plans or name in how.plans):
                    if name in WIDTHS:
                        thin = splice(model, *narrower(model, chain, WIDTHS[name]))
                    else:
                        thin = spliced(model, plans(chain)[name])
                    kept = cost(thin, as_batch(x[:1])).macs / cost(model, as_batch(x[:1])).macs
                    compressed = build(thin, f"{network} {name}")
                    for batch, goal in goals(name, form).items():
                        found = timed(original, compressed, thin, x[:batch], seconds=how.seconds)
                        row = {
                            "network": network,
                            "plan": name,
                            "form": form,
                            "batch": batch,
                            "macs_kept": round(kept, 4),
                            "excess": round(found["latency"] / kept, 4),
                            "goal": goal,
                            **found,
                        }
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    new = {(row["network"], row["plan"]) for row in rows}
    before = [row for row in written(how.out) if (row["network"], row["plan"]) not in new]
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    how.out.write_text(json.dumps({"hardware": machine, "rows": [*before, *rows]}, indent=1) + "\n")


def written(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier run."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def timed(
    original: nn.Module, compressed: nn.Module, expected: nn.Module, x: Tensor, *, seconds: float
) -> dict[str, float]:
    """The paired ratio, after a check that the timed network is the compressed one."""
    with torch.no_grad():
        output = compressed(x)
        found = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(found, expected(x), rtol=1e-3, atol=1e-3)
    latency = benchmark(original, compressed, x, seconds=seconds)
    return {
        "latency": round(latency.ratio, 4),
        "low": round(latency.ratio_low, 4),
        "high": round(latency.ratio_high, 4),
        "dense_ms": round(latency.original_ms, 2),
        "pairs": latency.pairs,
    }


if __name__ == "__main__":
    main(tyro.cli(Run))
