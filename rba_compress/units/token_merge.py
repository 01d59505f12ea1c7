"""token_merge: the most similar positions are joined between a block's sublayers.

The level is the number of positions that are taken away (see `graph.token_merging`). From there on the
stream carries the size of each position as an additional channel, which the later blocks take off and
append again. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from rba_compress.core.config import Config
from rba_compress.core.cost import UNREACHABLE, Cost
from rba_compress.core.errors import ModelError
from rba_compress.core.inference import evaluating
from rba_compress.core.plan import Chain, Offer, Replacement, macs_at
from rba_compress.graph.rewrite import copy_model
from rba_compress.graph.token_merging import most, turned
from rba_compress.units.base import Level, Schedule, Trial, Unit
from rba_compress.units.block_variants import BlockGraph, Form, Thinned, example_inputs, thin

SHARES = (1 / 48, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 5 / 24, 1 / 4, 1 / 3)
"""Levels, as shares of the chain's positions."""


class TokenMerge(Unit):
    """Block that merges positions between its sublayers."""

    name = "token_merge"
    fitted = False
    scheduled = True

    def offers(self, trial: Trial) -> Iterable[Offer]:
        """Return nothing: a block that can merge positions has `by_positions`."""
        return ()

    def sites(self, chain: Chain, window: int | None) -> list[tuple[int, int]]:
        """Return the blocks that divide into sublayers and whose later blocks all take fewer positions;
        the last block is none of them, because nothing behind it would gain.
        """
        found = []
        for b in reversed(range(len(chain))):
            block = chain.blocks[b]
            if not block.by_positions:
                break
            if block.second and b < len(chain) - 1:
                found.append((b, b + 1))
        return found[::-1]

    def levels(self, config: Config, chain: Chain) -> Sequence[Level]:
        """Return numbers of positions to take away, the fewest first."""
        return sorted({float(max(round(share * chain.positions), 1)) for share in SHARES})

    def schedules(self, chain: Chain, blocks: Sequence[int]) -> dict[tuple[int, int], Schedule]:
        """Return schedules that merge the same share of what is left in every block.

        A shape says where merging begins, and over how many blocks the share grows to its full size,
        both in twelfths of the chain.
        """
        part = len(chain) / 12
        return {
            (first, ramp): partial(_share, chain, blocks, round(first * part), max(ramp * part, 1.0))
            for first in range(8)
            for ramp in range(7)
        }

    def choice(self, chain: Chain, start: int, stop: int, level: Level = 1.0) -> Replacement:
        """Return the decision for a block and a number of positions."""
        new = super().choice(chain, start, stop, level if isinstance(level, float) else 1.0)
        behind = {"behind": chain.blocks[stop:], "restores": not chain.reads}
        return new.model_copy(update=behind | {"reads": chain.ordered or 0})

    def cost(self, chain: Chain, new: Replacement, positions: int) -> tuple[list[Cost], int]:
        """Return the cost of the block: the first sublayer before the merge, the second one behind it,
        and the comparison of positions.
        """
        assert new.level is not None
        count, block = int(new.level), new.blocks[0]
        kept = chain.ordered or 0
        if 0 < positions <= chain.reads or count > most(positions, kept):
            return [UNREACHABLE], positions
        compared = ((positions + 1) // 2 - (kept + 1) // 2) * (positions // 2 - kept // 2) * chain.width
        macs = macs_at(block.by_positions, positions) - count * block.second + compared
        return [Cost(macs=macs, params=chain.params[new.start])], positions - count

    def shapes(self, new: Replacement) -> dict[str, tuple[int, ...]]:
        """Return no shapes: the unit has no tensors."""
        return {}

    def build(self, new: Replacement) -> nn.Module:
        """Return a module without tensors."""
        return nn.Identity()

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Merge the stream between the sublayers."""
        assert form.level is not None
        block.merge_middle(int(form.level), form.reads, by_attention=form.by_attention)
        return block.output

    def require(self, new: Replacement) -> None:
        """Check that the decision is of one block and a number of positions.

        Raises:
            ValueError: it is not.
        """
        super().require(new)
        if new.level is None or new.level < 1 or new.level % 1:
            raise ValueError(f"{self.name} takes a number of positions away, not {new.level}")

    def brief(self, new: Replacement) -> str:
        """Return the number of positions."""
        return f"{new.level:.0f} positions merged"

    def describe(self, new: Replacement) -> str:
        """Return the block and the number of positions."""
        return f"{new.blocks[0].path} merges {new.level:.0f} positions"


def _share(
    chain: Chain, blocks: Sequence[int], first: int, ramp: float, share: float
) -> dict[int, float]:
    """Return the numbers of positions that blocks merge, each the same share of what is left.

    Args:
        blocks: those that may merge.
        first: the first block that does.
        ramp: the number of blocks over which the share grows to its full size.
        share: from 0, for nothing, to 1, for all that can be merged.
    """
    left, found = chain.positions, {}
    for b in (b for b in blocks if b >= first):
        count = round(share * min((b - first + 1) / ramp, 1.0) * most(left, chain.ordered or 0))
        if count:
            found[b] = float(count)
        left -= count
    return found


class _Sized:
    """Block as it is, whose stream carries sizes."""

    name = "sized"

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Return the output."""
        return block.output


SIZED = _Sized()


def carries_sizes(trial: Trial) -> str | None:
    """Return why a block cannot take positions with sizes; None where it can.

    The law of merging is tried: with sizes, each position counts as often as its size says, so that
    every output equals that of a stream in which positions are repeated.
    """
    block, chain = trial.block, trial.chain
    if chain.ndim != 3 or chain.axis not in (-1, 2) or chain.sample_axis or chain.rows != 1:
        return "its stream is not of samples, positions and channels"
    try:
        form = Form(sized=True, hands_sizes=True)
        copy = copy_model(trial.model, share=True)
        sized = thin(copy, block, nn.Identity(), trial.traces, unit=SIZED, form=form)
        plain = thin(copy, block, nn.Identity(), trial.traces, unit=SIZED)
        return _flaw(trial, sized, plain)
    except ModelError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  a block that cannot be run so is not merged
        return f"it takes no other number of positions: {type(error).__name__}: {error}"


def merging_costs(trial: Trial) -> dict[str, Any]:
    """Return the fields of a block that say what it costs with fewer positions."""
    form = Form()
    counts, second = trial.counted(SIZED, form), 0
    if trial.divisible:
        without = trial.counted(_FirstOnly(), form)
        second = (counts[0][1] - without[0][1]) // counts[0][0]
    return {"by_positions": counts, "second": second}


class Turned:
    """Block whose output comes in another order, to find out whether that matters."""

    name = "turned"

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Return the output, its first positions in their places."""
        return block.call(turned, block.output, form.reads, like=block.output.meta["shape"])


class _FirstOnly:
    """First sublayer of a block alone, to count its MACs."""

    name = "first"

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Return the stream between the sublayers."""
        return block.middle


def _flaw(trial: Trial, sized: Thinned, plain: Thinned) -> str | None:
    signature, drawn = trial.block.signature, torch.Generator().manual_seed(0)
    tensors = example_inputs(plain, signature)
    k = signature.stream_index
    n, whole, width = tensors[k].shape
    if len(tensors) > 1:
        return "it reads other tensors beside its stream, such as rotary embeddings"
    # A third of the positions behind the read ones is repeated, in another order.
    kept = trial.chain.ordered or 0
    left = whole - (whole - kept) // 3
    if left == whole:
        return "it has too few positions"
    order = torch.randperm(left - kept, generator=drawn) + kept
    again = torch.cat([torch.arange(left), order[: whole - left]])
    again = torch.cat([again[:kept], again[kept:].flip(0)])
    counts = torch.bincount(again, minlength=left).to(tensors[k]).view(1, -1, 1).expand(n, -1, 1)
    few = torch.randn(n, left, width, generator=drawn).to(tensors[k])

    def run(block: nn.Module, stream: Tensor) -> Tensor:
        args, kwargs = signature.call([stream])
        with evaluating(block):
            found: Tensor = signature.stream_out(block(*args, **kwargs))
        return found

    expected = run(plain, few[:, again.to(few.device)])
    found = run(sized, torch.cat([few, counts], -1))[..., :-1][:, again.to(few.device)]
    allowed = min(1000 * torch.finfo(expected.dtype).eps, 0.05) * expected.abs().max()
    if found.shape != expected.shape or not bool((found - expected).abs().max() <= allowed):
        return "its output depends on the place of a position"
    return None


TOKEN_MERGE = TokenMerge()
