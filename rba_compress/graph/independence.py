"""Independence check: the first dimension of a batch counts samples that do not affect each other.

The package relies on it: the loader is split sample by sample, and divergences are means over samples.
A network whose first dimension is time (`batch_first=False`), or which compares the samples of a batch,
gives a sample another output alone than in its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.errors import ModelError
from rba_compress.core.inference import evaluating, ran
from rba_compress.core.memory import out_of_memory
from rba_compress.core.outputs import float_outputs, per_sample

_TOGETHER, _ALONE = 8, 3
"""Number of samples of a batch, and number of those that are run alone."""
_ADVICE = (
    "rows of a batch depend on each other, so its first dimension does not count samples. Where that "
    "is time (batch_first=False), wrap the model so that samples come first; where a batch is one "
    "graph or one set, let the loader yield one of them a sample; a norm of batch statistics in eval "
    "mode needs track_running_stats=True"
)


def require_independent(model: nn.Module, batch: Batch) -> None:
    """Compare a few samples alone with the same samples in their batch.

    Raises:
        ModelError: they differ by more than rounding, or do not run alone.
    """
    if len(batch) < 2:
        return
    try:
        _compare(model, batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):  # calibration raises a more specific error
            raise


def _compare(model: nn.Module, batch: Batch) -> None:
    whole = batch.select(_spread(len(batch), _TOGETHER)).to(model)
    with evaluating(model):
        together, again = (float_outputs(ran(model, whole)) for _ in range(2))
        if any(_apart(together[name], again[name]) for name in together):
            return  # random in eval mode, which has a refusal of its own
        for row in _spread(len(whole), _ALONE):
            alone, rows = _ran_alone(model, whole, row)
            for name, output in together.items():
                _require_same(name, output, alone[name], rows, len(whole))


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` numbers below `count`, evenly spaced, the last one among them."""
    most = min(most, count)
    return sorted({round(k * (count - 1) / max(most - 1, 1)) for k in range(most)})


def _ran_alone(model: nn.Module, whole: Batch, row: int) -> tuple[dict[str, Tensor], list[int]]:
    """Run one sample alone, or with the next one where the model takes no batch of one."""
    failure: Exception | None = None
    for rows in ([row], sorted({row, (row + 1) % len(whole)})):
        try:
            return float_outputs(whole.select(rows).run(model)), rows
        except Exception as error:  # noqa: BLE001  a model may raise anything on a part of its batch
            failure = failure or error
    raise ModelError(
        f"{type(model).__name__} runs on a batch of {len(whole)} samples and not on one of them alone "
        f"({type(failure).__name__}: {failure}): {_ADVICE}"
    ) from failure


def _require_same(name: str, together: Tensor, alone: Tensor, rows: list[int], samples: int) -> None:
    if not together.ndim or len(together) % samples:
        return  # its rows are not those of samples
    wanted = per_sample(together, samples)[rows]
    found = per_sample(alone, len(rows)) if alone.ndim else alone
    if wanted.shape != found.shape:
        raise ModelError(
            f"the output {name!r} of a sample has the shape {tuple(found.shape[1:])} alone and "
            f"{tuple(wanted.shape[1:])} in its batch of {samples}: {_ADVICE}"
        )
    apart = _apart(wanted, found)
    if apart:
        raise ModelError(
            f"the output {name!r} of a sample that is run alone is {apart:.2g} of its largest value "
            f"away from that of the same sample in its batch of {samples}: {_ADVICE}"
        )


def _apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value; 0 where that is rounding."""
    if not bool(torch.isfinite(a).all()) or not a.numel():
        return 0.0  # calibration refuses values that are not finite
    allowed = 4 * torch.finfo(a.dtype).eps ** 0.5
    share = float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
    return 0.0 if share <= allowed else share
