"""External weights that several ONNX files share."""

from __future__ import annotations

import hashlib
from pathlib import Path

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

        model, first = onnx.load(file), not self.path.exists()
        with self.path.open("ab") as written:
            for tensor in model.graph.initializer:
                raw: bytes = tensor.raw_data
                key = hashlib.sha256(raw).digest()
                if first and len(raw) >= SMALLEST and key not in self._places:
                    written.write(bytes(-written.tell() % ALIGNED))
                    self._places[key] = written.tell(), len(raw)
                    written.write(raw)
                if key in self._places:
                    offset, length = self._places[key]
                    set_external_data(tensor, self.path.name, offset=offset, length=length)
                    tensor.ClearField("raw_data")
        file.with_name(f"{file.name}.data").unlink(missing_ok=True)  # of a file above 2 GiB
        onnx.save(model, file)
