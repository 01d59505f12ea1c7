"""read_out: a block computes the positions that the output reads; a map passes the others on.

y = [P block(x), T (1 - P) x], with P the read positions. The exact form is y = P block(x): the others
are not computed at all, since nothing reads them behind the last block that mixes positions.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from rba_compress.core.cost import Cost
from rba_compress.core.plan import Chain, Offer, Replacement
from rba_compress.units.base import Trial, Unit
from rba_compress.units.block_variants import BlockGraph, Form


class ReadOut(Unit):
    """Block that computes the read positions alone."""

    name = "read_out"
    unread = True

    def offers(self, trial: Trial) -> Iterator[Offer]:
        """Yield the exact form and the mapped form."""
        if trial.chain.reads:
            yield from trial.offers(self, narrow=True, exact=True)
            yield from trial.offers(self, narrow=False)

    def exact_at(self, chain: Chain, b: int) -> Replacement:
        """Return the exact read-out of block `b`; it has no map."""
        return self.choice(chain, b, b + 1).model_copy(update={"exact": True})

    def map_cost(self, new: Replacement, positions: int) -> Cost:
        """Return no cost for an exact read-out, whose map is unused."""
        return Cost() if new.exact else super().map_cost(new, positions)

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Join the read positions of the output and the mapped others of the input."""
        if form.exact:
            return block.part(block.output, 0, form.reads)
        return block.joined(block.output, block.entry, form.reads)

    def brief(self, new: Replacement) -> str:
        """Return the number of positions that are computed."""
        return f"{new.reads} position{'s' * (new.reads > 1)} computed"

    def describe(self, new: Replacement) -> str:
        """Return the block, the number of positions that it computes, and the others' map, if any."""
        others = "not computed" if new.exact else f"-> {new.map}"
        return f"{new.blocks[0].path} for {new.reads} read, others {others}"


READ_OUT = ReadOut()
