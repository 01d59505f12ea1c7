"""Claim: at the same number of blocks taken away, the search keeps more of a network than its rivals.

One harness for all: the same calibration samples and split, the same test samples, one row for each
network, number of blocks, method and split seed. The rivals:

    skip, greedy         blocks are skipped one by one, the least held-out divergence first
    linear, best span    the paper (RBA, arXiv 2410.04941): one plain least-squares map in place of the
                         contiguous span with the least held-out divergence
    linear, greedy       the same map, block by block, each fitted behind the ones before
    block influence      ShortGPT (arXiv 2403.03853): the blocks with the highest mean cosine between
                         input and output are skipped
    cosine ranking       the paper's map over the span whose ends have the highest cosine
    CKA ranking          the paper's map over the span whose ends have the highest linear CKA
    ReplaceMe            (arXiv 2505.02819, its least-squares variant): the span with the highest cosine
                         is skipped, and the map of what the last layer before it gives is folded into
                         that layer
    random spans         the paper's map over a random span, mean of five
    ours                 the steps of one search with the default `Config`

Every method fits on the half of the calibration samples that is dealt to fit on; those that choose by
held-out divergence choose on the same two fifths.

`python -m benchmarks.methods` writes `benchmarks/results/methods.jsonl` and its table; the
differences to ours carry 95 % intervals of a paired bootstrap over the test samples, of the mean over
the seeds.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.greedy import evaluate
from benchmarks.real_data import cifar10, deit_tiny, imagenet, resnet20
from rba_compress import Budget, Config, profile, search
from rba_compress.cli.digits import batches, digits_data, digits_model
from rba_compress.core.batch import Batch
from rba_compress.core.inference import evaluating
from rba_compress.core.loader import read
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.outputs import main_output
from rba_compress.core.plan import FoldRefit, Plan, Replacement, Site
from rba_compress.graph.activations import observe
from rba_compress.linalg.maps import fit_map, map_macs
from rba_compress.linalg.moments import PairMoments
from rba_compress.linalg.similarity import Metric
from rba_compress.planning.context import SearchContext
from rba_compress.planning.span_fits import fit_spans
from rba_compress.planning.state import Solution, with_candidate
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import divergence, interval
from rba_compress.profiling.profiler import Profile
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
LINEAR, SKIP = MapSpec(kind="linear"), MapSpec(kind="identity")
OURS, RANDOM = "ours", "random spans"
DRAWS = 5
Found = Iterator[tuple[int, Solution]]
"""(blocks that are gone, network)."""


@dataclass
class Run:
    networks: tuple[str, ...] = ("deit_tiny", "digits_vit", "resnet20")
    methods: tuple[str, ...] = ()
    """By default all; what else was measured before stays in the results."""
    blocks: tuple[int, ...] = (1, 2, 3, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Deal the samples to fit and choose."""
    out: Path = RESULTS / "methods.jsonl"
    samples: Path = RESULTS / "methods_samples.npz"
    """What the intervals are computed from: each test sample's measures; not committed."""


@dataclass(frozen=True)
class Case:
    """A network with its data."""

    model: nn.Module
    calibration: Sequence[Any]
    test: list[Batch]


def deit_case() -> Case:
    model = deit_tiny()
    return Case(model, imagenet(model, "calibration", 16), list(read(imagenet(model, "test"))))


def digits_case() -> Case:
    train, test = digits_data()
    return Case(digits_model(), batches(train), list(read(batches(test))))


def resnet_case() -> Case:
    images, labels = cifar10()
    pairs = list(zip(images.split(100), labels.split(100), strict=True))
    return Case(resnet20(), pairs[:20], list(read(pairs[20:])))


CASES = {"deit_tiny": deit_case, "digits_vit": digits_case, "resnet20": resnet_case}


def _whole_blocks(seed: int, **config: Any) -> Config:
    """Settings of nothing but maps over spans of blocks, as in the methods that are compared."""
    return Config(seed=seed, units=("span",), keep_features=True, **config)


