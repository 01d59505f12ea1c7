"""Report of a compression, its cost and its fidelity: as a value, as a table, and as one HTML page.

The page fetches nothing, suits phones and print, and has a light and a dark mode. Names of models and
files are escaped, in the page and in its data.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import Field

from rba_compress.core.cost import Cost, kept
from rba_compress.core.io import write_text
from rba_compress.core.plan import REPR, boundary_names
from rba_compress.core.schema import Frozen
from rba_compress.core.tables import html_table, text_table
from rba_compress.linalg.similarity import TITLES
from rba_compress.profiling.fidelity import DIVERGENCES, Fidelity
from rba_compress.profiling.latency import Latency
from rba_compress.reporting.changed_samples import Changed
from rba_compress.reporting.report_data import Details, Summary

MOST = 6
"""Changes that a table names."""
FEW = 100
"""Samples below which a report says that it is of few."""
PAGE = "report.html"
TEMPLATE = Path(__file__).with_name(PAGE)
METHODS = {"ours": "this search", "paper": "the paper's map over one span", "healed": "healed"}


class Report(Frozen):
    """Cost and fidelity, before and after, on samples that no choice was based on."""

    former: ClassVar[Mapping[str, str]] = {"dense": "original", "slim": "compressed"}

    model: str
    plan: str
    samples: str
    """Description of the samples: the held-out part of the loader, or a test set."""
    original: Cost
    compressed: Cost
    cache_original: int | None = None
    """Bytes of keys and values that a language model holds for each token, as `cache_compressed`."""
    cache_compressed: int | None = None
    fidelity: Fidelity
    latency: Latency
    forward_passes: float | None = None
    """Number of forward passes of the search over the whole loader."""
    notes: tuple[str, ...] = ()
    """Interpretation of the loader's items and of the output, one note a line."""
    warnings: tuple[str, ...] = ()
    details: Details | None = None
    seal: str | None = Field(None, exclude=True, repr=False)
    """Hash of report.json, which the file itself carries: its times differ from run to run."""
    changed: tuple[Changed, ...] = Field((), exclude=True)
    """Samples that changed most. No JSON or artefact holds them, because they belong to the user."""

    @property
    def summary(self) -> Summary:
        """Measurements of this report, to be plotted beside those of other networks."""
        f, t = self.fidelity, self.latency
        return Summary(
            macs=self.compressed.macs,
            macs_kept=round(kept(self.compressed.macs, self.original.macs), 5),
            params=self.compressed.params,
            params_kept=round(kept(self.compressed.params, self.original.params), 5),
            latency_ratio=round(t.ratio, 4),
            latency_low=round(t.ratio_low, 4),
            latency_high=round(t.ratio_high, 4),
            divergence=f.divergence if math.isfinite(f.divergence) else None,
            divergence_low=f.divergence_low,
            divergence_high=f.divergence_high,
            agreement=f.agreement,
            accuracy=f.accuracy_compressed,
            accuracy_original=f.accuracy_original,
            samples=f.samples,
            plan=self.plan,
        )

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained page: figures, pictures, decisions, provenance.

        The page shows the samples that changed most, if the report was made in this process.

        Raises:
            ArtifactError: the file cannot be written; an existing file is unchanged.
        """
        write_text(Path(path), page(self))

    @property
    def line(self) -> str:
        """Cost and loss in one line."""
        f, s = self.fidelity, self.summary
        lost = f"{divergence_name(f)} {f.divergence:.4g} on {f.samples} samples"
        plan = textwrap.shorten(self.plan, REPR, placeholder=" ...")
        return f"{self.model} with {s.macs_kept:.3f} of its MACs, {lost}; {plan}"

    def __repr__(self) -> str:
        return f"Report({self.line})"

    def __str__(self) -> str:
        return self.table()

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return a row for each measure: its name, before, after, and the ratio."""
        f, t = self.fidelity, self.latency
        rows = []
        if f.accuracy_original is not None and f.accuracy_compressed is not None:
            share = f.accuracy_compressed / f.accuracy_original if f.accuracy_original else None
            rows.append(
                _row("accuracy", f"{f.accuracy_original:.4f}", f"{f.accuracy_compressed:.4f}", share)
            )
        if f.agreement is not None:
            rows.append(_row("agreement", "1", f"{f.agreement:.4f}"))
        for name, metric in f.metrics.items():
            share = metric.compressed / metric.original if metric.original else None
            rows.append(_row(name, f"{metric.original:.4f}", f"{metric.compressed:.4f}", share))
        rows += [
            _row(divergence_name(f), "0", f"{f.divergence:.4f}"),
            *(
                _row(f"of {name}", "0", f"{mean:.4f}")
                for name, mean in f.outputs.items()
                if len(f.outputs) > 1
            ),
            _row("output cosine", "1", f"{f.cosine:.4f}"),
            _row("parameters", f"{self.original.params:,}", f"{self.compressed.params:,}",
                 kept(self.compressed.params, self.original.params)),
            _row("MACs", f"{self.original.macs:,}", f"{self.compressed.macs:,}",
                 kept(self.compressed.macs, self.original.macs)),
            _row(f"latency, batch {t.batch}", f"{t.original_ms:.2f} ms", f"{t.compressed_ms:.2f} ms",
                 t.ratio),
        ]  # fmt: skip
        if self.cache_original and self.cache_compressed is not None:
            before, after = self.cache_original, self.cache_compressed
            rows.append(_row("cache, bytes a token", f"{before:,}", f"{after:,}", after / before))
        return rows

    @property
    def of_few(self) -> list[str]:
        """Warning that a report is of few samples, if it is."""
        n = self.fidelity.samples
        if not 0 < n < FEW:
            return []
        return [
            f"warning: on {n} samples one of them is {100 / n:.1f} points: measure on {FEW} or more, "
            "with compare(original, compressed, loader), or --test-split"
        ]

    def _repr_html_(self) -> str:
        head = ("", "before", "after", "after/before", "95 % interval", "so")
        return html_table(self.line, head, verdicts(self))

    def table(self) -> str:
        """Return the report as text for a terminal."""
        f, t = self.fidelity, self.latency
        lines = [*self.notes, *self.of_few]
        lines += text_table(("", "before", "after", "after/before"), self.rows())
        lines += [
            f"{self.model}: {_shortened(self.plan)}",
            f"on {f.samples} samples ({self.samples}); latency on {t.device}, median of {t.pairs} "
            f"pairs, quartiles {t.ratio_low:.3f} to {t.ratio_high:.3f}",
        ]
        if f.divergence_low is not None and f.divergence_high is not None:
            low, high = f"{f.divergence_low:.4f}", f"{f.divergence_high:.4f}"
            lines.append(f"95 % interval of the {divergence_name(f)}: {low} to {high}")
        if self.forward_passes is not None:
            lines.append(f"the search took {self.forward_passes:.1f} forward passes over the loader")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _shortened(plan: str) -> str:
    """Return the changes of a plan, of many the first ones and the last."""
    changes = plan.split("; ")
    if len(changes) <= MOST:
        return plan
    left = len(changes) - MOST + 1
    return "; ".join([*changes[: MOST - 2], f"... ({left} more, all of them in the plan)", changes[-1]])


