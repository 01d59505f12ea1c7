"""The pipeline, stage by stage, from the zip to a report. A finished stage is not run again."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from pydantic import BaseModel
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from benchmarks.clinical.analysis import (
    Clusters,
    Lift,
    Rate,
    clusters,
    hba1c,
    lifts,
    plot_clusters,
    plot_lifts,
    plot_rates,
)
from benchmarks.clinical.cleaning import NUMBERS, Cleaned, Entry, clean, first_stays
from benchmarks.clinical.compression import Compression, measured, shrink
from benchmarks.clinical.intervals import SMALLEST
from benchmarks.clinical.prediction import (
    OUTCOME,
    Encoding,
    FTTransformer,
    Parts,
    Quality,
    Scores,
    Subgroup,
    Training,
    baselines,
    parts,
    plot_quality,
    quality,
    scored,
    subgroups,
    train,
)
from benchmarks.clinical.schema import COLUMNS, VERSION, ClinicalError, read_tables
from rba_compress import __version__

HERE = Path(__file__).parent
RECORD = "stage.json"
TRANSFORMER, SLIM = "FT-Transformer", "FT-Transformer, compressed"


@dataclass
class Run:
    """Build a report from Diabetes 130-US hospitals."""

    out: Path = Path("clinical")
    """Directory of the stages and the report; run again, it goes on from the last that is finished."""
    records: Path = field(
        default_factory=lambda: Path(os.environ.get("RBA_DATA", "../shared/data")) / "diabetes130.zip"
    )
    kept: float = 0.5
    """Share of multiply-accumulates that the transformer keeps."""
    seed: int = 0
    training: Training = field(default_factory=Training)


class Cleaning(BaseModel):
    """Contents of the table's log."""

    audit: tuple[Entry, ...]
    rows_in: int
    patients: int


class Analysis(BaseModel):
    """Findings from one stay per patient."""

    audit: tuple[Entry, ...]
    stays: int
    lifts: tuple[Lift, ...]
    hba1c: dict[str, list[Rate]]
    clusters: Clusters


class Prediction(BaseModel):
    """Results of every model on the test part."""

    rows: tuple[int, int, int]
    """To train, choose and test on."""
    models: tuple[Quality, ...]
    subgroups: tuple[Subgroup, ...]
    """Of the transformer."""


