"""head_width, qk_rank and vo_rank: narrower attention, by the network that it makes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from rba_compress import Budget, Config, Healing, compress, export_onnx, heal, load, profile, supports
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.sites import sites
from rba_compress.planning.state import Candidate, undone, with_candidate, without_unread
from rba_compress.profiling.cost import cost
from rba_compress.units.splice import splice
from tests.networks import images, seeded

UNITS = ("head_width", "qk_rank", "vo_rank")


def vit(**kwargs: object) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return seeded(timm.create_model, "vit_tiny_patch16_224", **(size | {"num_classes": 5} | kwargs))


def fitted(
    model: nn.Module, data: list[Tensor], units: tuple[str, ...] = UNITS
) -> tuple[SearchContext, list[Candidate]]:
    """A search at its start, and every option inside the blocks."""
    seen = profile(model, data, config=Config(units=units, multiple=1, refit=False))
    run = SearchContext.read(model, seen, data, Budget(macs=0.99))
    sites = [
        Site(c, b, b + 1, unit)
        for c, chain in enumerate(run.chains)
        for b, block in enumerate(chain.blocks)
        for unit in units
        if block.width(unit)
    ]
    return run, run.fitter.candidates(run.start, sites)


class Encoder(nn.Module):
    """torch's own encoder behind a linear layer: (N, T, 12) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
        self.stem = nn.Linear(12, 24)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)).mean(1))


def hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return seeded(ViTForImageClassification, config)


NETWORKS = {
    "fused, timm": lambda: (vit(), list(images(40, 32).split(10))),
    "separate, transformers": lambda: (hugging_face(), list(images(40, 32).split(10))),
    "torch.nn": lambda: (
        seeded(Encoder),
        list(torch.randn(40, 9, 12, generator=torch.Generator().manual_seed(0)).split(10)),
    ),
}


