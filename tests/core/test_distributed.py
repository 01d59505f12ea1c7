from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rba_compress import Plan, Result, compress
from rba_compress.core.config import Budget
from rba_compress.profiling.fidelity import Fidelity
from tests.networks import LIGHT, Chain, rows, seeded, to_heal


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def together(job: str, folder: Path, count: int = 2) -> list[tuple[int, str]]:
    """Return the exit code and the output of every process of a job.

    The processes start as under a launcher, but no launcher stops those that are left.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared |= {"ACCELERATE_USE_CPU": "1"}
    logs = [folder / f"{rank}.log" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.core.rank_worker", job, str(folder)],
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    ends = [process.wait(timeout=300) for process in processes]
    return [(end, log.read_text()) for end, log in zip(ends, logs, strict=True)]


def results(job: str, folder: Path, count: int = 2) -> list[tuple[str, dict[str, Tensor]]]:
    """Return the text and tensors that every process of a job wrote."""
    for end, printed in together(job, folder, count):
        assert end == 0, printed
    return [
        ((folder / f"{r}.json").read_text(), load_file(folder / f"{r}.safetensors"))
        for r in range(count)
    ]


def decisions(plan: Plan) -> list[Any]:
    """Return what a plan does, and why, without figures that depend on the order of a sum."""
    taken = [(r.chain, r.start, r.stop, r.unit, r.map, r.exact, r.reads) for r in plan.replacements]
    refits = [r.model_dump() for r in plan.refits]
    judged = [(c.step, c.chain, c.start, c.stop, c.unit, c.map, c.macs) for c in plan.candidates]
    return [taken, refits, judged, [(s.action, s.macs) for s in plan.steps], plan.forward_passes]


def require_same(
    plan: Plan, tensors: dict[str, Tensor], expected: Plan, others: dict[str, Tensor]
) -> None:
    assert decisions(plan) == decisions(expected)
    found = [step.divergence for step in plan.steps]
    assert found == pytest.approx([step.divergence for step in expected.steps], rel=1e-4)
    assert tensors.keys() == others.keys()
    for key, tensor in others.items():
        # Float32 streams, summed up in another order, behind a ridge of 1e-4.
        assert float((tensors[key] - tensor).norm()) < 1e-4 * float(tensor.norm())


@pytest.mark.slow
def test_two_processes_make_the_plan_of_one(tmp_path: Path, result: Result) -> None:
    first, second = results("digits", tmp_path)
    assert first[0] == second[0]  # to the last digit
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    require_same(Plan.model_validate_json(first[0]), first[1], result.plan, result.tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "batch", "count"), [("uneven", 9, 3), ("empty", 40, 2)])
def test_shards_of_any_size(tmp_path: Path, job: str, batch: int, count: int) -> None:
    data = list(rows(40).split(batch))
    alone = compress(seeded(Chain), data, budget=Budget(macs=0.7), config=LIGHT)
    found = results(job, tmp_path, count)
    for text, tensors in found:
        plan, fidelity = text.splitlines()
        require_same(Plan.model_validate_json(plan), tensors, alone.plan, alone.tensors)
        seen, expected = Fidelity.model_validate_json(fidelity), alone.report.fidelity
        assert seen.samples == expected.samples == 4
        assert seen.divergence == pytest.approx(expected.divergence, rel=1e-4)
        assert text == found[0][0]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    start = time.perf_counter()
    first, second, last = together("dies", tmp_path, 3)
    assert time.perf_counter() - start < 300  # most of it starts processes; peers would wait for hours
    assert last[0] == -signal.SIGKILL
    for end, printed in (first, second):
        assert end == 1
        assert "RankError: one of the 3 processes ended or does not answer" in printed


@pytest.mark.slow
def test_processes_with_other_data_are_refused(tmp_path: Path) -> None:
    for end, printed in together("other", tmp_path):
        assert end == 1
        assert "RankError: rank 1 has another loader than rank 0" in printed


@pytest.mark.slow
def test_two_processes_heal_together(tmp_path: Path) -> None:
    first, second = results("heal", tmp_path)
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    original, _, compressed = to_heal()
    before = {name: p.clone() for name, p in compressed.state_dict().items()}
    healed = copy.deepcopy(compressed)
    healed.load_state_dict(first[1])
    assert any(not torch.equal(p, before[name]) for name, p in healed.state_dict().items())
    x = rows(500, seed=7)
    errors = [
        float((original(x) - model(x)).square().mean().detach()) for model in (compressed, healed)
    ]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_a_process_that_dies_in_training_ends_the_others(tmp_path: Path) -> None:
    start = time.perf_counter()
    first, last = together("heal_dies", tmp_path)
    assert time.perf_counter() - start < 300  # most of it starts processes; peers would wait for hours
    assert last[0] == -signal.SIGKILL
    assert first[0] == 1
    assert "RankError: one of" in first[1]
