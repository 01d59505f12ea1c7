"""Laws, tested on what hypothesis draws."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from rba_compress import Budget, Plan, Result, compress, load, save, splice, supports
from rba_compress.core.batch import as_batch
from rba_compress.core.map_spec import Kind, MapSpec
from rba_compress.linalg.maps import fit_map
from rba_compress.linalg.moments import Moments, PairMoments
from rba_compress.planning.state import keyed
from rba_compress.profiling.cost import cost
from rba_compress.units.span import SPAN
from tests.networks import LIGHT, Chain, loader, rows

SEEDS = st.integers(0, 2**31)
COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=6)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(seed: int, n: int, d: int = 5) -> tuple[Tensor, Tensor]:
    """Rows and an affine image of them with noise, some units from zero."""
    x = normal(seed, n, d) @ normal(seed + 1, d, d) + 3 * normal(seed + 2, 1, d)
    return x, x @ normal(seed + 3, d, d) + normal(seed + 4, 1, d) + 0.1 * normal(seed + 5, n, d)


def moments(streams: list[Tensor], window: int | None = None) -> Moments:
    found = Moments(len(streams), streams[0].shape[1], window=window)
    found.update(streams)
    return found


def assert_alike(a: Moments, b: Moments, tolerance: float) -> None:
    """Assert that moments agree, relative to the largest number of each kind."""
    assert a.n == pytest.approx(b.n, rel=tolerance)
    for x, y in ((a.mean, b.mean), *zip(a.comoment, b.comoment, strict=True)):
        assert float((x - y).abs().max()) <= tolerance * max(1.0, float(y.abs().max()))


def split(x: Tensor, counts: list[int]) -> list[Tensor]:
    return list(x.split([*counts, len(x) - sum(counts)] if sum(counts) <= len(x) else [len(x)]))


@given(SEEDS, COUNTS, st.integers(0, 3), st.sampled_from([1e-3, 1.0, 1e3]))
def test_merging_moments_is_associative_and_commutative(
    seed: int, counts: list[int], window: int, scale: float
) -> None:
    whole = [scale * normal(seed + j, sum(counts) + 1, 4) for j in range(3)]
    parts = [
        moments(list(part), window or None)
        for part in zip(*(split(h, counts) for h in whole), strict=True)
    ]
    in_order = parts[0]
    for part in parts[1:]:
        in_order = in_order + part
    backwards = parts[-1]
    for part in reversed(parts[:-1]):
        backwards = part + backwards
    reverse = parts[-1]
    for part in reversed(parts[:-1]):
        reverse = reverse + part
    for other in (backwards, reverse, moments(whole, window or None)):
        assert_alike(in_order, other, 1e-12)


@given(SEEDS, COUNTS)
def test_merging_pairs_is_associative_and_commutative(seed: int, counts: list[int]) -> None:
    x, y = pair(seed, sum(counts) + 1)
    parts = [
        PairMoments.from_rows(a, b)
        for a, b in zip(split(x, counts), split(y, counts), strict=True)
        if len(a)
    ]
    for order in itertools.islice(itertools.permutations(parts), 6):
        found = order[0]
        for part in order[1:]:
            found = found + part
        wanted = PairMoments.from_rows(x, y)
        for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
            a, b = getattr(found, name), getattr(wanted, name)
            assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max())) * len(x)


@given(SEEDS, COUNTS, st.sampled_from(["scale", "linear", "affine", "orthogonal", "low_rank"]))
def test_any_partition_of_the_data_gives_the_same_map(seed: int, counts: list[int], kind: Kind) -> None:
    x, y = pair(seed, sum(counts) + 40)
    spec = MapSpec(kind=kind, rank=3 if kind == "low_rank" else None)
    parts = Moments(2, 5)
    for a, b in zip(split(x, counts), split(y, counts), strict=True):
        parts.update([a, b])
    one, other = (fit_map(spec, found.pair(0, 1)) for found in (moments([x, y]), parts))
    for name, tensor in one.tensors.items():
        found, wanted = other.tensors[name], tensor
        if kind == "low_rank" and "weight" in name:  # its factors have no signs of their own
            found, wanted = found.abs(), wanted.abs()
        assert float((found - wanted).abs().max()) <= 1e-7 * max(1.0, float(wanted.abs().max()))


def invertible(seed: int, d: int) -> Tensor:
    """Return a matrix of condition number 4."""
    q, _ = torch.linalg.qr(normal(seed, d, d))
    return q * torch.linspace(0.5, 2, d, dtype=torch.float64)


@given(SEEDS)
def test_an_affine_map_follows_a_linear_change_of_the_stream_on_both_sides(seed: int) -> None:
    """Replacing x by x A and y by y B turns W into A^-1 W B and b into b B."""
    x, y = pair(seed, 60)
    a, b = invertible(seed + 7, 5), invertible(seed + 8, 5)
    spec = MapSpec(kind="affine")
    plain = fit_map(spec, PairMoments.from_rows(x, y)).tensors
    changed = fit_map(spec, PairMoments.from_rows(x @ a, y @ b)).tensors
    weight = torch.linalg.inv(a) @ plain["weight"].T @ b
    scale = max(1.0, float(weight.abs().max()))
    assert float((changed["weight"].T - weight).abs().max()) <= 1e-7 * scale
    bias = plain["bias"] @ b
    assert float((changed["bias"] - bias).abs().max()) <= 1e-6 * max(1.0, float(bias.abs().max()))


FORMS: list[Any] = [lambda model: model, fx.symbolic_trace]


def network(seed: int, depth: int, width: int) -> Chain:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Chain(depth, width).eval()


@settings(deadline=None, max_examples=8)
@given(SEEDS, st.integers(2, 6), st.integers(2, 12), st.sampled_from(FORMS))
def test_splicing_nothing_is_the_identity(seed: int, depth: int, width: int, form: Any) -> None:
    model = form(network(seed, depth, width))
    found = splice(model, Plan(), {})
    assert found is not model
    assert torch.equal(found(rows(5)), model(rows(5)))
    assert found.state_dict().keys() == model.state_dict().keys()


@st.composite
def plans(draw: Any) -> tuple[nn.Module, Plan, dict[str, Tensor]]:
    """A network, and maps over its spans that do not meet."""
    depth, width = draw(st.integers(2, 6)), draw(st.integers(2, 12))
    model = network(draw(SEEDS), depth, width)
    (chain,) = supports(model, rows(4)).chains
    kinds: st.SearchStrategy[Kind] = st.sampled_from(
        ["identity", "scale", "linear", "affine", "low_rank"]
    )
    replacements, tensors, start = [], {}, 0
    while start < depth and draw(st.booleans()):
        start = draw(st.integers(start, depth - 1))
        stop, kind = draw(st.integers(start + 1, depth)), draw(kinds)
        spec = MapSpec(kind=kind, rank=1 + width // 3 if kind == "low_rank" else None)
        x, y = pair(draw(SEEDS), 40, width)
        new, fitted = SPAN.fit(SPAN.choice(chain, start, stop, spec), PairMoments.from_rows(x, y))
        replacements.append(new)
        tensors |= keyed(new, fitted)
        start = stop
    return model, Plan(replacements=tuple(replacements)), tensors


@settings(deadline=None, max_examples=4)
@given(plans())
def test_the_cost_of_a_plan_is_the_cost_of_the_network_that_it_makes(
    made: tuple[Chain, Plan, dict[str, Tensor]],
) -> None:
    model, plan, tensors = made
    original, compressed = (cost(m, as_batch(rows(4))) for m in (model, splice(model, plan, tensors)))
    macs = params = 0
    for new in plan.replacements:
        inner = [model.get_submodule(block.path) for block in new.blocks]
        width = new.width
        gone = sum(p.numel() for module in inner for p in module.parameters())
        maps = {"identity": (0, 0), "scale": (0, width), "linear": (width**2, width**2)}
        maps["affine"] = (width**2, width**2 + width)
        rank = new.map.rank or 0
        maps["low_rank"] = (2 * width * rank, 2 * width * rank + width)
        macs += maps[new.map.kind][0] - len(inner) * 4 * width**2
        params += maps[new.map.kind][1] - gone
    assert (compressed.macs, compressed.params) == (original.macs + macs, original.params + params)


@settings(deadline=None, max_examples=8)
@given(plans(), st.sampled_from(FORMS))
def test_splicing_any_plan_leaves_the_original_and_both_forms_agree(
    made: tuple[nn.Module, Plan, dict[str, Tensor]], form: Any
) -> None:
    model, plan, tensors = made
    before = copy.deepcopy(model.state_dict())
    compressed = splice(model, plan, tensors)
    traced = fx.symbolic_trace(model)
    of_graph = supports(traced, rows(4)).chains[0]
    blocks = {block.path: block for block in of_graph.blocks}
    moved = [
        r.model_copy(update={"blocks": tuple(blocks[b.path] for b in r.blocks)})
        for r in plan.replacements
    ]
    graph = splice(traced, Plan(replacements=tuple(moved)), tensors)
    torch.testing.assert_close(graph(rows(6)), compressed(rows(6)))
    assert {n: t.shape for n, t in graph.state_dict().items()} == {
        n: t.shape for n, t in compressed.state_dict().items()
    }
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.fixture(scope="module")
def slims() -> list[tuple[nn.Module, Result]]:
    found = []
    for seed, macs in ((0, 0.8), (1, 0.6), (2, 0.9)):
        model = network(seed, 5, 8)
        found.append((model, compress(model, loader(), budget=Budget(macs=macs), config=LIGHT)))
    return found


def test_saved_loaded_and_spliced_with_nothing_it_is_the_same(
    slims: list[tuple[nn.Module, Result]], tmp_path: Path
) -> None:
    for k, (model, result) in enumerate(slims):
        save(result, tmp_path / str(k))
        again = splice(load(tmp_path / str(k), original=model), Plan(), {})
        assert torch.equal(again(rows(9)), result.model(rows(9)))
        mine, theirs = again.state_dict(), result.model.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
