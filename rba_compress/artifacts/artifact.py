"""Artefacts: the compressed model as a directory, and back. Nothing is pickled or unpickled.

    model.safetensors   the state dict; tensors that share memory are stored once. A delta holds the
                        fitted tensors alone, which are applied onto the original weights
    plan.json           a `Manifest`: plan, architecture, hashes, versions; it carries its own hash
    report.json         the `Report`, if there is one
    config.json, README.md   for a hub, if requested: see `rba_compress.artifacts.hub`

A directory is written under a temporary sibling's name, flushed to disk and renamed, so that an
interrupted save leaves the previous state.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import field_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from rba_compress.artifacts.architecture import Architecture, architecture_of
from rba_compress.artifacts.constructor import completed
from rba_compress.artifacts.fold import folded
from rba_compress.artifacts.hub import write_hub
from rba_compress.artifacts.reference_io import Probe
from rba_compress.artifacts.tree_comparison import differences, differing, settings
from rba_compress.artifacts.weights import fill, read_state, unique, unsaved_buffers
from rba_compress.core.batch import Batch
from rba_compress.core.errors import ArtifactError, WeightsError
from rba_compress.core.file_formats import other_format
from rba_compress.core.inference import evaluating, unwrap
from rba_compress.core.io import (
    BLANK,
    Sealed,
    parsed,
    read_json,
    read_sealed,
    require_intact,
    require_seal,
    require_vacant,
    sealed,
    sha256,
    written_whole,
)
from rba_compress.core.offload import device_of, in_memory
from rba_compress.core.outputs import main_output
from rba_compress.core.plan import Plan
from rba_compress.core.schema import Dtype
from rba_compress.core.weight_types import require_plain_weights
from rba_compress.graph.rewrite import copy_model
from rba_compress.profiling.profiler import fingerprint
from rba_compress.reporting.report import Report
from rba_compress.reporting.report_data import versions
from rba_compress.units.splice import splice

SCHEMA = 7
WEIGHTS, MANIFEST, REPORT = "model.safetensors", "plan.json", "report.json"


class Manifest(Sealed):
    """Content of plan.json: all that is needed to rebuild the compressed network and to check it."""

    former: ClassVar[Mapping[str, str]] = {"dense_weights": "original_weights"}

    schema_version: int = SCHEMA
    architecture: Architecture | None
    """Architecture of the original; None if unknown, so that `load(dir, original=...)` must be used."""
    delta: bool = False
    """True if the weights are the fitted ones alone, which `load` joins with those of the original."""
    folded: Architecture | None = None
    """Architecture with fewer blocks that builds the network, if the replaced blocks were left out."""
    model: str
    """Class of the original network."""
    plan: Plan
    tied: dict[str, str]
    """State-dict keys whose tensor is stored under another key."""
    buffers: dict[str, Dtype]
    """Dtypes of the buffers that are not in the state dict."""
    sha256: dict[str, str]
    """Hashes of the files beside this one; up to schema 5 also of report.json."""
    report: bool = False
    """True if there is a report.json, which carries its own hash."""
    original_weights: str
    """SHA-256 of the original weights, as `rba_compress.profiling.profiler.fingerprint` returns it."""
    probe: Probe | None = None
    """Reference inputs and outputs of the compressed network; None where none can be drawn."""
    versions: dict[str, str]

    @field_validator("sha256")
    @classmethod
    def _of_files_beside(cls, value: dict[str, str]) -> dict[str, str]:
        stray = next((n for n in value if n in (".", "..") or {*n} & {*"/\\\0"} or not n), None)
        if stray is not None:
            raise ValueError(f"{stray!r} is no file of this directory")
        if WEIGHTS not in value:
            raise ValueError(f"it says nothing of {WEIGHTS}")
        return value

    @property
    def builder(self) -> Architecture | None:
        """Architecture that builds the network before weights and, if it is not folded, before maps."""
        return self.folded or self.architecture


def write_artifact(
    model: nn.Module,
    plan: Plan,
    directory: str | Path,
    *,
    example: Batch,
    original_weights: str,
    report: Report | None = None,
    architecture: Architecture | None = None,
    delta: bool = False,
    fold: bool = False,
    hub: bool = False,
) -> Manifest:
    """Write the compressed model to a new directory, all of it or nothing.

    Args:
        model: the compressed network.
        plan: the plan that made it.
        directory: must not exist, or be empty.
        example: a batch. On its first sample the network is built anew from the architecture and
            compared, bit for bit, before the architecture is written down; so are the settings of
            both module trees. If they differ, or there is no architecture, the artefact is written
            without one and `load` asks for `original=`. No sample is written, but the range of the
            samples' values is.
        original_weights: fingerprint of the original weights.
        report: written beside the weights.
        architecture: the architecture of the original network; by default the one that the model
            states, with constructor arguments inferred from the model.
        delta: write the fitted tensors alone, to be applied onto the original network.
        fold: leave replaced blocks out, so that the architecture's own code with fewer blocks loads
            the weights without this package.
        hub: write config.json and a model card, as `rba_compress.artifacts.hub.write_hub`.

    Raises:
        ArtifactError: the directory is not empty, is a file, or cannot be written; `delta` was combined
            with `fold` or `hub`.
        PlanError: the plan cannot be folded, or no architecture with fewer blocks is that network.
        WeightsError: the architecture that was passed in does not build this network.
        ModelError: the network was quantised after it was compressed.
    """
    # Long, for all that an artefact holds comes together here; nothing of it is used elsewhere.
    target = Path(directory).absolute()
    require_vacant(target)
    if delta and (fold or hub):
        raise ArtifactError("a delta needs the original beside it: it cannot be folded or for a hub")
    require_plain_weights(model)
    probe = _probe(example, model)
    sample, stock = example.select([0]), None
    if not delta:
        model = in_memory(model, device="cpu")
    if fold:
        own = None if architecture else architecture_of(model)
        architecture = completed(own, model, plan) if own else architecture
        compressed = model
        model, stock = folded(compressed, plan, architecture, sample)
        _name_losses(architecture, compressed, plan, sample, given=own is None)
    state, tied = unique(fitted_tensors(plan, model.state_dict()) if delta else model.state_dict())
    if delta:
        architecture = None
    elif not fold:
        architecture = _checked(architecture, model, plan, state, tied, example=sample)
    with written_whole(target) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        if report is not None:
            told = report.model_dump_json(indent=2).removeprefix("{")
            (temporary / REPORT).write_bytes(sealed(f'{{\n  "seal": "{BLANK}",{told}\n'))
        if hub:
            write_hub(temporary, model, report, architecture=architecture, stock=stock)
        manifest = Manifest(
            architecture=architecture,
            delta=delta,
            folded=stock,
            model=type(model).__name__,
            plan=plan,
            tied=tied,
            buffers=unsaved_buffers(model),
            report=report is not None,
            # A model card may be edited, and the times in a report vary.
            sha256={
                path.name: sha256(path)
                for path in sorted(temporary.iterdir())
                if path.suffix != ".md" and path.name != REPORT
            },
            original_weights=original_weights,
            probe=probe,
            versions=versions(),
        )
        (temporary / MANIFEST).write_bytes(sealed(manifest.model_dump_json(indent=2) + "\n"))
        read_manifest(temporary)  # check that the manifest can be read
        shutil.copymode(temporary / MANIFEST, temporary / WEIGHTS)  # safetensors writes 0600
    return manifest


def _probe(example: Batch, model: nn.Module) -> Probe | None:
    try:
        return Probe.of(example, model)
    except Exception:  # noqa: BLE001  a network may refuse random inputs, and the probe is optional
        return None


def fitted_tensors(plan: Plan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a compressed state dict that a plan added or changed."""
    trained = () if plan.healed is None else plan.healed.keys

    def fitted(name: str) -> bool:
        replaced = any(r.owns(name) for r in plan.replacements)
        return replaced or name in trained or any(refit.owns(name) for refit in plan.refits)

    return {name: tensor for name, tensor in state.items() if fitted(name)}


