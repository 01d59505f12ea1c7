"""Runs that end early or starve: nothing is lost, what goes on is bit-equal, what stops says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rba_compress import ArtifactError, Budget, Config, compress, profile
from rba_compress.core import memory as of_memory
from rba_compress.core.errors import MemoryLimitError
from rba_compress.linalg import moments as of_moments
from rba_compress.planning import candidates as fitter
from rba_compress.profiling import profiler as of_calibration
from tests.artifacts.test_delivery import script
from tests.networks import LIGHT, Chain, loader, rows, seeded

# --- killed

KILLS = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
from rba_compress import Budget, Profile, compress, heal, load, profile, save
from rba_compress.profiling import profiler as calibration
from rba_compress.healing import loop as healing
from rba_compress.planning import progress as searching
from safetensors.torch import load_file, save_file
from tests.networks import BRIEF, Chain, LIGHT, loader, rows, seeded, to_heal

folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
# A checkpoint after every batch, every epoch, every option.
calibration.EVERY = healing.EVERY = searching.EVERY = 0.0
model, data = seeded(Chain), loader(200, 5)
original, samples, compressed = to_heal()

def forked(job):
    pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def seconds(job):
    start = time.perf_counter()
    assert os.waitpid(forked(job), 0)[1] == 0
    return time.perf_counter() - start

def killed(job, whole):
    # SIGKILL at a random moment; whether it came before the end.
    pid = forked(job)
    time.sleep(chance.uniform(0, whole))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)

def to_compress(target):
    def job():
        again = dict(config=LIGHT, checkpoint=folder / "compress.checkpoint")
        save(compress(model, data, budget=Budget(macs=0.8), **again), target)
    return job

def to_save(target):
    return lambda: save(found, target, hub=True)

def to_profile(target):
    return lambda: profile(model, data, checkpoint=folder / "seen.checkpoint").save(target)

def to_train(target):
    def job():
        healed = heal(compressed, samples, original=original, healing=BRIEF, checkpoint=folder / "heal.checkpoint")
        save_file(healed.state_dict(), target)
    return job

found = compress(model, data, budget=Budget(macs=0.8), config=LIGHT)
save(found, folder / "before")
before = {p.name: p.read_bytes() for p in (folder / "before").iterdir()}

def directory(target):
    if target.exists() and any(target.iterdir()):
        assert torch.equal(load(target, original=model)(rows(3)), found.model(rows(3)))

def state(target):
    if target.exists():
        load_file(target)

count = dict.fromkeys(("compress", "save", "profile", "heal"), 0)
jobs = {"compress": (to_compress, directory), "save": (to_save, directory),
        "profile": (to_profile, state), "heal": (to_train, state)}
whole = {}
for name, (make, check) in jobs.items():
    target = folder / f"{name}.whole"
    whole[name] = seconds(make(target))
    attempt = 0
    while count[name] < kills // 4:
        attempt += 1
        assert attempt < 4 * kills, (name, count)
        target = folder / f"{name}.{attempt}"
        count[name] += killed(make(target), whole[name])
        check(target)
        assert {p.name: p.read_bytes() for p in (folder / "before").iterdir()} == before
    # What goes on from the last one that was killed ends as if it had never stopped.
    target = folder / f"{name}.last"
    seconds(make(target))
    if name == "profile":
        a, b = (load_file(folder / f"profile.{end}") for end in ("whole", "last"))
    elif name == "heal":
        a, b = (load_file(folder / f"heal.{end}") for end in ("whole", "last"))
    else:
        a, b = (load(folder / f"{name}.{end}", original=model).state_dict() for end in ("whole", "last"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a), name
    assert not (folder / f"{name}.checkpoint").exists()
print(sum(count.values()), {name: round(s, 2) for name, s in whole.items()})
"""


