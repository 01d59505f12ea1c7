"""Claim: a search with all units loses less of a language model than whole layers, skipped or mapped.

SmolLM2-135M-Instruct (30 layers; a 4-bit GGUF, dequantised), calibrated on WikiText-2's calibration
part, measured on 32,768 tokens of its test part in sequences of 512. A tenth, two and three tenths of
the layers' multiply-accumulates are taken away:

    any      every unit of the search
    gguf     what llama.cpp can run: `Config(deploy="gguf")`
    narrow   a width for each layer and linear attention alone, which llama.cpp runs as well
    stock    what `AutoModelForCausalLM` loads without this package: `Config(stock=True)`
    widths   one hidden width for all layers, none taken out, compensated (as CORP does)
    skip     ShortGPT (arXiv 2403.03853): the layers with the highest mean cosine between input and
             output are skipped
    linear   the same layers, a plain least-squares map in place of each (RBA, arXiv 2410.04941)

One process runs one method: `python -m benchmarks.language_search --method any --seed 0`. Its rows take
the place of those of the same method and seed in `benchmarks/results/language_search.jsonl`, and the
table is written anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from torch import nn

from benchmarks import language
from benchmarks.real_data import smollm2
from rba_compress import Budget, Config, profile, search, splice
from rba_compress.artifacts.artifact import write_artifact
from rba_compress.cli.texts import stretch
from rba_compress.core.batch import Batch
from rba_compress.core.errors import BudgetError
from rba_compress.core.map_spec import MapSpec
from rba_compress.planning.span_fits import fit_spans
from rba_compress.planning.state import Solution
from rba_compress.profiling.cost import cache_bytes, cost
from rba_compress.profiling.fidelity import fidelity
from rba_compress.profiling.profiler import Profile
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
Method = Literal["any", "gguf", "narrow", "stock", "widths", "skip", "linear"]
SETTINGS: dict[str, dict[str, Any]] = {
    "any": {},
    "gguf": {"deploy": "gguf"},
    "narrow": {"deploy": "gguf", "units": ("hidden_width", "attention_linear")},
    "stock": {"stock": True},
    "widths": {"stock": True, "units": ("hidden_width",)},
}
MAPS = {"skip": MapSpec(kind="identity"), "linear": MapSpec(kind="linear")}
LAYERS = {0.1: 3, 0.2: 6, 0.3: 9}


@dataclass
class Run:
    """Settings of the benchmark."""

    method: Method = "any"
    seed: int = 0
    off: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Shares of the layers' MACs to take away."""
    tokens: int = 32_768
    """Tokens of the test part."""
    calibration: int = 65_536
    """Tokens of the calibration part."""
    length: int = 256
    """Tokens of a sequence to calibrate on; those of the test part have 512."""
    window: int = 1
    effort: Literal["quick", "default", "thorough"] = "default"
    out: Path = RESULTS / "language_search.jsonl"
    save: Path | None = None
    """Folder to save each compressed model in, with its tokenizer."""


def solutions(
    model: nn.Module, seen: Profile, data: Any, how: Run
) -> Iterator[tuple[float, Solution, float]]:
    """Yield the share that is asked for, the method's solution, and the seconds that it took."""
    share = sum(seen.chains[0].chain.macs) / seen.original.macs
    for off in how.off:
        start = time.perf_counter()
        if how.method in MAPS:
            spans = [(layer, layer + 1) for layer in sorted(language.influence(seen)[: LAYERS[off]])]
            yield off, fit_spans(seen.chains[0], spans, MAPS[how.method]), time.perf_counter() - start
            continue
        try:
            solution = search(model, seen, data, budget=Budget(macs=1 - off * share))
        except BudgetError as error:
            print(error, flush=True)
            return
        yield off, solution, time.perf_counter() - start