@dataclass(frozen=True)
class Bench:
    """A network and a split, ready for every method."""

    case: Case
    seen: Profile
    seed: int
    blocks: tuple[int, ...]

    def run(self, **config: Any) -> SearchContext:
        """A search that has taken nothing yet, with another `Config`."""
        seen = replace(self.seen, config=_whole_blocks(self.seed, **config))
        return SearchContext.read(self.case.model, seen, self.case.calibration, Budget(macs=1.0))

    def spans(self, blocks: int) -> list[tuple[int, int, int]]:
        return [
            (c, start, stop)
            for c, profiled in enumerate(self.seen.chains)
            for start, stop in profiled.chain.spans()
            if stop - start == blocks
        ]

    def mapped(self, span: tuple[int, int, int], spec: MapSpec) -> Solution:
        """A map over one span, fitted on the original streams."""
        c, start, stop = span
        return fit_spans(self.seen.chains[c], [(start, stop)], spec)

    def most_alike(self, metric: Metric, blocks: int, *, first: int = 0) -> tuple[int, int, int] | None:
        """The span whose ends are most alike."""
        tables = [profiled.similarity(metric) for profiled in self.seen.chains]
        spans = [span for span in self.spans(blocks) if span[1] >= first]
        return max(spans, key=lambda s: float(tables[s[0]][s[1], s[2]]), default=None)


def greedy(bench: Bench, kind: str) -> Found:
    run = bench.run(maps=(kind,), class_weight=1.0)
    draft = run.start
    for gone in range(1, max(bench.blocks) + 1):
        taken = {(r.chain, r.start) for r in draft.solution.plan.replacements}
        free = [s for s in bench.spans(1) if (run.chains[s[0]].name, s[1]) not in taken]
        sites: list[Site] = [Site(*span, "span") for span in free]
        moves = [m for m in run.fitter.candidates(draft, sites) if m.replacement.map.kind == kind]
        best = min(moves, key=lambda m: float(evaluate(run, draft, m).mean()))
        draft = run.state(with_candidate(draft.solution, best), draft.cost - best.saving)
        yield gone, draft.solution


def best_span(bench: Bench) -> Found:
    run = bench.run()
    for gone in bench.blocks:
        solutions = [(s, bench.mapped(s, LINEAR)) for s in bench.spans(gone)]
        judged = [
            (float(run.divergences(run.start, found, (c, start)).mean()), k)
            for k, ((c, start, _), found) in enumerate(solutions)
        ]
        if judged:
            yield gone, solutions[min(judged)[1]][1]


def block_influence(bench: Bench) -> Found:
    cosines = {
        (c, b): float(profiled.similarity("cosine")[b, b + 1])
        for c, profiled in enumerate(bench.seen.chains)
        for b in range(len(profiled.chain))
    }
    order = sorted(cosines, key=lambda place: -cosines[place])
    for gone in bench.blocks:
        parts = [bench.mapped((c, b, b + 1), SKIP).plan.replacements for c, b in order[:gone]]
        yield gone, Solution(Plan(replacements=tuple(r for part in parts for r in part)), {})


def ranked(bench: Bench, metric: Metric) -> Found:
    for gone in bench.blocks:
        span = bench.most_alike(metric, gone)
        if span is not None:
            yield gone, bench.mapped(span, LINEAR)


