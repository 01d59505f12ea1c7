"""The compressed network as a student: which of its tensors are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rba_compress.core.batch import Batch
from rba_compress.core.config import Healing
from rba_compress.core.errors import ModelError, PlanError
from rba_compress.core.plan import Chain
from rba_compress.core.weight_types import require_plain_weights
from rba_compress.graph.activations import observe

Seen = tuple[Any, list[Tensor]]
"""Output of a network, and the streams behind its chains."""


class Watched(nn.Module):
    """Network that also returns the streams behind its chains."""

    def __init__(self, model: nn.Module, chains: Sequence[Chain]) -> None:
        super().__init__()
        self.model, self.chains = model, chains

    def forward(self, batch: Batch) -> Seen:
        if not self.chains:
            return batch.run(self.model), []
        seen = observe(self.model, self.chains, batch)
        return seen.output, [s[len(c)] for s, c in zip(seen.streams, self.chains, strict=True)]


class Student(nn.Module):
    """Compressed network of which some tensors are trained and all others are frozen.

    Its parameters are the trained ones: whole tensors, and the factors U (out, r) and V (r, in) of
    adapters W + U V on others (Hu et al. 2022), with U = 0 at the start.
    """

    def __init__(
        self, compressed: nn.Module, healing: Healing, new: Sequence[str], chains: Sequence[Chain] = ()
    ) -> None:
        """Choose the tensors to train.

        Args:
            compressed: not changed.
            new: names of the parameters that the original does not have, those of maps.

        Raises:
            ModelError: the network has no parameter of the requested kind.
        """
        super().__init__()
        own = {name: p for name, p in compressed.named_parameters() if p.is_floating_point()}
        self.keys, self.adapted = _trained_names(compressed, own, healing, new)
        if not self.keys and not self.adapted:
            raise ModelError(
                f"train={healing.train!r}: the compressed network has no such parameter; its maps are "
                "identities, say. Train 'norms', 'adapters' or 'all'"
            )
        generator = torch.Generator().manual_seed(healing.seed)
        self.values = nn.ParameterList(own[key].detach().clone() for key in self.keys)
        self.ups, self.downs = nn.ParameterList(), nn.ParameterList()
        for weight in (own[key].detach() for key in self.adapted):
            rows, columns = weight.flatten(1).shape
            self.ups.append(weight.new_zeros(rows, healing.rank))
            drawn = torch.randn(healing.rank, columns, generator=generator) / columns**0.5
            self.downs.append(drawn.to(weight))
        # In a tuple, so that frozen parameters are not registered here.
        self._frozen = (Watched(compressed, chains),)
        self._own = own

    def weights(self) -> dict[str, Tensor]:
        """Return the trained tensors, by their key in the compressed network's state dict."""
        found: dict[str, Tensor] = dict(zip(self.keys, self.values, strict=True))
        for key, up, down in zip(self.adapted, self.ups, self.downs, strict=True):
            weight = self._own[key].detach()
            found[key] = weight + (up @ down).view_as(weight)
        return found

    def forward(self, batch: Batch) -> Seen:
        named = {f"model.{key}": weight for key, weight in self.weights().items()}
        found: Seen = functional_call(self._frozen[0], named, (batch,))
        return found


def _trained_names(
    compressed: nn.Module, own: dict[str, nn.Parameter], healing: Healing, new: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the names of the parameters that are trained, and of those that get an adapter."""
    match healing.train:
        case "maps":
            return [name for name in own if name in new], []
        case "all":
            return list(own), []
    keys = [name for name, p in own.items() if name in new or p.ndim == 1]
    if healing.train == "norms":
        return keys, []
    tables = {id(m.weight) for m in compressed.modules() if isinstance(m, nn.Embedding)}
    adapted = [
        name
        for name, p in own.items()
        if name not in keys
        and name.rpartition(".")[2] == "weight"
        and id(p) not in tables
        and min(p.flatten(1).shape) > healing.rank
    ]
    return keys, adapted


def require_shapes(original: nn.Module, compressed: nn.Module) -> None:
    """Require that a network of which no plan is known has its original's shapes.

    Raises:
        PlanError: it does not. A plan says which layers are narrower; without one, any might be.
    """
    known = dict(original.named_parameters())
    for name, p in compressed.named_parameters():
        if type(compressed) is type(original) and name in known and p.shape != known[name].shape:
            raise PlanError(
                f"the {type(compressed).__name__} was not made from this {type(original).__name__}: "
                f"{name} is of another shape. A network with narrowed layers is healed as a Result"
            )


def require_trainable(
    original: nn.Module, compressed: nn.Module, known: dict[str, nn.Parameter]
) -> None:
    """Require two networks that can be trained towards each other.

    Raises:
        PlanError: the compressed network was not made from this original.
        ModelError: its weights are of low precision, or weights of either are offloaded.
    """
    shared = any(name in known for name, _ in compressed.named_parameters())
    if type(compressed) is not type(original) or not shared:
        raise PlanError(
            f"the {type(compressed).__name__} was not made from this {type(original).__name__}"
        )
    for what, model in (("original", original), ("compressed", compressed)):
        if any(p.is_meta for p in model.parameters()):
            raise ModelError(
                f"weights of the {what} network are offloaded: load it into memory to heal"
            )
        require_plain_weights(model)
    low = {p.dtype for p in compressed.parameters() if p.is_floating_point()} - {
        torch.float32,
        torch.float64,
    }
    if low:
        raise ModelError(
            f"weights in {low.pop()} are too coarse for small steps: heal model.float(), and with "
            "bf16=True multiply in bfloat16"
        )
