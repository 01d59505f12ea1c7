from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rba_compress import (
    ArtifactError,
    Budget,
    Config,
    LoaderError,
    ModelError,
    PlanError,
    Profile,
    profile,
    search,
)
from rba_compress.core.loader import Split
from rba_compress.core.plan import Block, Chain
from rba_compress.linalg.moments import Moments, moment_bytes
from rba_compress.profiling import profiler as of_calibration
from rba_compress.profiling.chain_statistics import DENSE, ChainProfile, started, states_of
from tests.networks import LIGHT, loader, rows, seeded
from tests.networks import Chain as Network


class Rectified(Network):
    """A ReLU behind the blocks, which may overwrite their last stream."""

    overwrites = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.relu_() if self.overwrites else x.relu())


def assert_equal(a: Profile, b: Profile) -> None:
    ours, theirs = states_of(a.chains), states_of(b.chains)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert (a.samples, a.order, a.lengths, a.config) == (b.samples, b.order, b.lengths, b.config)


def test_a_profile_is_saved_and_searched_as_it_was(tmp_path: Path) -> None:
    model, data = seeded(Network), loader()
    seen = profile(model, data, config=LIGHT)
    seen.save(tmp_path / "seen.safetensors")
    again = Profile.load(tmp_path / "seen.safetensors")
    assert_equal(again, seen)
    assert repr(again) == repr(seen)
    assert torch.equal(again.example.args[0], seen.example.args[0])
    plans = [search(model, p, data, budget=Budget(macs=0.7)).plan for p in (seen, again)]
    assert plans[0] == plans[1]
    assert again.split(data).first().digest() == seen.order[0]


def test_a_stream_is_read_before_it_is_overwritten() -> None:
    found = []
    for overwrites in (False, True):
        model = seeded(Rectified)
        model.overwrites = overwrites
        found.append(profile(model, loader(), config=LIGHT))
    assert_equal(*found)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seen.safetensors"
    with pytest.raises(ArtifactError, match="not a savedprofile"):
        Profile.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="not a savedprofile"):
        Profile.load(path)
    profile(seeded(Network), loader()).save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not what was saved"):
        Profile.load(path)
    given = profile(seeded(Network), loader(), divergence=lambda a, b, batch: (a - b).abs().mean(-1))
    with pytest.raises(ArtifactError, match="divergence is a function"):
        given.save(path)
    with pytest.raises(ArtifactError, match="cannot write"):
        profile(seeded(Network), loader()).save("/proc/seen.safetensors")
    assert path.read_bytes() == content  # what was there is there still


def test_two_profiles_are_one_of_both_loaders() -> None:
    model = seeded(Network)
    first, second = loader(40), list(rows(33, seed=1).split(7))
    both = profile(model, first) + profile(model, second)
    fit = [batch for data in (first, second) for batch in Split(data, 0).part("fit")]
    whole = torch.cat([batch.args[0] for batch in fit])
    with torch.no_grad():
        streams = [model.stem(whole)]
        for block in model.blocks:
            streams.append(block(streams[-1]))
    x, y = streams[1].double(), streams[3].double()
    expected = (x - x.mean(0)).T @ (y - y.mean(0))
    torch.testing.assert_close(both.chains[0].moments.comoments(1, 3), expected, rtol=1e-5, atol=1e-4)
    # What was fitted on is what is dealt to fit of the two loaders, one behind the other.
    dealt = torch.cat([batch.args[0] for batch in both.split(first + second).part("fit")])
    assert torch.equal(dealt, whole)
    found = search(model, both, first + second, budget=Budget(macs=0.7))
    assert found.plan.replacements
    with pytest.raises(PlanError, match="differ in their config"):
        both + profile(model, first, config=Config(seed=1))
    with pytest.raises(PlanError, match="differ in their weights"):
        both + profile(Network().eval(), first)


