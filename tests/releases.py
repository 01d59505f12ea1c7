"""Features that older releases of other libraries lack: their tests are skipped, with the reason."""

from __future__ import annotations

import pytest
import safetensors
import timm
import torch
import transformers
from packaging.version import Version

TORCH = Version(torch.__version__)
INFERS_ALIKE = Version("2.7") <= TORCH
"""Weights that a hook has just loaded are multiplied in inference mode as others are, bit for bit."""
STORES_COMPLEX = Version(safetensors.__version__) >= Version("0.7")

reads_attention_type = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.4"),
    reason="transformers < 5.4: its model reads attention_type of each layer, which is refused",
)
reads_folders = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.16"), reason="timm < 1.0.16 opens no folders"
)
half_onnx = pytest.mark.skipif(
    Version("2.7") > TORCH, reason="torch < 2.7: ONNX Runtime does not open its ONNX in float16"
)

LACKING = {
    "regnetx_002": (Version("2.7") > TORCH, "torch < 2.7 exports no BatchNorm with this onnxscript"),
    "transformers/swin": (
        Version(transformers.__version__) < Version("5"),
        "transformers < 5: one block of it is called otherwise",
    ),
}
"""Networks with which less can be done: whether here, and why."""