@pytest.mark.catalogue
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    printed = script(KILLS, tmp_path, 100)
    assert printed.startswith("100 "), printed
    # What a killed process leaves behind is hidden, and in nobody's way.
    left = [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")]
    assert all(name.startswith(".") for name in left)


@pytest.mark.slow
def test_a_few_kills_lose_nothing(tmp_path: Path) -> None:
    assert script(KILLS, tmp_path, 4).startswith("4 ")


# --- no room


class Wide(Chain):
    def __init__(self) -> None:
        super().__init__(depth=12, width=1024)


STARVED = """
import resource, sys
from rba_compress import Config, RBAError, profile
from tests.networks import loader, seeded
from tests.test_faults import Wide
model, data = seeded(Wide), loader()
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
memory = int(sys.argv[1]) or None
try:
    profile(model, data, config=Config(memory=memory))
except RBAError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_memory_that_runs_out_is_named_with_what_was_wanted() -> None:
    wanted = f"{of_moments.moment_bytes(13, 1024):,}"
    printed = script(STARVED, 10**12)  # more than there is, as if nothing else used it
    assert printed.startswith("MemoryLimitError memory ran out: the moments take ")
    assert wanted in printed
    assert "Pass smaller batches, or Config(window=...)" in printed


@pytest.mark.slow
def test_a_limit_of_the_process_is_seen_before() -> None:
    printed = script(
        "import resource, torch\n"
        "from rba_compress.core.memory import device_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (5 << 30, resource.RLIM_INFINITY))\n"
        "print(device_bytes(torch.device('cpu')))"
    )
    assert int(printed) <= 5 << 30


def test_a_limit_of_the_container_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = tuple(tmp_path / name for name in ("memory.max", "limit_in_bytes", "none"))
    monkeypatch.setattr(of_memory, "_CONTAINER_LIMITS", limits)
    limits[0].write_text("max\n")
    whole = of_memory.device_bytes(torch.device("cpu"))
    limits[1].write_text("123456789\n")
    assert of_memory.device_bytes(torch.device("cpu")) == 123456789 < whole


def starve(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """Let fits of more than `most` sources at once run out of memory; return how many were asked."""
    asked: list[int] = []
    plain = fitter.span_rows

    def span_rows(*args: Any, spans: Any, **kwargs: Any) -> Any:
        asked.append(len({start for start, _ in spans}))
        if asked[-1] > most:
            raise error
        return plain(*args, spans=spans, **kwargs)

    monkeypatch.setattr(fitter, "span_rows", span_rows)
    return asked


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_a_fit_that_runs_out_of_memory_takes_smaller_parts(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(maps=("shrunk",), shrinks=(0.6,), refit=False)
    wanted = compress(seeded(Chain), loader(), budget=Budget(macs=0.7), config=config)
    asked = starve(monkeypatch, 1, error)
    found = compress(seeded(Chain), loader(), budget=Budget(macs=0.7), config=config)
    assert max(asked) > 1
    assert found.plan.replacements == wanted.plan.replacements
    assert found.plan.candidates == wanted.plan.candidates
    assert all(torch.equal(t, found.tensors[name]) for name, t in wanted.tensors.items())


def test_a_fit_that_nothing_makes_small_enough_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    starve(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(
        MemoryLimitError, match=r"streams of a sample take 160 bytes.*takes 2,048.*CUDA"
    ):
        compress(seeded(Chain), loader(), budget=Budget(macs=0.7), config=LIGHT)


def test_a_forward_pass_that_runs_out_of_memory_is_named() -> None:
    class Greedy(Chain):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    with pytest.raises(MemoryLimitError, match="streams of 10 samples 1,600, .* Pass smaller batches"):
        profile(seeded(Greedy), loader())


def test_another_error_of_torch_is_no_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), of_memory.within_memory("nothing"):
        raise RuntimeError("shapes do not fit")


FULL = """
import os, resource, signal, sys
from pathlib import Path
from rba_compress import ArtifactError, Budget, compress, heal, profile, export_onnx
from rba_compress.profiling import profiler as calibration
from rba_compress.healing import loop as healing
from tests.networks import BRIEF, Chain, LIGHT, loader, rows, seeded, to_heal
folder = Path(sys.argv[1])
calibration.EVERY = healing.EVERY = 0.0
found = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=LIGHT)
seen = profile(seeded(Chain), loader())
original, samples, compressed = to_heal()
for name in ("page.html", "seen", "a.checkpoint", "b.checkpoint"):
    (folder / name).write_text("mine")
