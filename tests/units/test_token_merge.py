"""Merged positions: the law on whole networks, costs, artefacts, other forms, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, fx, nn

from rba_compress import (
    Budget,
    Config,
    Healing,
    ModelError,
    Plan,
    compress,
    export_onnx,
    heal,
    load,
    profile,
    save,
    search,
    splice,
    supports,
)
from rba_compress.artifacts.artifact import write_artifact
from rba_compress.core.batch import as_batch
from rba_compress.core.plan import Chain, Site
from rba_compress.graph.token_merging import merge, merged_sizes, places, shares
from rba_compress.linalg.moments import PairMoments
from rba_compress.planning.context import SearchContext
from rba_compress.planning.fit_statistics import probed, span_rows
from rba_compress.planning.plan_cost import network_cost
from rba_compress.planning.sites import sites
from rba_compress.planning.state import (
    Candidate,
    SearchState,
    Solution,
    with_candidate,
    without_unread,
)
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity
from rba_compress.units.block_variants import Traces
from rba_compress.units.splice import forms_of, splice_shared
from rba_compress.units.token_merge import TOKEN_MERGE
from tests.networks import images, seeded

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}


def vit(**more: Any) -> nn.Module:
    """Vision transformer of 17 positions, the first one a class token."""
    return seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES | {"num_classes": 5} | more)


def chain_of(model: nn.Module) -> Chain:
    (chain,) = supports(model, images(4, 32)).chains
    return chain


def planned(chain: Chain, *merges: tuple[int, int]) -> Plan:
    chosen = [TOKEN_MERGE.choice(chain, b, b + 1, float(count)) for b, count in merges]
    return Plan(replacements=tuple(chosen))


@pytest.mark.parametrize("merges", [[(0, 8)], [(0, 3), (1, 3)], [(2, 5)]])
def test_equal_positions_merge_without_any_change(merges: list[tuple[int, int]]) -> None:
    """Patches come in pairs, and no embedding tells positions apart."""
    model = vit()
    with torch.no_grad():
        model.pos_embed.zero_()  # type: ignore[operator, union-attr]
    x = images(3, 32)
    x = x.unflatten(3, (2, 2, 8))[:, :, :, :, :1].expand(-1, -1, -1, -1, 2, -1).flatten(3)
    merged = splice(model, planned(chain_of(model), *merges), {})
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)


def stream_by_hand(
    model: Any, x: Tensor, merges: dict[int, int], protected: int, *, reads: bool = True
) -> tuple[Tensor, Tensor]:
    """Run the blocks of a vision transformer of timm with merged positions, without its attention."""
    h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    sizes = torch.ones(*h.shape[:2], 1)
    for b, block in enumerate(model.blocks):
        n, positions, width = h.shape
        attn = block.attn
        qkv = attn.qkv(block.norm1(h)).reshape(n, positions, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * attn.scale + sizes.log().reshape(n, 1, 1, positions)
        attention = scores.softmax(-1)
        mixed = (attention @ v).transpose(1, 2).reshape(n, positions, width)
        h = h + block.ls1(attn.proj(mixed))
        if b in merges:
            size = sizes.squeeze(-1)
            read = attention[:, :, :protected].mean((1, 2)) if reads else size
            new = places(h, (read * size).sqrt(), merges[b], protected)
            h = merge(h, shares(new, read, merges[b]), new, merges[b])
            sizes = merged_sizes(sizes, new, merges[b])
        h = h + block.ls2(block.mlp(block.norm2(h)))
    return h, sizes


def by_hand(model: Any, x: Tensor, merges: dict[int, int], protected: int = 1) -> Any:
    """Return the output with a class token."""
    return model.forward_head(model.norm(stream_by_hand(model, x, merges, protected)[0]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
def test_a_spliced_network_computes_what_is_written_by_hand(fused: bool, registers: int) -> None:
    model: Any = vit(reg_tokens=registers)
    for block in model.blocks:
        block.attn.fused_attn = fused
    merges = {0: 4, 1: 2, 2: 3}
    chain = chain_of(model)
    merged = splice(model, planned(chain, *merges.items()), {})
    for n in (1, 2, 5):
        x = images(n, 32)
        with torch.no_grad():
            expected = by_hand(model, x, merges, chain.reads)
            torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merges", [[(0, 4)], [(1, 3), (2, 5)], [(0, 1), (1, 2), (2, 3)]])
@pytest.mark.parametrize("read_out", [False, True])
def test_costs_follow_the_positions(merges: list[tuple[int, int]], read_out: bool) -> None:
    model = vit() if read_out else vit(class_token=False, global_pool="avg")
    seen = profile(model, [images(20, 32)])
    plan = planned(seen.chains[0].chain, *merges)
    handed = without_unread(Solution(plan, {}), seen).plan
    assert any(r.exact for r in handed.replacements) is read_out
    measured, said = cost(splice(model, handed, {}), as_batch(images(2, 32))), network_cost(seen, plan)
    assert (measured.macs, measured.params) == (said.macs, said.params)
    assert measured.macs < seen.original.macs


@pytest.mark.slow
def test_a_search_merges_and_what_it_found_reloads(tmp_path: Path) -> None:
    model, data = vit(), [images(10, 32, seed=k) for k in range(4)]
    config = Config(units=("token_merge",))
    result = compress(model, data, budget=Budget(macs=0.75), config=config)
    assert {r.unit for r in result.plan.replacements} == {"token_merge", "read_out"}
    assert result.report.compressed.macs <= 0.75 * result.report.original.macs
    assert result.report.compressed.params == result.report.original.params
    assert not result.report.warnings
    assert not result.check(data[0]).shifted
    save(result, tmp_path / "merged")
    again = load(tmp_path / "merged", original=model)
    assert torch.equal(again(data[0]), result.model(data[0]))
    assert again.forward_features(data[0]).shape == result.model.forward_features(data[0]).shape


@pytest.mark.slow
def test_a_merged_network_is_healed() -> None:
    model: Any = vit()
    with torch.no_grad():
        model.head.weight.mul_(30)
    merged = splice(model, planned(chain_of(model), (0, 6), (1, 4)), {})
    healing = Healing(train="all", rate=1e-4, epochs=4, batch=16, augment=())
    healed = heal(merged, [images(50, 32, seed=k) for k in range(4)], original=model, healing=healing)
    x = images(100, 32, seed=9)
    before, after = (fidelity(model, net, [as_batch(x)], "kl").divergence for net in (merged, healed))
    assert after < 0.7 * before


def test_kept_features_leave_merging_alone() -> None:
    model, config = vit(), Config(units=("token_merge",), keep_features=True)
    (seen,) = profile(model, [images(20, 32)], config=config).chains
    assert not TOKEN_MERGE.sites(seen.chain, None)


def test_a_graph_merges_as_its_module_does() -> None:
    model, x = vit(depth=3), images(3, 32)
    plain = splice(model, planned(chain_of(model), (0, 4), (1, 3)), {})
    traced = fx.symbolic_trace(model)
    graph = splice(traced, planned(chain_of(traced), (0, 4), (1, 3)), {})
    assert isinstance(graph, fx.GraphModule)
    assert torch.equal(graph(x), plain(x))


def test_a_level_that_is_no_number_of_positions_is_refused() -> None:
    chain = chain_of(vit())
    (new,) = planned(chain, (0, 4)).replacements
    for level in (None, 0.0, 1.5):
        with pytest.raises(ValueError, match="takes a number of positions away"):
            type(new).model_validate(new.model_dump() | {"level": level})
    message = "17 positions reach a block that merges 40 of them: .* 81 or more reach it"
    with pytest.raises(ModelError, match=message):
        splice(vit(), planned(chain, (0, 40)), {})(images(2, 32))


@pytest.mark.parametrize("more", [{"class_token": False}, {"class_token": True}, {"reg_tokens": 2}])
def test_a_head_that_takes_a_mean_counts_positions_by_their_sizes(more: dict[str, Any]) -> None:
    model: Any = vit(global_pool="avg", **more)
    chain = chain_of(model)
    assert chain.reads == 0
    assert chain.ordered == model.num_prefix_tokens
    merges = {0: 3, 1: 2}
    merged = splice(model, planned(chain, *merges.items()), {})
    x = images(3, 32)

    with torch.no_grad():
        h, sizes = stream_by_hand(model, x, merges, chain.ordered, reads=False)
        h = model.norm(h)[:, model.num_prefix_tokens :]
        weights = sizes[:, model.num_prefix_tokens :]
        pooled = (h * weights).sum(1) / weights.sum(1)
        expected = model.head(model.head_drop(model.fc_norm(pooled)))
        torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    measured, said = cost(merged, as_batch(x[:2])), profile(model, [images(20, 32)])
    assert measured.macs == network_cost(said, planned(said.chains[0].chain, *merges.items())).macs


@pytest.mark.slow
def test_a_merged_network_is_exported_and_compiled(tmp_path: Path) -> None:
    model, x = vit(depth=2), images(5, 32)
    merged = splice(model, planned(chain_of(model), (0, 4), (1, 3)), {})
    export_onnx(merged, tmp_path / "merged.onnx", x[:2], original=model)
    half = copy.deepcopy(merged).half()
    export_onnx(half, tmp_path / "half" / "merged.onnx", x[:2].half())
    batch = torch.export.Dim("batch")
    exported = torch.export.export(merged, (x[:2],), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x), merged(x))
    compiled = torch.compile(merged, fullgraph=True)
    torch.testing.assert_close(compiled(x), merged(x), rtol=1e-4, atol=1e-5)


def test_refits_behind_a_merge_are_towards_the_original_merged_alike() -> None:
    """Compare what layers lack with streams by hand: before a merge, at it, and behind two of them."""
    model: Any = vit(init_values=0.5)
    merges, data = {1: 4, 2: 3}, list(images(20, 32).split(5))
    seen = profile(model, data, config=Config(seed=0))
    run = SearchContext.read(model, seen, data, Budget(macs=0.5))
    chain, plan = run.chains[0], planned(run.chains[0], *merges.items())
    walk, network = run.fitter.walk(0, plan), run.fitter.compressed(Solution(plan, {}))
    for b, branch in ((0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)):
        walk.to(network, b, unchanged=b % 2 == 0)
        found = walk.gaps(network, chain.blocks[b].branches)[branch]
        features, lacking = [], []
        for batch in run.fitter.batches:
            with torch.no_grad():
                seen_at = streams_by_hand(model, batch.args[0], merges)[b + (branch + 1) / 2]
            scale = (model.blocks[b].ls1, model.blocks[b].ls2)[branch].gamma.detach()
            features.append(seen_at.features)
            lacking.append((seen_at.alike @ seen_at.original - seen_at.compressed) / scale)
        x, y = (torch.cat(parts).double() for parts in (features, lacking))
        torch.testing.assert_close(found.others.mean_x, x[:, 1:].mean((0, 1)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.others.mean_y, y[:, 1:].mean((0, 1)), rtol=1e-3, atol=1e-5)
        cross = (x[:, 1:] - x[:, 1:].mean((0, 1))).flatten(0, 1).T @ y[:, 1:].flatten(0, 1)
        torch.testing.assert_close(found.others.xy, cross, rtol=1e-3, atol=1e-3)
        assert float(y.abs().max()) > (1e-3 if (b, branch) > (1, 0) else -1)


class Seen(NamedTuple):
    """Streams of both networks at one place, by hand."""

    original: Tensor
    compressed: Tensor
    alike: Tensor
    """(N, merged positions, original positions): the weight of each in each group's mean."""
    features: Tensor
    """Input of the last layer before the place."""


