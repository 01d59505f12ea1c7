"""Claim: at five and four sixths of its cost, a sentence encoder keeps its similarities.

all-MiniLM-L6-v2 through transformers, calibrated on sentences of WikiText-2's calibration part with
their attention mask, measured on sentences of its test part: the cosine of each embedding (mean of
the real tokens' last hidden states, normalised) to the original, and Spearman's correlation of all
pairwise similarities. The divergence of the search is a function: one minus the cosine of the
embeddings.

    skip     the layer whose skipping raises the held-out divergence least, then the next
    linear   a plain least-squares map in place of each of those layers (RBA, arXiv 2410.04941)
    ours     a search with every unit
    stock    a search for what a configuration of BERT can say, fewer layers and one width of all that
             are left: it is written, read back by `AutoModel` and by sentence-transformers, and
             measured as they read it

`python -m benchmarks.sentences` writes `benchmarks/results/sentences.jsonl` and its table.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.real_data import minilm, wikitext2
from rba_compress import Budget, Config, profile, search
from rba_compress.artifacts.artifact import write_artifact
from rba_compress.core.batch import Batch
from rba_compress.core.map_spec import MapSpec
from rba_compress.planning.context import SearchContext
from rba_compress.planning.span_fits import fit_spans
from rba_compress.planning.state import Solution
from rba_compress.profiling.cost import cost
from rba_compress.profiling.profiler import Profile
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
BUDGETS = (5 / 6 + 1e-4, 4 / 6 + 1e-4)
"""Shares of the MACs to keep: those of five and of four of six layers."""
BASELINES = {"skip": MapSpec(kind="identity"), "linear": MapSpec(kind="linear")}


@dataclass
class Run:
    """Settings of the benchmark."""

    calibration: int = 600
    """Sentences; half of them to fit on, two fifths to choose on."""
    test: int = 600
    batch_size: int = 20
    out: Path = RESULTS / "sentences.jsonl"


def encoder() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm()).eval()  # nosec B615 # local
    return model, AutoTokenizer.from_pretrained(minilm())  # nosec B615 # local


def sentences(split: str, count: int) -> list[str]:
    """Sentences of 8 to 60 words, spread over a part of WikiText-2."""
    whole = (s.replace(" @-@ ", "-") for line in wikitext2(split) for s in line.split(" . "))
    fit = [s.replace("<unk>", "[UNK]") for s in whole if 8 <= len(s.split()) <= 60]
    return [fit[k * len(fit) // count] for k in range(count)]


def loader(tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[dict[str, Tensor]]:
    """Batches with an attention mask, each padded to its longest sentence."""
    parts = (list(texts[k : k + batch_size]) for k in range(0, len(texts), batch_size))
    return [dict(tokenizer(p, padding=True, truncation=True, return_tensors="pt")) for p in parts]


def embedding(output: Any, mask: Tensor) -> Tensor:
    """Return the mean of the real tokens' last hidden states, normalised, (N, d)."""
    weight = mask[..., None].to(output.last_hidden_state)
    mean = (output.last_hidden_state * weight).sum(1) / weight.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def embedding_divergence(original: Any, compressed: Any, batch: Batch) -> Tensor:
    """Return one minus the cosine of the two networks' embeddings, (N,)."""
    mask = batch.kwargs["attention_mask"]
    return 1 - (embedding(original, mask) * embedding(compressed, mask)).sum(-1)


