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
from typing import Any

import torch
import tyro
from torch import nn

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Plan, export_onnx, splice, supports
from rba_compress.batches import as_batch
from rba_compress.certificate import OnnxModel
from rba_compress.drafts import Solution, skip, with_read_outs
from rba_compress.measure import benchmark, cost


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
    blocks = tuple(skip(chain, b, b + 1, "read_out") for b in range(1, len(chain)))
    plans = {"exact": exact, "eleven read-outs": Plan(replacements=blocks)}
    slim = {name: splice(model, plan, {}) for name, plan in plans.items()}
    with torch.no_grad():
        torch.testing.assert_close(slim["exact"](x), model(x), rtol=1e-4, atol=1e-4)

    def onnx(net: nn.Module, path: Path) -> OnnxModel:
        export_onnx(net, path, x[:2])
        return OnnxModel(path)

    forms: dict[str, Any] = {
        "eager": lambda net, _: net,
        "compiled": lambda net, _: torch.compile(net),
        "ONNX Runtime": onnx,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form, build in forms.items():
            dense = build(model, Path(folder) / form / "model.onnx")
            for name, plan in plans.items():
                thin = build(slim[name], Path(folder) / form / name / "model.onnx")
                kept = cost(slim[name], as_batch(x)).macs / cost(model, as_batch(x)).macs
                for batch in (1, 32):
                    with torch.no_grad():
                        expected = slim[name](x[:batch])
                        output = thin(x[:batch])
                        found = output[0] if isinstance(output, tuple) else output
                        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
                    timed = benchmark(dense, thin, x[:batch], seconds=how.seconds)
                    row = {
                        "network": name,
                        "plan": str(plan) if name == "exact" else "blocks 1 to 11 read out, identity",
                        "form": form,
                        "batch": batch,
                        "macs_kept": round(kept, 4),
                        "latency": round(timed.ratio, 4),
                        "quartiles": [round(timed.ratio_low, 4), round(timed.ratio_high, 4)],
                        "dense_ms": round(timed.dense_ms, 2),
                        "pairs": timed.pairs,
                    }
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    how.out.write_text(json.dumps({"hardware": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Run))
