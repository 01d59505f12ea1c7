"""Networks that accelerate has dispatched: the same plan, tensors and outputs as in memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from rba_compress import (
    Architecture,
    Budget,
    Config,
    ModelError,
    Plan,
    Result,
    compress,
    export_onnx,
    load,
    profile,
    search,
    splice,
    supports,
)
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS, digits_model
from rba_compress.core import offload
from rba_compress.core.offload import Offloaded, dispatched, in_memory, undispatched
from rba_compress.core.plan import LayerRefit, NormRefit
from rba_compress.profiling.profiler import fingerprint
from tests.networks import BRIEF_SEARCH, Chain, Normed, images, loader, rows, seeded
from tests.releases import INFERS_ALIKE
from tests.test_language import ids, llama, texts

Dispatch = Callable[[nn.Module, Path], nn.Module]


def digits_on_disk(folder: Path) -> nn.Module:
    """The digits ViT, every second block and the last three on disk."""
    model: Any = digits_model()
    places = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    places |= {f"blocks.{b}": "disk" if b % 2 or b > 8 else "cpu" for b in range(len(model.blocks))}
    with pytest.warns(UserWarning, match="device_map keys do not match"):  # parameters have keys, too
        places |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
        accelerate.dispatch_model(model, places, offload_dir=folder)
    return model


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder, offload_buffers=True)


def in_ram(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.cpu_offload(model, torch.device("cpu"))


def half_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    """A `Chain`: its ends and every second block in memory."""
    places = {"stem": "cpu", "head": "cpu", **{f"blocks.{b}": ("cpu", "disk")[b % 2] for b in range(4)}}
    return accelerate.dispatch_model(model, places, offload_dir=folder)


def whole_blocks(model: nn.Module, folder: Path) -> nn.Module:
    """Offload to disk with one hook a block, which loads all of the block's submodules."""
    return accelerate.disk_offload(model, folder, preload_module_classes=["Block"])


def all_at_once(model: nn.Module, folder: Path) -> nn.Module:
    return accelerate.disk_offload(model, folder, preload_module_classes=["Chain"])


EVERY_WAY = [on_disk, in_ram, half_on_disk, whole_blocks, all_at_once]


