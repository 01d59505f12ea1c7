"""Forward passes that start at a boundary of a chain, from cached streams."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rba_compress.core.plan import Chain
from rba_compress.graph.rewrite import Held, replace_blocks

Streams = Sequence[dict[int, Tensor]]
"""Streams of each chain by boundary, as in `Observed`."""


class Resumed:
    """Model that starts at a boundary of a chain, from cached streams.

    Blocks before the boundary and all earlier chains are skipped. Their last streams are supplied from
    the cache, because more than the next chain may read them (a decoder reads its encoder, a head two
    towers).

    Args:
        model: changed in place: pass a copy.
        chains: in the order in which they run.
        chain, boundary: the start; at boundary 0 of the first chain the whole model runs.
        known: cached streams of one batch, which show the earlier chains that were reached.
    """

    def __init__(
        self, model: nn.Module, chains: Sequence[Chain], chain: int, boundary: int, known: Streams
    ) -> None:
        self.model = model
        self._held: list[tuple[int, int, Held]] = []
        places = [(c, len(chains[c])) for c in range(chain) if len(chains[c]) in known[c]]
        for c, stop in [*places, (chain, boundary)]:
            if stop:
                held = Held()
                replace_blocks(model, chains[c].blocks[:stop], held)
                self._held.append((c, stop, held))

    def start(self, streams: Streams) -> nn.Module:
        """Return the model, ready to run on the batch that the streams come from."""
        for c, boundary, held in self._held:
            held.value = streams[c][boundary]
        return self.model