def replace_me(bench: Bench) -> Found:
    """T = argmin ||M T + Y - h_j||, M what the last layer before the span gives, Y = h_i - M."""
    run = bench.run()
    for gone in bench.blocks:
        span = bench.most_alike("cosine", gone, first=1)
        if span is None:
            continue
        c, start, stop = span
        chain = run.chains[c]
        branches = chain.blocks[start - 1].branches
        if not branches or branches[-1].scale is not None:
            continue
        path, pair = branches[-1].path, None
        with evaluating(bench.case.model):
            for batch in run.fitter.batches:
                seen = observe(bench.case.model, [chain], batch, layers=[path])
                h, (_, given) = seen.streams[0], seen.layers[path]
                target = h[stop] - h[start] + given
                rows = PairMoments.from_rows(given.flatten(0, -2), target.flatten(0, -2))
                pair = rows if pair is None else pair + rows
        assert pair is not None
        matrix = fit_map(LINEAR, pair).tensors["weight"]
        layer = bench.case.model.get_submodule(path)
        tensors = {f"{path}.{n}": matrix @ p.detach().double() for n, p in layer.named_parameters()}
        refit = FoldRefit(chain=chain.name, block=start - 1, path=path, damping=0.0, step=1.0)
        (replacement,) = bench.mapped(span, SKIP).plan.replacements
        yield gone, Solution(Plan(replacements=(replacement,), refits=(refit,)), tensors)


def random_spans(bench: Bench) -> Found:
    draw = random.Random(bench.seed)  # nosec B311 # repeatable, no secret
    for gone in bench.blocks:
        for span in draw.choices(bench.spans(gone), k=DRAWS) if bench.spans(gone) else ():
            yield gone, bench.mapped(span, LINEAR)


def ours(bench: Bench) -> Found:
    """The steps of one search; where a step took several blocks, another search for that number."""
    chains = [profiled.chain for profiled in bench.seen.chains]
    least = min(chains, key=lambda chain: min(chain.macs))
    saved = min(least.macs) - least.positions * map_macs(LINEAR, least.width)
    found: dict[int, Solution] = {}
    for gone in sorted(bench.blocks, reverse=True):
        if gone not in found:
            budget = Budget(macs=bench.seen.original.macs - gone * saved)
            solution = search(bench.case.model, bench.seen, bench.case.calibration, budget=budget)
            for point in solution.points:
                found.setdefault(_blocks(point.plan.replacements), point)
    yield from sorted(item for item in found.items() if item[0] in bench.blocks)


def _blocks(replacements: Sequence[Replacement]) -> int:
    return sum(r.stop - r.start for r in replacements)


METHODS: dict[str, Callable[[Bench], Found]] = {
    "skip, greedy": lambda bench: greedy(bench, "identity"),
    "linear, best span": best_span,
    "linear, greedy": lambda bench: greedy(bench, "linear"),
    "block influence": block_influence,
    "cosine ranking": lambda bench: ranked(bench, "cosine"),
    "CKA ranking": lambda bench: ranked(bench, "cka"),
    "ReplaceMe": replace_me,
    RANDOM: random_spans,
    OURS: ours,
}


def outputs(model: nn.Module, test: Sequence[Batch]) -> list[Tensor]:
    with evaluating(model):
        return [main_output(batch.run(model)) for batch in test]


def measured(
    original: Sequence[Tensor], compressed: Sequence[Tensor], test: Sequence[Batch]
) -> np.ndarray:
    """Return each sample's divergence, agreement, and whether each network is right, (4, samples)."""
    columns = []
    for a, b, batch in zip(original, compressed, test, strict=True):
        assert batch.labels is not None
        first, second = a.argmax(-1), b.argmax(-1)
        found = (
            divergence("kl", a, b),
            first == second,
            first == batch.labels,
            second == batch.labels,
        )
        columns.append(torch.stack([column.double() for column in found]))
    return torch.cat(columns, 1).numpy()


