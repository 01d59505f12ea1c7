"""Samples on which a compressed network's output is farthest from the original's, for inspection."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.distributed import current
from rba_compress.core.outputs import main_output
from rba_compress.core.schema import Frozen
from rba_compress.profiling.fidelity import Compared

_PIXELS = 112
"""The longer side of a thumbnail."""


class Changed(Frozen):
    """A sample whose output the compressed network changed."""

    former: ClassVar[Mapping[str, str]] = {"dense": "original", "slim": "compressed"}

    divergence: float
    original: int | None = None
    """Class that the original network predicts; None where the output is not class scores."""
    compressed: int | None = None
    label: int | None = None
    picture: str = ""
    """A PNG as a data URI, where the input is an image."""


class MostChanged:
    """Collector of the samples with the largest divergence, called with every compared batch."""

    def __init__(self, model: nn.Module, count: int = 12) -> None:
        """Start without samples.

        Args:
            model: the original; the `pretrained_cfg` of a timm model tells how images were normalised.
        """
        known: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        self._mean, self._std = (known.get(name, (0.5,)) for name in ("mean", "std"))
        self._count = count
        self._heap: list[tuple[float, int, Changed]] = []
        self._seen = 0

    def __call__(self, compared: Compared) -> None:
        """Collect the samples of one batch that changed most."""
        divergence = compared.rows[:, 0].nan_to_num(torch.inf)
        for row in divergence.topk(min(self._count, len(divergence))).indices.tolist():
            # Of equal divergences the earlier sample comes first.
            key = float(divergence[row]), -(self._seen + row)
            if len(self._heap) < self._count or key > self._heap[0][:2]:
                entry = (*key, self._changed(compared, row, key[0]))
                (heapq.heappush if len(self._heap) < self._count else heapq.heapreplace)(
                    self._heap, entry
                )
        self._seen += len(divergence)

    def found(self) -> tuple[Changed, ...]:
        """Return the samples of all processes, the most changed first."""
        own = [entry[2].model_dump(mode="json") for entry in sorted(self._heap, reverse=True)]
        every = [Changed(**value) for part in current().collected(own) for value in part]
        return tuple(sorted(every, key=lambda c: -c.divergence)[: self._count])

    def _changed(self, compared: Compared, row: int, divergence: float) -> Changed:
        scored = not bool(compared.rows[row, 2].isnan())
        original, compressed = (
            self._top(main_output(output)[row]) if scored else None
            for output in (compared.original, compared.compressed)
        )
        labels = compared.batch.labels
        label = int(labels[row]) if labels is not None and labels[row].ndim == 0 else None
        return Changed(
            divergence=divergence,
            original=original,
            compressed=compressed,
            label=label,
            picture=self._picture(compared.batch, row),
        )

    @staticmethod
    def _top(scores: Tensor) -> int | None:
        return int(scores.argmax()) if scores.ndim == 1 else None

    def _picture(self, batch: Batch, row: int) -> str:
        """Return the sample as a PNG, if its first tensor is an image (channels, height, width);
        otherwise an empty string.
        """
        image = next(iter(batch.tensors.values()))[row].detach().cpu()
        if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
            return ""
        from PIL import Image

        mean, std = (torch.tensor(v)[:, None, None] for v in (self._mean, self._std))
        if len(mean) not in (1, image.shape[0]):
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        pixels = ((image.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        drawn = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        scale = _PIXELS / max(drawn.size)
        size = tuple(max(1, round(side * scale)) for side in drawn.size)
        # Small images are enlarged in whole pixels, to show them as the network sees them.
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        buffer = io.BytesIO()
        drawn.resize((size[0], size[1]), how).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
