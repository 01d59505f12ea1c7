"""Claim: what is not computed is not waited for: a read-out runs at its share of MACs.

A real DeiT-tiny against itself with the exact read-out of its last block, and with eleven of its blocks
computed for the class token alone (so that a block's own share shows), in eager mode, compiled, and in
ONNX Runtime, at batch 1 and 32. Paired ratios in one run; the outputs are compared before anything is
timed. `python -m benchmarks.read_out_latency` writes `benchmarks/results/read_out_latency.json`.
"""

from __future__ import annotations

import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.delivered_speed import forms, timed
from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Plan, splice, supports
from rba_compress.core.batch import as_batch
from rba_compress.planning.state import Solution, with_read_outs
from rba_compress.profiling.cost import cost
from rba_compress.units.registry import unit_of


@dataclass
class Run:
    seconds: float = 20.0
    """For each comparison."""
    out: Path = Path(__file__).parent / "results" / "read_out_latency.json"


def main(how: Run) -> None:
    model = deit_tiny().eval()
    x = torch.cat([images for images, _ in imagenet(model, "test", 16)[:2]])
    (chain,) = supports(model, x).chains
    exact = with_read_outs(Solution(Plan(), {}), [chain]).plan
    blocks = tuple(unit_of("read_out").choice(chain, b, b + 1) for b in range(1, len(chain)))
    plans = {"exact": exact, "eleven read-outs": Plan(replacements=blocks)}
    compressed = {name: splice(model, plan, {}) for name, plan in plans.items()}
    with torch.no_grad():
        torch.testing.assert_close(compressed["exact"](x), model(x), rtol=1e-4, atol=1e-4)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form, build in forms(Path(folder), x[:2]).items():
            original = build(model, f"{form} original")
            for name, plan in plans.items():
                thin = build(compressed[name], f"{form} {name}")
                kept = cost(compressed[name], as_batch(x)).macs / cost(model, as_batch(x)).macs
                for batch in (1, 32):
                    found = timed(original, thin, compressed[name], x[:batch], seconds=how.seconds)
                    row = {
                        "network": name,
                        "plan": str(plan) if name == "exact" else "blocks 1 to 11 read out, identity",
                        "form": form,
                        "batch": batch,
                        "macs_kept": round(kept, 4),
                        **found,
                    }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    how.out.write_text(json.dumps({"hardware": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Run))
