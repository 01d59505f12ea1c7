"""A compressed DeiT-tiny does what one of timm does."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.delivered_speed import plans, spliced
from benchmarks.real_data import DEIT, data_root, deit_tiny, imagenet
from rba_compress import Plan, export_onnx, export_pt2, load, supports, verify
from rba_compress.artifacts.artifact import WEIGHTS, write_artifact
from rba_compress.core.batch import as_batch
from rba_compress.profiling.profiler import fingerprint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (data_root() / "deit_tiny_patch16_224.safetensors").is_file(),
        reason=f"no DeiT-tiny in RBA_DATA ({data_root()})",
    ),
]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return deit_tiny()


@pytest.fixture(scope="module")
def images(original: nn.Module) -> Tensor:
    return imagenet(original, "test", 16)[0][0]


@pytest.fixture(scope="module")
def plan(original: nn.Module, images: Tensor) -> Plan:
    """A block skipped, a span mapped, one without attention, one without MLP, and the exact read-out."""
    return plans(supports(original, images[:2]).chains[0])["all kinds"]


@pytest.fixture
def compressed(original: nn.Module, plan: Plan) -> nn.Module:
    return spliced(original, plan)


@pytest.fixture
def featured(original: nn.Module, plan: Plan) -> nn.Module:
    """The network of `compressed`, with every position computed."""
    kept = tuple(r for r in plan.replacements if not r.exact)
    return spliced(original, plan.model_copy(update={"replacements": kept}))


def test_the_class_and_its_methods(
    compressed: nn.Module, featured: nn.Module, original: Any, images: Tensor
) -> None:
    assert type(compressed) is type(original)
    assert compressed.get_classifier() is compressed.head
    with torch.no_grad():
        assert compressed.forward_features(images).shape == (16, 1, 192)  # what the head reads, no more
        assert torch.equal(
            compressed.forward_head(compressed.forward_features(images)), compressed(images)
        )
        assert featured.forward_features(images).shape == (16, 197, 192)
        middle, last = featured.get_intermediate_layers(images, n=[6, 11], reshape=True)
        assert middle.shape == last.shape == (16, 192, 14, 14)
        (patches,) = featured.forward_intermediates(
            images, indices=[11], norm=True, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(patches, featured.forward_features(images)[:, 1:])
    compressed.reset_classifier(10)
    assert compressed.num_classes == 10
    assert compressed(images).shape == (16, 10)
    mine, theirs = compressed.state_dict(), original.state_dict()
    kept = [name for name in theirs if name.startswith(("blocks.0.", "norm.", "patch_embed."))]
    assert all(torch.equal(mine[name], theirs[name]) for name in kept)


def test_hooks_of_the_original_fire(original: nn.Module, plan: Plan, images: Tensor) -> None:
    model, seen = copy.deepcopy(original), []
    model.blocks[0].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    model.norm.register_forward_pre_hook(lambda *_: seen.append("norm"))
    found = spliced(model, plan)
    found(images[:2])
    assert seen == ["mlp", "norm"]


def test_a_copy_is_a_network_of_its_own(compressed: nn.Module, images: Tensor) -> None:
    other = copy.deepcopy(compressed)
    with torch.no_grad():
        wanted = compressed(images)
        assert torch.equal(other(images), wanted)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(compressed(images), wanted)
        assert not torch.allclose(other(images), wanted)


def test_fine_tuning_moves_every_weight(compressed: nn.Module, images: Tensor) -> None:
    labels = torch.arange(16)
    optimizer = torch.optim.SGD(compressed.train().parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(compressed(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    used = {
        name
        for name, p in compressed.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    unread = {name for name, _ in compressed.named_parameters()} - used
    assert all(".map." in name and name.startswith("blocks.11.") for name in unread), unread
    compressed.set_grad_checkpointing(True)
    compressed(images).sum().backward()


def test_compiled_it_gives_the_same(compressed: nn.Module, images: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(compressed, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), compressed(images), atol=1e-4, rtol=1e-4)


def test_exported_it_takes_any_batch(compressed: nn.Module, images: Tensor, tmp_path: Path) -> None:
    program = torch.export.export(
        compressed, (images[:4],), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images[:7]), compressed(images[:7]))
    assert (
        max(p.max_rel for p in export_pt2(compressed, tmp_path / "compressed.pt2", images).parity)
        <= 1e-4
    )


def test_onnx_of_real_images(
    compressed: nn.Module, original: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    certificate = export_onnx(compressed, tmp_path / "compressed.onnx", images, original=original)
    assert certificate.original is not None
    assert certificate.latency is not None
    assert certificate.compressed.nodes < certificate.original.nodes
    assert certificate.compressed.bytes < certificate.original.bytes
    assert certificate.latency.ratio < 0.9
    assert all(parity.argmax_agreement == 1 for parity in certificate.parity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_it_is_bit_equal_in_a_fresh_process(
    dtype: torch.dtype, original: nn.Module, plan: Plan, images: Tensor, tmp_path: Path
) -> None:
    model = spliced(copy.deepcopy(original).to(dtype), plan)
    weights = {"original_weights": fingerprint(original), "example": as_batch(images)}
    write_artifact(model, plan, tmp_path / "compressed", architecture=DEIT, **weights)
    write_artifact(model, plan, tmp_path / "delta", delta=True, **weights)
    x = images[:4].to(dtype)
    torch.save(x, tmp_path / "x.pt")
    code = """
import sys, torch
from rba_compress import load
folder = sys.argv[1]
with torch.no_grad():
    torch.save(load(folder + "/compressed")(torch.load(folder + "/x.pt")), folder + "/y.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))
        if dtype is torch.float32:
            assert torch.equal(load(tmp_path / "delta", original=original)(x), model(x))
    sizes = {name: (tmp_path / name / WEIGHTS).stat().st_size for name in ("compressed", "delta")}
    assert sizes["delta"] < 0.06 * sizes["compressed"]
    verify(tmp_path / "compressed")


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    original = deit_tiny()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(2, 3, 224, 224, generator=generator)
    compressed = spliced(original, plans(supports(original, x).chains[0])["blocks thinned"])
    for name, parameter in compressed.named_parameters():
        parameter.requires_grad_(not (name.startswith("blocks.11.map")))  # it is not used
    wrapped = DistributedDataParallel(compressed)
    wrapped(x).square().mean().backward()
    gradients = {n: p.grad for n, p in compressed.named_parameters() if p.grad is not None}
    torch.save((x, gradients), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def test_in_two_processes_gradients_are_shared(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    (x, first), (y, second) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    original = deit_tiny()
    compressed = spliced(original, plans(supports(original, x).chains[0])["blocks thinned"])
    compressed(torch.cat([x, y])).square().mean().backward()
    assert len(first) > 100
    for name, parameter in compressed.named_parameters():
        if name in first:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], parameter.grad, atol=1e-4, rtol=1e-3)
