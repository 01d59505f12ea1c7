"""Findings from one stay per patient, with intervals, and no more than the records say."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from benchmarks.clinical.cleaning import NUMBERS
from benchmarks.clinical.intervals import SMALLEST, Interval, share
from benchmarks.clinical.schema import DIAGNOSES

GROUPS = (
    "circulatory",
    "diabetes",
    "respiratory",
    "digestive",
    "endocrine",
    "genitourinary",
    "symptoms",
)
"""The diagnosis groups that are drawn; the others are rarer."""

AGE_GROUPS = {"under 50": range(0, 50), "50 to 69": range(50, 70), "70 and over": range(70, 100)}
RESAMPLES = 200


class Lift(BaseModel):
    """Lift of two diagnosis groups: how much more often they meet in a stay than if independent."""

    model_config = ConfigDict(frozen=True)

    sex: str
    age: str
    first: str
    second: str
    count: int
    lift: Interval


class Rate(BaseModel):
    """Readmission within 30 days in a group of patients."""

    model_config = ConfigDict(frozen=True)

    group: str
    count: int
    rate: Interval


class Clusters(BaseModel):
    """Subgroups of patients: how stable, how large, how often readmitted."""

    model_config = ConfigDict(frozen=True)

    stability: dict[int, Interval]
    """By how many clusters: the adjusted Rand index of two halves' clusterings on a third set."""
    chosen: int
    rates: tuple[Rate, ...]
    centres: dict[str, tuple[float, ...]]
    """Mean of each number in each cluster, in its own unit."""


def age_group(ages: pd.Series) -> pd.Series:
    """Map bands of ten years to three groups."""
    low = ages.str.extract(r"\[(\d+)-", expand=False).astype(int)
    return low.map(lambda age: next(name for name, years in AGE_GROUPS.items() if age in years))


def lifts(table: pd.DataFrame, *, seed: int = 0) -> list[Lift]:
    """Return P(a, b) / (P(a) P(b)) for every two of `GROUPS` by sex and age; small cells left out.

    The interval is from resampled stays: multinomial draws over the four cells of a and b.
    """
    generator = np.random.default_rng(seed)
    found = []
    ages = age_group(table["age"])
    for sex, age in itertools.product(("Female", "Male"), AGE_GROUPS):
        own = table[(table["gender"] == sex) & (ages == age)]
        has = {g: (own[list(DIAGNOSES)] == g).any(axis=1).to_numpy() for g in GROUPS}
        for a, b in itertools.combinations(GROUPS, 2):
            cells = np.array(
                [(has[a] & has[b]).sum(), (has[a] & ~has[b]).sum(), (~has[a] & has[b]).sum()]
            )
            if cells.min() < SMALLEST:
                continue
            counts = np.append(cells, len(own) - cells.sum())
            draws = generator.multinomial(len(own), counts / len(own), RESAMPLES)
            low, high = np.percentile(_lift(draws.T), (2.5, 97.5))
            value = Interval(value=float(_lift(counts)), low=float(low), high=float(high))
            found.append(Lift(sex=sex, age=age, first=a, second=b, count=int(cells[0]), lift=value))
    return found


def _lift(cells: np.ndarray) -> np.ndarray:
    """Return the lift of (both, the first alone, the second alone, neither) along the first axis."""
    both, one, two, neither = cells
    lift: np.ndarray = both * (both + one + two + neither) / ((both + one) * (both + two))
    return lift


def rates(table: pd.DataFrame, groups: pd.Series) -> list[Rate]:
    """Readmission in every group; those with fewer events than `SMALLEST` left out."""
    counted = table.groupby(groups.to_numpy())["readmitted"].agg(["sum", "count"])
    return [
        Rate(group=str(name), count=int(row["count"]), rate=share(int(row["sum"]), int(row["count"])))
        for name, row in counted.iterrows()
        if min(row["sum"], row["count"] - row["sum"]) >= SMALLEST
    ]


def hba1c(table: pd.DataFrame) -> dict[str, list[Rate]]:
    """Readmission by whether HbA1c was measured, by its value, and by both with the main diagnosis."""
    measured = table["A1Cresult"].map(lambda v: "not measured" if v == "None" else "measured")
    diabetes = table["diag_1"].map(lambda g: "diabetes first" if g == "diabetes" else "another first")
    return {
        "HbA1c measured or not": rates(table, measured),
        "its value": rates(table, table["A1Cresult"].replace("None", "not measured")),
        "by main diagnosis": rates(table, diabetes + ", " + measured),
    }


