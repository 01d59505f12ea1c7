"""Claim: what an engineer gets from each tool that makes a vision transformer cheaper without training.

The real packages, on one DeiT-tiny, the same 500 calibration and 500 test images, and one machine. Each
peer is the code that its user writes, run as it stands here: its lines are counted. Nothing is
installed: a package that is missing is a row that says so.

`python -m benchmarks.peers` writes `benchmarks/results/peers.jsonl` and its table; rows of peers that
are not asked for stay.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import RBAError, export_onnx
from rba_compress.artifacts.certificate import open_in
from rba_compress.artifacts.int8 import AsNetwork
from rba_compress.core.batch import as_batch
from rba_compress.core.inference import evaluating
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity
from rba_compress.profiling.latency import benchmark

RESULTS = Path(__file__).parent / "results"
BATCH = 32

PRUNED = """
import torch_pruning as tp

heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
pruner = tp.pruner.MetaPruner(
    model,
    images[:1],
    importance=IMPORTANCE,
    pruning_ratio=0.25,
    num_heads=heads,
    prune_head_dims=False,
    prune_num_heads=True,
    head_pruning_ratio=1 / 3,
    ignored_layers=[model.head, model.patch_embed.proj],
    root_module_types=[torch.nn.Linear],
)
pruner.step()
for block in model.blocks:
    block.attn.num_heads = pruner.num_heads[block.attn.qkv]
    block.attn.attn_dim = block.attn.qkv.out_features // 3
    block.attn.head_dim = block.attn.attn_dim // block.attn.num_heads
"""
"""User code by peer: `model`, `loader`, `images` (a batch) and `path` are given; it leaves `model`, or
writes an ONNX file to `path`."""
PEERS: dict[str, tuple[str, str]] = {
    "original": ("", "yes"),
    "Torch-Pruning, magnitude": (
        PRUNED.replace("IMPORTANCE", "tp.importance.GroupMagnitudeImportance(p=2)"),
        "no: the whole module is pickled",
    ),
    "uniform token merging": (
        """
from benchmarks.tome import ToMe

model = ToMe(model, {block: 8 for block in range(11)}).eval()
""",
        "no: its code is needed",
    ),
    "torchao, int8 dynamic": (
        """
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

quantize_(model, Int8DynamicActivationInt8WeightConfig())
""",
        "no: torchao is needed",
    ),
    "ONNX Runtime, int8 dynamic": (
        """
from onnxruntime.quantization import quantize_dynamic
from rba_compress import export_onnx

export_onnx(model, path.with_name("float.onnx"), images[:8])
quantize_dynamic(path.with_name("float.onnx"), path)
""",
        "yes, as ONNX",
    ),
    "rba_compress, 40 % off": (
        """
from rba_compress import Budget, compress

model = compress(model, loader, budget=Budget(macs=0.6)).model
""",
        "as ONNX; in Python with the package",
    ),
    "rba_compress, 40 % off, int8": (
        """
from rba_compress import export_onnx

