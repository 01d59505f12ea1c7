"""Entries of every table of hostile cases: a name, something hostile, and the expected outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from rba_compress import RBAError


@dataclass(frozen=True)
class Case:
    """Hostile case that `make` builds; `error` with `message` is the refusal, None for no refusal."""

    name: str
    make: Callable[[], Any]
    error: type[RBAError] | None = None
    message: str = ""
    """A regular expression: what was found and what to do."""
    blocks: int = 4
    """Of a model that is not refused: how many can be replaced."""


def table(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """The cases as parameters of a test, by their names."""
    found = list(cases)
    assert len({case.name for case in found}) == len(found), "two cases of one name"
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in found])
