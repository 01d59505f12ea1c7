"""Progress of a search: other budgets from its record, checkpoints, effort, bar and log lines."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rba_compress import ArtifactError, Budget, Config, Profile, compress, profile, search
from rba_compress.core.distributed import Ranks
from rba_compress.planning.context import SearchContext
from rba_compress.planning.descent import Descent, descend
from rba_compress.planning.evaluator import Evaluator
from rba_compress.planning.output_changes import _Runs
from rba_compress.planning.state import Solution
from rba_compress.profiling.search_record import OptionRun
from tests.networks import LIGHT, Chain, loader, rows, seeded

HOW = Config(units=("span",), window=2, maps=("shrunk", "folded"), shrinks=(0.7,), refit_steps=(1.0,))
BUDGET = Budget(macs=0.6)


def deep() -> tuple[Chain, list[Tensor]]:
    return seeded(Chain, 5), [*rows(40).split(10)]


def searched(checkpoint: Path | None = None) -> Solution:
    model, data = deep()
    return search(model, profile(model, data, config=HOW), data, budget=BUDGET, checkpoint=checkpoint)


def assert_equal(found: Solution, expected: Solution) -> None:
    assert found.plan.model_dump_json() == expected.plan.model_dump_json()
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())


@pytest.mark.parametrize("runs", [1, 20, 40])
def test_an_interrupted_search_resumes_and_ends_bit_equal(
    runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first stage, in a later one, in a refinement."""
    path, outputs = tmp_path / "search.checkpoint", Evaluator.outputs
    monkeypatch.setattr("rba_compress.planning.progress.EVERY", 0.0)
    done: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        return outputs(*args, **kwargs)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if len(done) >= runs:
            raise KeyboardInterrupt
        return counted(*args, **kwargs)

    monkeypatch.setattr(Evaluator, "outputs", counted)
    expected, whole = searched(), len(done)
    done.clear()

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "outputs", stopped)
        with pytest.raises(KeyboardInterrupt):
            searched(path)
    assert path.exists()
    done.clear()
    assert_equal(searched(path), expected)
    assert len(done) < whole
    assert not path.exists()


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_ends_bit_equal(tmp_path: Path) -> None:
    path = tmp_path / "search.checkpoint"
    code = f"""
import os, signal
from pathlib import Path
from rba_compress.planning import progress
from tests.planning import test_progress as t
progress.EVERY, write, count = 0.0, progress.SearchProgress.write, []
def killed(self):
    write(self)
    count.append(1)
    if len(count) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
progress.SearchProgress.write = killed
t.searched(Path({str(path)!r}))
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == [path]
    assert_equal(searched(path), searched())


def test_a_checkpoint_of_another_search_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "search.checkpoint"
    monkeypatch.setattr("rba_compress.planning.progress.EVERY", 0.0)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("rba_compress.planning.stages._solved", broken)
        with pytest.raises(RuntimeError, match="stopped here"):
            searched(path)
    content, (model, data) = path.read_bytes(), deep()
    other = profile(model, data, config=HOW.model_copy(update={"seed": 1}))
    with pytest.raises(ArtifactError, match="is the checkpoint of another search"):
        search(model, other, data, budget=BUDGET, checkpoint=path)
    assert path.read_bytes() == content
    path.write_bytes(content[:-9])
    with pytest.raises(
        ArtifactError, match=f"{path} is not a searchcheckpoint that this version reads"
    ):
        searched(path)


def test_compress_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (model, data) = tmp_path / "compress.checkpoint", deep()
    expected = compress(model, data, budget=BUDGET, config=HOW)
    monkeypatch.setattr("rba_compress.planning.progress.EVERY", 0.0)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rba_compress.planning.descent._refined", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(model, data, budget=BUDGET, config=HOW, checkpoint=path)
    found = compress(model, data, budget=BUDGET, config=HOW, checkpoint=path)
    assert found.plan == expected.plan
    assert not list(tmp_path.iterdir())


def test_another_budget_is_answered_from_the_record_of_a_saved_profile(tmp_path: Path) -> None:
    model, data = deep()
    seen = profile(model, data, config=HOW)
    first = search(model, seen, data, budget=Budget(macs=0.4))
    assert first.plan.forward_passes > 10
    seen.save(tmp_path / "profile.safetensors")
    again = Profile.load(tmp_path / "profile.safetensors")
    assert len(again.record.networks) == len(seen.record.networks) > 3
    divergences = []
    for share in (0.4, 0.55, 0.7, 0.85):
        found = search(model, again, data, budget=Budget(macs=share))
        assert found.plan.forward_passes <= 5
        assert found.plan.steps[-1].macs <= share * seen.original.macs
        assert found.plan.budget == Budget(macs=share)
        divergences.append(found.plan.steps[-1].divergence)
    assert divergences == sorted(divergences, reverse=True)
    by_params = search(model, again, data, budget=Budget(params=0.6))
    assert by_params.plan.steps[-1].params <= 0.6 * seen.original.params
    # A budget below the last stage goes on from there.
    further = search(model, again, data, budget=Budget(macs=0.25))
    assert further.plan.steps[-1].macs <= 0.25 * seen.original.macs


@pytest.mark.parametrize("seed", range(12))
def test_a_looser_budget_never_ends_worse_from_one_record(seed: int) -> None:
    """On the samples chosen on: neighbours among four budgets on a random network."""
    config = Config(units=("span",), maps=("shrunk",), shrinks=(0.7,), refit=False, window=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Chain(5).eval()
    data = [*rows(40, seed).split(20)]
    seen = profile(model, data, config=config)
    ends = []
    for macs in (0.45, 0.6, 0.75, 0.9):
        context = SearchContext.read(model, seen, data, Budget(macs=macs))
        progress: Any = SimpleNamespace(stage=lambda *_: None, refine=lambda: None, before=0)
        ends.append(Descent(context, progress).best().mean)
    assert ends == sorted(ends, reverse=True)


def test_the_sum_of_profiles_has_no_record() -> None:
    model, data = deep()
    a, b = (profile(model, part, config=LIGHT) for part in (data[:3], data[3:]))
    search(model, a, data[:3], budget=BUDGET)
    assert a.record.networks
    assert not (a + b).record.networks


def test_a_quick_search_takes_fewer_passes() -> None:
    model, data = seeded(Chain, 9), [*rows(80).split(20)]
    passes = []
    for effort in ("quick", "default"):
        config = Config(units=("span",), effort=effort, window=2)  # type: ignore[arg-type]
        found = search(model, profile(model, data, config=config), data, budget=Budget(macs=0.67))
        passes.append(found.plan.forward_passes)
    assert passes[0] < 0.5 * passes[1]


class Bar:
    """Progress bar that remembers where it stood."""

    def __init__(self, disable: bool) -> None:
        self.disable, self.n, self.seen = disable, 0.0, [0.0]
        self.said: list[str] = []

    def update(self, n: float) -> None:
        self.n += n
        self.seen.append(self.n)

    def set_description(self, text: str, **_: Any) -> None:
        self.said.append(text)

    def close(self) -> None:
        self.seen.append(self.n)


def test_the_bar_never_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, (model, data) = Bar(disable=False), deep()
    seen = profile(model, data, config=HOW)
    monkeypatch.setattr(Ranks, "bar", lambda *_, **__: bar)
    descend(SearchContext.read(model, seen, data, BUDGET))
    assert bar.seen == sorted(bar.seen)
    assert bar.seen[-1] == pytest.approx(100)
    assert len(set(bar.seen)) > 20
    assert any("search, stage 1 of about 4" in said for said in bar.said)


def test_without_a_terminal_a_line_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rba_compress.planning.progress.EVERY", 0.0)
    with caplog.at_level(logging.INFO, "rba_compress"):
        searched()
    lines = [r.getMessage() for r in caplog.records if r.name == "rba_compress"]
    assert "forward passes over 36 samples" in lines[0]
    assert any(line.startswith("search, stage 1 of about 4: 1 runs, ") for line in lines)
    assert any(line.startswith("about ") and line.endswith(" left") for line in lines)


def squared(expected: Any, found: Any, _: Any) -> Tensor:
    return (expected - found).square().mean(1)


def rounded(expected: Any, found: Any, _: Any) -> Tensor:
    return (expected - found).detach().abs().mean(1).double()


@pytest.mark.parametrize(
    ("function", "said"),
    [(squared, "combined by the second derivative"), (rounded, "without their interactions")],
)
def test_the_report_says_how_a_divergence_of_yours_was_combined(function: Any, said: str) -> None:
    result = compress(seeded(Chain), loader(), budget=BUDGET, config=LIGHT, divergence=function)
    assert any(said in note for note in result.report.notes)
    assert said in result.report.table()
    usual = compress(seeded(Chain), loader(), budget=BUDGET, config=LIGHT)
    assert not usual.plan.notes


def test_an_option_that_is_not_finite_is_dropped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float16 the output of a network without its first block may overflow."""
    run = _Runs._run

    def overflowing(self: _Runs, solution: Solution, at: tuple[int, int]) -> OptionRun:
        done = run(self, solution, at)
        return replace(done, rise=math.inf) if at == (0, 0) else done

    monkeypatch.setattr(_Runs, "_run", overflowing)
    model, config = seeded(Chain), Config(maps=("identity",), window=1)
    plan = search(model, profile(model, loader(), config=config), loader(), budget=BUDGET).plan
    dropped = {(c.start, c.dropped) for c in plan.candidates if c.dropped}
    assert dropped == {(0, "its output holds NaN or infinity")}
    assert plan.replacements
    assert 0 not in {r.start for r in plan.replacements}
