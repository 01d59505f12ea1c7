"""Claim: everything of a profile runs on the model's device, at the speed of inference.

A ViT with random weights in bf16 and fp32 (tf32 off in products of matrices), on images made on the
host. `plain` is a forward pass without gradients over just the images that `profile` fits on, in its
batches, dealt beforehand, pinned and of the model's dtype: nothing but copying and computing. `stream`
is `calibrate` on the same batches. `profile` is the whole call: it reads and deals the loader, finds
the chains and hashes the weights besides, most of which takes as long for few images as for many
(`call_seconds`). The three run in turn; a share is plain's time over the other's, with its quartiles.
MACs a second are compared with that rate, too; those of the
moments with that of float32, whatever the model's dtype.

Before anything is timed, an affine map of the profile is compared with float64 least squares on the
rows of the same forward passes. `python -m benchmarks.gpu` writes `benchmarks/results/gpu.json`, and
runs on a CPU too: `--device cpu --networks vit_tiny_patch16_224 --batch 8 --images 32 --matmul 1024`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from torch import Tensor, nn

from rba_compress import Config, Profile, profile, splice
from rba_compress.core.batch import Batch, as_batch
from rba_compress.core.inference import evaluating
from rba_compress.core.loader import Split
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.outputs import main_output
from rba_compress.core.plan import Chain
from rba_compress.graph.activations import as_rows, run_with_streams
from rba_compress.linalg.maps import fit_map
from rba_compress.linalg.moments import full_precision
from rba_compress.planning.span_fits import fit_spans
from rba_compress.profiling.cost import cost
from rba_compress.profiling.latency import benchmark
from rba_compress.profiling.profiler import calibrate, fingerprint
from rba_compress.units.offers import discover

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GOALS = {"stream_share": 0.7, "profile_share": 0.7, "fit_seconds": 5.0}
TOLERANCE = 5e-5
"""Of the fitted map, relative: ten times what float32 products leave, half of what tf32 ones would."""
AFFINE = MapSpec(kind="affine", damping=1e-4)

Calls = dict[str, Callable[[], object]]


@dataclass
class Run:
    networks: tuple[str, ...] = ("vit_base_patch16_224", "vit_large_patch16_224")
    """Names of timm ViTs, of four blocks or more."""
    dtypes: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    batch: int = 128
    """Images in a batch of the loader; half of them are fitted on."""
    images: int = 2048
    pairs: int = 3
    """How often plain and profile are timed in turn; three or more."""
    seconds: float = 5.0
    """For each comparison of latencies."""
    matmul: int = 8192
    """Side of the square matrices whose product sets the device's rate."""
    window: int | None = None
    """The longest span that is profiled."""
    arguments: dict[str, int] = field(default_factory=dict)
    """Of `timm.create_model`, such as img_size and depth."""
    seed: int = 0
    out: Path = Path(__file__).parent / "results" / "gpu.json"


def main(how: Run) -> None:
    device = torch.device(how.device)
    kinds: dict[str, None] = dict.fromkeys((*how.dtypes, "fp32"))  # the dtype of the moments' products
    rates = {kind: matrix_rate(how.matmul, DTYPES[kind], device) for kind in kinds}
    head = {
        "hardware": hardware(device),
        "options": {name: value for name, value in asdict(how).items() if name != "out"},
        "goals": GOALS,
        "tolerance": TOLERANCE,
        "matrix_gmacs_s": {kind: round(rate / 1e9, 1) for kind, rate in rates.items()},
    }
    rows: list[dict[str, Any]] = []
    for network in how.networks:
        for kind in how.dtypes:
            start = time.perf_counter()
            row = measured(network, kind, rates, how)
            rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
            print(json.dumps(rows[-1]), flush=True)
            how.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


