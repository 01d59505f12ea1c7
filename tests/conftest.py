from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Callable, Generator
from typing import Any

import pytest
import threadpoolctl
import torch
from filelock import FileLock
from torch import Tensor, nn

from rba_compress import Budget, Result, benchmark, compress
from rba_compress.artifacts import certification
from rba_compress.cli.digits import Split, batches, digits_data, digits_model
from rba_compress.profiling.latency import Latency
from rba_compress.reporting import comparison
from tests.networks import BRIEF_SEARCH

FIRST = {"test_clinical", "test_real_text", "test_real_data", "test_docs"}

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; so do the processes that they start.
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time reports and files in a few pairs: half a second in each of some hundred tests adds up."""

    def timed(original: nn.Module, compressed: nn.Module, example: Any, *, seconds: float) -> Latency:
        return benchmark(original, compressed, example, seconds=0)

    monkeypatch.setattr(comparison, "benchmark", timed)
    monkeypatch.setattr(certification, "benchmark", timed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with the longest tests first, so that no worker waits for the other at the end."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(scope="session")
def digits() -> nn.Module:
    """The shipped digits ViT; tests leave the model unchanged."""
    return digits_model()


@pytest.fixture(scope="session")
def digits_loader() -> list[tuple[Tensor, Tensor]]:
    """192 training digits in three batches."""
    (images, labels), _ = digits_data()
    return batches((images[:192], labels[:192]), 64)


@pytest.fixture(scope="session")
def held_out() -> Split:
    return digits_data()[1]


@pytest.fixture(scope="session")
def result(digits_loader: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The digits ViT without its unread positions and two MLPs; tests leave the result unchanged."""
    return once(
        tmp_path_factory,
        "result",
        lambda: compress(digits_model(), digits_loader, budget=Budget(macs=0.85), config=BRIEF_SEARCH),
    )


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[], Any]) -> Any:
    """Build a value once per run, not once per worker."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    path = root / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_bytes(pickle.dumps(build()))
    return pickle.loads(path.read_bytes())  # noqa: S301  written by this run


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Import and trace once, before any test is measured."""
    import timm  # noqa: F401
    import transformers  # noqa: F401

    torch.export.export(nn.Linear(2, 2), (torch.zeros(2, 2),), strict=False)


LONGEST = 5.0
"""CPU seconds of a test that is not marked slow, on a quiet machine."""
QUIET = 280.0
"""CPU seconds of all such tests on a quiet machine. Where they take longer together, because cores are
shared, each may take longer by the same ratio.
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    started = _cpu_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu", _cpu_seconds() - started))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run on several workers with a long test that is not marked slow. On one worker, torch has
    several threads, and those that wait count, too.
    """
    config = session.config
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    seconds = {
        report.nodeid: dict(report.user_properties)["cpu"]
        for report in (*reporter.stats.get("passed", ()), *reporter.stats.get("failed", ()))
        if report.when == "call" and not {"slow", "catalogue"} & set(report.keywords)
    }
    limit = LONGEST * max(1.0, sum(seconds.values()) / QUIET)
    reporter.ensure_newline()
    for name, taken in seconds.items():
        if taken > limit:
            reporter.line(
                f"{name} took {taken:.1f} CPU seconds: shorten it to {limit:.1f}, or mark it slow"
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
