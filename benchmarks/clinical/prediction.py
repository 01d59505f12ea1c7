"""Readmission within 30 days: two baselines and a transformer over features, told apart by patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.clinical.analysis import age_group
from benchmarks.clinical.cleaning import NUMBERS
from benchmarks.clinical.intervals import SMALLEST, Interval, by_patient
from benchmarks.clinical.schema import DRUGS

OUTCOME = "readmitted"
APART = (OUTCOME, "patient", "stay")
"""What no model sees. A patient's number of stays would tell of the future."""

RARE = 0.01
"""A drug that is given in fewer stays than this share is one of the others."""

FEWEST = 50
"""Rows of the training part that a value needs to be one of its own."""

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Parts:
    """Rows of the table to train, choose and test on; no patient is in two."""

    train: np.ndarray
    choose: np.ndarray
    test: np.ndarray


def parts(patients: np.ndarray, *, seed: int = 0) -> Parts:
    """Divide rows by patient: seven tenths of the patients, and twice fifteen hundredths."""
    order = np.random.default_rng(seed).permutation(patients.max() + 1)
    place = order[patients] / len(order)
    cuts = (place < 0.7, (place >= 0.7) & (place < 0.85), place >= 0.85)
    return Parts(*(which.nonzero()[0] for which in cuts))


@dataclass(frozen=True)
class Encoding:
    """Encoding of a table: the columns of `NUMBERS` standardised, then a code for each other column.

    Learned from the training part alone. Code 0 is any value that was rare there.
    """

    means: np.ndarray
    widths: np.ndarray
    values: dict[str, tuple[str, ...]]
    drugs: tuple[str, ...]
    """That are common enough to be told apart."""

    @classmethod
    def of(cls, table: pd.DataFrame) -> Encoding:
        drugs = [name for name in DRUGS if name in table and (table[name] != "No").mean() >= RARE]
        prepared = _prepared(table, drugs)
        numbers = np.log1p(prepared[list(NUMBERS)].to_numpy(float))
        names = [name for name in prepared if name not in NUMBERS]
        counts = {name: prepared[name].value_counts() for name in names}
        values = {name: tuple(sorted(c.index[c >= FEWEST])) for name, c in counts.items()}
        return cls(numbers.mean(0), numbers.std(0), values, tuple(drugs))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes of each column that is not a number."""
        return tuple(len(values) + 1 for values in self.values.values())

    def of_table(self, table: pd.DataFrame) -> np.ndarray:
        """Return an encoded table, (rows, columns), float32."""
        prepared = _prepared(table, self.drugs)
        numbers = (np.log1p(prepared[list(NUMBERS)].to_numpy(float)) - self.means) / self.widths
        codes = [
            prepared[name].map({v: k + 1 for k, v in enumerate(values)}).fillna(0).to_numpy(float)
            for name, values in self.values.items()
        ]
        return np.column_stack([numbers, *codes]).astype(np.float32)


def _prepared(table: pd.DataFrame, common: Sequence[str]) -> pd.DataFrame:
    """Drop what no model sees, and replace the other drugs by whether any was given."""
    others = [drug for drug in DRUGS if drug in table and drug not in common]
    given = (table[others] != "No").any(axis=1).map({True: "Yes", False: "No"})
    return table.drop(columns=[*APART, *others]).assign(other_drugs=given)


class FTTransformer(nn.Module):
    """A token for each feature, a class token, and blocks of attention over them.

    Gorishniy et al. 2021, arXiv 2106.11959. Takes what `Encoding` gives, (N, columns); gives (N, 2).
    """

    starts: Tensor

    def __init__(
        self, numbers: int, sizes: tuple[int, ...], *, width: int = 32, depth: int = 6, heads: int = 4
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self.weight = nn.Parameter(torch.randn(numbers, width) * 0.1)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.int64))
        self.codes = nn.Embedding(int(sum(sizes)), width)
        nn.init.normal_(self.codes.weight, std=0.1)
        self.bias = nn.Parameter(torch.zeros(numbers + len(sizes), width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio=2.0) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        numbers = x[:, : self.numbers, None] * self.weight
        codes = self.codes(x[:, self.numbers :].long() + self.starts)
        tokens = torch.cat([numbers, codes], dim=1) + self.bias
        stream = self.blocks(torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1))
        scores: Tensor = self.head(self.norm(stream)[:, 0])
        return scores


class Training(BaseModel):
    """Training of the transformer: AdamW, a cosine schedule, the best epoch on the choosing part."""

    model_config = ConfigDict(frozen=True)

    epochs: int = 4
    batch: int = 256
    rate: float = 1e-3
    decay: float = 1e-2
    seed: int = 0


def train(
    x: np.ndarray, y: np.ndarray, found: Parts, sizes: tuple[int, ...], how: Training
) -> FTTransformer:
    """The transformer, trained on the training part."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model = FTTransformer(len(NUMBERS), sizes)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    data = torch.utils.data.TensorDataset(*(torch.from_numpy(v[found.train]) for v in (x, y)))
    loader = torch.utils.data.DataLoader(
        data, how.batch, shuffle=True, generator=torch.Generator().manual_seed(how.seed), drop_last=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=how.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    best, kept = -1.0, model.state_dict()
    with tqdm(total=how.epochs * len(loader), desc="transformer", unit="batch", disable=None) as bar:
        for _ in range(how.epochs):
            model.train()
            for rows, outcomes in loader:
                optimizer.zero_grad()
                accelerator.backward(nn.functional.cross_entropy(model(rows), outcomes))
                optimizer.step()
                schedule.step()
                bar.update()
            quality = roc_auc_score(y[found.choose], scored(model, x[found.choose]))
            bar.set_postfix_str(f"AUROC {quality:.3f}")
            if quality > best:
                best, kept = quality, {k: v.clone() for k, v in model.state_dict().items()}
    plain: FTTransformer = accelerator.unwrap_model(model).cpu()
    plain.load_state_dict(kept)
    return plain.eval()


@torch.no_grad()
def scored(model: nn.Module, x: np.ndarray, batch: int = 4096) -> np.ndarray:
    """The probability of readmission, (rows,)."""
    device = next(model.parameters()).device
    model.eval()
    rows = torch.from_numpy(x).split(batch)
    return torch.cat([model(part.to(device)).softmax(1)[:, 1].cpu() for part in rows]).numpy()


def baselines(x: np.ndarray, y: np.ndarray, found: Parts, *, seed: int = 0) -> Scores:
    """Return the scores of logistic regression and of boosted trees on the test part."""
    numbers, codes = slice(0, len(NUMBERS)), slice(len(NUMBERS), None)
    columns = np.arange(x.shape[1])
    linear = make_pipeline(
        make_column_transformer(
            ("passthrough", columns[numbers]),
            (OneHotEncoder(handle_unknown="ignore"), columns[codes]),
        ),
        LogisticRegression(max_iter=1000, C=0.1),
    )
    trees = HistGradientBoostingClassifier(
        categorical_features=columns[codes],
        learning_rate=0.06,
        max_iter=300,
        early_stopping=True,
        random_state=seed,
    )
    models = {"logistic regression": linear, "boosted trees": trees}
    for model in models.values():
        model.fit(x[found.train], y[found.train])
    # Columns of a matrix are no rows in memory, which is how a file would read them.
    return {
        name: np.ascontiguousarray(model.predict_proba(x[found.test])[:, 1])
        for name, model in models.items()
    }


class Quality(BaseModel):
    """Quality of a model on the test part."""

    model_config = ConfigDict(frozen=True)

    model: str
    auroc: Interval
    auprc: Interval
    brier: Interval


class Subgroup(BaseModel):
    """Quality of a model, or the difference of two models, in one group of the test part."""

    model_config = ConfigDict(frozen=True)

    by: str
    group: str
    count: int
    events: int
    auroc: Interval
    brier: Interval


MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "auroc": roc_auc_score,
    "auprc": average_precision_score,
    "brier": brier_score_loss,
}


