"""Breadth: one network of each family from end to end; one a mechanism by default, one a kind of stream
with -m slow, all with -m catalogue.
"""

from __future__ import annotations

import json

import pytest
import timm
import torch

from benchmarks.coverage import RESULTS, read, table, totals
from rba_compress import ModelError
from rba_compress.cli.catalogue import TIMM, names, network
from rba_compress.cli.coverage import tried
from tests.releases import LACKING

# network, chains, blocks
QUICK = [
    ("cait_xxs24_224", 2, 26),
    ("coatnet_pico_rw_224", 4, 8),
    ("convit_tiny", 2, 12),
    ("convnextv2_atto", 4, 12),
    ("densenet121", 0, 0),
    ("efficientvit_b0", 4, 6),
    ("fastvit_t8", 5, 11),
    ("ghostnet_050", 5, 10),
    ("mixer_s16_224", 1, 8),
    ("mobilevitv2_050", 4, 10),
    ("mvitv2_tiny", 3, 6),
    ("pvt_v2_b0", 4, 8),
    ("regnetx_002", 2, 9),
    ("resnetv2_18", 4, 5),
    ("skresnet18", 4, 5),
    ("swinv2_cr_tiny_224", 4, 12),
    ("tnt_s_legacy_patch16_224", 0, 0),
    ("transformers/albert", 0, 0),
    ("transformers/bart", 2, 6),
    ("transformers/distilbert", 1, 4),
    ("transformers/gpt2", 1, 4),
    ("transformers/mamba", 1, 4),
    ("transformers/swin", 4, 9),
    ("torchvision/mobilenet_v2", 5, 10),
    ("nn/transformer", 2, 4),
]
FAST = (
    "densenet121",
    "tnt_s_legacy_patch16_224",
    "transformers/albert",
    "transformers/bart",
    "transformers/gpt2",
    "transformers/mamba",
    "convnextv2_atto",
)
"""One network a mechanism, in the default run."""
SLOW = (
    "cait_xxs24_224",
    "fastvit_t8",
    "mixer_s16_224",
    "mvitv2_tiny",
    "regnetx_002",
    "transformers/distilbert",
    "transformers/swin",
    "nn/transformer",
)
"""One a kind of stream, and those that are exported, with -m slow."""
EXPORTED = ("mixer_s16_224", "regnetx_002", "transformers/distilbert", "transformers/swin")


def marked(name: str) -> tuple[str, ...]:
    if name in FAST:
        return ()
    return ("slow", "catalogue") if name in SLOW else ("catalogue",)


@pytest.mark.filterwarnings("ignore")  # of libraries that meet sizes they were not made for
@pytest.mark.parametrize(
    ("name", "chains", "blocks"),
    [
        pytest.param(*row, id=row[0], marks=[getattr(pytest.mark, mark) for mark in marked(row[0])])
        for row in QUICK
    ],
)
def test_a_network_from_end_to_end(name: str, chains: int, blocks: int) -> None:
    if "/" not in name and not timm.is_model(name):
        pytest.skip("newer than the timm that is here")
    lacking, reason = LACKING.get(name, (False, ""))
    if lacking:
        pytest.skip(reason)
    _, row = tried(network(name), onnx=name in EXPORTED)
    assert (row.chains, row.blocks) == (chains, blocks)
    assert row.right
    if not chains:
        assert "can be replaced: it has no blocks in a row that each add" in row.refusal
        return
    assert row.reloaded
    assert not row.onnx_error
    if name in EXPORTED:
        assert row.onnx is not None
        assert row.onnx < 1e-4


def others() -> list[object]:
    rest = [name for name in names() if name not in {row[0] for row in QUICK}]
    both, alone = [pytest.mark.slow, pytest.mark.catalogue], pytest.mark.catalogue
    return [pytest.param(n, marks=alone if k % 30 else both) for k, n in enumerate(rest)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", others())
def test_every_other_network(name: str) -> None:
    known = read(RESULTS / "coverage.jsonl")[name]
    support, row = tried(network(name), onnx=False)
    assert (row.chains, row.blocks) == (known.chains, known.blocks), support
    assert row.right
    assert bool(row.refusal) == (not row.chains)


def test_the_committed_table_is_of_all_networks_and_without_a_wrong_one() -> None:
    rows = list(read(RESULTS / "coverage.jsonl").values())
    assert {row.network for row in rows} == set(names())
    assert len(TIMM) >= 120
    assert len(names()) - len(TIMM) >= 30
    summed = totals(rows)
    assert summed["wrong"] == 0
    assert summed["reloaded_bit_equal"] == summed["with_chains"]
    assert summed["onnx_worst"] < 1e-4
    # What ONNX refuses of a compressed network, it refuses of the original.
    assert summed["onnx_refused"] == summed["onnx_refused_dense_too"]
    assert table(rows) == (RESULTS / "coverage.md").read_text()
    assert json.dumps(summed)


def test_weights_and_inputs_are_the_same_each_time_and_none_is_left_at_zero() -> None:
    state = torch.get_rng_state()
    one, two = (network("resnet18").build() for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0
    assert torch.equal(network("nn/mlp").example(one), network("nn/mlp").example(one))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_name_that_is_none_names_others() -> None:
    with pytest.raises(ModelError, match="no network 'resnet1': did you mean .*resnet18"):
        network("resnet1")
    with pytest.raises(ModelError, match=r"(?s)no network 'transformers/burt': .*nn/encoder"):
        network("transformers/burt")
