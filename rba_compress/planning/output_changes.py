"""Output changes of options: each is run alone, and their inner products tell how they add up.

An option is a unit with one level at one site, fitted on the network of a search state. It is run from
the cached stream of its boundary on the screened validation samples. Of its output change only inner
products with the other options' changes are kept, so that the table does not grow with the samples.

Not every option is run. Of each site one level is run first, the middle one of the last kind of map
that is not folded; of what narrows a block the one that takes least. A fit tells the squared error that
it leaves in the stream. Its ratio to the rise differs little between the options of a block, so that
those whose error is far too large for what they save are not run at all. Other levels follow for the
sites of interest, those whose rise is the least for what they save, and for those that are replaced
already; a unit whose levels are set by schedules needs one of each site. A span that is longer by a
block follows where both of its shorter ones belong to the better half and are not far from being of
interest.

In a deep network, where each run is long and sites are many, a width is run at one level. Its other
levels are taken to change the output in the same direction, by as much as their errors tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rba_compress.core.errors import ActivationError
from rba_compress.core.plan import Replacement, Site
from rba_compress.linalg.sketch import Sketch
from rba_compress.planning.context import SearchContext
from rba_compress.planning.solver import Floats, rounded
from rba_compress.planning.state import (
    Candidate,
    SearchState,
    Solution,
    removed_length,
    taken_at,
    undone,
    with_candidate,
)
from rba_compress.profiling.quadratic_form import Change, changes, likeliest, of_classes
from rba_compress.profiling.search_record import OptionRun
from rba_compress.units.registry import unit_of
from rba_compress.units.width import WidthUnit

FEWEST = 4
"""Spans of one length of which no half is left out, and sites that are of interest at any price."""
ENOUGH = 3
"""Stages that the sites of interest, the cheapest ones, would suffice for together."""
FAR = 4
"""Ratio of a site's price to the highest of interest above which no longer span is run for it, nor the
site itself in the next stage.
"""
MIDDLE = 0.3
"""Share of the channels at which a width is run in a deep network."""
WIDER = 2
"""Levels of a width that are run beside the first one in one stage."""
MARGIN = 4
"""Ratio by which a price that was expected by its fit may be too high."""
BY_DERIVATIVE = "options were combined by the second derivative of your divergence"
BY_SUMS = (
    "the rises of options were added up without their interactions, for your divergence cannot be "
    "differentiated twice"
)


@dataclass(frozen=True, eq=False)
class OutputChanges:
    """Options of one search state, and the rise of the divergence that they predict together.

    The rise is x' linear + x' gram x / 2; x has an entry for each option, then for each replacement of
    the state that is undone.
    """

    options: tuple[Candidate, ...]
    undone: tuple[Replacement, ...]
    linear: Floats
    gram: Floats

    def rise(self, rows: Sequence[int]) -> float:
        """Return the predicted rise of the mean divergence with some of the rows together."""
        taken = list(rows)
        return float(self.linear[taken].sum() + self.gram[np.ix_(taken, taken)].sum() / 2)


class _Runs:
    """Runs of changed networks on the screened samples: rises, and sketched output changes."""

    def __init__(self, context: SearchContext, state: SearchState) -> None:
        context.rebase(state)
        self._context, self._evaluator = context, context.evaluator
        self._before = state.evaluation.divergence
        criterion, current = context.evaluator.criterion, context.evaluator.current
        self._classes = [likeliest(criterion, output) for output in current]
        unchanged = [self._changes(k, output) for k, output in enumerate(current)]
        self.interact = not context.ranks.sum(any(found is None for found in unchanged))
        """False where the divergence has no second derivative: rises add up then."""
        if context.evaluator.criterion.function is not None:
            context.notes = (BY_DERIVATIVE if self.interact else BY_SUMS,)
        self._first: list[list[int]] = []
        rows = 0
        for found in unchanged:
            self._first.append([])
            for change in found or ():
                self._first[-1].append(rows)
                rows += len(change.rows)
        self._sketch = Sketch(rows, seed=context.config.seed)
        self._done: list[OptionRun] = []
        self._scaled: list[tuple[int, float]] = []
        self.rises: list[float] = []
        """Rise of the mean divergence of each change, not finite where the output is not."""

    def _changes(self, k: int, output: Any) -> list[Change] | None:
        evaluator, classes = self._evaluator, self._classes[k]
        outputs = (evaluator.expected[k], evaluator.current[k], output)
        expected, before, after = (of_classes(each, classes) for each in outputs)
        return changes(evaluator.criterion, expected, before, after, evaluator.batches[k])

    def add(self, solution: Solution, at: tuple[int, int]) -> int:
        """Run a network that equals the current one up to a boundary; return the index of its change.

        A run that the record holds, of a search that was interrupted, is not repeated.
        """
        recorded, k = self._context.record.runs, len(self._done)
        if k < len(recorded):
            self._evaluator.samples += self._evaluator.price(*at, screen=True)
        else:
            recorded.append(self._run(solution, at))
        self._done.append(recorded[k])
        self._context.ran()
        return self._added(k, 1.0, recorded[k].rise)

    def scaled(self, index: int, ratio: float) -> int:
        """Add the change of a run at another size, by the ratio of their squares; return its index."""
        k, size = self._scaled[index]
        return self._added(k, size * ratio**0.5, self.rises[index] * ratio)

    def _added(self, run: int, size: float, rise: float) -> int:
        self._scaled.append((run, size))
        self.rises.append(rise)
        return len(self.rises) - 1

    def _run(self, solution: Solution, at: tuple[int, int]) -> OptionRun:
        evaluator, found = self._evaluator, []
        rows, duals = [torch.zeros(0)], [torch.zeros(0)]
        model = self._context.fitter.compressed(solution)
        for k, output in evaluator.outputs(model, *at, screen=True):
            found.append(evaluator.criterion(evaluator.expected[k], output, evaluator.batches[k]))
            made = (self._changes(k, output) or []) if self.interact else []
            for first, change in zip(self._first[k], made, strict=False):
                rows.append(self._sketch(change.rows, first=first).flatten().float().cpu())
                if change.dual is not change.rows:
                    duals.append(self._sketch(change.dual, first=first).flatten().float().cpu())
        divergences = evaluator.of_all(found)
        rise = float(divergences.mean() - self._before[: len(divergences)].mean())
        row = torch.cat(rows).nan_to_num(0, 0, 0)
        return OptionRun(rise, row, torch.cat(duals).nan_to_num(0, 0, 0) if len(duals) > 1 else row)

    def form(self) -> tuple[Floats, Floats]:
        """Return the linear term and the Gram matrix of all changes, over all ranks."""
        if not self._done:
            return np.zeros(0), np.zeros((0, 0))
        rows = torch.stack([run.row for run in self._done]).double()
        duals = torch.stack([run.dual for run in self._done]).double()
        products = rows @ duals.T
        total = self._context.ranks.total((products + products.T) / 2)
        gram = np.asarray(total / self._evaluator.screened)
        rises = np.nan_to_num([run.rise for run in self._done], nan=0.0, posinf=0.0, neginf=0.0)
        linear = rises - np.diagonal(gram) / 2
        of, sizes = [k for k, _ in self._scaled], np.array([size for _, size in self._scaled])
        return linear[of] * sizes, gram[np.ix_(of, of)] * np.outer(sizes, sizes)


def output_changes(
    context: SearchContext, state: SearchState, candidates: Sequence[Candidate]
) -> OutputChanges:
    """Measure the output changes of candidates, and of replacements undone, each alone.

    Candidates whose output holds NaN or infinity are left out, and so are those that are not run.

    Raises:
        ActivationError: the output of every candidate holds NaN or infinity.
    """
    runs = _Runs(context, state)
    options = _Options(context, state, candidates, runs).measured()
    plan = state.solution.plan
    # A block that gets its width back alone would differ from the others of a stock network.
    replaced = tuple(old for old in plan.in_order if not (old.inner and plan.config.stock))
    taken = [index for _, index in options if math.isfinite(runs.rises[index])]
    for old in replaced:
        taken.append(runs.add(undone(state.solution, old), context.before(old)))
    linear, gram = runs.form()
    finite = tuple(c for c, index in options if math.isfinite(runs.rises[index]))
    return OutputChanges(finite, replaced, linear[taken], gram[np.ix_(taken, taken)])


class _Options:
    """Candidates of a stage by their sites, of which some are run, shorter spans first."""

    def __init__(
        self,
        context: SearchContext,
        state: SearchState,
        candidates: Sequence[Candidate],
        runs: _Runs,
    ) -> None:
        self.context, self.state, self.runs = context, state, runs
        self.of_site: dict[Site, list[Candidate]] = {}
        for candidate in candidates:
            self.of_site.setdefault(candidate.site, []).append(candidate)
        self.done: list[tuple[Candidate, int]] = []
        """Candidates that were run, with the index of each run."""
        self.prices: dict[Site, float] = {}
        """Price of each site, expected where no level was run."""
        self.saved: dict[Site, float] = {}
        self.most = max(FEWEST, round(context.spent.finer * context.blocks))
        self.again = round(context.spent.again * context.blocks)
        self._errors: dict[Hashable, tuple[float, float]] = {}
        """Largest error of what was run of a block, with its rise."""

    def run(self, candidate: Candidate) -> float:
        """Run a candidate; return its price."""
        state = self.state
        index = self.runs.add(
            with_candidate(state.solution, candidate), (candidate.chain, candidate.boundary)
        )
        rise = self.runs.rises[index]
        self.done.append((candidate, index))
        self.context.log.measured(state, candidate, state.mean + rise)
        error, place = _error(candidate), _place(candidate)
        if error is not None and error > self._errors.get(place, (0.0, 0.0))[0] and rise > 0:
            self._errors[place] = error, rise
        self.saved.setdefault(candidate.site, self._size(candidate))
        return self._price(candidate, rise)

    def _price(self, candidate: Candidate, rise: float) -> float:
        size = self._size(candidate)
        price = rise / (size if size > 0 else 1.0)
        return rounded(price) if math.isfinite(price) else math.inf

    def _by_error(self, levels: Sequence[Candidate]) -> list[float]:
        """Add the levels of a site of which the last run is one, their changes scaled by their errors;
        return their prices. Nothing is added where the errors tell nothing.
        """
        ran, index = self.done[-1]
        error, rise, prices = _error(ran), self.runs.rises[index], []
        if not (self.context.deep and ran.replacement.inner and error and 0 < rise < math.inf):
            return []
        for level in levels:
            other = _error(level)
            if level is not ran and level.site == ran.site and other is not None:
                scaled = self.runs.scaled(index, other / error)
                self.done.append((level, scaled))
                prices.append(self._price(level, self.runs.rises[scaled]))
        return prices

    def measured(self) -> list[tuple[Candidate, int]]:
        """Run candidates; return what was run, with the index of each run."""
        context, runs = self.context, self.runs
        earlier = {site: taken_at(self.state, levels[0]) for site, levels in self.of_site.items()}
        for site, old in earlier.items():
            if old is not None:
                context.prices.pop(site, None)
                levels = self.of_site.pop(site)
                _run_again(levels, old, self.run, further=context.spent.refits)
                self._by_error(levels)
        first_new = len(self.done)
        rounds: dict[int, list[Site]] = {}
        for site in self.of_site:
            rounds.setdefault(max(removed_length(site), 1), []).append(site)
        poor = set(context.skipped)
        for _, sites in sorted(rounds.items()):
            best = self._round([site for site in sites if not poor.intersection(_shorter(site))])
            spans = [site for site in best if removed_length(site)]
            better = spans[: max(-(-len(spans) // 2), FEWEST)]
            far = _far(self.highest())
            near = [site for site in better if self.prices[site] <= far]
            poor.update(site for site in sites if site not in near)
        new_rises = runs.rises[first_new:]
        if new_rises and not context.skipped and not any(map(math.isfinite, new_rises)):
            raise ActivationError("every candidate makes the model's output NaN or infinite")
        context.prices |= self.prices
        order = sorted(context.prices, key=lambda site: (context.prices[site], site))
        again, far = order[: self.again], _far(self.highest())
        kept = {site for site in again if context.prices[site] <= far}
        context.skipped = set(order) - kept.union(again[:FEWEST])
        return self.done

    def _round(self, sites: Sequence[Site]) -> list[Site]:
        """Run sites whose spans are equally long; return those that were run, the cheapest first."""
        first = {site: _first(self.of_site[site], deep=self.context.deep) for site in sites}
        best, predicted = [], set[Site]()
        for site in sorted(sites, key=lambda site: self._expensive(first[site])):
            expected = self._expected(first[site])
            if expected > MARGIN * _far(self.highest(few=math.inf)) and not self.context.record.every:
                self.prices[site], self.saved[site] = expected, self._size(first[site])
            else:
                self.prices[site] = self.run(first[site])
                further = self._by_error(self.of_site[site])
                self.prices[site] = min([self.prices[site], *further])
                predicted.update([site] if further else [])
                best.append(site)
        best.sort(key=lambda site: self.prices[site])
        highest = self.highest()
        for site in (site for site in best if self.prices[site] <= highest):
            if not unit_of(site.unit).scheduled and site not in predicted:
                found = _levels(self.of_site[site], first[site], self.prices[site], self.run, highest)
                self.prices[site] = min(found)
        return best

    def _size(self, candidate: Candidate) -> float:
        return self.context.limits.saved(self.state.cost, candidate.saving)

    def _expensive(self, candidate: Candidate) -> float:
        """Return the error for what is saved; 0 where the fit tells none."""
        error, size = _error(candidate), self._size(candidate)
        return error / size if error and size > 0 else 0.0

    def _expected(self, candidate: Candidate) -> float:
        """Return the price to expect by what was run of the same block; 0 where nothing tells it."""
        error, rise = self._errors.get(_place(candidate), (1.0, 0.0))
        return self._expensive(candidate) * rise / error

    def highest(self, few: float | None = None) -> float:
        """Return the price up to which sites are of interest: the cheapest ones that together save
        enough, at least `FEWEST` and at most `most` of them.

        Args:
            few: what to return where all sites are too few; the highest price by default.
        """
        prices, enough = self.prices, ENOUGH * self.context.spent.stage
        total = highest = 0.0
        for count, site in enumerate(sorted(prices, key=lambda site: prices[site])):
            if count >= FEWEST and (total >= enough or count >= self.most):
                return highest
            total, highest = total + max(self.saved[site], 0.0), prices[site]
        return highest if few is None else few


def _error(candidate: Candidate) -> float | None:
    """Return the mean squared error of the stream that a fit leaves; None where it tells none."""
    new, unit = candidate.replacement, unit_of(candidate.site.unit)
    if new.diagnostics is None or not unit.of_stream or candidate.also:
        return None
    if isinstance(unit, WidthUnit) and unit.readers(new.blocks[0]):
        return None  # the error of a layer inside of the block
    return new.diagnostics.residual


def _place(candidate: Candidate) -> Hashable:
    """Return what options share whose errors are of one kind: the end, whether a block is narrowed, and
    whether unread positions alone differ.
    """
    new = candidate.replacement
    return candidate.chain, new.stop, new.inner, unit_of(new.unit).unread


def _run_again(
    levels: Sequence[Candidate], old: Replacement, run: Callable[[Candidate], float], *, further: bool
) -> None:
    """Run levels of a site that is replaced already: of a number, those next to it, the next one where
    it is a width, or the highest of them where schedules set it; of a map, which is fitted anew, the
    first one and with `further` others.
    """
    if old.level is not None:
        near = _near(levels, old.level)
        if old.inner:  # a narrowed block is narrowed further
            near = near[:1]
        elif unit_of(old.unit).scheduled:
            near = near[-1:]
        for level in near:
            run(level)
        return
    price = run(_first(levels))
    if further:
        _levels(levels, _first(levels), price, run)


def _far(highest: float) -> float:
    """Return the price that is far from the highest of interest, which may be negative."""
    return max(FAR * highest, highest)


def _levels(
    levels: Sequence[Candidate],
    first: Candidate,
    price: float,
    run: Callable[[Candidate], float],
    highest: float = math.inf,
) -> list[float]:
    """Run further levels of a site; return their prices.

    The divergence along the dial of one kind of map falls to its least and rises again, so that each
    kind is run from its middle in the direction in which the price falls, for as long as it falls. The
    price of a level that saves more is higher: from the middle, those that save more are run as long as
    the price is below the `highest` one of interest, or else those that save less until it is.
    """
    kinds: dict[tuple[str, bool], list[Candidate]] = {}
    for level in levels:
        kinds.setdefault((level.replacement.map.kind, level.refit is not None), []).append(level)
    found = [price]
    for dial in kinds.values():
        if len({level.saving.macs for level in dial}) > 1:
            dial.sort(key=lambda level: level.saving.macs)
            at = dial.index(first) if first in dial else len(dial) // 2
            found += [] if first in dial else [run(dial[at])]
            cheap = found[-1] <= highest
            # A block that is narrowed by itself is narrowed further in the next stage.
            last = at + 1 + WIDER if first.replacement.inner and not first.also else len(dial)
            last_run = dial[at]
            for level in dial[at + 1 : last] if cheap else dial[:at][::-1]:
                if cheap and _grown(last_run, level) * found[-1] > highest:
                    break
                found.append(run(level))
                last_run = level
                if (found[-1] <= highest) != cheap:
                    break
            continue
        middle = len(dial) // 2
        lowest = price if dial[middle] is first else run(dial[middle])
        found.append(lowest)
        for way in (dial[middle + 1 :], dial[:middle][::-1]):
            before = lowest
            for level in way:
                found.append(run(level))
                if found[-1] >= lowest:
                    break
                lowest = found[-1]
            if lowest < before:
                break
    return found


def _grown(before: Candidate, after: Candidate) -> float:
    """Return the ratio of two levels' prices that their fits expect; 0 where they tell none."""
    fits = before.replacement.diagnostics, after.replacement.diagnostics
    if fits[0] is None or fits[1] is None or not before.replacement.inner or not fits[0].residual:
        return 0.0
    saved = before.saving.macs / max(after.saving.macs, 1)
    return fits[1].residual / fits[0].residual * saved


