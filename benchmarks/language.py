"""Claim: layers of a language model that are chosen one by one and mapped cost less than skipped ones.

SmolLM2-135M-Instruct (30 layers; a 4-bit GGUF, dequantised), calibrated on 32,768 tokens of
WikiText-2's calibration part (half of them to fit on, two fifths to validate on), measured on 32,768
tokens of its test part, in sequences of 512 tokens. At 3, 6 and 9 layers taken away:

    skip            ShortGPT (arXiv 2403.03853): the layers with the highest mean cosine between input
                    and output are skipped
    linear          the same layers, a plain least-squares map in place of each (RBA, arXiv
                    2410.04941)
    ours            layer by layer, of the five that `skip` ranks next: the identity or a shrunk map
                    that raises the output's divergence least, fitted behind the ones before it; then
                    what is kept behind the last of them is re-solved

`python -m benchmarks.language` writes `benchmarks/results/language.jsonl` and its table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.greedy import Selection
from benchmarks.real_data import smollm2, wikitext2
from rba_compress import Budget, Config, profile
from rba_compress.core.batch import as_batch
from rba_compress.core.inference import evaluating
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.plan import Plan
from rba_compress.planning.context import SearchContext
from rba_compress.planning.refinement import refit
from rba_compress.planning.span_fits import fit_spans
from rba_compress.planning.state import Solution, with_candidate
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import divergence
from rba_compress.profiling.profiler import Profile
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
BASELINES = {"skip": MapSpec(kind="identity"), "linear": MapSpec(kind="linear")}


@dataclass
class Run:
    """Settings of the benchmark."""

    tokens: int = 32_768
    """Of the test part."""
    calibration: int = 32_768
    """Tokens of the calibration part: half to fit on, two fifths to choose on."""
    length: int = 512
    """Tokens of a sequence."""
    removed: tuple[int, ...] = (3, 6, 9)
    batch_size: int = 4
    out: Path = RESULTS / "language.jsonl"


def sequences(tokenizer: Any, split: str, tokens: int, how: Run) -> list[dict[str, Any]]:
    """A loader of the first tokens of a part of WikiText-2."""
    text = "\n".join(wikitext2(split))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0, :tokens]
    assert len(ids) == tokens, "the part is shorter"
    rows = ids.view(-1, how.length)
    return [{"input_ids": part, "use_cache": False} for part in rows.split(how.batch_size)]


def influence(seen: Profile) -> list[int]:
    """The layers, the most alike in input and output first."""
    cosines = seen.chains[0].similarity("cosine").diagonal(1)
    return [int(layer) for layer in cosines.argsort(descending=True)]


def searched(
    search: SearchContext, ranked: Sequence[int], removed: Sequence[int]
) -> Iterator[Solution]:
    """Search greedily, a layer at a time; re-solve each solution handed out, and go on from there."""
    draft = search.start
    for count in tqdm(range(1, max(removed) + 1), "layers", disable=None):
        gone = {r.start for r in draft.solution.plan.replacements}
        likely = [layer for layer in ranked if layer not in gone][:5]
        selection = Selection(search, draft)
        sites = [site for site in selection.sites() if site.start in likely]
        found = selection.best(sites, finalists=1)
        assert found is not None
        move, _, margin = found
        draft = search.state(with_candidate(draft.solution, move), draft.cost - move.saving)
        search.log.decided("take", move.replacement, draft, margin)
        print(json.dumps({"took": str(move.replacement), "divergence": draft.mean}), flush=True)
        if count in removed:
            last = max(r.stop for r in draft.solution.plan.replacements)
            draft = refit(search, draft, 0, last)
            print(json.dumps({"refits": len(draft.solution.plan.refits), "kl": draft.mean}), flush=True)
            yield search.finished(draft)


@torch.no_grad()
def perplexities(
    original: nn.Module, slims: dict[str, nn.Module], test: Sequence[dict[str, Tensor]]
) -> dict[str, tuple[float, float, float]]:
    """Return each network's perplexity, KL per token to the original, and next-token agreement."""
    nll = dict.fromkeys(slims, 0.0)
    kl, agreed, tokens, each = dict(nll), dict(nll), 0, 0
    with evaluating(original):
        for item in tqdm(test, "test", disable=None):
            batch = as_batch(item)
            ids = item["input_ids"]
            wanted = batch.run(original).logits
            tokens, each = tokens + ids[:, 1:].numel(), each + ids.numel()
            for name, compressed in slims.items():
                with evaluating(compressed):
                    logits = batch.run(compressed).logits
                nll[name] += float(
                    nn.functional.cross_entropy(
                        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                    )
                )
                kl[name] += float(divergence("kl", wanted, logits).sum()) * ids.shape[1]
                agreed[name] += float((wanted.argmax(-1) == logits.argmax(-1)).sum())
    return {
        name: (float(torch.tensor(nll[name] / tokens).exp()), kl[name] / each, agreed[name] / each)
        for name in slims
    }


