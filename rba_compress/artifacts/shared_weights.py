"""External weights that several ONNX files share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

SMALLEST = 1024
"""Bytes of a tensor from which on it is worth a place outside of the file."""
ALIGNED = 4096
"""Offsets are multiples of a page, so that a runtime can map the weights into memory."""


class SharedWeights:
    """File of weights: the first ONNX file moves its weights there, the later ones refer to equal ones.

    Args:
        path: the file of weights, in the folder of the ONNX files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, tuple[int, int]] = {}

    def take(self, file: Path) -> None:
        """Rewrite an ONNX file so that it refers to shared weights wherever it has equal ones."""
        import onnx
        from onnx.external_data_helper import set_external_data

        model = onnx.load(file)
        if not self.path.exists():
            with self.path.open("wb") as written:
                for tensor in model.graph.initializer:
                    self._write(tensor.raw_data, written)
        for tensor in model.graph.initializer:
            place = self._places.get(hashlib.sha256(tensor.raw_data).digest())
            if place is not None:
                set_external_data(tensor, self.path.name, offset=place[0], length=place[1])
                tensor.ClearField("raw_data")
        file.with_name(f"{file.name}.data").unlink(missing_ok=True)  # of a file above 2 GiB
        onnx.save(model, file)

    def _write(self, raw: bytes, written: BinaryIO) -> None:
        key = hashlib.sha256(raw).digest()
        if len(raw) >= SMALLEST and key not in self._places:
            written.write(bytes(-written.tell() % ALIGNED))
            self._places[key] = written.tell(), len(raw)
            written.write(raw)