def main(how: Run) -> None:
    rows = {row["key"]: row for row in map(json.loads, how.out.read_text().splitlines())} if (
        how.out.exists()
    ) else {}  # fmt: skip
    samples = dict(np.load(how.samples)) if how.samples.exists() else {}
    for network in how.networks:
        case = CASES[network]()
        original = outputs(case.model, case.test)
        for seed in how.seeds:
            seen = profile(case.model, case.calibration, config=_whole_blocks(seed))
            bench = Bench(case, seen, seed, how.blocks)
            for method in how.methods or METHODS:
                start = time.perf_counter()
                found = list(METHODS[method](bench))
                seconds = time.perf_counter() - start
                numbers: dict[int, int] = {}
                for gone, solution in tqdm(found, f"{network} {seed} {method}"):
                    number = numbers[gone] = numbers.get(gone, -1) + 1
                    key = f"{network}/{gone}/{method}/{seed}/{number}"
                    compressed = splice_shared(case.model, solution.plan, solution.tensors)
                    each = measured(original, outputs(compressed, case.test), case.test)
                    samples[key] = each.astype(np.float32)
                    rows[key] = {
                        "key": key,
                        "macs_kept": round(cost(compressed, case.test[0]).macs / seen.original.macs, 4),
                        "top1_dense": round(float(each[2].mean()), 4),
                        "top1": round(float(each[3].mean()), 4),
                        "agreement": round(float(each[1].mean()), 4),
                        "kl": round(float(each[0].mean()), 4),
                        "seconds": round(seconds),
                        "plan": str(solution.plan),
                    }
                    print(json.dumps(rows[key]), flush=True)
                how.out.write_text("".join(f"{json.dumps(rows[k])}\n" for k in sorted(rows)))
                np.savez_compressed(how.samples, **samples)
    how.out.with_suffix(".md").write_text(table(rows, samples))


def table(rows: dict[str, dict[str, Any]], samples: dict[str, np.ndarray]) -> str:
    """The rows as Markdown, one table for each network and number of blocks."""
    lines = [
        "# Methods at the same number of blocks taken away",
        "",
        "Means over the seeds of the split into samples to fit and to choose on (and over the draws of "
        "the random spans), [least, most] over them; the last two columns are the method minus ours on "
        "the same test samples, with the 95 % interval of a bootstrap over them.",
    ]
    rows = {key: row for key, row in rows.items() if key in samples}
    for network, gone in sorted({tuple(key.split("/")[:2]) for key in rows}):
        of_case = {key: row for key, row in rows.items() if key.startswith(f"{network}/{gone}/")}
        original = next(iter(of_case.values()))["top1_dense"]
        size = samples[next(iter(of_case))].shape[1]
        lines += [
            "",
            f"## {network}, {gone} {'block' if gone == '1' else 'blocks'} gone",
            "",
            f"{size} test samples, original top-1 {original:.3f}.",
            "",
            "| method | MACs kept | top-1 | of original | agreement | KL | KL minus ours "
            "| top-1 minus ours |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        reference = _stack(of_case, samples, OURS)
        for method in METHODS:
            each = _stack(of_case, samples, method)
            if each is None:
                continue
            kl, top1 = each[:, 0].mean(1), each[:, 3].mean(1)
            macs = [row["macs_kept"] for key, row in of_case.items() if f"/{method}/" in key]
            cells = [
                method,
                f"{np.mean(macs):.3f}",
                f"{top1.mean():.3f} [{top1.min():.3f}, {top1.max():.3f}]",
                f"{top1.mean() / original:.3f}",
                f"{each[:, 1].mean():.3f}",
                f"{kl.mean():.3f} [{kl.min():.3f}, {kl.max():.3f}]",
            ]
            for index in (0, 3):
                if method == OURS or reference is None:
                    cells.append("")
                    continue
                gap = torch.from_numpy(each[:, index].mean(0) - reference[:, index].mean(0)).double()
                low, high = interval(gap)
                cells.append(f"{float(gap.mean()):+.3f} [{low:+.3f}, {high:+.3f}]")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _stack(
    of_case: dict[str, dict[str, Any]], samples: dict[str, np.ndarray], method: str
) -> np.ndarray | None:
    """Measures of every seed and draw, from `measured`: (runs, 4, samples)."""
    keys = sorted(key for key in of_case if f"/{method}/" in key)
    return np.stack([samples[key] for key in keys]) if keys else None


if __name__ == "__main__":
    main(tyro.cli(Run))