class Stopped:
    """Loader that kills its process at a given batch."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    def __iter__(self) -> Iterator[Tensor]:
        for index, batch in enumerate(rows(400).split(10)):
            if index == self.stop:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


@pytest.mark.slow
def test_a_profile_that_was_killed_goes_on_and_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "seen.checkpoint"
    code = (
        "from tests.profiling import test_profiler as t; t.of_calibration.EVERY = 0.0; "
        f"t.profile(t.seeded(t.Network), t.Stopped(23), checkpoint={str(path)!r})"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == [path]
    assert any("held" in name for name in load_file(path))  # rows that were not folded in yet
    run: list[int] = []
    update = ChainProfile.update
    monkeypatch.setattr(
        ChainProfile, "update", lambda *args, **kw: (run.append(1), update(*args, **kw))[1]
    )
    resumed = profile(seeded(Network), Stopped(None), checkpoint=path)
    assert len(run) == 40 - 23
    assert not path.exists()
    assert_equal(resumed, profile(seeded(Network), Stopped(None)))


def test_a_checkpoint_of_another_profile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_calibration, "EVERY", 0.0)
    path = tmp_path / "seen.checkpoint"

    def broken() -> Iterator[Any]:
        yield from loader()[:3]
        raise OSError("the disk is gone")

    class Broken:
        def __iter__(self) -> Iterator[Any]:
            return broken()

    with pytest.raises(LoaderError, match="batch 3 .*the disk is gone"):
        profile(seeded(Network), Broken(), checkpoint=path)
    content = path.read_bytes()
    with pytest.raises(ArtifactError, match="checkpoint of another profile"):
        profile(seeded(Network), loader(), config=Config(seed=1), checkpoint=path)
    assert path.read_bytes() == content
    assert profile(seeded(Network), loader(), checkpoint=path).samples == 20


def test_a_window_is_as_wide_as_memory_allows() -> None:
    model, data = seeded(Network, depth=6), loader()
    size = {w: moment_bytes(7, 8, w) for w in (1, 2, 6)}
    asked = Config(memory=size[6])
    assert profile(model, data, config=asked).chains[0].moments.window == 6
    narrow = profile(model, data, config=Config(memory=size[6] - 1))
    assert narrow.window == narrow.chains[0].moments.window == 5
    assert "those of spans of up to 5 blocks were taken" in narrow.warnings[0]
    with pytest.raises(ModelError, match="raise `memory`"):
        profile(model, data, config=Config(memory=size[1] - 1))
    kept = Moments(7, 8, window=2)
    assert 8 * sum(c.numel() for c in kept.comoment) < size[2]


def chain_of_tokens(positions: int, width: int) -> Chain:
    blocks = tuple(Block(path=f"blocks.{b}", type="Block") for b in range(2))
    return Chain(
        name="blocks",
        blocks=blocks,
        width=width,
        ndim=3,
        axis=2,
        positions=positions,
        macs=(1, 1),
        params=(1, 1),
        class_tokens=(0,),
        reads=1,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_left_out_positions_are_counted_by_those_that_are_taken(masked: bool) -> None:
    (profiled,) = started([chain_of_tokens(13, 4)], None, "cpu")
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(5, 13, 4, generator=generator) for _ in range(3)]
    mask = torch.arange(13)[None] < torch.tensor([13, 9, 4, 2, 13])[:, None] if masked else None
    first = DENSE * 4  # so many rows a channel were seen
    profiled.update(streams, mask, first=first, stride=4)
    taken = [0, *range(1 + first % 4, 13, 4)]
    weight = torch.tensor([1.0] + [12 / (len(taken) - 1)] * (len(taken) - 1)).expand(5, -1)
    kept = torch.ones(5, len(taken), dtype=torch.bool) if mask is None else mask[:, taken]
    w = weight[kept].double()
    x, y = (h[:, taken][kept].double() for h in (streams[0], streams[2]))
    if not masked:
        assert profiled.moments.n == pytest.approx(5 * 13)
    assert profiled.moments.n == pytest.approx(float(w.sum()))
    mean_x, mean_y = ((h * w[:, None]).sum(0) / w.sum() for h in (x, y))
    expected = ((x - mean_x) * w[:, None]).T @ (y - mean_y)
    torch.testing.assert_close(profiled.moments.comoments(0, 2), expected, rtol=1e-6, atol=1e-6)
    cosine = (torch.cosine_similarity(x, y) * w).sum() / w.sum()
    assert profiled.similarity("cosine")[0, 2] == pytest.approx(float(cosine), abs=1e-6)


def test_the_first_rows_are_all_taken_and_later_ones_move_on(digits: nn.Module) -> None:
    (profiled,) = started([chain_of_tokens(13, 4)], None, "cpu")
    streams = [torch.randn(5, 13, 4) for _ in range(3)]
    profiled.update(streams, None, first=0, stride=4)
    assert profiled.moments.n == 65
    positions = [set(profiled._taken(13, first, 4)[0].tolist()) for first in range(4)]
    assert set.union(*positions) == set(range(13))
    assert set.intersection(*positions) == {0}
