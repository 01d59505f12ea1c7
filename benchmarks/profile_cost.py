"""Claim: all that any map over any span needs is seen at little more than the price of a forward pass.

Over the images that `profile` takes of a loader, in turn: (a) a plain forward pass without gradients,
(b) the whole call of `profile`, then a map over every span; (c) once, what one would do otherwise:
activations stored, `torch.linalg.lstsq` for every span. Then each lever by itself, on streams of real
images. `python -m benchmarks.profile_cost` appends one JSON line a network to
`benchmarks/results/profile_cost.jsonl`.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import tyro
from torch import Tensor, nn

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Config, Profile, profile
from rba_compress.core.batch import Batch, as_batch
from rba_compress.core.inference import evaluating
from rba_compress.core.loader import Split, read
from rba_compress.core.map_spec import Kind, MapSpec
from rba_compress.core.plan import Chain
from rba_compress.graph.activations import as_rows, run_with_streams
from rba_compress.linalg import moments
from rba_compress.linalg.maps import fit_map
from rba_compress.linalg.moments import Moments, full_precision
from rba_compress.planning.span_fits import fit_spans
from rba_compress.profiling.fidelity import fidelity
from rba_compress.profiling.profiler import calibrate
from rba_compress.units.offers import discover
from rba_compress.units.splice import splice

KINDS: tuple[Kind, ...] = ("scale", "linear", "affine", "low_rank", "orthogonal", "shrunk")


@dataclass
class Cost:
    network: Literal["deit_tiny", "vit_base"] = "deit_tiny"
    """DeiT-tiny with its own weights, or the geometry of ViT-B/16 with random ones."""
    images: int = 1000
    """Of the loader, of which half are profiled; the thousand of `RBA_DATA`, over and over."""
    pairs: int = 3
    """(a) and (b) in turn so often."""
    stored: bool = True
    """Run (c), which takes minutes and gigabytes."""
    levers: bool = True
    """Measure each lever by itself."""
    batch_size: int = 16
    out: Path = Path(__file__).parent / "results" / "profile_cost.jsonl"


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def every_span(chain: Chain) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(chain) + 1), 2))


def spec(kind: Kind, width: int) -> MapSpec:
    rank, shrink = width // 4 if kind == "low_rank" else None, 0.7 if kind == "shrunk" else None
    damping = 1e-4 if kind in ("affine", "low_rank", "shrunk") else 0.0
    return MapSpec(kind=kind, damping=damping, rank=rank, shrink=shrink)


def plain(model: nn.Module, batches: list[Batch]) -> None:
    with evaluating(model):
        for batch in batches:
            batch.run(model)


def stored(model: nn.Module, chain: Chain, batches: list[Batch]) -> None:
    """Fit every span by least squares on stored activations."""
    kept: list[list[Tensor]] = [[] for _ in range(len(chain) + 1)]
    with evaluating(model):
        for batch in batches:
            _, (streams,) = run_with_streams(model, [chain], batch)
            for rows, h in zip(kept, streams, strict=True):
                rows.append(as_rows(h, chain.axis))
    whole = [torch.cat(rows) for rows in kept]
    for start, stop in every_span(chain):
        torch.linalg.lstsq(whole[start], whole[stop])


def spread(ratios: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [round(v, 3) for v in (low, middle, high)]


def timed(how: Cost, model: nn.Module, loader: list[Any]) -> tuple[dict[str, Any], Profile]:
    """The price of a profile, in forward passes."""
    fit = [batch.to(model) for batch in Split(loader, 0).part("fit")]
    plain(model, fit[:2])
    times: list[dict[str, float]] = []
    held: list[Profile] = []

    def fits(kind: Kind) -> float:
        (profiled,) = held[-1].chains
        how = spec(kind, profiled.chain.width)
        return seconds(lambda: fit_spans(profiled, every_span(profiled.chain), how))

    for _ in range(how.pairs):
        found = {"plain": seconds(lambda: plain(model, fit))}
        found["profile"] = seconds(lambda: held.append(profile(model, loader)))
        times.append(found | {"fits": fits("shrunk")})
    chain = held[-1].chains[0].chain
    example = as_batch(loader[0])
    middle = {key: statistics.median(t[key] for t in times) for key in times[0]}
    fixed = seconds(lambda: discover(model, example))
    row = {
        "images": sum(map(len, fit)),
        "seconds": {key: round(value, 2) for key, value in middle.items()},
        "of_profile_discovery": round(fixed, 2),
        "profile_over_plain": spread([t["profile"] / t["plain"] for t in times]),
        "with_fits_over_plain": spread([(t["profile"] + t["fits"]) / t["plain"] for t in times]),
        "spans": len(every_span(chain)),
        "fits_by_kind": {kind: round(fits(kind), 2) for kind in KINDS},
    }
    if how.stored:
        took = seconds(lambda: stored(model, chain, fit))
        extra = middle["profile"] + middle["fits"] - middle["plain"]
        row["stored_lstsq_seconds"] = round(took, 1)
        row["extra_stored_over_extra"] = round((took - middle["plain"]) / extra, 1)
    return row, held[-1]


def products(rows: Tensor, how: str) -> list[Tensor]:
    """The comoments of centred rows (B, n, d), by several ways."""
    count = len(rows)
    if how == "no symmetry":
        return [rows.mT @ rows[j] for j in range(count)]
    if how == "one product a pair":
        return [rows[i].T @ rows[j] for j in range(count) for i in range(j + 1)]
    wide = rows.double() if how == "float64 products" else rows
    window = 4 if how == "a window of 4" else count
    return [wide[max(0, j - window) : j + 1].mT @ wide[j] for j in range(count)]


def levers(model: nn.Module, seen: Profile, batches: list[Batch], pairs: int) -> dict[str, Any]:
    """Return the cost of the statistics alone under each lever, as a share of a forward pass."""
    chain = seen.chains[0].chain
    kept: list[Tensor] = []
    with evaluating(model):
        for batch in batches[:8]:
            _, (streams,) = run_with_streams(model, [chain], batch)
            kept.append(torch.stack([as_rows(h, chain.axis) for h in streams]))
    rows = torch.cat(kept, dim=1)
    rows -= rows.mean(1, keepdim=True)
    forward = [seconds(lambda: plain(model, batches[:8])) for _ in range(pairs)]
    whole = statistics.median(forward)

    def share(run: Callable[[], Any]) -> float:
        run()
        return round(statistics.median(seconds(run) for _ in range(pairs)) / whole, 3)

    found: dict[str, Any] = {}
    with full_precision(rows.device):
        for how in (
            "as it is",
            "no symmetry",
            "one product a pair",
            "a window of 4",
            "float64 products",
        ):
            found[f"products: {how}"] = share(lambda h=how: products(rows, h))  # type: ignore[misc]
    numbered = list(enumerate(batches))
    late = [(10**9, batch) for batch in batches]  # when positions are left out already

    def streaming(batches: list[tuple[int, Batch]], stride: int, held: int = moments._HELD) -> float:
        """Return the cost of watching, as a share of the pass."""
        ratios, before = [], moments._HELD
        moments._HELD = held
        try:
            for _ in range(pairs):
                bare = seconds(lambda: plain(model, [b for _, b in batches]))
                ratios.append(seconds(lambda: calibrate(model, [chain], batches, stride=stride)) / bare)
        finally:
            moments._HELD = before
        return round(statistics.median(ratios) - 1, 3)

    found["watching: every position"] = streaming(numbered, 1)
    found["watching: every position, folded in batch by batch"] = streaming(numbered, 1, held=0)
    found["watching: one position in four"] = streaming(late, 4)
    found["watching: one position in four, folded in batch by batch"] = streaming(late, 4, held=0)
    return found


def precision(model: nn.Module, seen: Profile, batches: list[Batch]) -> dict[str, dict[str, float]]:
    """Return the distance of maps of every span from those of products in float64 of the same streams.

    The distance is of weights and of outputs on those streams; the worst span and the middle one.
    """
    chain = seen.chains[0].chain
    single, double = (Moments(len(chain) + 1, chain.width) for _ in range(2))
    with evaluating(model):
        for batch in batches:
            _, (streams,) = run_with_streams(model, [chain], batch)
            rows = [as_rows(h, chain.axis) for h in streams]
            single.update(rows)
            double.update([h.double() for h in rows])

    def errors(kind: Kind, span: tuple[int, int]) -> tuple[float, float]:
        how, exact = spec(kind, chain.width), double.pair(*span)
        wanted = fit_map(how, exact).tensors["weight"]
        apart = fit_map(how, single.pair(*span)).tensors["weight"] - wanted
        given = [float((w @ exact.raw_xx * w).sum()) for w in (apart, wanted)]
        return float(apart.norm() / wanted.norm()), (max(given[0], 0.0) / given[1]) ** 0.5

    found: dict[str, dict[str, float]] = {}
    for kind in ("linear", "affine", "shrunk"):
        each = zip(*(errors(kind, span) for span in every_span(chain)), strict=True)
        for what, values in zip(("weights", "outputs"), each, strict=True):
            worst, middle = max(values), statistics.median(values)
            found[f"{kind}: {what}"] = {
                "worst": float(f"{worst:.2g}"),
                "median": float(f"{middle:.2g}"),
            }
    return found


def quality(model: nn.Module, loader: list[Any], test: list[Any]) -> list[dict[str, Any]]:
    """The divergence on test images of maps from every position, and from one in four."""
    by_stride = {s: profile(model, loader, config=Config(stride=s)).chains[0] for s in (1, 4)}
    chain = by_stride[1].chain
    rows = []
    for start, stop in every_span(chain):
        if (stop - start, start % 2) not in ((1, 1), (3, 0)):
            continue  # a dozen of them
        row: dict[str, Any] = {"span": [start, stop]}
        for stride, profiled in by_stride.items():
            found = fit_spans(profiled, [(start, stop)], spec("shrunk", chain.width))
            compressed = splice(model, found.plan, found.tensors)
            row[f"kl_stride_{stride}"] = round(
                fidelity(model, compressed, read(test[:12]), "kl").divergence, 5
            )
        rows.append(row)
    return rows


def images(how: Cost, model: nn.Module) -> Iterator[Any]:
    """Batches of the real images, over and over."""
    parts = [b for part in ("calibration", "test") for b in imagenet(model, part, how.batch_size)]
    yield from itertools.islice(itertools.cycle(parts), how.images // how.batch_size)


def main(how: Cost) -> None:
    deit = deit_tiny()
    loader = list(images(how, deit))
    model = deit if how.network == "deit_tiny" else timm.create_model("vit_base_patch16_224").eval()
    row, seen = timed(how, model, loader)
    row = {"benchmark": "profile_cost", "network": how.network, "cores": os.cpu_count(), **row}
    if how.levers:
        fit = [batch.to(model) for batch in Split(loader, 0).part("fit")]
        row["levers"] = levers(model, seen, fit[:16], how.pairs)
        row["float32_error"] = precision(model, seen, fit[:16])
    if how.levers and how.network == "deit_tiny":
        calibration, test = (imagenet(model, part, how.batch_size) for part in ("calibration", "test"))
        row["quality"] = quality(model, calibration, test)
    print(json.dumps(row), flush=True)
    with how.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Cost))