@pytest.mark.parametrize("units", [("head_width",), ("qk_rank", "vo_rank")], ids="+".join)
@pytest.mark.parametrize("name", NETWORKS)
def test_narrower_attention_costs_what_is_counted(name: str, units: tuple[str, ...]) -> None:
    model, data = NETWORKS[name]()
    run, options = fitted(model, data, units)
    assert {o.site.unit for o in options} == {*units}
    solution = run.start.solution
    for site in dict.fromkeys(each.site for each in options):
        of_site = [each for each in options if each.site == site]
        solution = with_candidate(solution, of_site[len(of_site) // 2])
    solution = without_unread(solution, run.profile)
    compressed = splice(model, solution.plan, solution.tensors)
    assert type(compressed) is type(model)
    counted, expected = cost(compressed, run.profile.example), run.fitter.cost(solution.plan)
    assert (counted.macs, counted.params) == (expected.macs, expected.params)
    for old in list(solution.plan.replacements):
        if old.inner:
            solution = undone(solution, old)
    with torch.no_grad():
        x = data[0]
        again = splice(model, solution.plan, solution.tensors)
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def one_level(options: list[Candidate], unit: str, kept: int) -> list[Candidate]:
    return [o for o in options if o.site.unit == unit and o.replacement.kept == kept]


def planted() -> nn.Module:
    """A ViT with four heads of six channels: the last head's values are sums of two others', products of
    queries and keys have rank three, and values rank four.
    """
    model = vit(num_heads=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            qkv = block.attn.qkv
            q, k, v = (part.view(4, 6, 24) for part in qkv.weight.split(24))
            qb, kb, vb = (part.view(4, 6) for part in qkv.bias.normal_(generator=generator).split(24))
            for h in range(4):
                low = torch.randn(6, 3, generator=generator)
                q[h], qb[h] = low @ q[h, :3], low @ qb[h, :3]
                low = torch.randn(6, 4, generator=generator)
                v[h], vb[h] = low @ v[h, :4], low @ vb[h, :4]
            # Heads with the same attention, so that their values add up.
            q[3], k[3], qb[3], kb[3] = q[1], k[1], qb[1], kb[1]
            v[3], vb[3] = 0.5 * v[1], 0.5 * vb[1]
    return model


@pytest.mark.parametrize(("unit", "left"), [("head_width", 3), ("qk_rank", 3), ("vo_rank", 4)])
def test_planted_redundancy_of_attention_costs_nothing(unit: str, left: int) -> None:
    model, data = planted(), list(images(40, 32).split(10))
    run, options = fitted(model, data, (unit,))
    solution = run.start.solution
    for option in one_level(options, unit, left):
        assert option.replacement.level == 0, "found without being told"
        solution = with_candidate(solution, option)
    assert len(solution.plan.replacements) == 3
    compressed = splice(model, solution.plan, solution.tensors)
    with torch.no_grad():
        for batch in run.fitter.batches:
            expected = model(batch.args[0])
            found = compressed(batch.args[0])
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def of_block(model: nn.Module, data: list[Tensor], b: int) -> dict[str, np.ndarray]:
    """Inputs of a ViT block's attention, and what its heads compute, in numpy's float64."""
    block = model.blocks[b].double()  # type: ignore[union-attr, index, operator]
    seen: list[Tensor] = []
    handle = block.attn.proj.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    inputs: list[Tensor] = []
    other = block.attn.register_forward_hook(lambda _, given, out: inputs.append(given[0]))
    with torch.no_grad():
        for x in data:
            model.double()(x.double())
    handle.remove()
    other.remove()
    return {"x": torch.cat(inputs).numpy(), "z": torch.cat(seen).numpy()}


def test_ranks_are_those_of_the_singular_value_decomposition() -> None:
    """By numpy: the products of queries and centred keys, and the values that the output layer reads."""
    model, data = vit(class_token=False, global_pool="avg"), list(images(40, 32).split(10))
    run, options = fitted(model, data, ("qk_rank", "vo_rank"))
    fit = [batch.args[0] for batch in run.fitter.batches]
    block = model.blocks[1]  # type: ignore[index]
    seen = of_block(vit(class_token=False, global_pool="avg"), fit, 1)
    weight, bias = (t.detach().double().numpy() for t in (block.attn.qkv.weight, block.attn.qkv.bias))
    q, k, _ = np.split(seen["x"] @ weight.T + bias, 3, -1)
    kept = next(o for o in options if o.site == Site(0, 1, 2, "qk_rank") and o.replacement.kept == 6)
    new = {name.rpartition("qkv.")[2]: t.double().numpy() for name, t in kept.tensors.items()}
    total = best = ours = 0.0
    for h in range(2):
        own = slice(h * 12, (h + 1) * 12)
        qh, kh = q[..., own].reshape(-1, 12), k[..., own]
        kh = (kh - kh.mean(1, keepdims=True)).reshape(-1, 12)
        _, s, _ = np.linalg.svd(np.linalg.qr(qh)[1] @ np.linalg.qr(kh)[1].T)
        best += (s[6:] ** 2).sum()
        total += (s**2).sum()
        # The difference of the products, by the factors that were fitted.
        half = slice(h * 6, (h + 1) * 6)
        qn = seen["x"] @ new["query.weight"][half].T + new["query.bias"][half]
        kn = seen["x"] @ new["key.weight"][half].T
        kn = (kn - kn.mean(1, keepdims=True)).reshape(-1, 6)
        both = np.concatenate([qh, -qn.reshape(-1, 6)], 1), np.concatenate([kh, kn], 1)
        r = np.linalg.qr(both[0])[1] @ np.linalg.qr(both[1])[1].T
        ours += (r**2).sum()
    assert ours / total == pytest.approx(best / total, rel=1e-5)
    diagnostics = kept.replacement.diagnostics
    assert diagnostics is not None
    assert 1 - diagnostics.r2 == pytest.approx(best / total, rel=1e-5)


def test_values_of_lower_rank_are_solved_by_least_squares() -> None:
    model, data = vit(class_token=False, global_pool="avg"), list(images(40, 32).split(10))
    run, options = fitted(model, data, ("vo_rank",))
    fit = [batch.args[0] for batch in run.fitter.batches]
    seen = of_block(vit(class_token=False, global_pool="avg"), fit, 0)
    block = model.blocks[0]  # type: ignore[index]
    kept = next(o for o in options if o.site == Site(0, 0, 1, "vo_rank") and o.replacement.kept == 6)
    new = {name.rpartition("attn.")[2]: t.double().numpy() for name, t in kept.tensors.items()}
    qkv, bias = (t.detach().double().numpy() for t in (block.attn.qkv.weight, block.attn.qkv.bias))
    value, shift = np.split(qkv, 3)[2], np.split(bias, 3)[2]
    z = seen["z"].reshape(-1, 24)
    # Attention's rows sum to 1, so that a head's new values are its old ones, turned.
    turned = []
    for h in range(2):
        into = new["qkv.value.weight"][h * 6 : (h + 1) * 6] @ np.linalg.pinv(
            value[h * 12 : (h + 1) * 12]
        )
        own = shift[h * 12 : (h + 1) * 12]
        np.testing.assert_allclose(into @ own, new["qkv.value.bias"][h * 6 : (h + 1) * 6], atol=1e-5)
        turned.append(z[:, h * 12 : (h + 1) * 12] @ into.T)
    features = np.concatenate([*turned, np.ones((len(z), 1))], 1)
    wanted = z @ block.attn.proj.weight.detach().double().numpy().T
    wanted = wanted + block.attn.proj.bias.detach().double().numpy()
    best = np.linalg.lstsq(features, wanted, rcond=None)[0]
    ours = np.concatenate([new["proj.weight"].T, new["proj.bias"][None]])
    least = ((wanted - features @ best) ** 2).sum()
    assert ((wanted - features @ ours) ** 2).sum() == pytest.approx(least, rel=1e-4)


def test_more_channels_never_lose_more() -> None:
    _, options = fitted(vit(num_heads=4), list(images(40, 32).split(10)))
    for site in {o.site for o in options}:
        levels = [o.replacement for o in options if o.site == site]
        errors = [r.diagnostics.residual for r in sorted(levels, key=lambda r: r.kept) if r.diagnostics]
        assert len(errors) == len(levels)
        assert all(less <= more * (1 + 1e-6) for more, less in pairwise(errors))


@pytest.mark.slow
@pytest.mark.parametrize("delta", [False, True])
def test_narrower_attention_is_searched_saved_and_exported(delta: bool, tmp_path: Path) -> None:
    """Beside merges and hidden widths, in one plan."""
    model, data = vit(), list(images(40, 32).split(10))
    config = Config(units=(*UNITS, "hidden_width", "token_merge"), multiple=1, effort="quick")
    found = compress(model, data, budget=Budget(macs=0.55), config=config)
    assert {r.unit for r in found.plan.replacements}.intersection(UNITS)
    assert found.report.compressed == cost(found.model, found.profile.example)
    found.save(tmp_path / "narrow", delta=delta)
    again = load(tmp_path / "narrow", original=vit() if delta else None)
    x = data[0]
    with torch.no_grad():
        assert torch.equal(again(x), found.model(x))
    certificate = export_onnx(found.model, tmp_path / "narrow.onnx", x)
    assert all(parity.max_rel <= certificate.tolerance for parity in certificate.parity)


def test_attention_that_cannot_be_narrowed_is_refused_with_the_reason() -> None:
    x = images(2, 32)
    normed = str(supports(vit(qk_norm=True), x))
    reason = "the layer of its values makes its queries and keys, too, and norms or rotary embeddings"
    assert f"qk_rank of attention: {reason} lie between" in normed
    assert f"vo_rank of attention: {reason} lie between" in normed
    swin = seeded(
        timm.create_model,
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=24,
        depths=(2,),
        num_heads=(2,),
        num_classes=5,
    )
    assert "of attention: it has 0 calls of scaled_dot_product_attention, not one" in str(
        supports(swin, x)
    )
    one = vit(num_heads=1)
    assert "head_width of attention: all of its heads share their keys and values" in str(
        supports(one, x)
    )


def test_whole_heads_and_their_channels_are_not_taken_in_one_block() -> None:
    """Neither by a later stage, nor together in one."""
    run, options = fitted(vit(num_heads=4), list(images(40, 32).split(10)))
    for unit, others in (("head_width", {"qk_rank", "vo_rank"}), ("vo_rank", {"head_width"})):
        first = next(o for o in options if o.site.unit == unit and o.site.start == 1)
        plan = with_candidate(run.start.solution, first).plan
        left = {site.unit for site in sites(run, plan) if site.start == 1}
        assert not left & others
        assert left | others == {*UNITS}


def test_a_network_with_narrower_attention_is_healed(tmp_path: Path) -> None:
    """Also the parts of a divided layer that were not narrowed are trained, saved and read back."""
    model, data = vit(), list(images(40, 32).split(10))
    config = Config(units=("vo_rank",), multiple=1, effort="quick", keep_features=True)
    found = compress(model, data, budget=Budget(macs=0.93), config=config)
    assert any(r.inner for r in found.plan.replacements)
    healed = heal(found, data, original=model, healing=Healing(rate=1e-4, epochs=1, augment=()))
    healed.save(tmp_path / "healed", delta=True)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "healed", original=vit())(data[0]), healed.model(data[0]))
