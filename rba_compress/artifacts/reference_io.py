"""Reference inputs and outputs: statistics to draw similar inputs from, and no sample itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.inference import evaluating
from rba_compress.core.outputs import main_output
from rba_compress.core.schema import Dtype, Frozen
from rba_compress.profiling.fidelity import gap

_VALUES = 64
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Difference allowed on another machine, where sums have another order, over the largest output."""


class Given(Frozen):
    """Input tensor of a network, with the range of its values."""

    name: str | None
    """Keyword that the tensor is passed by; None for a positional one."""
    dtype: Dtype
    shape: tuple[int, ...]
    """Shape of one sample, without the batch dimension, if `batched`; otherwise of the whole tensor."""
    batched: bool
    low: float
    high: float
    mean: float
    std: float

    @classmethod
    def of(cls, name: str | None, tensor: Tensor, samples: int) -> Given:
        """Measure a tensor of an example with so many samples."""
        values = tensor.detach().double().reshape(-1)
        batched = tensor.ndim > 0 and tensor.shape[0] == samples
        return cls(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape[1:] if batched else tensor.shape),
            batched=batched,
            low=float(values.min()) if len(values) else 0.0,
            high=float(values.max()) if len(values) else 0.0,
            mean=float(values.mean()) if len(values) else 0.0,
            std=float(values.std(correction=0)) if len(values) else 0.0,
        )

    @property
    def sequence(self) -> bool:
        """True if the tensor may be a sequence: token ids (N, T), or a mask beside them."""
        return self.batched and len(self.shape) == 1 and "float" not in self.dtype

    def draw(self, samples: int, generator: torch.Generator, length: int | None = None) -> Tensor:
        """Draw values of that range; `length` is that of a sequence."""
        shape = (samples, *self.shape) if self.batched else self.shape
        if self.sequence and length is not None:
            shape = (samples, length)
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            drawn = self.mean + self.std * torch.randn(shape, generator=generator)
            return drawn.clamp(self.low, self.high).to(dtype)
        low, high = int(self.low), int(self.high)
        drawn = torch.randint(low, high + 1, shape, generator=generator)
        if (low, high) == (0, 1) and len(shape) > 1:
            drawn[:, 0] = 1  # a mask that hides everything is invalid
        return drawn.to(dtype)


class Probe(Frozen):
    """Reference inputs, to be drawn at random, and a network's outputs on them."""

    inputs: tuple[Given, ...]
    constants: dict[str, JsonValue] = Field(default_factory=dict)
    """Keywords that are not tensors."""
    wrapped: bool = False
    """True where the keywords are passed as one dict by position."""
    outputs: tuple[float, ...] = ()
    """Some values of the output on `draw(2)`, evenly spaced; none where one is not finite."""

    @classmethod
    def of(cls, example: Batch, model: nn.Module | None = None) -> Probe | None:
        """Measure an example, and a model's outputs; return None if an argument is no plain value."""
        rest = [a for a in example.args if not isinstance(a, Tensor)]
        constants = {k: v for k, v in example.kwargs.items() if not isinstance(v, Tensor)}
        plain = (bool, int, float, str, type(None))
        if rest or not all(isinstance(v, plain) for v in constants.values()):
            return None
        n = len(example)
        named = [(None, a) for a in example.args] + [
            (k, v) for k, v in example.kwargs.items() if isinstance(v, Tensor)
        ]
        probe = cls(
            inputs=tuple(Given.of(k, v, n) for k, v in named),
            constants=constants,
            wrapped=example.wrapped,
        )
        if model is None:
            return probe
        outputs = tuple(probe.outputs_of(model))
        # Random inputs may give NaN, which is not equal to itself.
        return probe.model_copy(update={"outputs": outputs if all(map(math.isfinite, outputs)) else ()})

    def draw(self, samples: int, *, seed: int = 0, length: int | None = None) -> Batch:
        """Return a batch of similar inputs; sequences have `length`, if it is given."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [(g.name, g.draw(samples, generator, length)) for g in self.inputs]
        kwargs = {name: tensor for name, tensor in drawn if name is not None}
        return Batch(
            tuple(tensor for name, tensor in drawn if name is None),
            {**kwargs, **self.constants},
            None,
            self.wrapped,
        )

    def draws(self, sizes: Sequence[int], *, sequences: bool) -> list[Batch]:
        """Return a batch of each size; with `sequences`, the second is half as long."""
        lengths = [given.shape[0] for given in self.inputs if given.sequence]
        half = min(lengths) // 2 if sequences else None
        return [
            self.draw(size, seed=k, length=half if k == 1 else None) for k, size in enumerate(sizes)
        ]

    def outputs_of(self, model: nn.Module) -> list[float]:
        """Return the values that are recorded of a network's output."""
        with evaluating(model):
            found = main_output(self.draw(2).to(model).run(model)).detach().cpu().double().reshape(-1)
        return found[:: max(1, len(found) // _VALUES)][:_VALUES].tolist()

    def flaw(self, model: nn.Module) -> str | None:
        """Return how a network's outputs differ from those that were recorded, or None."""
        if not self.outputs:
            return None
        found, wanted = torch.tensor(self.outputs_of(model)), torch.tensor(self.outputs)
        apart, share = gap(wanted, found)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if share <= _TOLERANCES[dtype]:
            return None
        return (
            f"its outputs are {apart:.3g} apart, {share:.3g} of the largest, allowed are "
            f"{_TOLERANCES[dtype]:g}"
        )
