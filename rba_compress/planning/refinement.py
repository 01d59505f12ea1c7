"""Refinements of a network: each is accepted only if the divergence falls."""

from __future__ import annotations

from torch import Tensor, nn

from rba_compress.core.plan import FoldRefit, LayerRefit, Plan
from rba_compress.graph.rewrite import tensor_of
from rba_compress.planning.candidates import readers
from rba_compress.planning.context import SearchContext
from rba_compress.planning.fit_statistics import Walk
from rba_compress.planning.state import SearchState, Solution, replaced_blocks
from rba_compress.units.registry import unit_of

DAMPINGS = (0.01, 0.1, 1.0)
"""Ridge of the layers that outputs come from, relative to the Gram matrix's mean diagonal: less than
for layers in between, for these read few features.
"""
SOLVED = "layers that read narrowed channels"
"""Change of the action "solve"."""


def wins(context: SearchContext, after: Tensor, before: Tensor) -> bool:
    """Return whether `after` is below `before` on the same samples: by more than the tolerance, and by
    more than one standard error of the mean difference.

    Many refinements are tried on the same samples. Without the second condition, the best of them is
    often a chance result (on a DeiT-tiny, a fifth less divergence on the validation samples and no less
    on the test samples).
    """
    return _falls(context, after, before, len(after))


def promises(context: SearchContext, after: Tensor, before: Tensor) -> bool:
    """Return whether `after`, on the screened samples alone, is so far below `before` that `wins` is
    likely on all samples: by more than the standard error of a mean over all of them.
    """
    return _falls(context, after, before[: len(after)], context.evaluator.held)


def _falls(context: SearchContext, after: Tensor, before: Tensor, samples: int) -> bool:
    gap = before - after
    error = float(gap.std()) / samples**0.5 if len(gap) > 1 else 0.0
    return float(gap.mean()) > max(context.config.tolerance * float(before.mean()), error)


def _fitted(plan: Plan) -> Plan:
    """Return the plan without replacements that fit nothing."""
    own = tuple(r for r in plan.replacements if unit_of(r.unit).fitted)
    return plan.model_copy(update={"replacements": own})


def refit(context: SearchContext, state: SearchState, chain: int, boundary: int) -> SearchState:
    """Re-solve the last linear layers of the kept blocks behind a boundary, one by one."""
    blocks = context.chains[chain].blocks
    plan = state.solution.plan
    taken = replaced_blocks(_fitted(plan), context.chains[chain])
    walk = context.fitter.walk(chain, plan)
    for b in range(boundary, len(blocks)):
        folded = {r.path for r in state.solution.plan.refits if isinstance(r, FoldRefit)}
        for k, branch in enumerate(blocks[b].branches if b not in taken else ()):
            if branch.path in folded:
                continue
            state = _resolved(context, state, walk, b, k)
    return state


