"""span: consecutive blocks are replaced by one map of the stream, y = T x."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from rba_compress.core.config import Config
from rba_compress.core.cost import Cost
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.plan import Chain, Offer, Replacement, listed
from rba_compress.graph.rewrite import Spliced
from rba_compress.graph.token_merging import restored, with_sizes
from rba_compress.units.base import Level, Trial, Unit
from rba_compress.units.block_variants import Form, Traces


class SizedMap(Spliced):
    """Map of a stream that comes with the sizes of its positions."""

    def __init__(self, map: nn.Module, form: Form) -> None:  # noqa: A002
        super().__init__(map)
        self.form = form

    def mapped(self, stream: Tensor) -> Tensor:
        """Return the mapped stream, with sizes or with positions repeated where the form says so."""
        width = stream.shape[-1] - 1
        sizes, found = stream[..., width:], self.map(stream[..., :width])
        if self.form.restored:
            return restored(found, sizes, self.form.restored)
        return with_sizes(found, sizes) if self.form.hands_sizes else found


class Span(Unit):
    """Consecutive blocks removed, and one map in their place."""

    name = "span"
    stock = True
    gguf = True
    removes = True
    mixes = False

    def offers(self, trial: Trial) -> Iterable[Offer]:
        """Return nothing: every chain that was found is replaceable."""
        return ()

    def sites(self, chain: Chain, window: int | None) -> list[tuple[int, int]]:
        """Return every span of at most `window` blocks."""
        return chain.spans(window)

    def levels(self, config: Config, chain: Chain) -> list[MapSpec]:
        """Return every map, folded ones among them."""
        return config.specs(chain.width)

    def folds(self, level: Level) -> bool:
        """Return whether the map is a correction of the layer before."""
        return isinstance(level, MapSpec) and level.kind == "folded"

    def cost(self, chain: Chain, new: Replacement, positions: int) -> tuple[list[Cost], int]:
        """Return the map's cost, and nothing for the other blocks."""
        others = [Cost()] * (len(new.blocks) - 1)
        return [self.map_cost(new, positions), *others], positions

    def unfoldable(self, new: Replacement) -> str | None:
        """Return why the map cannot be folded; None for identities and folded maps."""
        if new.map.kind in ("identity", "folded"):
            return None
        return "a linear map on a residual stream has no place in a stock network"

    def require(self, new: Replacement) -> None:
        """Accept any number of blocks."""

    def rewrite(
        self, model: nn.Module, new: Replacement, module: nn.Module, traces: Traces, form: Form
    ) -> nn.Module:
        """Return the map."""
        return SizedMap(module, form) if form.sized else module

    def brief(self, new: Replacement) -> str:
        """Return the map, or that nothing is left."""
        return f"{new.map} map" if new.map.kind not in ("identity", "folded") else "left out"

    def describe(self, new: Replacement) -> str:
        """Return the blocks and the map."""
        return f"{listed([block.path for block in new.blocks])} -> {new.map}"


SPAN = Span()