def _near(levels: Sequence[Candidate], taken: float) -> list[Candidate]:
    """Return the two levels above and the two below the one that is taken."""
    values = {level.replacement.level or 0.0: level for level in levels}
    order = sorted({*values, taken})
    at = order.index(taken)
    return [values[v] for v in order[max(at - 2, 0) : at + 3] if v != taken]


def _shorter(site: Site) -> Iterable[Site]:
    """Return the sites that are shorter by a block."""
    return site._replace(stop=site.stop - 1), site._replace(start=site.start + 1)


def _first(levels: Sequence[Candidate], *, deep: bool = False) -> Candidate:
    """Return the level of a site to run first: the middle one of the last kind that is not folded, or
    the one that takes least, where a block is narrowed: it may be free.

    Args:
        deep: take a middle one there instead, where the fits tell errors, from which those of the
            others follow.
    """
    if levels[0].replacement.inner:
        if deep and all(map(_error, levels[1:])):
            return min(levels, key=lambda level: abs((level.replacement.level or 0.0) - MIDDLE))
        return min(levels, key=lambda level: level.saving.macs)
    own = [level for level in levels if level.refit is None] or levels
    kind = own[-1].replacement.map.kind
    alike = [level for level in own if level.replacement.map.kind == kind]
    return alike[len(alike) // 2]
