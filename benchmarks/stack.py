"""Claim: compressing and quantising add up, in ONNX Runtime and in OpenVINO.

A DeiT-tiny (500 ImageNet images to calibrate, 500 others to test) and the CIFAR ResNet-20 (1,000 and
2,000): the original, and the compressed network at a quarter, two fifths and half of its MACs off, each
in float and in int8, nothing trained. Latency is paired with the original's float file in the same
runtime, at batch 1 and 32.

`python -m benchmarks.stack --model deit --seeds 0` writes rows to `benchmarks/results/stack.jsonl`, in
place of those of the same model and seed, and makes the table and the picture anew.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

from benchmarks.real_data import cifar10, deit_tiny, imagenet, resnet20
from rba_compress import Budget, Config, export_onnx, profile, search, splice
from rba_compress.artifacts.certificate import Certificate, Runtime, open_in
from rba_compress.artifacts.int8 import AsNetwork
from rba_compress.core.batch import as_batch
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity
from rba_compress.profiling.latency import benchmark

RESULTS = Path(__file__).parent / "results"
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
BATCHES = (1, 32)


@dataclass
class Run:
    """Settings of the benchmark."""

    model: Literal["deit", "resnet20"] = "deit"
    seeds: tuple[int, ...] = (0,)
    off: tuple[float, ...] = (0.0, 0.25, 0.4, 0.5)
    """Shares of the MACs to take away; 0 is the original."""
    bound: float | None = None
    """Largest divergence that int8 may add, as in `export_onnx`."""
    seconds: float = 4.0
    """Seconds of timing for each pair of files."""
    out: Path = RESULTS / "stack.jsonl"


def loaded(how: Run) -> tuple[nn.Module, list[Any], list[Any]]:
    """The network, its calibration samples and its test samples, in batches of 25."""
    if how.model == "deit":
        model = deit_tiny()
        return model, imagenet(model, "calibration"), imagenet(model, "test")
    images, labels = cifar10()
    pairs = list(zip(images.split(25), labels.split(25), strict=True))
    return resnet20(), pairs[:40], pairs[80:]


def networks(
    model: nn.Module, data: list[Any], seed: int, off: Sequence[float]
) -> Iterator[tuple[float, nn.Module, float]]:
    """Yield (share of MACs off, network, seconds of its search)."""
    if 0.0 in off:
        yield 0.0, model, 0.0
    seen = profile(model, data, config=Config(seed=seed))
    for share in (share for share in off if share):
        start = time.perf_counter()
        found = search(model, seen, data, budget=Budget(macs=1 - share))
        yield share, splice(model, found.plan, found.tensors), time.perf_counter() - start


def files(
    network: nn.Module, data: list[Any], how: Run, folder: Path
) -> dict[str, tuple[Path, Certificate]]:
    """Write a network in float and in int8; return file and certificate of each."""
    found = {}
    for form in ("float", "int8"):
        path = folder / form / "model.onnx"
        path.parent.mkdir(parents=True)
        given: dict[str, Any] = {"quantize": "int8", "bound": how.bound} if form == "int8" else {}
        example = data if form == "int8" else data[0][0]
        made = export_onnx(network, path, example, runtimes=RUNTIMES, seconds=0.0, **given)
        found[form] = path, made
    return found


def rows_of(how: Run, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each network, form and runtime."""
    model, data, loader = loaded(how)
    test = [as_batch(pair) for pair in loader]
    examples = [torch.cat([images for images, _ in loader[:2]])[:size] for size in BATCHES]
    with tempfile.TemporaryDirectory() as aside:
        first: Path | None = None
        for off, network, seconds in networks(model, data, seed, (0.0, *filter(None, how.off))):
            start = time.perf_counter()
            made = files(network, data, how, Path(aside) / str(off))
            exported = time.perf_counter() - start
            first = first or made["float"][0]
            with torch.no_grad():
                output = network(test[0].args[0])
            for form, (path, certificate) in made.items():
                for runtime in RUNTIMES:
                    runner = open_in(runtime, path)
                    found = fidelity(model, AsNetwork(runner, output), test, "kl")
                    low, high = found.drop_low, found.drop_high
                    quantized = certificate.quantized
                    yield {
                        "model": how.model,
                        "seed": seed,
                        "off": off,
                        "form": form,
                        "runtime": runtime,
                        "macs_kept": round(cost(network, test[0]).macs / cost(model, test[0]).macs, 4),
                        "top1_original": found.accuracy_original,
                        "top1": found.accuracy_compressed,
                        "drop": [low and round(low, 4), high and round(high, 4)],
                        "agreement": found.agreement,
                        "kl": float(f"{found.divergence:.4g}"),
                        "megabytes": round(certificate.compressed.bytes / 1e6, 2),
                        "latency": {
                            len(x): timed(runtime, first, path, x, how.seconds) for x in examples
                        },
                        "in_float": [*quantized.floats] if quantized else None,
                        "search_seconds": round(seconds),
                        "export_seconds": round(exported),
                    }