def streams_by_hand(model: Any, x: Tensor, merges: dict[int, int]) -> dict[float, Seen]:
    """Return the streams between the sublayers of each block (b + 1/2) and behind it (b + 1)."""
    h = g = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    # Both are (N, merged positions, original positions).
    groups = alike = torch.eye(h.shape[1]).expand(len(h), -1, -1)
    found = {}
    for b, block in enumerate(model.blocks):
        streams = []
        for stream, sizes in ((h, torch.ones(h.shape[:2])), (g, groups.sum(-1))):
            n, positions, width = stream.shape
            attn = block.attn
            qkv = attn.qkv(block.norm1(stream)).reshape(n, positions, 3, attn.num_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-2, -1) * attn.scale + sizes.log()[:, None, None]
            mixed = attn.norm((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, positions, width))
            read = scores.softmax(-1)[:, :, 0].mean(1)
            streams.append((stream + block.ls1(attn.proj(mixed)), mixed, read))
        (h, _, _), (g, features, read) = streams
        found[b + 0.5] = Seen(h, g, alike, features)
        if b in merges:
            new = places(g, (read * groups.sum(-1)).sqrt(), merges[b], 1)
            joined = torch.nn.functional.one_hot(new, g.shape[1] - merges[b]).mT.float()
            mean = joined * read[:, None]
            mean = mean / mean.sum(-1, keepdim=True)
            g, groups, alike = mean @ g, joined @ groups, mean @ alike
        mlp = block.mlp
        features = mlp.norm(mlp.act(mlp.fc1(block.norm2(g))))
        h, g = (s + block.ls2(mlp(block.norm2(s))) for s in (h, g))
        found[b + 1.0] = Seen(h, g, alike, features)
    return found