def main(how: Run) -> None:
    """Print a JSON line for each share that is taken away."""
    model, tokenizer = smollm2()
    cut = language.Run(length=how.length, batch_size=2048 // how.length)
    data = language.sequences(tokenizer, "calibration", how.calibration, cut)
    test = language.sequences(tokenizer, "test", how.tokens, language.Run())
    own = SETTINGS.get(how.method, {"units": ("span",)})
    config = Config(
        seed=how.seed,
        stretch=stretch(how.calibration // how.length),
        window=how.window,
        effort=how.effort,
        **own,
    )
    start = time.perf_counter()
    seen = profile(model, data, config=config)
    profiled = time.perf_counter() - start
    whole = 0.0
    parts = {part: first_of(seen, data, part) for part in ("fit", "validation")}
    rows = []
    for off, solution, seconds in solutions(model, seen, data, how):
        slim = splice_shared(model, solution.plan, solution.tensors)
        if how.save is not None:
            keep(model, tokenizer, seen, solution, how.save / f"{how.method}-{off}-{how.seed}")
        networks = {"slim": slim} if whole else {"slim": slim, "original": model}
        measured = language.perplexities(model, networks, test)
        ppl, kl, agreement = measured["slim"]
        whole = whole or measured["original"][0]
        rows.append(
            {
                "method": how.method,
                "seed": how.seed,
                "off": off,
                "perplexity": round(ppl, 3),
                "ratio": round(ppl / whole, 4),
                "kl_test": round(kl, 4),
                **{
                    f"kl_{p}": round(fidelity(model, slim, b, "kl").divergence, 4)
                    for p, b in parts.items()
                },
                "agreement": round(agreement, 4),
                "macs_kept": round(cost(slim, seen.example).macs / seen.original.macs, 4),
                "cache_bytes": [cache_bytes(m, seen.example) for m in (model, slim)],
                "profile_seconds": round(profiled),
                "seconds": round(seconds),
                "passes": solution.plan.forward_passes,
                "calibration": how.calibration,
                "plan": str(solution.plan),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        write(rows, how)


def write(rows: Sequence[dict[str, Any]], how: Run) -> None:
    """Write the rows in place of those of the same method and seed, and the table of all."""
    before = [json.loads(line) for line in how.out.read_text().splitlines()] if how.out.exists() else []
    kept = [r for r in before if (r["method"], r["seed"]) != (how.method, how.seed)]
    rows = sorted([*kept, *rows], key=lambda r: (r["off"], r["method"], r["seed"]))
    how.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def keep(model: nn.Module, tokenizer: Any, seen: Profile, found: Solution, folder: Path) -> None:
    """Save a compressed model with its tokenizer, as `rba-compress` does."""
    network = splice(model, found.plan, found.tensors)
    write_artifact(network, found.plan, folder, example=seen.example, original_weights=seen.weights)
    tokenizer.save_pretrained(folder)


def first_of(seen: Profile, data: Any, part: Any) -> list[Batch]:
    """The first batches of a part of the calibration text, 4,096 tokens or more."""
    batches: list[Batch] = []
    for batch in seen.split(data).part(part):
        batches.append(batch)
        if sum(b.kwargs["input_ids"].numel() for b in batches) >= 4096:
            break
    return batches


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# SmolLM2-135M-Instruct with less of its layers",
        "",
        "Perplexity on 32,768 tokens of WikiText-2's test part (original 25.96), and KL a token to the "
        "original on text that was fitted on, chosen on, and neither. Nothing is trained.",
        "",
        "| of the layers' MACs | method | seed | perplexity | ratio | KL fit | KL validation | KL test "
        "| same token | search, seconds | passes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {100 * r['off']:.0f} % off | {r['method']} | {r['seed']} | {r['perplexity']:.2f} "
        f"| {r['ratio']:.3f} | {r['kl_fit']:.3f} | {r['kl_validation']:.3f} | {r['kl_test']:.3f} "
        f"| {r['agreement']:.3f} | {r['seconds']} | {r['passes']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Run))
