"""A compressed network as a stock architecture with fewer blocks, which loads without this package.

A span that became the identity, the layer before it re-solved or not, can be left out: the blocks
behind it are renumbered. A linear map on a residual stream is not part of a block, so that the
architecture has no place for it.
"""

from __future__ import annotations

from torch import Tensor, nn

from rba_compress.artifacts.architecture import Architecture, siblings
from rba_compress.artifacts.weights import fill, unsaved_buffers
from rba_compress.core.batch import Batch
from rba_compress.core.errors import PlanError, WeightsError
from rba_compress.core.inference import evaluating
from rba_compress.core.outputs import main_output
from rba_compress.core.plan import Plan, Replacement
from rba_compress.profiling.fidelity import gap
from rba_compress.units.registry import unit_of

TOLERANCE = 1e-5
"""Difference of outputs allowed, relative to the largest absolute value of the compressed network's."""


def unfoldable(plan: Plan) -> str | None:
    """Return the reason why a plan cannot be folded; None if it can."""
    for replacement in plan.replacements:
        reason = unit_of(replacement.unit).unfoldable(replacement)
        if reason is not None:
            return f"{replacement}: {reason}"
    return None


def folded(
    model: nn.Module, plan: Plan, architecture: Architecture | None, example: Batch
) -> tuple[nn.Module, Architecture]:
    """Return the compressed network in its architecture's code with fewer blocks, and the architecture.

    Args:
        model: the compressed network.
        plan: the plan that made it.
        architecture: the architecture of the original network.
        example: a batch on which both are compared.

    Raises:
        PlanError: the plan has maps that cannot be folded, the architecture is not known, or no
            network of it with fewer blocks gives the same outputs to 1e-5.
    """
    reason = unfoldable(plan)
    if reason is not None:
        raise PlanError(f"{reason}: search with Config(stock=True)")
    if architecture is None:
        raise PlanError(
            f"a {type(model).__name__} is neither timm's nor transformers', so none with fewer blocks "
            "can be built: pass save(architecture=...), or save it unfolded"
        )
    kept = _kept(model, plan)
    state = _renumbered(model.state_dict(), kept)
    flaws = []
    candidates = architecture.with_blocks(kept) if kept else [architecture]
    for width, count in _widths(plan):
        candidates = [wider for each in candidates for wider in each.with_width(width, count)]
    for candidate in candidates:
        try:
            stock = candidate.build()
        except WeightsError as error:
            flaws.append(str(error))
            continue
        flaw = _flaw(stock, model, state, example)
        if flaw is None:
            return stock, candidate
        flaws.append(f"{candidate.arguments}: {flaw}")
    counts = {path: len(indices) for path, (_, indices) in kept.items()}
    raise PlanError(
        f"{architecture.library} builds no {architecture.name} of {counts} blocks that is this network "
        f"({'; '.join(flaws) or 'it has no argument for its depth'}): save it unfolded"
    )


def _widths(plan: Plan) -> list[tuple[Replacement, int]]:
    """Return one of the narrowed blocks for each width, with the number of channels of the original.

    That all blocks have the same is checked by loading the weights.
    """
    found: dict[str, tuple[Replacement, int]] = {}
    for new in plan.replacements:
        width = new.blocks[0].width(new.unit)
        if new.inner and width is not None:
            found.setdefault(new.unit, (new, width.channels))
    return list(found.values())


def _kept(model: nn.Module, plan: Plan) -> dict[str, tuple[int, list[int]]]:
    """Return the length and the kept indices of each list of blocks, in the network's order."""
    removed = [r for r in plan.replacements if unit_of(r.unit).removes]
    gone = {block.path for replacement in removed for block in replacement.blocks}
    lists = dict.fromkeys(
        name for path in sorted(gone) for name in siblings(model, path.rpartition(".")[0])
    )
    found = {}
    for name in lists:
        blocks = [child for child, _ in model.get_submodule(name).named_children()]
        found[name] = (len(blocks), [k for k, c in enumerate(blocks) if f"{name}.{c}" not in gone])
    return found


def _renumbered(state: dict[str, Tensor], kept: dict[str, tuple[int, list[int]]]) -> dict[str, Tensor]:
    """Return a state dict with the kept blocks alone, renumbered."""
    moved = {}
    for key, tensor in state.items():
        for path, (_, indices) in kept.items():
            if key.startswith(f"{path}."):
                number, dot, rest = key.removeprefix(f"{path}.").partition(".")
                if number.isdigit():
                    if int(number) in indices:
                        moved[f"{path}.{indices.index(int(number))}{dot}{rest}"] = tensor
                    break
        else:
            moved[key] = tensor
    return moved


def _flaw(stock: nn.Module, model: nn.Module, state: dict[str, Tensor], example: Batch) -> str | None:
    """Load the weights into a stock network; return how it differs from the compressed one, or None."""
    try:
        fill(stock, state, unsaved_buffers(model), "the folded network")
    except WeightsError as error:
        return str(error)
    stock.to(next(model.parameters()).device)
    with evaluating(model), evaluating(stock):
        batch = example.to(model)
        apart, share = gap(main_output(batch.run(model)), main_output(batch.run(stock)))
    return None if share <= TOLERANCE else f"outputs are {apart:.3g} apart"
