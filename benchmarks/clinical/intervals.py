"""Intervals: Wilson's for a share, resampling of patients for anything else."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest

SMALLEST = 11
"""Cells of fewer people are not shown (the rule of the US Centers for Medicare & Medicaid Services)."""

TIMES = 500
"""Number of bootstrap samples of patients for an interval."""


class Interval(BaseModel):
    """A value and its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float

    @property
    def is_none(self) -> bool:
        """Return whether zero lies in the interval."""
        return self.low <= 0 <= self.high


def share(events: int, count: int) -> Interval:
    """Return the share of events among a count, with Wilson's interval."""
    test = binomtest(events, count)
    found = test.proportion_ci(method="wilson")
    return Interval(value=events / count, low=found.low, high=found.high)


def by_patient(
    measure: Callable[[np.ndarray], float], patients: np.ndarray, *, seed: int = 0
) -> Interval:
    """A measure of rows, with its percentiles over patients drawn with replacement.

    Args:
        measure: of row numbers, which may repeat; NaN where it cannot be taken.
        patients: whose each row is, numbered from 0 without gaps.
    """
    order = np.argsort(patients, kind="stable")
    starts = np.searchsorted(patients[order], np.arange(patients.max() + 2))
    groups = [order[a:b] for a, b in itertools.pairwise(starts)]
    generator = np.random.default_rng(seed)
    drawn = [
        measure(np.concatenate([groups[k] for k in generator.integers(0, len(groups), len(groups))]))
        for _ in range(TIMES)
    ]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Interval(value=float(measure(np.arange(len(patients)))), low=float(low), high=float(high))
