"""Effort of a search: what its three settings spend on it."""

from __future__ import annotations

from dataclasses import dataclass

from rba_compress.core.config import Effort


@dataclass(frozen=True)
class Spent:
    """Amounts of work."""

    stage: float
    """Share of the original's cost that a stage goes down."""
    screen: int
    """Ratio of validation to screened samples."""
    fewest: int
    """Screened samples at least, where there are as many."""
    finer: float
    """Sites whose further levels are run, for each block of the network."""
    again: float
    """Sites that are measured again in the next stage at most, for each block of the network."""
    judged: int
    """Plans that are evaluated at the end of a stage."""
    shapes: int
    """Shapes of schedules that are run between two stages, and at the end."""
    trades: int
    """Trades of levels that are run at the end."""
    refits: bool
    """True to re-solve kept layers of the result."""


SPENT: dict[Effort, Spent] = {
    "quick": Spent(
        stage=0.2,
        screen=8,
        fewest=16,
        finer=0.25,
        again=0.5,
        judged=2,
        shapes=8,
        trades=0,
        refits=False,
    ),
    # 25 screened images missed a DeiT-tiny's best span, 50 did not.
    "default": Spent(
        stage=0.1, screen=4, fewest=32, finer=1, again=2, judged=3, shapes=14, trades=48, refits=True
    ),
    "thorough": Spent(
        stage=0.1, screen=2, fewest=64, finer=3, again=4, judged=6, shapes=28, trades=96, refits=True
    ),
}
