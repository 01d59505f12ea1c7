from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rba_compress import Config, Result, profile
from rba_compress.core.batch import as_batch
from rba_compress.core.map_spec import MapSpec
from rba_compress.graph.activations import run_with_streams
from rba_compress.planning.plan_cost import plan_saving
from rba_compress.planning.span_fits import paper_span
from rba_compress.reporting.plots import plot_pareto, plot_similarity, plot_span_errors, span_errors
from rba_compress.units.registry import unit_of
from tests.networks import Chain, loader, seeded


def test_span_errors_are_those_of_regressions_on_stored_rows() -> None:
    model = seeded(Chain)
    seen = profile(model, loader(), config=Config(stride=1))
    (profiled,) = seen.chains
    fitted_on = torch.cat([batch.args[0] for batch in seen.split(loader()).part("fit")])
    _, (found,) = run_with_streams(model, [profiled.chain], as_batch(fitted_on))
    streams = [h.detach().double().numpy() for h in found]
    skipped, fitted = span_errors(profiled)
    for start in range(5):
        for stop in range(start + 1, 5):
            x, y = streams[start], streams[stop]
            spread = np.square(y - y.mean(0)).sum()
            assert skipped[start][stop] == pytest.approx(np.square(x - y).sum() / spread, rel=1e-5)
            ones = np.c_[x, np.ones(len(x))]
            left = y - ones @ np.linalg.lstsq(ones, y, rcond=1e-6)[0]
            assert fitted[start][stop] == pytest.approx(np.square(left).sum() / spread, abs=1e-5)
    assert np.isnan(skipped[2][1])
    figure = plot_span_errors(profiled)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["skipped", "the best affine map"]


def test_the_similarity_has_an_axis_a_metric(result: Result) -> None:
    figure = plot_similarity(result.profile.chains[0], ("cosine", "cka"))
    assert [axis.get_title() for axis in figure.axes[:2]] == ["cosine", "linear CKA"]


def test_the_front_shows_every_point(result: Result) -> None:
    details = result.report.details
    assert details is not None
    figure = plot_pareto(details.front)
    (line, *_) = figure.axes[0].lines
    assert len(line.get_xdata()) == len(result.front) + 1
    assert len(figure.axes) == 2
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "the paper's map" in shown
    assert len(plot_pareto([]).axes) == 1


def test_what_a_notebook_shows(result: Result) -> None:
    shown = {name: getattr(result, name)._repr_html_() for name in ("profile", "plan", "report")}
    assert shown["profile"].count("<tr>") == 13  # a head and twelve blocks
    assert "blocks.11" in shown["profile"]
    assert shown["plan"].count("R²") >= 1
    assert "latency, batch 64" in shown["report"] == result._repr_html_()
    assert repr(result.plan) == f"Plan({result.plan})"
    hostile = result.report.model_copy(update={"model": "<script>"})
    assert "<script>" not in hostile._repr_html_()


def test_the_papers_span_is_the_most_redundant_of_the_shortest_that_save_enough(
    digits: nn.Module, digits_loader: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    seen = profile(digits, digits_loader)
    (profiled,) = seen.chains
    alike = profiled.similarity("redundancy")
    found = paper_span(seen, round(0.8 * seen.original.macs))
    assert found is not None
    (chosen,) = found.plan.replacements
    assert chosen.map == MapSpec(kind="linear")
    length = chosen.stop - chosen.start
    shorter = (
        unit_of("span").choice(profiled.chain, 0, length - 1).model_copy(update={"map": chosen.map})
    )
    assert seen.original.macs - plan_saving([profiled.chain], [shorter]).macs > 0.8 * seen.original.macs
    assert seen.original.macs - plan_saving([profiled.chain], [chosen]).macs <= 0.8 * seen.original.macs
    assert chosen.start == int(alike.diagonal(length).argmax())
    least = paper_span(seen, 1)
    assert least is not None
    assert (least.plan.replacements[0].start, least.plan.replacements[0].stop) == (0, 12)