def divergence_name(fidelity: Fidelity) -> str:
    """Return the name of the divergence in a table."""
    if len(fidelity.outputs) > 1:
        return "divergence of all outputs"
    names = {
        "kl": "KL divergence",
        "bernoulli": "Bernoulli KL",
        "nse": "squared error",
        "cosine": "1 - cosine",
        "given": "divergence",
    }
    return names[fidelity.kind]


def _row(name: str, before: str, after: str, ratio: float | None = None) -> tuple[str, str, str, str]:
    return name, before, after, "" if ratio is None else f"{ratio:.3f}"


TERMS = {
    "accuracy": "share of samples whose label is predicted",
    "agreement": "share of samples for which both networks predict the same",
    "KL divergence": "distance of the predicted probabilities from the original's; 0 is none, in nats",
    "Bernoulli KL": "distance of the predicted probabilities of each label from the original's",
    "squared error": "squared difference of the outputs, over their variance",
    "output cosine": "mean cosine of the angle between both outputs; 1 is the same direction",
    "parameters": "weights and biases, shared ones once",
    "MACs": "multiply-accumulates of one sample",
    "latency": "time of one batch, both networks timed in turns",
    "cache": "keys and values that a language model holds for each token",
    "R²": "share of the variance that the fit explains; 1 is all of it",
    "effective rank": "number of directions in which the samples vary",
    "condition": "ratio of the largest to the smallest of these variances: how well posed the fit is",
    "damping": "ridge that was added to keep the fit well posed",
    "rows": "positions of samples that were fitted on",
}
"""Explanations of the terms of a page, by the beginning of a name."""


