"""The units of this package, one line each."""

from __future__ import annotations

from typing import cast

from rba_compress.core.registry import UNITS, register
from rba_compress.units.attention_free import AttentionFree
from rba_compress.units.attention_linear import AttentionLinear
from rba_compress.units.base import Unit
from rba_compress.units.head_width import HeadWidth
from rba_compress.units.hidden_width import HiddenWidth
from rba_compress.units.mlp_free import MlpFree
from rba_compress.units.qk_rank import QkRank
from rba_compress.units.read_out import READ_OUT
from rba_compress.units.read_out_mlp import ReadOutMlp
from rba_compress.units.span import SPAN
from rba_compress.units.token_merge import TOKEN_MERGE
from rba_compress.units.vo_rank import VoRank
from rba_compress.units.whole import WHOLE
from rba_compress.units.width import WidthUnit

register(SPAN)
register(READ_OUT)
register(AttentionFree())
register(MlpFree())
register(ReadOutMlp())
register(TOKEN_MERGE)
register(HiddenWidth())
register(HeadWidth())
register(AttentionLinear())
register(QkRank())
register(VoRank())
register(WHOLE)


def unit_of(name: str) -> Unit:
    """Return a registered unit; the names in a plan were checked when the plan was read."""
    return cast("Unit", UNITS[name])


def width_unit_of(name: str) -> WidthUnit:
    """Return a registered unit that narrows blocks from the inside."""
    unit = unit_of(name)
    assert isinstance(unit, WidthUnit)
    return unit