def places(model: nn.Module) -> dict[str, str]:
    """Return the type and device of each tensor while the model does not run."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: f"{type(tensor).__name__} {tensor.device}" for name, tensor in named}


def assert_same(found: Result, wanted: Result) -> None:
    assert found.plan == wanted.plan
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[key], wanted.tensors[key]) for key in wanted.tensors)
    assert found.profile.weights == wanted.profile.weights
    assert (found.report.original, found.report.compressed) == (
        wanted.report.original,
        wanted.report.compressed,
    )
    assert found.report.fidelity == wanted.report.fidelity


@pytest.mark.slow
def test_a_network_half_on_disk_gets_the_plan_of_the_one_in_memory(
    digits: nn.Module, digits_loader: list[Any], held_out: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    batches, x = [tuple(part[:20] for part in batch) for batch in digits_loader], held_out[0]
    model = digits_on_disk(tmp_path / "weights")
    before = places(model)
    assert {"Parameter cpu", "Parameter meta"} == set(before.values())
    assert fingerprint(model) == fingerprint(digits)

    wanted = compress(digits, batches, budget=Budget(macs=0.85), config=BRIEF_SEARCH)
    found = compress(model, batches, budget=Budget(macs=0.85), config=BRIEF_SEARCH)
    assert_same(found, wanted)
    assert {r.unit for r in wanted.plan.replacements} - {"span"}, "some blocks are thinned"
    assert wanted.plan.refits
    assert torch.equal(found.model(x), wanted.model(x))

    # The compressed one is dispatched as well, with what was fitted in memory.
    compressed = places(found.model)
    assert dispatched(found.model)
    assert all(compressed[key] == "Parameter cpu" for key in found.tensors)
    assert any(place == "Parameter meta" for place in compressed.values())
    again = copy.deepcopy(found.model)
    assert torch.equal(again(x), wanted.model(x))

    # The user's is as it was.
    assert places(model) == before
    assert torch.equal(model(x), digits(x))

    found.save(
        tmp_path / "compressed", architecture=Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS))
    )
    for loaded in (load(tmp_path / "compressed"), load(tmp_path / "compressed", original=model)):
        assert set(places(loaded).values()) == {"Parameter cpu"}
        assert torch.equal(loaded(x), wanted.model(x))
    assert places(model) == before


@pytest.fixture(scope="module")
def in_memory_result() -> Result:
    """The small network compressed in memory; tests leave the result unchanged."""
    return compress(seeded(Chain), loader(), budget=Budget(macs=0.6))


@pytest.fixture(scope="module")
def every_map() -> Result:
    """The small network compressed in memory with maps of other kinds."""
    config = Config(maps=("folded", "low_rank", "affine"), shrinks=(0.6,))
    return compress(seeded(Chain), loader(), budget=Budget(macs=0.6), config=config)


@pytest.mark.parametrize(
    "dispatch",
    [pytest.param(way, marks=pytest.mark.slow if k > 1 else ()) for k, way in enumerate(EVERY_WAY)],
)
def test_each_way_to_dispatch(dispatch: Dispatch, tmp_path: Path, in_memory_result: Result) -> None:
    plain, model = seeded(Chain), dispatch(seeded(Chain), tmp_path / "weights")
    before = places(model)
    assert fingerprint(model) == fingerprint(plain)
    assert str(supports(model, rows(8))) == str(supports(plain, rows(8)))
    x, wanted = rows(5), in_memory_result
    found = compress(model, loader(), budget=Budget(macs=0.6))
    assert_same(found, wanted)
    assert wanted.tensors
    assert torch.equal(found.model(x), wanted.model(x))
    assert places(model) == before
    assert torch.equal(model(x), plain(x))
    for a, b in zip(found.front, wanted.front, strict=True):
        assert torch.equal(a.splice(model)(x), b.splice(plain)(x))
    found.save(tmp_path / "compressed")
    found.save(tmp_path / "delta", delta=True)
    for loaded in (
        load(tmp_path / "compressed", original=model),
        load(tmp_path / "compressed", original=model),
        load(tmp_path / "delta", original=model),
        load(tmp_path / "delta", original=plain),
    ):
        assert not dispatched(loaded)
        assert torch.equal(loaded(x), wanted.model(x))
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.zero_()  # it shares nothing with the user's model
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("dispatch", EVERY_WAY)
def test_every_map_and_refit_is_put_in_memory_where_its_block_ran(
    dispatch: Dispatch, tmp_path: Path, every_map: Result
) -> None:
    plain, model, wanted = seeded(Chain), dispatch(seeded(Chain), tmp_path), every_map
    refit = LayerRefit(path="head", step=1.0)
    tensors = {**wanted.tensors, "head.weight": torch.ones(3, 8), "head.bias": torch.zeros(3)}
    plan = wanted.plan.model_copy(update={"refits": (*wanted.plan.refits, refit)})
    compressed = splice(model, plan, tensors)
    assert torch.equal(compressed(rows(5)), splice(plain, plan, tensors)(rows(5)))
    assert all(places(compressed)[key] == "Parameter cpu" for key in tensors)
    splice(model, plan, tensors, inplace=True)
    assert torch.equal(model(rows(5)), compressed(rows(5)))


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["Block", "Attention"])
def test_thinned_blocks_of_modules_that_are_loaded_as_a_whole(whole: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    plain, model = (seeded(timm.create_model, "vit_tiny_patch16_224", **sizes) for _ in range(2))
    accelerate.disk_offload(model, tmp_path, preload_module_classes=[whole])
    data = list(images(30).split(10))
    wanted, found = (
        compress(m, data, budget=Budget(macs=0.7), config=BRIEF_SEARCH) for m in (plain, model)
    )
    assert_same(found, wanted)
    assert {r.unit for r in wanted.plan.replacements} - {"span"}
    assert any(place.startswith("Offloaded") for place in places(found.model).values())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            one, other = found.model(data[0]), wanted.model(data[0])
            torch.testing.assert_close(one, other, rtol=0, atol=0 if INFERS_ALIKE else 1e-6)


@pytest.mark.slow
def test_offloaded_buffers(tmp_path: Path) -> None:
    plain, model = (seeded(Chain, block=Normed) for _ in range(2))
    for network in (plain, model):
        network.train()
        for batch in loader():
            network(batch)
        network.eval()
    on_disk(model, tmp_path)
    assert "Tensor meta" in places(model).values()
    assert fingerprint(model) == fingerprint(plain)
    config = Config(refit_steps=(1.0,), shrinks=(0.6,), refit_dampings=(1.0,))
    wanted, found = (
        compress(m, loader(), budget=Budget(macs=0.7), config=config) for m in (plain, model)
    )
    assert_same(found, wanted)
    plan = Plan(refits=(NormRefit(path="blocks.2.norm", step=1.0),))
    tensors = {f"blocks.2.norm.running_{name}": torch.rand(8) + 1 for name in ("mean", "var")}
    wanted_model, compressed = (splice(m, plan, tensors) for m in (plain, model))
    assert torch.equal(compressed(rows(5)), wanted_model(rows(5)))
    assert torch.equal(model(rows(5)), plain(rows(5)))


@pytest.mark.slow
def test_a_language_model_on_disk(tmp_path: Path) -> None:
    plain, model = llama(), accelerate.disk_offload(llama(), tmp_path)
    wanted, found = (compress(m, texts(), budget=Budget(macs=0.7)) for m in (plain, model))
    assert_same(found, wanted)
    prompt = ids()
    how: Any = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    how["attention_mask"] = torch.ones_like(prompt)
    first, second = (r.model.generate(prompt, **how) for r in (found, wanted))  # type: ignore[operator]
    assert torch.equal(first, second)
    # What is compressed already is compressed again.
    config = Config(refit=False)
    first, second = (
        compress(r.model, texts(), budget=Budget(macs=0.8), config=config) for r in (found, wanted)
    )
    assert_same(first, second)


def test_tied_weights_on_disk_are_counted_once(tmp_path: Path) -> None:
    plain, model = (llama(tie_word_embeddings=True) for _ in range(2))
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers", "lm_head")
    accelerate.dispatch_model(model, dict.fromkeys(names, "disk"), offload_dir=tmp_path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight, "accelerate unties them"
    assert profile(model, texts()).original == profile(plain, texts()).original
    view: Any = undispatched(model)
    assert view.lm_head.weight is view.model.embed_tokens.weight


def test_weights_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate.disk_offload(seeded(Chain, depth=6, width=16), tmp_path)
    fetch, seen, peak = offload._fetch, [], 0

    def alive() -> int:
        seen[:] = [(size, storage) for size, storage in seen if not storage.expired()]
        return sum(size for size, _ in seen)

    def counted(*given: Any) -> Tensor:
        nonlocal peak
        tensor = fetch(*given)
        seen.append((tensor.numel(), StorageWeakRef(tensor.untyped_storage())))
        peak = max(peak, alive())
        return tensor

    monkeypatch.setattr(offload, "_fetch", counted)
    config = Config(shrinks=(0.6,), refit_dampings=(1.0,), refit_steps=(1.0,))
    found = search(model, profile(model, loader(), config=config), loader(), budget=Budget(macs=0.7))
    assert found.plan.replacements
    largest, biases = max(p.numel() for p in model.parameters()), 2 * 16
    assert 0 < peak <= largest + biases
    gc.collect()
    assert alive() == 0


def test_an_offloaded_tensor_is_like_the_one_that_it_stands_for(tmp_path: Path) -> None:
    plain = seeded(Chain)
    model = undispatched(on_disk(seeded(Chain), tmp_path))
    weight, same = model.stem.weight, plain.stem.weight
    assert isinstance(weight, Offloaded)
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == (same.shape, same.dtype, same.device)
    assert weight.requires_grad == same.requires_grad
    assert repr(weight) == "Offloaded((8, 4), torch.float32, for cpu)"
    views = (
        lambda t: t.detach(),
        lambda t: t.t(),
        lambda t: t[2:5, 1],
        lambda t: t.reshape(-1).view(4, 8),
    )
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            for view in views:
                assert isinstance(view(weight), Offloaded)
                assert view(weight).stride() == view(same).stride()
                assert torch.equal(view(weight), view(same))
            assert all(torch.equal(a, b) for a, b in zip(weight.split(3), same.split(3), strict=True))
            assert type(weight + 1) is Tensor
            assert torch.equal(model(rows(5)), plain(rows(5)))
    assert isinstance(copy.deepcopy(weight), Offloaded)
    whole = in_memory(model)
    assert set(places(whole).values()) == {"Parameter cpu"}
    assert torch.equal(whole(rows(5)), plain(rows(5)))


def test_a_network_that_is_not_dispatched_is_taken_as_it_is() -> None:
    model = seeded(Chain)
    assert undispatched(model) is model
    assert undispatched(model, "blocks.1") is model.blocks[1]
    assert in_memory(model) is model


def test_a_copy_has_no_methods_of_the_original(tmp_path: Path) -> None:
    plain, model = seeded(Chain), half_on_disk(seeded(Chain), tmp_path)
    assert "to" in vars(model)
    compressed = splice(model, Plan(), {})
    assert "to" not in vars(compressed)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert dispatched(compressed)
    assert torch.equal(compressed(rows(5)), plain(rows(5)))


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    model = half_on_disk(seeded(Chain), tmp_path)
    model.head.to("meta")
    with pytest.raises(ModelError, match=r"the tensor head.weight of the Chain is on the meta device"):
        profile(model, loader())
    graph = in_ram(fx.symbolic_trace(seeded(Chain)), tmp_path)
    for call in (
        lambda: compress(graph, loader()),
        lambda: supports(graph, rows(5)),
        lambda: splice(graph, Plan(), {}),
    ):
        with pytest.raises(ModelError, match="accelerate has dispatched a GraphModule: pass the plain"):
            call()
    hooks = accelerate.hooks
    model = half_on_disk(seeded(Chain), tmp_path)
    hooks.add_hook_to_module(model.head, hooks.ModelHook(), append=True)
    with pytest.raises(ModelError, match=r"other hooks, too \(AlignDevicesHook, ModelHook\): remove"):
        supports(model, rows(5))


@pytest.mark.slow
def test_a_slim_network_is_exported_from_disk(tmp_path: Path) -> None:
    model = on_disk(seeded(Chain), tmp_path / "weights")
    found = compress(model, loader(), budget=Budget(macs=0.8), config=Config())
    export_onnx(found.model, tmp_path / "compressed.onnx", rows(4))
    assert (tmp_path / "compressed.onnx").exists()