def hardware(device: torch.device) -> dict[str, Any]:
    named: dict[str, Any] = {"device": device.type, "cores": os.cpu_count()}
    if device.type == "cuda":
        named = {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {**named, "threads": torch.get_num_threads(), "torch": torch.__version__}


def timed(device: torch.device, call: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds of a call, and the device's peak memory in MB; on a CPU None."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    call()
    if device.type != "cuda":
        return time.perf_counter() - start, None
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, torch.cuda.max_memory_allocated(device) / 2**20


def in_turn(device: torch.device, calls: Calls) -> dict[str, tuple[float, float | None]]:
    gc.collect()  # a recorded graph holds tensors in cycles, which would count as plain's memory
    return {name: timed(device, call) for name, call in calls.items()}


def matrix_rate(size: int, dtype: torch.dtype, device: torch.device, *, times: int = 30) -> float:
    """Multiply-accumulates a second of a product of two square matrices; no tf32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    with full_precision(device):
        torch.mm(a, b, out=out)
        seconds, _ = timed(device, lambda: [torch.mm(a, b, out=out) for _ in range(times)])
    return times * size**3 / seconds


def host_images(how: Run, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(how.seed)
    made = (torch.randn(how.batch, *shape, generator=generator) for _ in range(how.images // how.batch))
    return [on_host(images.to(dtype), how) for images in made]


def on_host(images: Tensor, how: Run) -> Tensor:
    return images.pin_memory() if how.device.startswith("cuda") else images


def forward(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    with evaluating(model):
        return [main_output(batch.to(model).run(model)) for batch in batches]


def thirds(chain: Chain) -> list[int]:
    """Three blocks of a chain, none the first."""
    return [len(chain) * quarter // 4 for quarter in (1, 2, 3)]


def measured(network: str, kind: str, rates: Mapping[str, float], how: Run) -> dict[str, Any]:
    device, dtype = torch.device(how.device), DTYPES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        model = timm.create_model(network, pretrained=False, **how.arguments).eval().to(device, dtype)
    side = how.arguments.get("img_size", model.default_cfg["input_size"][-1])
    loader, config = host_images(how, (3, side, side), dtype), Config(window=how.window, seed=how.seed)
    numbered = [
        (places[0], as_batch(on_host(batch.args[0], how)))
        for _, places, batch in Split(loader, config.seed).deal("fit")
    ]
    batches = [batch for _, batch in numbered]
    assert all(bool(torch.isfinite(output).all()) for output in forward(model, batches))
    seen = profile(model, loader, config=config)
    (chain,), original = (found.chain for found in seen.chains), seen.original.macs
    apart = parity(model, chain, batches, how.window)
    assert apart < TOLERANCE, f"the map is {apart:.2g} from least squares in float64"
    length, macs = sum(map(len, batches)), {"original": original, "moments": moments_macs(seen)}
    images = {"loader_images": how.batch * len(loader), "images": length}
    row: dict[str, Any] = {"network": network, "dtype": kind, **images, "parity": apart}
    row |= of_profile(model, seen, how)
    del seen  # its moments would count as plain's memory

    once: Calls = {
        "discover": lambda: discover(model, as_batch(loader[0])),
        "fingerprint": lambda: fingerprint(model),
        "read": lambda: list(Split(loader, config.seed).part("fit")),
    }
    calls: Calls = {
        "plain": lambda: forward(model, batches),
        "stream": lambda: calibrate(model, [chain], numbered, window=how.window, stride=config.stride),
        "profile": lambda: profile(model, loader, config=config),
    }
    call_seconds = {name: timed(device, call)[0] for name, call in once.items()}
    runs = [in_turn(device, calls) for _ in range(how.pairs)]
    call_seconds |= {name: statistics.median(run[name][0] for run in runs) for name in calls}
    plain = call_seconds["plain"]
    rate: dict[str, float] = row["gmacs_s"]
    rate["plain"] = round(length * original / plain / 1e9, 1)
    bound = {name: rates["fp32" if name == "moments" else kind] / 1e9 for name in rate}
    return row | {
        "images_s": {name: round(length / call_seconds[name], 2) for name in calls},
        "stream_share": spread([run["plain"][0] / run["stream"][0] for run in runs]),
        "profile_share": spread([run["plain"][0] / run["profile"][0] for run in runs]),
        "call_seconds": {name: round(value, 4) for name, value in call_seconds.items()},
        "gmacs": {name: round(value / 1e9, 4) for name, value in macs.items()},
        "of_matrix_rate": {name: round(value / bound[name], 4) for name, value in rate.items()},
        "peak_mb": {name: peak([run[name][1] for run in runs]) for name in ("plain", "profile")},
    }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def peak(found: Sequence[float | None]) -> float | None:
    known = [value for value in found if value is not None]
    return round(max(known), 1) if known else None


def parity(model: nn.Module, chain: Chain, batches: Sequence[Batch], window: int | None) -> float:
    """Return the relative distance of one span's affine map from ridge least squares in float64.

    The first batches with four rows a channel are used: with fewer the damping decides, and rounding
    shows. The rows are those of the very forward passes that the moments are taken of, read by hooks,
    and are solved on the CPU.
    """
    enough = -(-4 * chain.width // (chain.positions * len(batches[0])))
    assert len(batches) >= enough, f"{len(batches)} batches are too few rows: give more --images"
    start = thirds(chain)[0]
    stop = start + min(thirds(chain)[1] - start, window or len(chain))
    rows: dict[int, list[Tensor]] = {start: [], stop: []}

    def kept(boundary: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: rows[boundary].append(as_rows(output, chain.axis).cpu().double())

    blocks = [(b, model.get_submodule(chain.blocks[b - 1].path)) for b in rows]
    handles = [block.register_forward_hook(kept(b)) for b, block in blocks]
    try:
        (state,), _ = calibrate(model, [chain], enumerate(batches[:enough]), window=window)
    finally:
        for handle in handles:
            handle.remove()
    fit = fit_map(AFFINE, state.moments.pair(start, stop))
    x, y = torch.cat(rows[start]), torch.cat(rows[stop])
    mean_x, mean_y = x.mean(0), y.mean(0)
    damping = (AFFINE.damping * (x - mean_x).square().sum(0).mean()).sqrt()
    ridge = damping * torch.eye(chain.width, dtype=x.dtype)
    weight = torch.linalg.lstsq(
        torch.cat([x - mean_x, ridge]), torch.cat([y - mean_y, torch.zeros_like(ridge)])
    ).solution  # (d, d), y = x @ weight
    wanted = torch.cat([weight.T, (mean_y - mean_x @ weight)[:, None]], 1)
    found = torch.cat([fit.tensors["weight"], fit.tensors["bias"][:, None]], 1).cpu()
    return float((found - wanted).norm() / wanted.norm())


def of_profile(model: nn.Module, seen: Profile, how: Run) -> dict[str, Any]:
    """Measure the uses of a profile: every span fitted, and three blocks replaced."""
    (profiled,) = seen.chains
    moments, device = profiled.moments, torch.device(how.device)
    spans = [(i, j) for j in range(moments.boundaries) for i in range(max(0, j - moments.window), j)]
    fit_seconds, _ = timed(
        device, lambda: [fit_map(AFFINE, moments.pair(*s, spectrum=True)).spec for s in spans]
    )
    solution = fit_spans(profiled, [(b, b + 1) for b in thirds(profiled.chain)], AFFINE)
    compressed = splice(model, solution.plan, solution.tensors)
    assert all(bool(torch.isfinite(output).all()) for output in forward(compressed, [seen.example]))
    macs = {"original": seen.original.macs, "compressed": cost(compressed, seen.example).macs}
    rows, milliseconds = [], {"original": 0.0, "compressed": 0.0}
    for batch in (1, how.batch):
        found = benchmark(
            model, compressed, seen.example.select(list(range(batch))), seconds=how.seconds
        )
        milliseconds = {"original": found.original_ms, "compressed": found.compressed_ms}
        latency = {"median": found.ratio, "low": found.ratio_low, "high": found.ratio_high}
        rows.append(
            {"batch": batch, "pairs": found.pairs}
            | {name: round(value, 4) for name, value in latency.items()}
            | {f"{name}_ms": round(value, 4) for name, value in milliseconds.items()}
        )
    rate = {name: how.batch * macs[name] / milliseconds[name] * 1e3 for name in macs}
    rate["moments"] = folding_rate(model, seen)
    return {
        "fits": len(spans),
        "fit_seconds": round(fit_seconds, 3),
        "macs_kept": round(macs["compressed"] / macs["original"], 4),
        "latency": rows,
        "gmacs_s": {name: round(value / 1e9, 1) for name, value in rate.items()},
    }


def moments_macs(seen: Profile) -> int:
    """Multiply-accumulates of one image's products, every position taken: (d, d) for each kept pair."""
    (profiled,) = seen.chains
    pairs = sum(map(len, profiled.moments.comoment))
    return pairs * profiled.chain.positions * profiled.chain.width**2


def folding_rate(model: nn.Module, seen: Profile, *, times: int = 5) -> float:
    """Multiply-accumulates a second of folding one batch's streams, centring and sums included."""
    (profiled,), batch = seen.chains, seen.example.to(model)
    with evaluating(model):
        _, (streams,) = run_with_streams(model, [profiled.chain], batch)
    rows = [as_rows(h, profiled.chain.axis) for h in streams]
    moments = profiled.moments + profiled.moments  # of its own, and the same window
    moments.update(rows)
    seconds, _ = timed(
        rows[0].device, lambda: [(moments.update(rows), moments.n) for _ in range(times)]
    )
    return times * len(batch) * moments_macs(seen) / seconds


if __name__ == "__main__":
    main(tyro.cli(Run))