def main(how: Run) -> None:
    """Print a JSON line for each method and number of layers."""
    model, tokenizer = smollm2()
    calibration = sequences(tokenizer, "calibration", how.calibration, how)
    test = sequences(tokenizer, "test", how.tokens, how)
    config = Config(
        maps=("shrunk",),
        shrinks=(0.5,),
        units=("span",),
        refit_dampings=(1.0,),
        refit_steps=(1.0,),
        window=1,
    )
    seen = profile(model, calibration, config=config)
    took: dict[str, float] = {}
    ranked = influence(seen)
    found: dict[str, Solution] = {"dense/0": Solution(Plan(), {})}
    for count in how.removed:
        for method, spec in BASELINES.items():
            start = time.perf_counter()
            spans = [(layer, layer + 1) for layer in sorted(ranked[:count])]
            found[f"{method}/{count}"] = fit_spans(seen.chains[0], spans, spec)
            took[f"{method}/{count}"] = time.perf_counter() - start
    start = time.perf_counter()
    search = SearchContext.read(model, seen, calibration, Budget(macs=0.5))
    for count, solution in zip(how.removed, searched(search, ranked, how.removed), strict=True):
        found[f"ours/{count}"] = solution
        took[f"ours/{count}"] = time.perf_counter() - start
    slims = {key: splice_shared(model, s.plan, s.tensors) for key, s in found.items()}
    measured = perplexities(model, slims, test)
    rows = []
    for key, (ppl, kl, agreement) in measured.items():
        method, number = key.split("/")
        spent = cost(slims[key], as_batch(test[0]))
        rows.append(
            {
                "method": method,
                "removed": int(number),
                "layers": [
                    int(r.blocks[0].path.rpartition(".")[2]) for r in found[key].plan.replacements
                ],
                "perplexity": round(ppl, 3),
                "kl_per_token": round(kl, 4),
                "agreement": round(agreement, 4),
                "macs_kept": round(spent.macs / seen.original.macs, 4),
                "params": spent.params,
                "refits": len(found[key].plan.refits),
                "seconds": round(took.get(key, 0.0), 1),
                "plan": str(found[key].plan),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    how.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# SmolLM2-135M-Instruct, layers taken away",
        "",
        "Perplexity on 32,768 tokens of WikiText-2's test part; KL and agreement of the next token "
        "to the original model.",
        "",
        "| layers removed | method | which | perplexity | KL per token | agreement | MACs kept |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['removed']} | {r['method']} | {', '.join(map(str, sorted(r['layers'])))} "
        f"| {r['perplexity']:.2f} | {r['kl_per_token']:.3f} | {r['agreement']:.3f} "
        f"| {r['macs_kept']:.3f} |"
        for r in sorted(rows, key=lambda r: r["removed"])
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Run))