class Pipeline:
    """The stages of one run. Each reads the ones before it through its properties."""

    def __init__(self, how: Run) -> None:
        self.how = how
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, make: Callable[[Path], BaseModel], kind: type[BaseModel]) -> Any:
        """A finished stage's record, or that of `make`, which fills a folder that appears whole."""
        folder, key = self.how.out / name, self._key
        record = folder / RECORD
        if record.exists():
            known = json.loads(record.read_text())
            if known["key"] == key:
                return kind.model_validate(known["value"])
        began = time.perf_counter()
        self.how.out.mkdir(parents=True, exist_ok=True)
        work = self.how.out / f".{name}-{uuid.uuid4().hex}"
        work.mkdir()
        try:
            value = make(work)
            found = {"key": key, "value": value.model_dump(mode="json")}
            (work / RECORD).write_text(json.dumps(found))
            shutil.rmtree(folder, ignore_errors=True)
            work.replace(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self.seconds[name] = time.perf_counter() - began
        return value

    @cached_property
    def _key(self) -> str:
        """Hash of the records, the settings and this code."""
        hashed = hashlib.sha256()
        for path in (self.how.records, *sorted(HERE.glob("*.py"))):
            try:
                hashed.update(path.read_bytes())
            except OSError as error:
                raise ClinicalError(f"{path} cannot be read: {error}") from error
        settings = (VERSION, __version__, self.how.kept, self.how.seed, self.how.training.model_dump())
        hashed.update(json.dumps(settings).encode())
        return hashed.hexdigest()

    @cached_property
    def cleaning(self) -> Cleaning:
        def make(folder: Path) -> Cleaning:
            cleaned = clean(*read_tables(self.how.records))
            cleaned.table.to_csv(folder / "table.csv", index=False)
            patients = int(cleaned.table["patient"].max()) + 1
            return Cleaning(audit=cleaned.audit, rows_in=cleaned.rows_in, patients=patients)

        found: Cleaning = self.stage("1-clean", make, Cleaning)
        return found

    @cached_property
    def cleaned(self) -> Cleaned:
        found = self.cleaning
        whole = dict.fromkeys((*NUMBERS, OUTCOME, "patient", "stay"), "int64")
        path = self.how.out / "1-clean" / "table.csv"
        names = pd.read_csv(path, nrows=0).columns
        types = {name: whole.get(name, "str") for name in names}
        table = pd.read_csv(path, dtype=types, keep_default_na=False)
        return Cleaned(table=table, audit=found.audit, rows_in=found.rows_in)

    @cached_property
    def analysis(self) -> Analysis:
        def make(_: Path) -> Analysis:
            first = first_stays(self.cleaned)
            return Analysis(
                audit=first.audit,
                stays=len(first.table),
                lifts=tuple(lifts(first.table, seed=self.how.seed)),
                hba1c=hba1c(first.table),
                clusters=clusters(first.table, seed=self.how.seed),
            )

        found: Analysis = self.stage("2-analyse", make, Analysis)
        return found

    @cached_property
    def parts(self) -> Parts:
        return parts(self.cleaned.table["patient"].to_numpy(), seed=self.how.seed)

    @cached_property
    def encoding(self) -> Encoding:
        return Encoding.of(self.cleaned.table.iloc[self.parts.train])

    @cached_property
    def encoded(self) -> tuple[np.ndarray, np.ndarray]:
        table = self.cleaned.table
        return self.encoding.of_table(table), table[OUTCOME].to_numpy()

    @property
    def test(self) -> pd.DataFrame:
        return self.cleaned.table.iloc[self.parts.test]

    @cached_property
    def prediction(self) -> Prediction:
        def make(folder: Path) -> Prediction:
            (x, y), split = self.encoded, self.parts
            scores = baselines(x, y, split, seed=self.how.seed)
            model = train(x, y, split, self.encoding.sizes, self.how.training)
            scores[TRANSFORMER] = scored(model, x[split.test])
            save_file(model.state_dict(), folder / "model.safetensors")
            save_arrays(scores, folder / "scores.safetensors")
            truth, patients = y[split.test], self.test["patient"].to_numpy()
            return Prediction(
                rows=(len(split.train), len(split.choose), len(split.test)),
                models=tuple(quality(name, truth, s, patients) for name, s in scores.items()),
                subgroups=tuple(subgroups(self.test, scores[TRANSFORMER])),
            )

        found: Prediction = self.stage("3-predict", make, Prediction)
        return found

    @cached_property
    def compression(self) -> Compression:
        def make(folder: Path) -> Compression:
            model = self.model()
            result = shrink(model, *self.encoded, self.parts, kept=self.how.kept, seed=self.how.seed)
            rows = self.encoded[0][self.parts.test]
            found, after = measured(result, model, rows, self.test, folder / "slim")
            save_arrays({SLIM: after}, folder / "scores.safetensors")
            return found

        _ = self.prediction
        found: Compression = self.stage("4-compress", make, Compression)
        return found

    def model(self) -> FTTransformer:
        """The trained transformer."""
        _ = self.prediction
        model = FTTransformer(len(NUMBERS), self.encoding.sizes)
        model.load_state_dict(load_file(self.how.out / "3-predict" / "model.safetensors"))
        return model.eval()

    def scores(self) -> Scores:
        """Return the scores of every model on the test part."""
        folders = ("3-predict", "4-compress")
        both = [load_arrays(self.how.out / name / "scores.safetensors") for name in folders]
        return both[0] | both[1]

    def run(self) -> Path:
        """Run every stage, then write the report; return its path."""
        values = {
            "audit": shown(self.cleaning.audit),
            "cleaning": self.cleaning,
            "analysis": self.analysis,
            "prediction": self.prediction,
            "compression": self.compression,
        }
        truth = self.encoded[1][self.parts.test]
        pictures = {
            "lifts": plot_lifts([*self.analysis.lifts]),
            "rates": plot_rates(self.analysis.hba1c),
            "clusters": plot_clusters(self.analysis.clusters),
            "quality": plot_quality(truth, self.scores()),
        }
        provenance = {
            "records, SHA-256": hashlib.sha256(self.how.records.read_bytes()).hexdigest(),
            "schema": VERSION,
            "rba_compress": __version__,
            "seed": self.how.seed,
            **{f"stage {name}": f"{seconds:.0f} s" for name, seconds in self.seconds.items()},
        }
        pages = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
        drawn = {name: _embedded(figure) for name, figure in pictures.items()}
        text = pages.get_template("report.html").render(**values, pictures=drawn, provenance=provenance)
        path = self.how.out / "report.html"
        _write(path, text)
        dictionary = pages.get_template("dictionary.html").render(columns=COLUMNS, version=VERSION)
        _write(self.how.out / "dictionary.html", dictionary)
        return path


def shown(audit: Sequence[Entry]) -> list[Entry]:
    """The log without rules that met nothing; small counts are added to the next rule of their kind."""
    found: list[Entry] = []
    for entry in audit:
        last = found[-1] if found else None
        if last and last.count < SMALLEST and last.action == entry.action:
            found[-1] = Entry(
                rule=f"{last.rule}; {entry.rule}",
                action=entry.action,
                count=last.count + entry.count,
                reason=f"{last.reason}; {entry.reason}",
            )
        elif entry.count:
            found.append(entry)
    return [entry for entry in found if entry.count >= SMALLEST]


def _embedded(figure: Figure) -> str:
    """Return a figure as the source of an image."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _write(path: Path, text: str) -> None:
    """Write text whole, in place of what was there."""
    fresh = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pipeline from a shell."""
    how = tyro.cli(Run, args=arguments, prog="python -m benchmarks.clinical", description=Run.__doc__)
    began = time.perf_counter()
    try:
        path = Pipeline(how).run()
    except ClinicalError as error:
        raise SystemExit(f"{how.records}: {error}") from error
    print(f"{path}: {time.perf_counter() - began:.0f} s")