def test_maps_behind_a_merge_are_fitted_to_the_original_merged_alike() -> None:
    """Moments of sources and targets equal those of streams by hand, and folds read what precedes."""
    model: Any = vit(init_values=0.5)
    merges, data = {0: 4, 1: 3}, list(images(20, 32).split(5))
    chain, batches = chain_of(model), [as_batch(x) for x in data]
    plan, traces = planned(chain, *merges.items()), Traces()
    network = splice(model, plan, {}, traces=traces)
    middle = [chain.blocks[2]]
    forms = {block.path: form for block, form in forms_of(plan)[1]}
    spans = [(1.0, 2.0), (1.0, 3.0), (2.0, 2.5), (2.0, 4.0), (2.5, 3.0)]
    found = span_rows(
        probed(model, middle, traces),
        probed(network, middle, traces, forms),
        chain,
        batches,
        spans=spans,
        folds={2.0: chain.blocks[1].branches[-1]},
        merges=[*merges],
    )
    with torch.no_grad():
        hand = [streams_by_hand(model, x, merges) for x in data]

    def moments_equal(moments: PairMoments, x: Tensor, y: Tensor) -> None:
        x, y = x[:, 1:].flatten(0, 1).double(), y[:, 1:].flatten(0, 1).double()
        torch.testing.assert_close(moments.mean_x, x.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.mean_y, y.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.xy, (x - x.mean(0)).T @ y, rtol=1e-3, atol=1e-3)

    for source, target in spans:
        rows = found[source]
        x = torch.cat([seen[source].compressed for seen in hand])
        y = torch.cat([seen[source].alike @ seen[target].original for seen in hand])
        moments_equal(rows.maps.others.targets(rows.columns(target)), x, y)
        if source == 2.0:
            features = torch.cat([seen[source].features for seen in hand])
            lacking = (y - x) / model.blocks[1].ls2.gamma
            assert rows.folds is not None
            moments_equal(rows.folds.others.targets(rows.columns(target)), features, lacking)


