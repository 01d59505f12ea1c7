"""Artefacts that earlier versions wrote, read today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rba_compress import WeightsError, load, verify
from rba_compress.artifacts.artifact import read_manifest, read_report
from rba_compress.core.plan import FoldRefit, LayerRefit, NormRefit
from tests.networks import Chain, Normed, seeded

SIX = Path(__file__).parent / "schema_6"
"""A chain with BatchNorms: a mapped span and a refit of every kind, with the outputs on a line."""


@pytest.mark.parametrize("name", ["whole", "delta"])
def test_schema_6_is_read(name: str) -> None:
    model, line = seeded(Chain, 6, block=Normed), torch.linspace(-1, 1, 12).reshape(3, 4)
    loaded = load(SIX / name, original=model)
    expected = torch.tensor(json.loads((SIX / "outputs.json").read_text()))
    torch.testing.assert_close(loaded(line), expected, rtol=1e-6, atol=1e-6)
    manifest = read_manifest(SIX / name)
    kinds = [type(refit) for refit in manifest.plan.refits]
    assert kinds == [NormRefit, LayerRefit, FoldRefit]
    assert "kept layers re-solved: 1; BatchNorms re-estimated: 1" in str(manifest.plan)
    report = read_report(SIX / name)
    assert report is not None
    assert 0 < report.compressed.macs < report.original.macs
    assert report.fidelity.accuracy_original is not None
    assert report.latency.original_ms > 0
    assert verify(SIX / name, original=model)


def test_a_delta_of_schema_6_asks_for_its_original() -> None:
    other = seeded(Chain, 6, block=Normed)
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(WeightsError, match="original is not the Chain"):
        load(SIX / "delta", original=other)
