"""Claim: channels that are taken in closed form, and searched for, cost a ResNet less than pruned ones.

The CIFAR-10 ResNet-20 of `RBA_DATA`: 1,000 images to calibrate, 2,000 others to measure, at two thirds
and at half of its MACs; nothing is trained.

    magnitude, Taylor     the same share of the middle channels of every block, chosen by the group
                          importances of Torch-Pruning (pip install torch-pruning); Taylor with labels
    uniform, compensated  the same share, chosen and compensated as `hidden_width` does, block by block
    widths alone          the search with the unit `hidden_width` alone
    rba_compress          the search with every unit
    thorough              the same with `effort="thorough"`

`python -m benchmarks.widths` writes `benchmarks/results/widths.jsonl`, a table and a picture; rows of
methods that are not asked for stay.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor, nn

from benchmarks.quality import quality
from benchmarks.real_data import BasicBlock, cifar10, resnet20
from rba_compress import Budget, Config, profile, search
from rba_compress.core.batch import as_batch
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import with_candidate
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
SHARES = (0.67, 0.5)
SEARCHED = {
    "widths alone": Config(units=("hidden_width",)),
    "rba_compress": Config(),
    "thorough": Config(effort="thorough"),
}
ORDER = ("magnitude", "Taylor", "uniform, compensated", *SEARCHED)


@dataclass
class Run:
    """Settings of the benchmark."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Deal the images to fit, validation and test samples."""
    methods: tuple[str, ...] = ORDER
    out: Path = RESULTS / "widths.jsonl"


def data() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """1,000 images to calibrate on, and the last 2,000 to test on."""
    images, labels = cifar10()
    pairs = list(zip(images.split(50), labels.split(50), strict=True))
    return pairs[:20], pairs[40:]


def pruned(share: float, importance: str, calibration: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Return the network with the same share of every block's middle channels pruned."""
    import torch_pruning as tp

    model = resnet20()
    example = calibration[0][0][:1]
    whole = tp.utils.count_ops_and_params(model, example)[0]
    best = model
    for kept in [k / 64 for k in range(63, 7, -1)]:
        if tp.utils.count_ops_and_params(best, example)[0] <= share * whole:
            break
        best = copy.deepcopy(model)
        graph = tp.DependencyGraph().build_dependency(best, example_inputs=example)
        score = tp.importance.GroupMagnitudeImportance(p=2)
        if importance == "Taylor":
            score = tp.importance.GroupTaylorImportance()
            for images, labels in calibration:
                nn.functional.cross_entropy(best(images), labels).backward()
        prune = tp.prune_conv_out_channels
        for layer in [m.conv1 for m in best.modules() if isinstance(m, BasicBlock)]:
            channels = layer.out_channels
            group = graph.get_pruning_group(layer, prune, idxs=list(range(channels)))
            order = score(group).argsort()[: channels - max(round(kept * channels), 1)]
            graph.get_pruning_group(layer, prune, idxs=order.tolist()).prune()
    return best.eval()


def uniform(share: float, calibration: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Return the network with about the same share of every block's channels taken and compensated."""
    model = resnet20()
    config = Config(stock=True, multiple=1)  # whose levels are the finest
    run = SearchContext.read(
        model, profile(model, calibration, config=config), calibration, Budget(macs=0.99)
    )
    state, whole = run.start, run.start.cost.macs
    for level in (k / 32 for k in range(8, 25)):
        solution = run.start.solution
        for c, chain in enumerate(run.chains):
            for b in range(len(chain)):
                site = Site(c, b, b + 1, "hidden_width")
                options = run.fitter.narrower(solution, c, [site])
                solution = with_candidate(
                    solution, min(options, key=lambda o: abs((o.replacement.level or 0) - level))
                )
                solution = run.fitter.narrowed_again(solution, c)
        state = run.state(solution, run.fitter.cost(solution.plan))
        if state.cost.macs <= share * whole:
            break
    return splice_shared(model, state.solution.plan, state.solution.tensors)


def networks(how: Run) -> Iterator[tuple[str, int, float, nn.Module, float]]:
    """Yield (method, seed, share, network, passes)."""
    calibration, _ = data()
    for share in SHARES:
        for method in (m for m in ORDER[:2] if m in how.methods):
            yield method, 0, share, pruned(share, method, calibration), 0.0
        if ORDER[2] in how.methods:
            yield ORDER[2], 0, share, uniform(share, calibration), 0.0
    for method, config in SEARCHED.items():
        for seed in how.seeds if method in how.methods else ():
            model = resnet20()
            own = config.model_copy(update={"seed": seed})
            seen = profile(model, calibration, config=own)
            for share in SHARES:
                found = search(model, seen, calibration, budget=Budget(macs=share))
                network = splice_shared(model, found.plan, found.tensors)
                yield method, seed, share, network, found.plan.forward_passes


def main(how: Run) -> None:
    """Print a JSON line for each network, and write rows, table and picture."""
    test = [as_batch(pair) for pair in data()[1]]
    known = how.out.read_text().splitlines() if how.out.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in known]
    for method, seed, share, network, passes in networks(how):
        row = {"method": method, "seed": seed, "budget": share, "passes": passes}
        rows = [r for r in rows if any(r[key] != row[key] for key in ("method", "seed", "budget"))]
        rows.append(row | quality(resnet20(), network, test))
        print(json.dumps(rows[-1]), flush=True)
        how.out.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    how.out.with_suffix(".md").write_text(table(rows))
    draw(rows, how.out.with_suffix(".png"))


def table(rows: list[dict[str, Any]]) -> str:
    """The means over seeds as Markdown."""
    lines = [
        "# CIFAR-10 ResNet-20, fewer channels inside its blocks",
        "",
        f"2,000 test images, original top-1 {rows[0]['top1_dense']:.4f}; nothing trained.",
        "",
        "| method | MACs kept | top-1 | agreement | KL | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for share in SHARES:
        for method in ORDER:
            own = [r for r in rows if (r["method"], r["budget"]) == (method, share)]
            if not own:
                continue
            means = [
                statistics.mean(r[key] for r in own) for key in ("macs_kept", "top1", "agreement", "kl")
            ]
            numbers = " | ".join(f"{value:.3f}" for value in means)
            lines.append(f"| {method} | {numbers} | {len(own)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Draw top-1 over the share of MACs, a marker for each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, marker in zip(ORDER, "xv^soD", strict=True):
        own = [r for r in rows if r["method"] == method]
        axes.plot(
            [r["macs_kept"] for r in own], [r["top1"] for r in own], marker, label=method, alpha=0.8
        )
    axes.axhline(rows[0]["top1_dense"], color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="share of MACs kept", ylabel="top-1 on 2,000 test images", ylim=(0, 1.02))
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Run))