class Row(NamedTuple):
    """Measure before and after, with its interval and verdict."""

    name: str
    before: str
    after: str
    ratio: str
    interval: str = ""
    verdict: str = ""


def page(report: Report) -> str:
    """Return a report as one self-contained HTML page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    details, kind = report.details, report.fidelity.kind
    front = details.front if details else ()
    heat = [
        {
            "name": chain.name,
            "names": boundary_names([block.path for block in chain.blocks]),
            "matrices": chain.similarity,
        }
        for chain in (details.chains if details else ())
        if chain.similarity
    ]
    data = {
        "divergence": DIVERGENCES[kind],
        "methods": METHODS,
        "titles": TITLES,
        "heat": heat,
        "front": [row.model_dump(mode="json") | {"commands": _commands(row, report)} for row in front],
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        details=details,
        rows=verdicts(report),
        headline=_headline(report),
        asked=_asked(report),
        story=_story(details),
        terms=TERMS,
        heat=heat,
        boundary_names=boundary_names,
        data=data,
    )


def verdicts(report: Report) -> list[Row]:
    """Return each measure with its interval and verdict: a difference within the interval is none."""
    f, t = report.fidelity, report.latency
    said: dict[str, tuple[str, str]] = {}
    if f.drop_low is not None and f.drop_high is not None:
        # Adding 0.0 keeps a gain of zero from being written as -0.0.
        low, high = (round(-100 * v, 6) + 0.0 for v in (f.drop_high, f.drop_low))
        drop = f.accuracy_drop or 0.0
        more = "a loss" if drop > 0 else "a gain"
        none = low <= 0 <= high
        verdict = (
            "no difference within the interval" if none else f"{more} of {abs(100 * drop):.1f} points"
        )
        said["accuracy"] = f"{low:+.1f} to {high:+.1f} points", verdict
    for name, metric in f.metrics.items():
        if metric.drop_low is not None and metric.drop_high is not None:
            low, high = -metric.drop_high + 0.0, -metric.drop_low + 0.0
            verdict = (
                "no difference within the interval"
                if low <= 0 <= high
                else (f"{'a loss' if metric.drop > 0 else 'a gain'} of {abs(metric.drop):.4f}")
            )
            said[name] = f"{low:+.4f} to {high:+.4f}", verdict
    if f.agreement is not None and f.agreement_low is not None and f.agreement_high is not None:
        changed = (1 - f.agreement) * f.samples
        whole = math.isclose(changed, round(changed), abs_tol=1e-6)
        verdict = f"{round(changed)} of {f.samples} samples changed class" if whole else ""
        said["agreement"] = f"{f.agreement_low:.4f} to {f.agreement_high:.4f}", verdict
    if f.divergence_low is not None and f.divergence_high is not None:
        said[divergence_name(f)] = f"{f.divergence_low:.4f} to {f.divergence_high:.4f}", ""
    speed = "faster" if t.ratio_high < 1 else "slower" if t.ratio_low > 1 else "no difference"
    said[f"latency, batch {t.batch}"] = f"{t.ratio_low:.3f} to {t.ratio_high:.3f}", speed
    said["MACs"] = said["parameters"] = said["cache, bytes a token"] = "exact", ""
    return [Row(*row, *said.get(row[0], ("", ""))) for row in report.rows()]


def _headline(report: Report) -> str:
    f, s = report.fidelity, report.summary
    text = (
        f"{100 * s.macs_kept:.1f} % of its multiply-accumulates, {100 * s.params_kept:.1f} % of its "
        f"parameters, {s.latency_ratio:.2f} times its latency"
    )
    if f.accuracy_original is not None and f.accuracy_compressed is not None:
        text += f"; accuracy {f.accuracy_compressed:.4f} where it was {f.accuracy_original:.4f}"
    if f.agreement is not None:
        text += f"; {100 * f.agreement:.1f} % of predictions are the same"
    return f"{text}."


def _asked(report: Report) -> list[str]:
    """Return each limit of the budget, and what was reached."""
    budget = report.details.budget if report.details else None
    if budget is None:
        return []
    f, s, t = report.fidelity, report.summary, report.latency
    reached: dict[str, tuple[float, float | None]] = {
        "macs": (s.macs_kept, s.macs),
        "params": (s.params_kept, s.params),
        "latency": (s.latency_ratio, t.compressed_ms),
        "divergence": (f.divergence, None),
        "agreement": (f.agreement or 0.0, None),
        "accuracy_drop": (f.accuracy_drop or 0.0, None),
    }
    found = []
    for name, (share, whole) in reached.items():
        limit = getattr(budget, name)
        if limit is None:
            continue
        absolute = whole is not None and (isinstance(limit, int) or limit > 1)
        value = whole if absolute else share
        sign = "at least" if name == "agreement" else "at most"
        said = {"macs": "MACs", "params": "parameters"}.get(name, name.replace("_", " "))
        digits = ",.0f" if absolute and name != "latency" else ".4g"
        found.append(f"{said} of {sign} {limit:{digits}} (reached: {value:{digits}})")
    for name, limit in (budget.metric_drop or {}).items():
        if name in f.metrics:
            found.append(f"drop of {name} of at most {limit:g} (reached: {f.metrics[name].drop:.4g})")
    return found


def _story(details: Details | None) -> str:
    """Return what the method did, in plain words."""
    blocks = [block for chain in (details.chains if details else ()) for block in chain.blocks]
    if details is None or not blocks:
        return ""
    words = {
        "replaced": "left out, or replaced by a linear map",
        "thinned": "made thinner",
        "re-solved": "kept, with the last layers solved anew",
        "kept": "left as they were",
    }
    states = Counter(str(block.state) for block in blocks)
    parts = [f"{states[state]} {said}" for state, said in words.items() if states[state]]
    how = "New weights are least-squares solutions on the calibration samples"
    if any(row.method == "healed" for row in details.front):
        how += "; then the original taught the network"
    elif details.budget is not None:
        how += ", and a search chose what changes the network's output least. Nothing was trained"
    return f"Of {len(blocks)} blocks: {'; '.join(parts)}. {how}."


def _commands(row: Summary, report: Report) -> list[str]:
    """Return the commands that make a network of the front, in Python and in a shell."""
    details = report.details
    options = (details.options if details else "") or "--model NAME"
    files = "--images IMAGES --weights WEIGHTS.safetensors"
    share = math.ceil(1e4 * row.macs_kept) / 1e4
    match row.method:
        case "ours":
            return [
                f"result = compress(model, loader, budget=Budget(macs={share:g}))",
                f"rba-compress compress {options} {files} --macs {share:g} --out compressed/",
            ]
        case "healed":
            return [
                "healed = heal(result, loader, original=model)",
                f"rba-compress heal compressed/ {files} --out healed/",
            ]
    return ["# the paper's choice at this cost, beside which the others are drawn"]