jobs = {
    "page.html": lambda: found.report.to_html(folder / "page.html"),
    "seen": lambda: seen.save(folder / "seen"),
    "new": lambda: profile(seeded(Chain), loader(), checkpoint=folder / "new"),
    "healed": lambda: heal(compressed, samples, original=original, healing=BRIEF, checkpoint=folder / "healed"),
    "compressed": lambda: found.save(folder / "compressed"),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write beyond fails, as on a full disk
for name, job in jobs.items():
    try:
        job()
    except ArtifactError as error:
        print(name, "|", error)
"""


@pytest.mark.slow
def test_a_full_disk_is_named_and_takes_nothing(tmp_path: Path) -> None:
    lines = script(FULL, tmp_path).strip().splitlines()
    assert [line.partition(" |")[0] for line in lines] == [
        "page.html",
        "seen",
        "new",
        "healed",
        "compressed",
    ]
    assert all("cannot write" in line for line in lines)
    assert {p.name for p in tmp_path.iterdir()} == {"page.html", "seen", "a.checkpoint", "b.checkpoint"}
    assert all(p.read_text() == "mine" for p in tmp_path.iterdir())


# --- what the loader does


DYING = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from rba_compress import LoaderError, profile
from tests.networks import Chain, rows, seeded

class Dying(Dataset):  # a worker is killed at a sample
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 33 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows(40)[index]

class Slow(Chain):  # the worker, which reads ahead, dies in a forward pass
    def forward(self, x):
        time.sleep(0.5)
        return super().forward(x)

try:
    profile(seeded(Slow if sys.argv[1] == "slow" else Chain), DataLoader(Dying(), 4, num_workers=1))
except LoaderError as error:
    try:
        print(error)
    except RuntimeError:  # torch's signal handler raises wherever the process is, once a worker
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fast", "slow"])
def test_a_worker_that_dies_is_named(model: str) -> None:
    # In a process of its own: torch raises its word of it anywhere, in a later test, too.
    printed = script(DYING, model)
    said = "the loader could not be read on (DataLoader worker (pid"
    # A batch that is read meanwhile ends with the connection.
    assert said in printed or (model == "fast" and "or a worker died" in printed)


class Interrupted:
    """Batches, until Ctrl-C."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __iter__(self) -> Iterator[Tensor]:
        for index, batch in enumerate(rows(400).split(10)):
            if index == self.after:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_profile_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_calibration, "EVERY", 0.0)
    path = tmp_path / "seen.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        profile(seeded(Chain), Interrupted(20), checkpoint=path)
    assert path.is_file()
    resumed = profile(seeded(Chain), Interrupted(1000), checkpoint=path)
    whole = profile(seeded(Chain), Interrupted(1000))
    for a, b in zip(resumed.chains, whole.chains, strict=True):
        mine, theirs = a.state(""), b.state("")
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("flip", range(0, 3000, 211))
def test_a_damaged_checkpoint_is_refused_and_kept(
    flip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_calibration, "EVERY", 0.0)
    path = tmp_path / "seen.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        profile(seeded(Chain), Interrupted(20), checkpoint=path)
    content = bytearray(path.read_bytes())
    content[flip % len(content)] ^= 4
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        profile(seeded(Chain), Interrupted(1000), checkpoint=path)
    assert path.read_bytes() == content


def test_nothing_of_the_users_is_changed_by_a_run_that_fails() -> None:
    model: nn.Module = seeded(Chain).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for data in ([*loader()[:2], rows(10) * torch.nan], [*loader()[:2], rows(10).double()]):
        with pytest.raises(Exception, match="NaN|kind"):
            compress(model, data, budget=Budget(macs=0.8), config=LIGHT)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
