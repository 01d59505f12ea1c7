"""attention_free: a map of the stream in place of a block's first sublayer, y = f(T x)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from rba_compress.core.plan import Offer, Replacement
from rba_compress.units.base import Trial, Unit
from rba_compress.units.block_variants import BlockGraph, Form


class AttentionFree(Unit):
    """A block without its attention; its MLP is kept."""

    name = "attention_free"
    mixes = False

    def offers(self, trial: Trial) -> Iterator[Offer]:
        """Yield the block for all positions, and behind an exact read-out."""
        if trial.divisible:
            yield from trial.offers(self, narrow=False)
            if trial.chain.reads:
                yield from trial.offers(self, narrow=True)

    def target(self, stop: int) -> float:
        """Return the original's stream between the sublayers."""
        return stop - 0.5

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Let the second sublayer read the mapped input."""
        block.replace_middle(block.entry)
        return block.output

    def brief(self, new: Replacement) -> str:
        """Return the loss of attention."""
        return "no attention"

    def describe(self, new: Replacement) -> str:
        """Return the block and the map."""
        return f"{new.blocks[0].path} attention -> {new.map}"