def refit_together(context: SearchContext, state: SearchState, c: int, boundary: int) -> SearchState:
    """Re-solve the last linear layer of every kept block behind a boundary, one behind the other, and
    accept all or none: in a deep network they are too many to try each.

    All are moved by the same share of their corrections, the one at which the divergence of the
    screened samples is least.
    """
    chain, plan, config = context.chains[c], state.solution.plan, context.config
    taken = replaced_blocks(_fitted(plan), chain)
    folded = {r.path for r in plan.refits if isinstance(r, FoldRefit)}
    kept = [b for b in range(boundary, len(chain)) if b not in taken and chain.blocks[b].branches]
    kept = [b for b in kept if chain.blocks[b].branches[-1].path not in folded]
    if not kept:
        return state
    damping = sorted(config.refit_dampings)[len(config.refit_dampings) // 2]
    walk, solution = context.fitter.walk(c, plan), state.solution
    for b in kept:
        of = b, len(chain.blocks[b].branches) - 1
        _, solution = context.fitter.corrected(walk, solution, of, damping=damping, step=1.0)
        context.ran()
    at, before = (c, kept[0]), state.evaluation.divergence
    model = context.fitter.compressed(state.solution)
    tried = [_moved(model, state.solution, solution, step) for step in sorted(config.refit_steps)]
    screened = [context.divergences(state, each, at, screen=True) for each in tried]
    best = min(range(len(tried)), key=lambda k: float(screened[k].mean()))
    if not promises(context, screened[best], before):
        return state
    divergences = context.divergences(state, tried[best], at)
    if not wins(context, divergences, before):
        return state
    new = context.state(tried[best], state.cost, at)
    return context.log.decided("refit", tried[best].plan.refits[-1], new, state.mean - new.mean)


def _moved(model: nn.Module, before: Solution, after: Solution, step: float) -> Solution:
    """Return the solution between two whose re-solved layers are moved by a share of their corrections.

    Args:
        model: the network of the solution `before`.
    """
    new = [r for r in after.plan.refits if r not in before.plan.refits]
    moved = {r.path: r.model_copy(update={"step": step}) for r in new if isinstance(r, LayerRefit)}
    refits = tuple(moved.get(r.path, r) for r in after.plan.refits)
    tensors = dict(after.tensors)
    for name in (name for name in tensors if any(r.owns(name) for r in new)):
        old = tensor_of(model, name).detach().to(tensors[name])
        tensors[name] = old + step * (tensors[name] - old)
    return Solution(after.plan.model_copy(update={"refits": refits}), tensors)


def _resolved(
    context: SearchContext, state: SearchState, walk: Walk, block: int, branch: int
) -> SearchState:
    """Re-solve one layer: corrections are tried on the screened samples, first steps with the middle
    damping, then other dampings with the best step; the best of all is evaluated on all samples.
    """
    at, before = (walk.index, block), state.evaluation.divergence
    dampings, steps = sorted(context.config.refit_dampings), sorted(context.config.refit_steps)
    middle = dampings[len(dampings) // 2]

    def tried(damping: float, step: float) -> tuple[Tensor, LayerRefit, Solution]:
        of = block, branch
        refit, solution = context.fitter.corrected(walk, state.solution, of, damping=damping, step=step)
        return context.divergences(state, solution, at, screen=True), refit, solution

    def mean(each: tuple[Tensor, LayerRefit, Solution]) -> float:
        return float(each[0].mean())

    found = [tried(middle, steps[0])]
    if not promises(context, found[0][0], before):
        return state  # if the smallest step does not help, the others hardly ever do
    found += [tried(middle, step) for step in steps[1:]]
    step = min(found, key=mean)[1].step
    found += [tried(damping, step) for damping in dampings if damping != middle]
    screened, refit, solution = min(found, key=mean)
    if not wins(context, screened, before[: len(screened)]):
        return state
    divergences = context.divergences(state, solution, at)
    if not wins(context, divergences, before):
        return state
    new = context.state(solution, state.cost, at)
    return context.log.decided("refit", refit, new, state.mean - new.mean)


def outputs(context: SearchContext, state: SearchState) -> SearchState:
    """Re-solve the linear layers that the outputs come from, towards the original's outputs."""
    at = len(context.chains) - 1, len(context.chains[-1])
    for path in context.fitter.outputs:
        tried = [
            (context.divergences(state, solution, at), refit, solution)
            for refit, solution in context.fitter.outputs_corrected(state.solution, path, DAMPINGS)
        ]
        divergences, refit, solution = min(tried, key=lambda each: float(each[0].mean()))
        if wins(context, divergences, state.evaluation.divergence):
            before, state = state.mean, context.state(solution, state.cost, at)
            state = context.log.decided("refit", refit, state, before - state.mean)
    return state


def settled(context: SearchContext, state: SearchState) -> SearchState:
    """Solve the layers that read narrowed channels anew, then re-estimate BatchNorms."""
    return statistics(context, narrowed(context, state))


def narrowed(context: SearchContext, state: SearchState) -> SearchState:
    """Solve the layers that read narrowed channels and end no branch anew, one behind the other.

    Each was fitted to a network in which it alone is narrower.
    """
    solution, starts = state.solution, []
    for c, chain in enumerate(context.chains):
        found = readers(solution.plan, chain)
        if found:
            starts.append((c, found[0][0]))
            solution = context.fitter.narrowed_again(solution, c)
    if not starts:
        return state
    at = min(starts)
    divergences = context.divergences(state, solution, at)
    if not wins(context, divergences, state.evaluation.divergence):
        return state
    before, state = state.mean, context.state(solution, state.cost, at)
    return context.log.decided("solve", SOLVED, state, before - state.mean)


def statistics(context: SearchContext, state: SearchState) -> SearchState:
    """Re-estimate the BatchNorms behind the first replacement, all at once."""
    places = [(context.order[r.chain], r.start, r) for r in state.solution.plan.replacements]
    if not places or not context.config.statistics:
        return state
    chain, start, first = min(places, key=lambda place: place[:2])
    best: tuple[Tensor, Solution] | None = None
    for solution in context.fitter.statistics(state.solution, first.blocks[0].path):
        divergences = context.divergences(state, solution, (chain, start))
        if wins(context, divergences, state.evaluation.divergence if best is None else best[0]):
            best = divergences, solution
    if best is None:
        return state
    before, state = state.mean, context.state(best[1], state.cost, (chain, start))
    return context.log.decided("statistics", best[1].plan.refits[-1], state, before - state.mean)