def clusters(table: pd.DataFrame, *, choices: range = range(2, 7), seed: int = 0) -> Clusters:
    """K-means over the numbers of a stay, with the most stable number of clusters.

    Stability: two halves of two thirds are clustered apart, both label the last third, and the adjusted
    Rand index says how far they agree; ten times.
    """
    numbers = table[list(NUMBERS)].to_numpy(float)
    numbers = StandardScaler().fit_transform(np.log1p(numbers))
    generator = np.random.default_rng(seed)
    stability = {}
    for k in choices:
        found = []
        for _ in range(10):
            first, second, rest = np.array_split(generator.permutation(len(numbers)), 3)
            labels = [
                _kmeans(numbers[part], k, seed).predict(numbers[rest]) for part in (first, second)
            ]
            found.append(adjusted_rand_score(*labels))
        low, high = np.percentile(found, (2.5, 97.5))
        stability[k] = Interval(value=float(np.mean(found)), low=float(low), high=float(high))
    chosen = max(stability, key=lambda k: stability[k].value)
    labels = pd.Series(_kmeans(numbers, chosen, seed).labels_)
    # The first is the largest.
    order = labels.value_counts().index.tolist()
    labels = labels.map(lambda label: f"cluster {order.index(label) + 1}")
    means = table[list(NUMBERS)].groupby(labels.to_numpy()).mean()
    return Clusters(
        stability=stability,
        chosen=chosen,
        rates=tuple(rates(table, labels)),
        centres={str(name): tuple(row) for name, row in means.iterrows()},
    )


def _kmeans(numbers: np.ndarray, k: int, seed: int) -> KMeans:
    return KMeans(k, random_state=seed, n_init=4).fit(numbers)


def plot_lifts(found: list[Lift]) -> Figure:
    """A heatmap for each sex and age group, on a scale of log lift; white is 1."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, len(AGE_GROUPS))
    for axis, (sex, age) in zip(
        axes.flat, itertools.product(("Female", "Male"), AGE_GROUPS), strict=True
    ):
        values = np.full((len(GROUPS), len(GROUPS)), np.nan)
        for one in found:
            if (one.sex, one.age) == (sex, age):
                i, j = GROUPS.index(one.first), GROUPS.index(one.second)
                values[j, i] = one.lift.value
                axis.text(i, j, f"{one.lift.value:.2f}", ha="center", va="center", fontsize=8)
        image = axis.imshow(np.log2(values), cmap="RdBu_r", vmin=-1.5, vmax=1.5)
        axis.set_xticks(range(len(GROUPS)), GROUPS, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(GROUPS)), GROUPS, fontsize=8)
        axis.set_title(f"{sex}, {age}", fontsize=10)
    figure.colorbar(image, ax=axes, label="log2 of the lift", shrink=0.7)
    return figure


def plot_rates(groups: dict[str, list[Rate]]) -> Figure:
    """Readmission with its interval, a panel for each question."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axis, (title, found) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        _bars(axis, found)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("readmitted within 30 days")
    return figure


def _bars(axis, found) -> None:  # type: ignore[no-untyped-def]  # matplotlib's Axes
    values = [rate.rate for rate in found]
    errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
    axis.errorbar([v.value for v in values], range(len(values)), xerr=errors, fmt="o", capsize=3)
    axis.set_yticks(range(len(found)), [f"{r.group}\n(n {r.count:,})" for r in found], fontsize=8)
    axis.margins(y=0.2)
    axis.grid(axis="x", alpha=0.3)


def plot_clusters(found: Clusters) -> Figure:
    """Plot the stability of each number of clusters, their differences and their readmissions."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    counts = [*found.stability]
    values = [found.stability[k] for k in counts]
    errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
    axes[0].errorbar(counts, [v.value for v in values], yerr=errors, fmt="o-", capsize=3)
    axes[0].set_xlabel("clusters")
    axes[0].set_ylabel("adjusted Rand index")
    axes[0].set_title("stability", fontsize=10)
    centres = np.array([*found.centres.values()])
    relative = centres / centres.mean(axis=0)
    image = axes[1].imshow(relative, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    for (i, j), value in np.ndenumerate(centres):
        axes[1].text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8)
    axes[1].set_xticks(range(len(NUMBERS)), NUMBERS, rotation=60, ha="right", fontsize=8)
    axes[1].set_yticks(range(len(centres)), [*found.centres], fontsize=8)
    axes[1].set_title("means; colour: beside the mean of all clusters", fontsize=10)
    figure.colorbar(image, ax=axes[1], shrink=0.8)
    _bars(axes[2], list(found.rates))
    axes[2].set_title("readmitted within 30 days", fontsize=10)
    return figure
