"""Int8 ONNX files: static quantisation in QDQ form, in a closed loop with the divergence that it costs.

Matrix products and convolutions with constant weights are computed in int8: weights symmetric for each
output channel, activations by the ranges that calibration samples show. Weights take seven bits, for on
processors without VNNI a product of eight and eight bits overflows, and a file must compute the same
everywhere. Where the divergence is above the bound, the operations that cost most of it stay in float.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rba_compress.artifacts.certificate import (
    OnnxModel,
    Runtime,
    flat,
    leaves,
    open_in,
    require_valid,
)
from rba_compress.artifacts.onnx_file import EXTERNAL, onnx_weight
from rba_compress.core.batch import Batch
from rba_compress.core.distributed import current
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import evaluating
from rba_compress.profiling.fidelity import Criterion, compared_with, run_original

OPERATIONS = ("MatMul", "Gemm", "Conv")
"""Operations that are computed in int8 where their weights are constant."""
BOUNDS = {"kl": 0.02, "bernoulli": 0.02, "nse": 0.02, "cosine": 0.01}
"""Largest mean divergence of an int8 file from the same network in float, where no bound is given."""
SCREENED = 64
"""Samples on which the divergence of single operations is measured."""
FURTHER = 0.1
"""Share of the operations that go back to float at once, where the bound does not hold yet."""
SETTINGS = {"WeightSymmetric": True, "ActivationSymmetric": False, "MatMulConstBOnly": True}


class AsNetwork(nn.Module):
    """File in a runtime that is called as the network that it was exported from.

    Args:
        runner: the file as a module from tensors to tensors.
        output: an output of the network, whose structure the file's outputs get.
    """

    def __init__(self, runner: nn.Module, output: Any) -> None:
        super().__init__()
        self.runner = runner
        self._parts, self._spec = pytree.tree_flatten(output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = iter(leaves(flat(Batch(args, kwargs, None)).run(self.runner)))
        parts = [next(found) if isinstance(part, Tensor) else part for part in self._parts]
        return pytree.tree_unflatten(parts, self._spec)


@dataclass(frozen=True)
class Int8File:
    """Quantised file, and how it came about."""

    divergence: float
    """Mean divergence on the samples that were chosen on."""
    operations: int
    """Number of operations in int8."""
    floats: dict[str, float]
    """Operations that stay in float, with the divergence that each costs alone in int8."""
    biases: int
    """Number of biases that were corrected."""


@dataclass(frozen=True)
class Chosen:
    """Criterion, samples and bound by which operations are chosen for int8."""

    criterion: Criterion
    batches: Sequence[Batch]
    bound: float
    """Largest mean divergence from the network in float, on the batches."""
    runtimes: Sequence[Runtime] = ("onnxruntime",)
    """Runtimes in each of which the bound must hold."""


def quantised(
    file: Path, network: nn.Module, chosen: Chosen, fit: Sequence[Batch], target: Path
) -> Int8File:
    """Write the int8 form of a float file.

    Args:
        file: the network in float.
        fit: batches whose activations give the ranges.

    Raises:
        ExportError: nothing can be quantised, or the bound holds in float alone.
    """
    with tempfile.TemporaryDirectory() as aside, _quiet():
        loop = _Loop(_Quantiser(file, fit, Path(aside)), network, chosen)
        found = loop.within(chosen.bound)
        loop.quantiser.write(found, target)
        require_valid(target)
        floats = {name: loop.alone[name] for name in loop.quantiser.nodes if name not in found}
        return Int8File(loop.reached, len(found), floats, loop.quantiser.biases)


class _Loop:
    """Closed loop: operations go back to float, the most sensitive first, until a bound holds."""

    def __init__(self, quantiser: _Quantiser, network: nn.Module, chosen: Chosen) -> None:
        self.quantiser, self.chosen = quantiser, chosen
        self._file = quantiser.aside / "tried.onnx"
        screened = _first(chosen.batches, SCREENED)
        with evaluating(network):
            self._all, self._screened = (
                [*run_original(network, b)] for b in (chosen.batches, screened)
            )
        self.alone: dict[str, float] = {}
        """Divergence that each operation costs alone in int8."""
        self.reached = math.inf

    def within(self, bound: float) -> list[str]:
        """Return the operations to compute in int8.

        Raises:
            ExportError: none can be.
        """
        kept = list(self.quantiser.nodes)
        self.reached = self.divergence(kept, self._all)
        self.quantiser.correct()
        corrected = self.divergence(kept, self._all)
        if corrected < self.reached:
            self.reached = corrected
        else:
            self.quantiser.restore()
        if self.reached <= bound:
            return kept
        for name in current().bar(kept, "sensitivity", unit="operation"):
            self.alone[name] = self.divergence([name], self._screened)
        kept.sort(key=lambda name: (self.alone[name], name))
        # Divergences of single operations nearly add up: start where their sum is within the bound.
        sums = np.cumsum([self.alone[name] for name in kept])
        kept = kept[: int((sums <= bound).sum())]
        least = max(round(FURTHER * len(self.quantiser.nodes)), 1)
        while kept:
            self.reached = self.divergence(kept, self._all)
            if self.reached <= bound:
                return kept
            kept = kept[:-least]
        raise ExportError(
            f"no operation can be computed in int8 at a divergence of {bound:g}: the least sensitive "
            f"one costs {min(self.alone.values()):.3g} alone; pass a larger bound="
        )

    def divergence(self, nodes: Sequence[str], outputs: Sequence[tuple[Any, Batch]]) -> float:
        """Return the mean divergence of the file with some operations in int8, the largest of all
        runtimes.

        Args:
            outputs: outputs of the network in float, and their batches.
        """
        self.quantiser.write(nodes, self._file)
        example, criterion = outputs[0][0], self.chosen.criterion
        files = (AsNetwork(open_in(name, self._file), example) for name in self.chosen.runtimes)
        return max(compared_with(outputs, file, criterion).divergence for file in files)


class _Quantiser:
    """ONNX Runtime's quantiser of one file, calibrated once, with biases corrected."""

    def __init__(self, file: Path, fit: Sequence[Batch], aside: Path) -> None:
        import onnx
        from onnxruntime.quantization import create_calibrator, quant_pre_process

        self.aside, self._fit = aside, fit
        self._large = onnx_weight(file).bytes > EXTERNAL
        prepared = aside / "prepared.onnx"
        quant_pre_process(
            str(file),
            str(prepared),
            skip_symbolic_shape=True,
            save_as_external_data=self._large,
            all_tensors_to_one_file=True,
            external_data_location=_data(prepared).name,
        )
        self._model = onnx.load(str(prepared))
        self.nodes = self._linear()
        if not self.nodes:
            raise ExportError("the network has no linear layer or convolution to compute in int8")
        calibrator = create_calibrator(
            prepared,
            [*OPERATIONS],
            augmented_model_path=str(aside / "augmented.onnx"),
            use_external_data_format=self._large,
        )
        self._names = [given.name for given in self._model.graph.input]
        calibrator.collect_data(_Reader(self._names, fit))
        self._ranges = calibrator.compute_data()
        self._moved: list[tuple[_Layer, np.ndarray]] = []

    @property
    def biases(self) -> int:
        """Number of biases that are corrected."""
        return len(self._moved)

    def _linear(self) -> list[str]:
        """Return the names of the operations whose weights are constant, in order."""
        constant = {each.name for each in self._model.graph.initializer}
        return [
            node.name
            for node in self._model.graph.node
            if node.op_type in OPERATIONS and node.input[1] in constant
        ]

    def write(self, nodes: Sequence[str], target: Path) -> None:
        """Write the file with some operations in int8; in float without any."""
        from onnxruntime.quantization import QDQQuantizer, QuantType

        quantizer = QDQQuantizer(
            copy.deepcopy(self._model),
            per_channel=True,
            reduce_range=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[*nodes],
            nodes_to_exclude=[],
            op_types_to_quantize=[*OPERATIONS],
            extra_options=dict(SETTINGS),
        )
        quantizer.quantize_model()
        _data(target).unlink(missing_ok=True)  # onnx appends to it
        quantizer.model.save_model_to_file(str(target), use_external_data_format=self._large)

    def correct(self) -> None:
        """Subtract from each bias the mean error that quantisation leaves in the layer's output.

        The mean of `W_q x_q - W x` over samples and positions, with the rounded weights and inputs of
        the layer alone (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
        Correction", section 4.2, with means that are measured).
        """
        rounded_file = self.aside / "all.onnx"
        self.write(self.nodes, rounded_file)
        rounded = _Rounded.read(rounded_file)
        layers = [layer for name in self.nodes if (layer := _Layer.of(self._model.graph, name))]
        means = self._means({layer.input: layer.axis for layer in layers}, rounded)
        for layer in layers:
            before = layer.bias_values
            error = layer.error(rounded.weights[layer.weight], *means[layer.input])
            layer.set_bias(before - error)
            self._moved.append((layer, before))

    def restore(self) -> None:
        """Take the corrections of the biases back."""
        for layer, before in self._moved:
            layer.set_bias(before)
        self._moved = []

    def _means(
        self, inputs: dict[str, int], rounded: _Rounded
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the mean of layers' inputs over samples and positions, as they are and rounded.

        Args:
            inputs: the axis of the channels of each input, by name.
        """
        import onnx

        wide = copy.deepcopy(self._model)
        known = {*self._names, *(each.name for each in wide.graph.output)}
        wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inputs if name not in known)
        file = self.aside / "observed.onnx"
        onnx.save(wide, str(file), save_as_external_data=self._large, location=_data(file).name)
        session = OnnxModel(file).session
        outputs = [each.name for each in session.get_outputs()]
        sums: dict[str, tuple[Any, Any, int]] = dict.fromkeys(inputs, (0.0, 0.0, 0))
        for batch in self._fit:
            feed = _feed(self._names, batch)
            found = dict(zip(outputs, session.run(None, feed), strict=True)) | feed
            for name, axis in inputs.items():
                x = np.moveaxis(found[name], axis, -1).reshape(-1, found[name].shape[axis])
                y, (sum_x, sum_y, count) = rounded.activation(name, x), sums[name]
                sums[name] = sum_x + x.sum(0, np.float64), sum_y + y.sum(0, np.float64), count + len(x)
        return {name: (x / count, y / count) for name, (x, y, count) in sums.items()}


@dataclass(frozen=True)
class _Layer:
    """Linear operation with a bias."""

    node: Any
    weight: str
    input: str
    values: np.ndarray
    bias: Any
    """Initializer of the bias."""

    @classmethod
    def of(cls, graph: Any, name: str) -> _Layer | None:
        """Return the layer of an operation; None where its bias is not its own."""
        from onnx import numpy_helper

        node = next(each for each in graph.node if each.name == name)
        held = {each.name: each for each in graph.initializer}
        bias = held.get(node.input[2]) if len(node.input) > 2 else None
        if node.op_type == "MatMul":
            users = [each for each in graph.node if node.output[0] in each.input]
            added = users[0].input if len(users) == 1 and users[0].op_type == "Add" else ()
            bias = next((held[each] for each in added if each in held), None)
        values = numpy_helper.to_array(held[node.input[1]])
        if bias is None or len(bias.dims) != 1 or sum(bias.name in n.input for n in graph.node) > 1:
            return None
        return cls(node, node.input[1], node.input[0], values, bias)

    @property
    def axis(self) -> int:
        """Axis of the inputs in the layer's input."""
        return 1 if self.node.op_type == "Conv" else -1

    def error(self, rounded: np.ndarray, mean: np.ndarray, mean_rounded: np.ndarray) -> np.ndarray:
        """Return the mean of `W_q x_q - W x`, (outputs,)."""
        if self.node.op_type == "Conv":  # each group reads its own inputs
            groups = next((a.i for a in self.node.attribute if a.name == "group"), 1)
            a, b = (w.reshape(len(w), w.shape[1], -1).sum(-1) for w in (rounded, self.values))
            each = len(a) // groups
            x, y = (np.repeat(m.reshape(groups, -1), each, 0) for m in (mean_rounded, mean))
            return np.asarray((a * x).sum(1) - (b * y).sum(1))
        transposed = any(a.name == "transB" and a.i for a in self.node.attribute)
        a, b = (w if transposed else w.T for w in (rounded, self.values))
        return np.asarray(a @ mean_rounded - b @ mean)

    @property
    def bias_values(self) -> np.ndarray:
        from onnx import numpy_helper

        return np.array(numpy_helper.to_array(self.bias))

    def set_bias(self, values: np.ndarray) -> None:
        from onnx import numpy_helper

        self.bias.CopyFrom(numpy_helper.from_array(values.astype(np.float32), self.bias.name))


@dataclass(frozen=True)
class _Rounded:
    """Weights and scales of a quantised file."""

    weights: dict[str, np.ndarray]
    """Rounded weights, by the name of the weight in float."""
    scales: dict[str, tuple[float, int]]
    """Scale and zero point of each activation, by its name."""

    def activation(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return values of an activation as they are rounded."""
        scale, zero = self.scales[name]
        return np.asarray((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale)

    @classmethod
    def read(cls, file: Path) -> _Rounded:
        """Read weights and scales; onnxruntime names a rounded weight after the one in float."""
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(str(file)).graph
        held = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        weights: dict[str, np.ndarray] = {}
        scales: dict[str, tuple[float, int]] = {}
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] not in held:
                scales[node.input[0]] = float(held[node.input[1]]), int(held[node.input[2]])
            if node.op_type == "DequantizeLinear" and node.input[0] in held:
                values, scale = held[node.input[0]], held[node.input[1]]
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
                shape = [-1 if k == axis % values.ndim else 1 for k in range(values.ndim)]
                wide = scale.reshape(shape) if scale.ndim else scale
                weights[node.input[0].removesuffix("_quantized")] = values * wide
        return cls(weights, scales)


def _data(file: Path) -> Path:
    """Return the file of the weights beside a large ONNX file."""
    return file.with_name(f"{file.name}.data")


class _Reader:
    """Calibration batches as onnxruntime reads them."""

    def __init__(self, names: Sequence[str], batches: Sequence[Batch]) -> None:
        self._items = iter([_feed(names, batch) for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._items, None)


def _feed(names: Sequence[str], batch: Batch) -> dict[str, np.ndarray]:
    return {n: t.detach().numpy() for n, t in zip(names, flat(batch).args, strict=True)}


def _first(batches: Sequence[Batch], most: int) -> list[Batch]:
    """Return the first batches that hold so many samples."""
    found: list[Batch] = []
    for batch in batches:
        left = most - sum(map(len, found))
        if left > 0:
            found.append(batch.select(list(range(min(left, len(batch))))))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the quantiser's advice, which is about steps that are taken here."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
