"""Cost of a network, of a part of it, or of a saving."""

from __future__ import annotations

from pydantic import Field

from rba_compress.core.schema import Frozen


class Cost(Frozen):
    """Multiply-accumulates of one sample, and parameters."""

    macs: int = 0
    params: int = 0
    latency: float = Field(0.0, exclude=True)
    """Share of the original's latency; tracked only where the budget limits it, never serialised."""

    def __add__(self, other: Cost) -> Cost:
        return _sum(self, other, 1)

    def __sub__(self, other: Cost) -> Cost:
        return _sum(self, other, -1)


def _sum(a: Cost, b: Cost, sign: int) -> Cost:
    return Cost(
        macs=a.macs + sign * b.macs,
        params=a.params + sign * b.params,
        latency=a.latency + sign * b.latency,
    )


UNREACHABLE = Cost(macs=1 << 60)
"""Cost of a combination that cannot be built."""


def kept(part: float, whole: float) -> float:
    """Return the share that is left of a cost; 1 where there was none."""
    return part / whole if whole else 1.0
