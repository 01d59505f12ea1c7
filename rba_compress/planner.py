"""The search: which spans to replace by which maps, under a budget.

Greedy over spans of every length, in every chain: each step fits its candidates on the network as it is
by now, towards the original streams, screens them on a few held-out samples, and takes the one with the
least rise of the *output's* divergence for what it brings towards the budget. What was chosen is then
refined: maps behind the new one are settled (fitted again), each span is undone and chosen again, and
the last linear layers of kept blocks are re-solved one by one, each where that proves itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rba_compress.calibration import Profile, fingerprint
from rba_compress.drafts import (
    Draft,
    Move,
    Solution,
    Span,
    changed,
    folded_for,
    keyed,
    less,
    replacement_of,
    span_saving,
    with_move,
)
from rba_compress.errors import ActivationError, BudgetError, PlanError
from rba_compress.fitting import SpanRows, Walk, span_rows
from rba_compress.judge import Judge
from rba_compress.maps import MapSpec, correction, fit_map
from rba_compress.measure import Cost
from rba_compress.moments import PairMoments
from rba_compress.plan import Branch, Budget, Candidate, Plan, Refit, Replacement, Step
from rba_compress.recorder import unwrap
from rba_compress.surgery import splice_shared

DEFAULT_BUDGET = Budget(macs=0.75)
FINALISTS = 6
"""Spans of a screening that are judged on all samples, with every map."""


@torch.inference_mode(False)
def search(
    model: nn.Module,
    profile: Profile,
    loader: Iterable[Any],
    *,
    budget: Budget | None = None,
) -> Solution:
    """Choose spans and maps that meet the budget at the least divergence of the output.

    Args:
        model: the network that was profiled; left as it is.
        profile: what `profile` returned for it.
        loader: the same loader. Seven samples of ten fit, two are chosen on; both are kept in memory.
        budget: what the slim network may cost; by default three quarters of the MACs.

    Raises:
        BudgetError: no plan reaches the budget; the message names the cheapest that is reachable.
        PlanError: the profile is of another network.
        ActivationError: the dense output, or that of every candidate, holds NaN or infinity.
        LoaderError: as `profile`.
    """
    model = unwrap(model)
    if type(model).__name__ != profile.model:
        raise PlanError(f"the profile is of a {profile.model}, the model is a {type(model).__name__}")
    if fingerprint(model) != profile.weights:
        raise PlanError(f"the profile is of a {profile.model} with other weights: profile this one")
    run = Search(model, profile, loader, budget or DEFAULT_BUDGET)
    draft = run.start
    with tqdm(total=100, desc="search", unit="%", disable=None) as bar:
        while run.remaining(draft.cost):
            draft = run.advance(draft)
            bar.update(round(60 * (1 - run.share(draft.cost))) - bar.n)
        for _ in range(run.config.swaps):
            draft = run.swap(draft)
        bar.update(80 - bar.n)
        if run.config.refit:
            draft = run.refit_layers(draft)
        bar.update(100 - bar.n)
    return run.finished(draft)


class Search:
    """The state of one search: what does not change, and the log of what was decided."""

    def __init__(
        self, model: nn.Module, profile: Profile, loader: Iterable[Any], budget: Budget
    ) -> None:
        self.model, self.profile, self.config = model, profile, profile.config
        self.limits = budget.limits(profile.dense.macs, profile.dense.params)
        self.chains = [entry.chain for entry in profile.chains]
        self._require_reachable()
        split = profile.split(loader)
        self.fit = [batch.to(model) for batch in split.part("fit")]
        self.judge = Judge(
            model,
            self.chains,
            profile.divergence,
            split.part("choose"),
            size=len(profile.example),
        )
        self.fitted = 0.0
        """Samples to fit on that were sent through a network."""
        self.steps: list[Step] = []
        self.judged: list[Candidate] = []
        plan = Plan(
            refusals=profile.refusals,
            budget=budget,
            config=self.config,
            divergence=profile.divergence,
        )
        self.start = self.settled(Solution(plan, {}), profile.dense)

    def _require_reachable(self) -> None:
        """
        Raises:
            BudgetError: even with every block skipped the limits are not met.
        """
        skip = MapSpec(kind="identity")
        cost = self.profile.dense
        for chain in self.chains:
            cost = less(cost, span_saving(chain, 0, len(chain), skip))
        missed = self.remaining(cost)
        if missed:
            dense = self.profile.dense
            wanted = ", ".join(f"{name} <= {self.limits[name]:,.0f}" for name in missed)
            raise BudgetError(
                f"no plan reaches {wanted} (of {dense.macs:,} macs, {dense.params:,} params): the "
                f"cheapest reachable is {cost.macs:,} macs ({cost.macs / dense.macs:.3f}) and "
                f"{cost.params:,} params ({cost.params / dense.params:.3f})"
                + (". An int is absolute: 1.0 keeps all" if 1 in self.limits.values() else "")
            )

    # --- drafts

    def slim(self, solution: Solution) -> nn.Module:
        """The rewritten network, on the original's weights."""
        return splice_shared(self.model, solution.plan, solution.tensors)

    def settled(self, solution: Solution, cost: Cost) -> Draft:
        """Make a solution the network that candidates are judged against."""
        return Draft(solution, cost, self.judge.rebase(self.slim(solution)))

    def without(self, draft: Draft, old: Replacement) -> Draft:
        """The draft with a span, and what was folded for it, undone."""
        chain = next(c for c in self.chains if c.name == old.chain)
        saving = span_saving(chain, old.start, old.stop, old.map)
        cost = Cost(macs=draft.cost.macs + saving.macs, params=draft.cost.params + saving.params)
        return self.settled(
            changed(draft.solution, drop=[old, *folded_for(draft.solution.plan, old)]), cost
        )

    def finished(self, draft: Draft) -> Solution:
        """The solution with the log of the search in its plan."""
        total = sum(len(batch) for batch in self.fit) + self.judge.held
        plan = draft.solution.plan.model_copy(
            update={
                "steps": tuple(self.steps),
                "candidates": tuple(self.judged),
                "forward_passes": round((self.judge.samples + self.fitted) / total, 2),
            }
        )
        return Solution(plan, draft.solution.tensors)

    def note(self, action: str, change: object, draft: Draft, margin: float) -> Draft:
        """Log a decision."""
        self.steps.append(
            Step(
                action=action,
                change=str(change),
                divergence=draft.mean,
                margin=margin,
                macs=draft.cost.macs,
                params=draft.cost.params,
            )
        )
        return draft

    # --- the budget

    def remaining(self, cost: Cost) -> dict[str, float]:
        """What each limit still asks to be saved."""
        return {k: getattr(cost, k) - v for k, v in self.limits.items() if getattr(cost, k) > v}

    def share(self, cost: Cost) -> float:
        """How much of what was asked is still to be saved, 1 to 0."""
        asked = self.remaining(self.profile.dense)
        left = self.remaining(cost)
        return max((left[k] / asked[k] for k in left), default=0.0)

    @staticmethod
    def progress(saving: Cost, remaining: dict[str, float]) -> float:
        """How much of what remains a saving brings, 0 to 1; the least of all limits."""
        return min(min(float(getattr(saving, k)) / v, 1.0) for k, v in remaining.items())

    def spans(self, draft: Draft) -> list[Span]:
        """Free spans, none longer than what the budget asks."""
        skip, remaining = MapSpec(kind="identity"), self.remaining(draft.cost)
        found = []
        for c, chain in enumerate(self.chains):
            taken = self.taken(draft, c)
            for start, stop in chain.spans(self.config.window):
                shorter = span_saving(chain, start, stop - 1, skip)
                enough = stop - start > 1 and self.progress(shorter, remaining) >= 1
                if not enough and not taken.intersection(range(start, stop)):
                    found.append((c, start, stop))
        return found

    def taken(self, draft: Draft, chain: int) -> set[int]:
        """Blocks of a chain that are replaced."""
        name = self.chains[chain].name
        replaced = [r for r in draft.solution.plan.replacements if r.chain == name]
        return {b for r in replaced for b in range(r.start, r.stop)}

    # --- moves

    def moves(self, draft: Draft, spans: Sequence[Span]) -> list[Move]:
        """Every map over every span, fitted behind the draft in one pass for each chain."""
        slim, found = self.slim(draft.solution), []
        for c, chain in enumerate(self.chains):
            wanted = [(start, stop) for k, start, stop in spans if k == c]
            if not wanted:
                continue
            taken, folds = self.taken(draft, c), {}
            if "folded" in self.config.maps:
                folds = {
                    b + 1: block.branches[-1]
                    for b, block in enumerate(chain.blocks)
                    if block.branches and b not in taken
                }
            rows = span_rows(self.model, slim, chain, self.fit, spans=wanted, folds=folds)
            self.fitted += 2 * sum(len(batch) for batch in self.fit)
            for start, stop in wanted:
                for spec in self.config.specs(chain.width):
                    if spec.kind != "folded":
                        found.append(self.map_move(c, start, stop, spec, rows[start]))
                    elif start in folds:
                        branch = folds[start]
                        mapped = self.map_move(c, start, stop, spec, rows[start])
                        found.append(self.folded(slim, mapped, rows[start], branch))
        return found

    def map_move(self, c: int, start: int, stop: int, spec: MapSpec, rows: SpanRows) -> Move:
        chain = self.chains[c]
        pair = rows.maps.weighted(self.class_weight(c)).targets(rows.columns(stop))
        fit = fit_map(spec, pair)
        replacement = replacement_of(chain, start, stop, fit)
        saving = span_saving(chain, start, stop, spec)
        return Move(c, replacement, keyed(replacement, fit), saving)

    def folded(self, slim: nn.Module, move: Move, rows: SpanRows, branch: Branch) -> Move:
        """The move with its map folded into the layer before its span."""
        new = move.replacement
        assert rows.folds is not None
        assert new.map.shrink is not None
        weighted = rows.folds.weighted(self.class_weight(move.chain))
        refit = Refit(
            chain=new.chain,
            block=new.start - 1,
            path=branch.path,
            damping=new.map.damping,
            step=new.map.shrink,
            folded=True,
        )
        gap = weighted.targets(rows.columns(new.stop))
        return replace(move, refit=refit, tensors=self.corrected(slim, refit, gap))

    def corrected(self, slim: nn.Module, refit: Refit, gap: PairMoments) -> dict[str, Tensor]:
        """The tensors of a kept layer, moved by a share of its correction."""
        layer = slim.get_submodule(refit.path)
        own = dict(layer.named_parameters(recurse=False))
        change, shift = correction(gap, refit.damping, bias="bias" in own)
        moved = {"weight": change, "bias": shift}
        return {
            f"{refit.key}{name}": value.detach().to(change) + refit.step * moved[name]
            for name, value in own.items()
        }

    def class_weight(self, chain: int) -> float:
        """How often a class token's row counts in fits."""
        return self.config.class_weight or float(self.chains[chain].positions)

    def advance(self, draft: Draft) -> Draft:
        """Take the best move, and settle the maps behind it.

        Raises:
            BudgetError: no move brings the network nearer to its budget.
            ActivationError: the output of every candidate holds NaN or infinity.
        """
        found = self.best(draft, self.spans(draft))
        if found is None:
            raise BudgetError(
                f"no map in {self.config.maps} brings the network below {draft.cost.macs:,} macs and "
                f"{draft.cost.params:,} params: allow the identity or cheaper maps"
            )
        move, _, margin = found
        taken = self.settled(with_move(draft, move), less(draft.cost, move.saving))
        self.note("take", move.replacement, taken, margin)
        return self.settle_maps(taken, move.chain, move.replacement.stop)

    def best(self, draft: Draft, spans: Sequence[Span]) -> tuple[Move, Tensor, float] | None:
        """The move with the least rise of divergence for its progress, and by how much it won.

        Raises:
            ActivationError: the output of every candidate holds NaN or infinity.
        """
        remaining = self.remaining(draft.cost)
        moves = [m for m in self.moves(draft, spans) if self.progress(m.saving, remaining) > 0]
        if not moves:
            return None

        def score(move: Move, judged: Tensor) -> float:
            rise = float(judged.mean() - draft.divergence[: len(judged)].mean())
            return rise / self.progress(move.saving, remaining)

        screened = [(score(m, self.judge_move(draft, m, screen=True)), m) for m in self.sample(moves)]
        order = sorted(screened, key=lambda pair: pair[0])
        finalists = list(dict.fromkeys(m.span for _, m in order))[:FINALISTS]
        results = []
        for move in (m for m in moves if m.span in finalists):
            judged = self.judge_move(draft, move)
            results.append((score(move, judged), -move.saving.macs, move, judged))
            self.log_candidate(draft, move, judged)
        # On a tie what costs least, hence the identity, is taken.
        results.sort(key=lambda result: result[:2])
        _, _, move, judged = results[0]
        mean = float(judged.mean())
        if not math.isfinite(mean):
            raise ActivationError("every candidate makes the model's output NaN or infinite")
        rest = [float(j.mean()) for _, _, m, j in results if m.span != move.span]
        return move, judged, min(rest, default=math.inf) - mean

    def sample(self, moves: Sequence[Move]) -> Iterator[Move]:
        """What spans are screened by: skipping them, and the last kind at the middle of its dial."""
        dial = sorted(self.config.shrinks)
        for span in dict.fromkeys(m.span for m in moves):
            maps = {str(m.replacement.map): m for m in moves if m.span == span}
            best = [m for m in maps.values() if m.replacement.map.shrink == dial[len(dial) // 2]]
            yield from {id(m): m for m in (*list(maps.values())[:1], *best[-1:])}.values()

    def judge_move(self, draft: Draft, move: Move, *, screen: bool = False) -> Tensor:
        slim = self.slim(with_move(draft, move))
        return self.judge(slim, move.chain, move.boundary, screen=screen)

    def log_candidate(self, draft: Draft, move: Move, judged: Tensor) -> None:
        cost = less(draft.cost, move.saving)
        self.judged.append(
            Candidate(
                step=len(self.steps),
                chain=move.replacement.chain,
                start=move.replacement.start,
                stop=move.replacement.stop,
                map=move.replacement.map,
                divergence=float(judged.mean()),
                macs=cost.macs,
                params=cost.params,
            )
        )

    # --- refinements: each is taken only where the divergence falls

    def settle_maps(self, draft: Draft, chain: int, boundary: int) -> Draft:
        """Fit the maps behind a boundary of a chain again, for what comes before them has changed."""
        order = {c.name: k for k, c in enumerate(self.chains)}
        behind = [
            r
            for r in draft.solution.plan.replacements
            if (order[r.chain], r.start) >= (chain, boundary)
        ]
        for old in sorted(behind, key=lambda r: (order[r.chain], r.start)):
            base = self.without(draft, old)
            moves = self.moves(base, [(order[old.chain], old.start, old.stop)])
            kept = [m for m in moves if not self.remaining(less(base.cost, m.saving)).keys()
                    - self.remaining(draft.cost).keys()]  # fmt: skip
            judged = [(float(self.judge_move(base, m).mean()), m) for m in kept]
            mean, move = min(judged, key=lambda pair: pair[0], default=(math.inf, None))
            if move is None or mean >= draft.mean * (1 - self.config.tolerance):
                continue
            before = draft.mean
            draft = self.settled(with_move(base, move), less(base.cost, move.saving))
            self.note("settle", move.replacement, draft, before - draft.mean)
        return self.settled(draft.solution, draft.cost)

    def swap(self, draft: Draft) -> Draft:
        """Undo each span and choose again; take what meets the budget at less divergence."""
        for old in draft.solution.plan.replacements:
            if old not in draft.solution.plan.replacements:
                continue  # settled anew since
            base = self.without(draft, old)
            remaining, skip = self.remaining(base.cost), MapSpec(kind="identity")
            if not remaining:
                continue
            spans = [
                (c, start, stop)
                for c, start, stop in self.spans(base)
                if self.progress(span_saving(self.chains[c], start, stop, skip), remaining) >= 1
            ]
            found = self.best(base, spans)
            if found is None:
                continue
            move, judged, _ = found
            cost = less(base.cost, move.saving)
            better = float(judged.mean()) < draft.mean * (1 - self.config.tolerance)
            if better and not self.remaining(cost):
                before = draft.mean
                draft = self.settled(with_move(base, move), cost)
                self.note("swap", f"{old} for {move.replacement}", draft, before - draft.mean)
                draft = self.settle_maps(draft, move.chain, move.replacement.stop)
        return self.settled(draft.solution, draft.cost)

    def refit_layers(self, draft: Draft) -> Draft:
        """Re-solve the last linear layers of kept blocks, one by one, downstream."""
        for c, chain in enumerate(self.chains):
            taken = self.taken(draft, c)
            if not taken:
                continue
            fixed = {refit.path for refit in draft.solution.plan.refits}
            walk = Walk(self.model, self.chains, c, self.fit)
            for b in range(min(taken), len(chain)):
                block = chain.blocks[b]
                for k, branch in enumerate(block.branches if b not in taken else ()):
                    if branch.path in fixed:
                        continue
                    slim = self.slim(draft.solution)
                    walk.to(slim, b)
                    gap = walk.gaps(slim, block.branches[: k + 1])
                    weighted = gap.weighted(self.class_weight(c))
                    draft = self.refit(draft, slim, (c, b), branch, weighted)
            self.fitted += walk.samples
        return self.settled(draft.solution, draft.cost)

    def refit(
        self, draft: Draft, slim: nn.Module, at: tuple[int, int], branch: Branch, gap: PairMoments
    ) -> Draft:
        """Try one layer's corrections in block `at` (chain, block), up to which nothing changes."""
        results, (c, b) = [], at
        for damping, step in self.dial():
            refit = Refit(
                chain=self.chains[c].name, block=b, path=branch.path, damping=damping, step=step
            )
            tensors = self.corrected(slim, refit, gap)
            solution = changed(draft.solution, add=[refit], tensors=tensors)
            judged = self.judge(self.slim(solution), c, b)
            results.append((float(judged.mean()), refit, solution, judged))
        mean, refit, solution, judged = min(results, key=lambda result: result[0])
        if mean >= draft.mean * (1 - self.config.tolerance):
            return draft
        better = Draft(solution, draft.cost, judged)
        return self.note("refit", refit, better, draft.mean - mean)

    def dial(self) -> Iterator[tuple[float, float]]:
        """Dampings and steps of refits to try."""
        for damping in self.config.refit_dampings:
            for step in self.config.refit_steps:
                yield damping, step