def _name_losses(
    architecture: Architecture | None, compressed: nn.Module, plan: Plan, example: Batch, *, given: bool
) -> None:
    """Warn of settings that a folded network has lost; its architecture is the original's.

    Raises:
        WeightsError: settings are lost, and the architecture was passed in.
    """
    state, tied = unique(compressed.state_dict())
    flaw = architecture and _rebuild_flaw(architecture, compressed, plan, state, tied, example=example)
    if flaw and given:
        raise WeightsError(f"the architecture that was passed in is not this network: {flaw}")
    if flaw:
        warnings.warn(
            f"the folded network is not this network in all ways ({flaw}): save it unfolded, or pass "
            "save(architecture=...) that builds it",
            stacklevel=4,
        )


def _checked(
    given: Architecture | None,
    model: nn.Module,
    plan: Plan,
    state: Mapping[str, Tensor],
    tied: Mapping[str, str],
    *,
    example: Batch,
) -> Architecture | None:
    """Return the architecture that builds exactly this network, the given one or the model's, or None.

    Raises:
        WeightsError: the given architecture does not build this network.
    """
    architecture = given or architecture_of(model)
    if architecture is None:
        return None
    flaw = _rebuild_flaw(architecture, model, plan, state, tied, example=example)
    if flaw is not None and given is None:
        architecture = completed(architecture, model, plan)
        flaw = _rebuild_flaw(architecture, model, plan, state, tied, example=example)
    if flaw is None:
        return architecture
    # A config of transformers has so many fields that the flaw would be hard to find.
    known = f" with {architecture.arguments}" if architecture.library == "timm" else ""
    if given is not None:
        raise WeightsError(f"{given.name!r}{known} is not this network: {flaw}")
    warnings.warn(
        f"{architecture.name!r}{known} is not this network ({flaw}), so "
        "load(dir) alone cannot build it: pass save(architecture=...), or load(dir, original=...)",
        stacklevel=5,
    )
    return None


