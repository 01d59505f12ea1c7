from __future__ import annotations

import os
import resource
from collections.abc import Generator
from typing import Any

import pytest
import threadpoolctl
import torch
from torch import Tensor, nn

from rba_compress import Budget, Result, api, benchmark, compress
from rba_compress.cli.digits import Split, batches, digits_data, digits_model
from rba_compress.profiling.latency import Latency

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; so do the processes that they start.
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are timed in a few pairs: half a second in each of some hundred tests is minutes."""

    def timed(original: nn.Module, compressed: nn.Module, example: Any, *, seconds: float) -> Latency:
        return benchmark(original, compressed, example, seconds=0)

    monkeypatch.setattr(api, "benchmark", timed)


@pytest.fixture(scope="session")
def digits() -> nn.Module:
    """The shipped digits ViT; tests leave it as it is."""
    return digits_model()


@pytest.fixture(scope="session")
def digits_loader() -> list[tuple[Tensor, Tensor]]:
    """320 training digits in five batches."""
    (images, labels), _ = digits_data()
    return batches((images[:320], labels[:320]), 64)


@pytest.fixture(scope="session")
def held_out() -> Split:
    return digits_data()[1]


@pytest.fixture(scope="session")
def result(digits: nn.Module, digits_loader: list[tuple[Tensor, Tensor]]) -> Result:
    """The digits ViT compressed to nine blocks; tests leave it as it is."""
    return compress(digits, digits_loader, budget=Budget(macs=0.8))


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    started = _cpu_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu", f"{_cpu_seconds() - started:.2f}"))