def timed(
    runtime: Runtime, first: Path, path: Path, x: torch.Tensor, seconds: float
) -> dict[str, float]:
    """Latency of a file over that of the original in float, in pairs."""
    found = benchmark(open_in(runtime, first), open_in(runtime, path), x, seconds=seconds)
    return {
        "ms": round(found.compressed_ms, 3),
        "ratio": round(found.ratio, 4),
        "low": round(found.ratio_low, 4),
        "high": round(found.ratio_high, 4),
    }


def main(how: Run) -> None:
    """Print a JSON line for each file in each runtime, and write rows, table and picture."""
    known = how.out.read_text().splitlines() if how.out.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in known]
    for seed in how.seeds:
        rows = [row for row in rows if (row["model"], row["seed"]) != (how.model, seed)]
        for row in rows_of(how, seed):
            print(json.dumps(row), flush=True)
            rows.append(json.loads(json.dumps(row)))
            how.out.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    if rows:
        how.out.with_suffix(".md").write_text(table(rows))
        draw(rows, how.out.with_suffix(".png"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Compressed and quantised",
        "",
        "Top-1 on test images, KL to the original in float, and latency over that of the original in "
        "float in the same runtime (median of pairs, quartiles in brackets). Nothing is trained.",
        "",
        "| model | MACs off | form | runtime | seed | top-1 | of original | KL | MB | batch 1 "
        "| batch 32 | operations in float |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(rows, key=lambda r: (r["model"], r["runtime"], r["form"], r["off"], r["seed"])):
        times = [r["latency"][str(size)] for size in BATCHES]
        said = " | ".join(f"{t['ratio']:.3f} ({t['low']:.3f} to {t['high']:.3f})" for t in times)
        floats = "" if r["in_float"] is None else len(r["in_float"])
        lines.append(
            f"| {r['model']} | {100 * r['off']:.0f} % | {r['form']} | {r['runtime']} | {r['seed']} "
            f"| {r['top1']:.3f} | {r['top1'] / r['top1_original']:.3f} | {r['kl']:.4f} "
            f"| {r['megabytes']:.1f} | {said} | {floats} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw top-1 over latency at batch 32, a line for each form and runtime."""
    import matplotlib.pyplot as plt

    models = sorted({row["model"] for row in rows})
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for runtime, colour in zip(RUNTIMES, ("C0", "C1"), strict=True):
            for form, style in (("float", "o--"), ("int8", "o-")):
                own = [
                    r for r in rows if (r["model"], r["runtime"], r["form"]) == (model, runtime, form)
                ]
                own.sort(key=lambda r: (r["seed"], r["off"]))
                x = [r["latency"]["32"]["ratio"] for r in own]
                y = [r["top1"] / r["top1_original"] for r in own]
                axis.plot(x, y, style, color=colour, label=f"{runtime}, {form}", markersize=4)
        axis.set(title=model, xlabel="latency over the original's in float, batch 32")
        axis.set_ylabel("top-1 over the original's")
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Run))