@torch.no_grad()
def embeddings(model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return the embeddings of every sentence, (sentences, d)."""
    return torch.cat([embedding(model(**batch), batch["attention_mask"]) for batch in batches])


def fidelity(original: Tensor, compressed: Tensor) -> dict[str, float]:
    """Mean cosine of the embeddings, and Spearman's correlation of all pairwise similarities."""
    upper = torch.triu_indices(len(original), len(original), 1)
    pairs = [(e @ e.T)[upper[0], upper[1]].numpy() for e in (original, compressed)]
    cosine = float((original * compressed).sum(-1).mean())
    return {"cosine": round(cosine, 4), "spearman": round(float(spearmanr(*pairs)[0]), 4)}


def baselines(model: nn.Module, seen: Profile, calibration: Any) -> Iterator[tuple[str, Solution]]:
    """The layers that are best skipped, one and two of them, skipped and mapped."""
    finder = SearchContext.read(model, seen, calibration, Budget(macs=0.5))
    layers: list[int] = []
    for _ in range(2):
        trials = [sorted([*layers, b]) for b in range(len(seen.chains[0].chain)) if b not in layers]
        layers = min(
            trials, key=lambda trial: finder.state(skipped(seen, trial), finder.start.cost).mean
        )
        for method, spec in BASELINES.items():
            yield method, skipped(seen, layers, spec)


def skipped(seen: Profile, layers: Sequence[int], spec: MapSpec = BASELINES["skip"]) -> Solution:
    """Layers, each replaced by a map that is fitted on the original streams."""
    return fit_spans(seen.chains[0], [(layer, layer + 1) for layer in layers], spec)


def write_stock(compressed: nn.Module, solution: Solution, seen: Profile, directory: Path) -> None:
    """The compressed encoder as a directory that transformers and sentence-transformers read."""
    write_artifact(
        compressed,
        solution.plan,
        directory,
        example=seen.example,
        original_weights=seen.weights,
        fold=True,
        hub=True,
    )
    # The tokenizer, and how sentence-transformers pools; of the files at the root, ours stay.
    written = {path.name for path in directory.iterdir()}
    shutil.copytree(
        minilm(),
        directory,
        dirs_exist_ok=True,
        ignore=lambda folder, _: written if Path(folder) == minilm() else (),
    )


def as_stock(
    compressed: nn.Module, solution: Solution, seen: Profile, test: Any, texts: Sequence[str]
) -> Tensor:
    """Embeddings of the encoder that transformers and sentence-transformers read from a directory."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "stock"
        write_stock(compressed, solution, seen, directory)
        found = embeddings(AutoModel.from_pretrained(directory).eval(), test)  # nosec B615 # local
        theirs = SentenceTransformer(str(directory), device="cpu").encode(
            list(texts), convert_to_tensor=True, batch_size=len(test[0]["input_ids"])
        )
    torch.testing.assert_close(theirs, found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embeddings(compressed, test), found, rtol=1e-4, atol=1e-4)
    return found


def main(how: Run) -> None:
    """Print a JSON line for each method and number of layers."""
    model, tokenizer = encoder()
    calibration = loader(tokenizer, sentences("calibration", how.calibration), how.batch_size)
    texts = sentences("test", how.test)
    test = loader(tokenizer, texts, how.batch_size)
    original = embeddings(model, test)
    rows: list[dict[str, Any]] = []

    def add(method: str, removed: int, solution: Solution, seen: Profile) -> None:
        compressed = splice_shared(model, solution.plan, solution.tensors)
        stock = method == "stock"
        found = (
            as_stock(compressed, solution, seen, test, texts) if stock else embeddings(compressed, test)
        )
        spent = cost(compressed, seen.example)
        rows.append(
            {
                "method": method,
                "removed": removed,
                **fidelity(original, found),
                "macs_kept": round(spent.macs / seen.original.macs, 4),
                "params_kept": round(spent.params / seen.original.params, 4),
                "plan": str(solution.plan),
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    for removed, share in enumerate(BUDGETS, 1):
        for method, config in {"ours": Config(), "stock": Config(stock=True)}.items():
            seen = profile(model, calibration, config=config, divergence=embedding_divergence)
            if method == "ours" and removed == 1:
                for name, solution in baselines(model, seen, calibration):
                    add(name, len(solution.plan.replacements), solution, seen)
            found = search(model, seen, calibration, budget=Budget(macs=share))
            add(method, removed, found, seen)
    how.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows, how))


def table(rows: Sequence[dict[str, Any]], how: Run) -> str:
    """The rows as Markdown."""
    lines = [
        "# all-MiniLM-L6-v2 at the cost of five and of four of its six layers",
        "",
        f"{how.calibration} sentences of WikiText-2's calibration part, measured on {how.test} of its "
        "test part: cosine of the embeddings to the originals, Spearman's correlation of all pairwise "
        "similarities. A stock model is measured as `AutoModel` reads it, and sentence-transformers "
        "gives the same.",
        "",
        "| removed, in layers | method | cosine | Spearman | MACs kept | parameters kept | plan |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['removed']} | {r['method']} | {r['cosine']:.3f} | {r['spearman']:.3f} "
        f"| {r['macs_kept']:.3f} | {r['params_kept']:.3f} | {r['plan']} |"
        for r in sorted(rows, key=lambda r: r["removed"])
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Run))