def load(directory: str | Path, *, original: nn.Module | None = None) -> nn.Module:
    """Return the network of a directory that `write_artifact` wrote, as `rba_compress.load` does of one
    network.

    Raises:
        ArtifactError, WeightsError, PlanError: as `rba_compress.load`.
    """
    root = Path(directory)
    return rebuilt(root, intact(root), original=original)


def intact(root: Path) -> Manifest:
    """Return the manifest of an artefact whose files are as they were written.

    Raises:
        ArtifactError: as `load`.
    """
    manifest = read_manifest(root)
    for name, digest in manifest.sha256.items():
        require_intact(root, name, digest)
    require_report(root, manifest)
    return manifest


@torch.inference_mode(False)
def rebuilt(root: Path, manifest: Manifest, *, original: nn.Module | None = None) -> nn.Module:
    """Rebuild the network of an artefact whose files were found to be intact, as `load`."""
    if manifest.folded and original is not None:
        raise ArtifactError(f"{root} is folded: it loads without the original, load(dir)")
    if manifest.delta:
        if original is None:
            raise ArtifactError(
                f"{root} is a delta: pass the {manifest.model} that it was made of, "
                "load(dir, original=...)"
            )
        if fingerprint(unwrap(original)) != manifest.original_weights:
            raise WeightsError(f"original is not the {manifest.model} that {root} was made from")
        whole = splice(
            unwrap(original), manifest.plan, fitted_tensors(manifest.plan, read_state(root / WEIGHTS))
        )
        return in_memory(whole, device="cpu").cpu().eval()
    if original is not None:
        skeleton = in_memory(copy_model(unwrap(original)), device="cpu").cpu().eval()
    elif manifest.builder is not None:
        skeleton = manifest.builder.build()
    else:
        raise ArtifactError(
            f"{root} does not know how to build a {manifest.model}: pass one, load(dir, original=...), "
            "and what that returns wherever a network is taken"
        )
    state = read_state(root / WEIGHTS)
    plan = Plan() if manifest.folded else manifest.plan
    return _restore(skeleton, plan, state, manifest.tied, manifest.buffers)


def read_manifest(root: Path) -> Manifest:
    """Return the plan.json of an artefact.

    Schemas 1 to 3 are read as they are; fields that they lack have defaults.

    Raises:
        ArtifactError: it is missing, of a newer schema, not a manifest, or not as it was written.
    """
    if root.is_file():
        reason = other_format(root) or "it is a file"
        raise ArtifactError(f"{root} is no directory that save wrote: {reason}")
    if root.is_dir() and not (root / MANIFEST).exists():
        raise ArtifactError(
            f"{root / MANIFEST} is unreadable: {root} is no directory that save wrote. Weights alone "
            "go into a network of your own: rba_compress.artifacts.weights.load_weights(model, file)"
        )
    return read_sealed(root / MANIFEST, Manifest, newest=SCHEMA, sealed_since=3)


def read_report(root: Path) -> Report | None:
    """Return the report.json of an artefact; None if it has none.

    Raises:
        ArtifactError: it is not a report, or not as it was written.
    """
    path = root / REPORT
    if not path.is_file():
        return None
    content = read_json(path)
    report = parsed(path, Report, content)
    require_seal(path, content, there=report.seal is not None)
    return report.model_copy(update={"seal": None})


def require_report(root: Path, manifest: Manifest) -> None:
    """Require an intact report, if the manifest names one.

    Raises:
        ArtifactError: the report is missing, or not as it was written.
    """
    if manifest.report and read_report(root) is None:
        raise ArtifactError(f"{root / REPORT} is missing: the artefact is incomplete")


def _restore(
    skeleton: nn.Module,
    plan: Plan,
    state: Mapping[str, Tensor],
    tied: Mapping[str, str],
    buffers: Mapping[str, str],
) -> nn.Module:
    """Rewrite an original skeleton in place by `plan`, load the weights `state`, and return it."""
    splice(skeleton, plan, fitted_tensors(plan, state), inplace=True)
    whole = {**state, **{alias: state[name] for alias, name in tied.items() if name in state}}
    fill(skeleton, whole, buffers, WEIGHTS)
    return skeleton.eval()


def _rebuild_flaw(
    architecture: Architecture,
    model: nn.Module,
    plan: Plan,
    state: Mapping[str, Tensor],
    tied: Mapping[str, str],
    *,
    example: Batch,
) -> str | None:
    """Return the reason why the rebuilt network is not the one that is saved, or None."""
    try:
        anew = _restore(architecture.build(), plan, state, tied, unsaved_buffers(model))
        anew.to(device_of(model))
        built = settings(anew)
        with evaluating(model), evaluating(anew):
            batch = example.to(model)
            alike = torch.equal(main_output(batch.run(model)), main_output(batch.run(anew)))
    except Exception as error:  # noqa: BLE001  whatever fails, it cannot be built anew
        return f"{type(error).__name__}: {error}"
    after = settings(anew)
    # Values that a forward pass changes are state, such as a cache, and not settings.
    apart = differences(settings(model), after, but={*differing(built, after)})
    reasons = ["" if alike else "its outputs differ", f"its settings differ: {apart}" if apart else ""]
    return ", ".join(filter(None, reasons)) or None
