"""Every check of what was written, over again: hashes, reload, parity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from rba_compress.artifact import MANIFEST, REPORT, load, read_manifest, require_intact
from rba_compress.errors import ArtifactError, ExportError, RBAError
from rba_compress.onnx_export import (
    CERTIFICATES,
    SIZES,
    Format,
    compared,
    open_file,
    read_certificate,
    require_valid,
)
from rba_compress.report import Report


def verify(
    directory: str | Path, *, model: nn.Module | None = None, base: nn.Module | None = None
) -> list[str]:
    """Check an artefact, the files that were exported into it, or both; returns each check that held.

    Args:
        directory: what `save`, `export_onnx` or `export_pt2` wrote.
        model, base: as for `load`, where the directory alone does not load. Without them, what needs
            the network is not checked, and a line says so.

    Raises:
        ArtifactError: the first thing that is not as it was written.
    """
    return list(checks(Path(directory), model=model, base=base))


def checks(root: Path, *, model: nn.Module | None, base: nn.Module | None) -> Iterator[str]:
    """As `verify`, one by one."""
    kinds = [kind for kind, name in CERTIFICATES.items() if (root / name).exists()]
    network = None
    if (root / MANIFEST).exists() or not kinds:
        manifest = read_manifest(root)
        yield f"{MANIFEST}: intact, schema {manifest.schema_version}"
        for name in manifest.sha256:
            require_intact(root, name, manifest.sha256[name])
            yield f"{name}: SHA-256 is as written"
        if REPORT in manifest.sha256:
            Report.model_validate_json((root / REPORT).read_bytes())
        known = manifest.folded or manifest.architecture
        if (base if manifest.delta else known or model or base) is None:
            wanted = "base" if manifest.delta else "model"
            yield f"reload: not checked, it needs the {manifest.model} ({wanted}=)"
        else:
            network = _reloaded(root, model, base)
            yield "reload: the network is built anew, its outputs are as recorded"
    for path in root.iterdir():
        if path.suffix in (".onnx", ".pt2") and path.suffix[1:] not in kinds:
            raise ArtifactError(f"{path} has no certificate: export it again")
    for kind in kinds:
        yield from _exported(root, kind, network)


def _reloaded(root: Path, model: nn.Module | None, base: nn.Module | None) -> nn.Module:
    try:
        network = load(root, model=model, base=base)
    except RBAError as error:
        raise ArtifactError(f"{root} does not load: {error}") from error
    probe = read_manifest(root).probe
    flaw = probe.flaw(network) if probe else None
    if flaw is not None:
        raise ArtifactError(f"{root} loads, but it is not the network that was saved: {flaw}")
    return network


def _exported(root: Path, kind: Format, network: nn.Module | None) -> Iterator[str]:
    certificate = read_certificate(root, kind)
    for name, digest in certificate.sha256.items():
        require_intact(root, name, digest)
        yield f"{name}: SHA-256 is that of its certificate"
    for path in root.glob(f"*.{kind}"):
        if path.name not in certificate.sha256:
            raise ArtifactError(f"{path} is another file than its certificate is of: export it again")
    if kind == "pt2":
        # Its reader unpickles parts of the archive.
        yield f"{certificate.file}: not opened; parity was measured when it was exported"
        return
    try:
        require_valid(kind, root / certificate.file)
        runner = open_file(kind, root / certificate.file)
        if network is None or certificate.probe is None:
            yield f"{certificate.file}: opens; parity is not checked, it needs the network"
            return
        manifest = read_manifest(root)
        if certificate.weights not in (None, *manifest.sha256.values()):
            raise ArtifactError(f"{certificate.file} was exported from other weights than those here")
        sizes = SIZES if certificate.dynamic else (certificate.parity[0].batch,)
        batches = certificate.probe.draws(sizes)
        found = [compared(network, runner, b, certificate.tolerance, certificate.file) for b in batches]
    except ExportError as error:
        raise ArtifactError(str(error)) from error
    furthest = max(found, key=lambda each: each.max_rel)
    yield (
        f"{certificate.file}: outputs at batch {', '.join(map(str, sizes))} are at most "
        f"{furthest.max_rel:.2g} of the largest apart, allowed are {certificate.tolerance:g}"
    )
