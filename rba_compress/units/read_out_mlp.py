"""read_out_mlp: attention for all positions, the MLP for the read ones; a map passes the others on.

y = [f(P m), T (1 - P) m], with m = mix(x) and P the read positions.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from rba_compress.core.plan import Offer, Replacement
from rba_compress.units.base import Trial, Unit
from rba_compress.units.block_variants import BlockGraph, Form


class ReadOutMlp(Unit):
    """Block whose MLP computes the read positions alone."""

    name = "read_out_mlp"
    unread = True

    def offers(self, trial: Trial) -> Iterator[Offer]:
        """Yield the block where some positions are read and others are not."""
        if trial.divisible and trial.chain.reads:
            yield from trial.offers(self, narrow=False)

    def source(self, start: int) -> float:
        """Return the compressed network's stream between the sublayers."""
        return start + 0.5

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Join the read positions of the output and the mapped others between the sublayers."""
        return block.joined(block.output, block.middle, form.reads)

    def brief(self, new: Replacement) -> str:
        """Return the number of positions that the MLP computes."""
        return f"MLP for {new.reads} position{'s' * (new.reads > 1)}"

    def describe(self, new: Replacement) -> str:
        """Return the block, the number of positions that its MLP computes, and the others' map."""
        return f"{new.blocks[0].path} MLP for {new.reads} read, others -> {new.map}"
