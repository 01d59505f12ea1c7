"""Forward passes that start at a boundary of a chain, from streams seen before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rba_compress.core.plan import Chain
from rba_compress.graph.rewrite import replace_blocks


class _Held(nn.Module):
    """Ignores its input and gives back `value`, a stream that was seen before."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        assert self.value is not None, "set before every pass"
        return self.value


Streams = Sequence[dict[int, Tensor]]
"""For each chain: boundary -> stream, as in `Observed`."""


class Resumed:
    """A model that starts at a boundary of a chain, from streams seen before.

    Blocks before the boundary and all earlier chains are passed over: their last streams are held, for
    more than the next chain may read them (a decoder reads its encoder, a head two towers).

    Args:
        model: changed in place: pass a copy.
        chains: in the order in which they run.
        chain, boundary: where it starts; at boundary 0 of the first chain the whole model runs.
        known: streams of one batch, to see which earlier chains were reached.
    """

    def __init__(
        self, model: nn.Module, chains: Sequence[Chain], chain: int, boundary: int, known: Streams
    ) -> None:
        self.model = model
        self._held: list[tuple[int, int, _Held]] = []
        places = [(c, len(chains[c])) for c in range(chain) if len(chains[c]) in known[c]]
        for c, stop in [*places, (chain, boundary)]:
            if stop:
                held = _Held()
                replace_blocks(model, chains[c].blocks[:stop], held)
                self._held.append((c, stop, held))

    def start(self, streams: Streams) -> nn.Module:
        """The model, ready to run on the batch that the streams were seen on."""
        for c, boundary, held in self._held:
            held.value = streams[c][boundary]
        return self.model