export_onnx(model, path, loader, quantize="int8")
""",
        "yes, as ONNX",
    ),
}
AFTER = {"rba_compress, 40 % off, int8": "rba_compress, 40 % off"}
"""Peers whose code starts from the network that another one left; the other's lines and minutes count,
too.
"""


@dataclass
class Run:
    """Settings of the benchmark."""

    peers: tuple[str, ...] = tuple(PEERS)
    seconds: float = 5.0
    """Seconds of timing for each pair."""
    out: Path = RESULTS / "peers.jsonl"


def row(peer: str, how: Run, left: dict[str, tuple[nn.Module, float]]) -> dict[str, Any]:
    """Run a peer's code, and measure what it leaves.

    Args:
        left: the network and the minutes of each peer that ran before; this one's are added.
    """
    code, reloads = PEERS[peer]
    first_code = PEERS[AFTER[peer]][0] if peer in AFTER else ""
    given, before = left.get(AFTER.get(peer, ""), (deit_tiny(), 0.0))
    original = deit_tiny()
    loader, test = imagenet(original, "calibration"), imagenet(original, "test")
    images, batches = loader[0][0], [as_batch(pair) for pair in test]
    lines = {line for line in (first_code + code).splitlines() if line.strip()}
    said: dict[str, Any] = {"peer": peer, "lines": len(lines)}
    with tempfile.TemporaryDirectory() as aside:
        path, first = Path(aside) / "model.onnx", Path(aside) / "original.onnx"
        names: dict[str, Any] = {"torch": torch, "model": given, "loader": loader}
        names |= {"images": images, "path": path}
        start = time.perf_counter()
        try:
            exec(compile(code, peer, "exec"), names)  # nosec B102 # the text above
        except ImportError as error:
            return said | {"missing": f"{error.name} is not installed"}
        minutes = before + (time.perf_counter() - start) / 60
        left[peer] = names["model"], minutes
        export_onnx(original, first, images[:8])
        network, in_file = names["model"], path.exists()
        if not in_file:
            try:
                export_onnx(network, path, images[:8])
            except RBAError as error:
                said["onnx"] = f"not exported: {type(error).__name__}"
        with torch.no_grad():
            output = original(images[:1])
        runner: nn.Module = AsNetwork(open_in("onnxruntime", path), output) if in_file else network
        with evaluating(runner):
            found = fidelity(original, runner, batches, "kl")
        x = torch.cat([part for part, _ in test[:2]])[:BATCH]
        said |= {
            "top1_original": found.accuracy_original,
            "top1": found.accuracy_compressed,
            "agreement": found.agreement,
            "kl": float(f"{found.divergence:.4g}"),
            "macs_kept": round(cost(network, batches[0]).macs / cost(original, batches[0]).macs, 4),
            "minutes": round(minutes, 2),
            "reloads": reloads,
        }
        if path.exists():
            files = open_in("onnxruntime", first), open_in("onnxruntime", path)
            said["megabytes"] = round(path.stat().st_size / 1e6, 2)
            said["onnxruntime"] = paired(*files, x, how.seconds)
        if not in_file:
            said["eager"] = paired(original, network, x, how.seconds)
    return said


def paired(first: nn.Module, second: nn.Module, x: torch.Tensor, seconds: float) -> list[float]:
    """Latency of the second over that of the first: median of the pairs, and quartiles."""
    found = benchmark(first, second, x, seconds=seconds)
    return [round(value, 4) for value in (found.ratio, found.ratio_low, found.ratio_high)]


def main(how: Run) -> None:
    """Print a JSON line for each peer, and write rows and table."""
    known = how.out.read_text().splitlines() if how.out.exists() else []
    rows: dict[str, dict[str, Any]] = {each["peer"]: each for each in map(json.loads, known)}
    left: dict[str, tuple[nn.Module, float]] = {}
    for peer in how.peers:
        if peer in AFTER and AFTER[peer] not in left:
            raise SystemExit(f"{peer!r} goes on from {AFTER[peer]!r}: name it before")
        rows[peer] = row(peer, how, left)
        print(json.dumps(rows[peer]), flush=True)
        ordered = [rows[name] for name in PEERS if name in rows]
        how.out.write_text("".join(f"{json.dumps(each)}\n" for each in ordered))
        how.out.with_suffix(".md").write_text(table(ordered))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Beside other tools",
        "",
        "DeiT-tiny, 500 test images, nothing trained. Latency at batch 32 over the original's in "
        "float, in torch and in ONNX Runtime (median of pairs, quartiles in brackets). Lines are those "
        "that a user writes.",
        "",
        "| tool | top-1 | agreement | KL | MACs kept | MB | torch | ONNX Runtime | lines | minutes "
        "| reloads without the tool |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def ratio(found: Any) -> str:
        return "" if found is None else f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"

    for r in rows:
        if "missing" in r:
            lines.append(f"| {r['peer']} | {r['missing']} |" + " |" * 9)
            continue
        lines.append(
            f"| {r['peer']} | {r['top1']:.3f} | {r['agreement']:.3f} | {r['kl']:.4f} "
            f"| {r['macs_kept']:.3f} | {r.get('megabytes', '')} | {ratio(r.get('eager'))} "
            f"| {ratio(r.get('onnxruntime')) or r.get('onnx', '')} | {r['lines']} | {r['minutes']} "
            f"| {r['reloads']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Run))
