"""Second-order form of a divergence: inner products of output changes predict how changes add up.

Near the outputs of a current network, the divergence after several changes u is

    D(all) = D + sum_u (D(u) - D) + sum_{u < v} <f_u, f_v>

where D(u) is the divergence with the change u alone and f_u the change of the output, scaled by the
square root of the divergence's second derivative there. With q the softmax and s the sigmoid of the
current output, and d the change of the scores:

    kl         f = sqrt(q) (d - sum_c q_c d_c)       (the Fisher metric of the softmax)
    bernoulli  f = sqrt(s (1 - s)) d
    nse        f = sqrt(2 / power) d                 (exact)
    cosine     f = y / ||y|| - x / ||x||             (exact, since 1 - cos = ||x^ - y^||^2 / 2)

Of a large vocabulary the likeliest classes of the current output are taken alone (`likeliest`): by the
square root of q, the others hardly count.

A user-defined divergence has the inner products d_u' H d_v, with H its second derivative; where it
cannot be differentiated twice, changes are taken to add up without interaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rba_compress.core.batch import Batch
from rba_compress.core.outputs import per_sample
from rba_compress.core.plan import ComparedOutput, Divergence
from rba_compress.profiling.fidelity import LARGE, Criterion, Function, real_tokens

CLASSES = 1024
"""Classes that are taken of a large vocabulary."""


@dataclass(frozen=True)
class Change:
    """Change of one output on a batch: rows f (n, length), whose inner products are with `dual`."""

    rows: Tensor
    dual: Tensor
    """The same rows, or for a user-defined divergence their products with its second derivative."""


def likeliest(criterion: Criterion, output: Any) -> dict[str, Tensor]:
    """Return the indices of the `CLASSES` largest scores of outputs with more than `LARGE`, by name."""
    found: dict[str, Tensor] = {}
    if criterion.kind == "kl":
        for name, scores in output.items():
            if scores.ndim > 1 and scores.shape[-1] > LARGE:
                found[name] = scores.topk(CLASSES, -1, sorted=False).indices
    return found


def of_classes(output: Any, classes: dict[str, Tensor]) -> Any:
    """Return an output with the scores of some classes alone."""
    if not classes:
        return output
    return {
        name: scores.gather(-1, classes[name]) if name in classes else scores
        for name, scores in output.items()
    }


def changes(
    criterion: Criterion, expected: Any, before: Any, after: Any, batch: Batch
) -> list[Change] | None:
    """Return the change of each compared output; None for a divergence without a second derivative.

    The sum over rows of inner products belongs to the sum over samples of divergences.

    Args:
        criterion: the divergence.
        expected: what `criterion.kept` returned for the original.
        before, after: the same for the current network and for the changed one.
        batch: the batch that they were computed from.
    """
    if criterion.function is not None:
        return _given(criterion.function, expected, before, after, batch)
    known = {output.name: output for output in criterion.outputs}
    samples = len(next(iter(expected.values())))
    found = []
    for name, wanted in expected.items():
        how = known.get(name) or ComparedOutput(name=name, divergence=criterion.kind)
        x, y, p = (per_sample(each, samples) for each in (before[name], after[name], wanted))
        rows = _rows(how, x, y, p, real_tokens(batch, wanted))
        found.append(Change(rows, rows))
    return found


def _rows(
    how: ComparedOutput, before: Tensor, after: Tensor, expected: Tensor, counted: Tensor | None
) -> Tensor:
    """Return the rows f of one output, a row for each distribution or sample."""
    if how.divergence in ("kl", "bernoulli"):
        classes = before.shape[-1] if before.ndim > 2 else before[0].numel()
        rows = _scores(how.divergence, before, after, classes, how.probabilities)
        weight = torch.ones(len(before), rows[:, 0].numel() // len(before), device=rows.device)
        if counted is not None:
            weight = counted.to(weight).reshape(weight.shape)
        share = weight / weight.sum(1, keepdim=True).clamp_min(1)
        return rows * share.flatten()[:, None].sqrt()
    x, y, p = (each.double().reshape(len(each), -1) for each in (before, after, expected))
    kept = torch.ones_like(p)
    if counted is not None:
        each = p.shape[1] // counted[0].numel()
        kept = counted.to(p).flatten(1).repeat_interleave(each, 1)
        x, y, p = x * kept, y * kept, p * kept
    tiny = torch.finfo(p.dtype).tiny
    if how.divergence == "cosine":
        x, y = (each / each.norm(dim=1, keepdim=True).clamp_min(tiny) for each in (x, y))
        power = torch.full((len(p),), 2.0, dtype=p.dtype, device=p.device)
    else:
        power = p.square().sum(1) if how.scale is None else how.scale * kept.sum(1)
    scale: Tensor = (2 / power.clamp_min(tiny))[:, None].sqrt()
    return (y - x) * scale


def _scores(
    kind: Divergence, before: Tensor, after: Tensor, classes: int, probabilities: bool
) -> Tensor:
    """Return rows of score changes in the metric of the current scores, (rows, classes)."""
    wide = torch.float32 if classes > LARGE else torch.float64
    x, y = (each.reshape(-1, classes).to(wide) for each in (before, after))
    if kind == "kl":
        if probabilities:
            x, y = (each.clamp_min(torch.finfo(wide).tiny).log() for each in (x, y))
        q = x.softmax(-1)
        change = y - x
        return q.sqrt() * (change - (q * change).sum(-1, keepdim=True))
    if probabilities:
        low = torch.finfo(before.dtype).eps
        x, y = (each.clamp(low, 1 - low).logit() for each in (x, y))
    s = x.sigmoid()
    return (s * (1 - s)).sqrt() * (y - x)


def _given(
    function: Function, expected: Any, before: Any, after: Any, batch: Batch
) -> list[Change] | None:
    """Return changes of the floating-point leaves, with their products with the second derivative."""
    leaves, tree = pytree.tree_flatten(before)
    moved = pytree.tree_leaves(after)
    places = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
    at = [leaves[k].detach().clone().requires_grad_() for k in places]
    steps = [moved[k].detach() - leaves[k].detach() for k in places]
    try:
        with torch.enable_grad():
            given = list(leaves)
            for k, value in zip(places, at, strict=True):
                given[k] = value
            total = function(expected, pytree.tree_unflatten(given, tree), batch).sum()
            first = torch.autograd.grad(total, at, create_graph=True, materialize_grads=True)
            along = torch.stack([(g * d).sum() for g, d in zip(first, steps, strict=True)]).sum()
            second = torch.autograd.grad(along, at, materialize_grads=True)
    except (RuntimeError, TypeError, ValueError):
        return None  # torch's errors for what has no derivative, and the function's own
    return [
        Change(d.reshape(1, -1), h.detach().reshape(1, -1)) for d, h in zip(steps, second, strict=True)
    ]