def interval(
    measure: str,
    y: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    minus: np.ndarray | None = None,
) -> Interval:
    """Interval of a measure, or of its difference to other scores of the rows; resampled by patient."""

    def of(rows: np.ndarray) -> float:
        if len(np.unique(y[rows])) < 2:
            return float("nan")
        value = MEASURES[measure](y[rows], scores[rows])
        return float(value if minus is None else value - MEASURES[measure](y[rows], minus[rows]))

    return by_patient(of, pd.factorize(patients)[0])


def quality(name: str, y: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> Quality:
    """Return the quality of a model, with intervals."""
    return Quality(model=name, **{m: interval(m, y, scores, patients) for m in MEASURES})


def groups_of(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the attributes that define subgroups."""
    return {"sex": table["gender"], "age": age_group(table["age"]), "race": table["race"]}


def subgroups(
    table: pd.DataFrame, scores: np.ndarray, *, minus: np.ndarray | None = None
) -> list[Subgroup]:
    """Quality by sex, age and race, on the rows that were scored; groups with too few are left out.

    Args:
        minus: other scores of the same rows, of which the difference is taken, in pairs.
    """
    found = []
    y, patients = table[OUTCOME].to_numpy(), table["patient"].to_numpy()
    for by, values in groups_of(table).items():
        for name in sorted(values.unique()):
            own = (values == name).to_numpy()
            events = int(y[own].sum())
            if min(events, int(own.sum()) - events) < SMALLEST:
                continue
            less = None if minus is None else minus[own]
            measured = {
                m: interval(m, y[own], scores[own], patients[own], minus=less)
                for m in ("auroc", "brier")
            }
            found.append(Subgroup(by=by, group=name, count=int(own.sum()), events=events, **measured))
    return found


def plot_quality(y: np.ndarray, scores: Scores) -> Figure:
    """Calibration in tenths of the scores, and the net benefit of acting above a threshold."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    calibration, decision = figure.subplots(1, 2)
    for name, values in scores.items():
        tenths = np.array_split(np.argsort(values), 10)
        calibration.plot(
            [values[t].mean() for t in tenths], [y[t].mean() for t in tenths], "o-", label=name
        )
    top = max(calibration.get_xlim()[1], calibration.get_ylim()[1])
    calibration.plot([0, top], [0, top], ":", c="0.5", label="as predicted")
    calibration.set_xlabel("mean predicted probability, in tenths")
    calibration.set_ylabel("readmitted")
    thresholds = np.linspace(0.02, 0.35, 67)
    for name, values in scores.items():
        decision.plot(thresholds, [net_benefit(y, values, t) for t in thresholds], label=name)
    decision.plot(
        thresholds, [net_benefit(y, np.ones(len(y)), t) for t in thresholds], ":", c="0.5", label="all"
    )
    decision.axhline(0, ls="--", c="0.5", label="none")
    decision.set_ylim(-0.01, y.mean() + 0.005)
    decision.set_xlabel("threshold of the probability")
    decision.set_ylabel("net benefit")
    for axis in (calibration, decision):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    return figure


def net_benefit(y: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    """Net benefit of acting above a threshold: true positives less false ones at the threshold's odds,
    per person (Vickers and Elkin 2006)."""
    acted = scores >= threshold
    return float((acted & (y == 1)).mean() - (acted & (y == 0)).mean() * threshold / (1 - threshold))
