"""mlp_free: a map in place of a block's second sublayer, y = T mix(x)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from rba_compress.core.plan import Chain, Offer, Replacement
from rba_compress.units.base import Trial, Unit
from rba_compress.units.block_variants import BlockGraph, Form


class MlpFree(Unit):
    """A block without its MLP; its attention is kept."""

    name = "mlp_free"

    def offers(self, trial: Trial) -> Iterator[Offer]:
        """Yield the block for all positions, and for the read ones alone."""
        if trial.divisible:
            yield from trial.offers(self, narrow=False)
            if trial.chain.reads:
                yield from trial.offers(self, narrow=True, exact=True)

    def source(self, start: int) -> float:
        """Return the compressed network's stream between the sublayers."""
        return start + 0.5

    def exact(self, chain: Chain, old: Replacement) -> Replacement:
        """Return the same decision for the read positions alone."""
        return old.model_copy(update={"exact": True, "reads": chain.reads})

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Return the mapped stream between the sublayers as the output."""
        output = block.mapped(block.middle)
        return block.part(output, 0, form.reads) if form.exact else output

    def brief(self, new: Replacement) -> str:
        """Return the loss of the MLP."""
        return "no MLP"

    def describe(self, new: Replacement) -> str:
        """Return the block and the map."""
        only = f" ({new.reads} read)" if new.exact else ""
        return f"{new.blocks[0].path} MLP -> {new.map}{only}"