def behind_merges(
    model: nn.Module, data: list[Tensor], *merges: tuple[int, int]
) -> tuple[SearchContext, SearchState, list[Candidate]]:
    """Return a search at a network that merges positions, and every candidate there."""
    seen = profile(model, data, config=Config(seed=0, maps=("shrunk",), shrinks=(0.7,)))
    run = SearchContext.read(model, seen, data, Budget(macs=0.5))
    solution = Solution(planned(run.chains[0], *merges), {})
    evaluation = run.evaluation(run.start, solution, (0, 0))
    state = SearchState(solution, run.fitter.cost(solution.plan), evaluation)
    run.rebase(state)
    return run, state, run.fitter.candidates(state, sites(run, solution.plan))


@pytest.mark.parametrize("read_out", [True, False])
def test_every_unit_behind_a_merge_costs_what_is_counted(read_out: bool) -> None:
    """One level of each unit at each site of a network that merges positions in two blocks."""
    model = vit(depth=3) if read_out else vit(depth=3, class_token=False, global_pool="avg")
    data = list(images(20, 32).split(10))
    run, state, found = behind_merges(model, data, (0, 4), (1, 3))
    tried, seen = {c.site: c for c in found}, run.fitter.profile
    units = {"span", "attention_free", "mlp_free", "token_merge"}
    units |= {"hidden_width", "head_width", "qk_rank", "vo_rank"}
    assert {site.unit for site in tried} == units | (
        {"read_out", "read_out_mlp"} if read_out else set()
    )
    for candidate in tried.values():
        new = with_candidate(state.solution, candidate)
        handed = without_unread(new, seen)
        network = splice_shared(model, handed.plan, handed.tensors, seen.traces)
        measured, said = cost(network, as_batch(images(2, 32))), network_cost(seen, new.plan)
        assert (measured.macs, measured.params) == (said.macs, said.params)
        assert said == state.cost - candidate.saving
        whole = splice_shared(model, new.plan, new.tensors, seen.traces)
        torch.testing.assert_close(network(data[0]), whole(data[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("last", ["mlp_free", "span"])
def test_maps_and_merges_in_one_network(last: str, tmp_path: Path) -> None:
    """A map, a merge, and maps behind it: a graph, a delta and an ONNX file compute the same."""
    more = {} if last == "mlp_free" else {"class_token": False, "global_pool": "avg"}
    model, data = vit(**more), list(images(20, 32).split(10))
    run, state, found = behind_merges(model, data, (1, 4))
    solution = state.solution
    for site in (Site(0, 0, 1, "mlp_free"), Site(0, 2, 3, "attention_free"), Site(0, 3, 4, last)):
        solution = with_candidate(solution, [c for c in found if c.site == site][-1])
    network = splice(model, solution.plan, solution.tensors)
    assert len(solution.plan.replacements) == 4
    traced = fx.symbolic_trace(model)
    blocks, parts = chain_of(traced).blocks, []
    for r in solution.plan.replacements:
        of_graph = {"blocks": blocks[r.start : r.stop], "behind": blocks[r.stop :] if r.behind else ()}
        parts.append(r.model_copy(update=of_graph))
    graph = splice(traced, Plan(replacements=tuple(parts)), solution.tensors)
    torch.testing.assert_close(graph(data[0]), network(data[0]), rtol=1e-5, atol=1e-5)
    seen = run.fitter.profile
    write_artifact(
        network,
        solution.plan,
        tmp_path / "delta",
        example=seen.example,
        original_weights=seen.weights,
        delta=True,
    )
    again = load(tmp_path / "delta", original=model)
    assert torch.equal(again(data[0]), network(data[0]))
    export_onnx(network, tmp_path / "network.onnx", data[0][:2], original=model)


def test_a_nested_network_that_shares_its_weights_leaves_the_original_as_it_is() -> None:
    """Blocks behind a merge are replaced as well."""
    model: Any = nn.Sequential(vit())
    x = images(2, 32)
    before, expected = [type(block) for block in model[0].blocks], model(x)
    merged = splice_shared(model, planned(chain_of(model), (0, 4)), {})
    assert not torch.equal(merged(x), expected)
    assert [type(block) for block in model[0].blocks] == before
    assert torch.equal(model(x), expected)


def test_a_network_without_attention_gets_the_plan_that_it_gets_without_merging() -> None:
    model = seeded(timm.create_model, "resnet18", num_classes=5)
    data = list(images(12, 32).split(6))

    def found(*units: Any) -> Any:
        how = Config(units=units, maps=("shrunk",), shrinks=(0.7,), effort="quick")
        return search(model, profile(model, data, config=how), data, budget=Budget(macs=0.85))

    with_merging, without = found("span", "token_merge"), found("span")
    assert with_merging.plan.replacements
    ignored = {"config", "refusals"}
    assert with_merging.plan.model_dump(exclude=ignored) == without.plan.model_dump(exclude=ignored)
    assert with_merging.tensors.keys() == without.tensors.keys()
    assert all(torch.equal(t, without.tensors[name]) for name, t in with_merging.tensors.items())
