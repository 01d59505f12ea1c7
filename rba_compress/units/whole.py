"""whole: a block as it is, with an identity between its sublayers, at which their stream is read.

The unit saves no cost. It is for statistics between sublayers, and to test whether a block can be cut.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from rba_compress.core.plan import Offer, Replacement
from rba_compress.units.base import Trial, Unit
from rba_compress.units.block_variants import BlockGraph, Form


class Whole(Unit):
    """Block that runs from its graph, unchanged."""

    name = "whole"
    searched = False

    def offers(self, trial: Trial) -> Iterable[Offer]:
        """Return nothing, because the unit saves no cost."""
        return ()

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Let the second sublayer read the stream between the two through the map."""
        block.replace_middle(block.middle)
        return block.output

    def brief(self, new: Replacement) -> str:
        """Return nothing: the block is as it was."""
        return ""

    def describe(self, new: Replacement) -> str:
        """Return the block."""
        return f"{new.blocks[0].path} as it is"


WHOLE = Whole()
