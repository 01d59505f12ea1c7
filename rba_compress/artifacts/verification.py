"""Verification of saved and exported files: hashes, reload, parity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from rba_compress.artifacts.artifact import (
    MANIFEST,
    REPORT,
    Manifest,
    read_manifest,
    rebuilt,
    require_report,
)
from rba_compress.artifacts.certificate import (
    SIZES,
    Certificate,
    certificates,
    compared,
    open_file,
    require_valid,
)
from rba_compress.artifacts.levels import TABLE, read_table
from rba_compress.core.errors import ArtifactError, ExportError, RBAError
from rba_compress.core.io import require_intact


def verify(directory: str | Path, *, original: nn.Module | None = None) -> list[str]:
    """Check an artefact, the files that were exported into it, or both; return each check that held.

    Args:
        directory: a directory that `save`, `export_onnx` or `export_pt2` wrote.
        original: as for `load`, if the directory alone does not load. Without it, checks that need the
            network are left out, and a line says so.

    Raises:
        ArtifactError: a check failed; the first one is named.
    """
    return list(checks(Path(directory), original=original))


def checks(root: Path, *, original: nn.Module | None = None) -> Iterator[str]:
    """Yield each check that held, as `verify`: every hash first, then slower checks."""
    if (root / TABLE).exists():
        yield from _of_levels(root, original)
        return
    exported = certificates(root)
    manifest = read_manifest(root) if (root / MANIFEST).exists() or not exported else None
    if manifest is not None:
        yield f"{MANIFEST}: intact, schema {manifest.schema_version}"
    digests = [pair for each in (manifest, *exported) if each for pair in each.sha256.items()]
    for name, digest in dict.fromkeys(digests):
        require_intact(root, name, digest)
        yield f"{name}: SHA-256 is as written"
    certified = {name for each in exported for name in each.sha256}
    for path in root.iterdir():
        if path.suffix in (".onnx", ".pt2") and path.name not in certified:
            raise ArtifactError(f"{path} has no certificate: export it again")
    network = None
    if manifest is not None:
        require_report(root, manifest)
        if manifest.report:
            yield f"{REPORT}: intact"
        if original is None and (manifest.delta or manifest.builder is None):
            yield f"reload: not checked, it needs the {manifest.model} (original=)"
        else:
            network = _reloaded(root, manifest, original)
            yield "reload: the network is built anew, its outputs are as recorded"
    for certificate in exported:
        if manifest and certificate.weights not in (None, *manifest.sha256.values()):
            raise ArtifactError(f"{certificate.file} was exported from other weights than those here")
        yield f"{certificate.file}: {_parity(root, certificate, network)}"


def _of_levels(root: Path, original: nn.Module | None) -> Iterator[str]:
    """Yield the checks of each level, by its directory."""
    table = read_table(root)
    yield f"{TABLE}: intact, schema {table.schema_version}"
    for level in table.levels:
        for check in checks(root / level.directory, original=original):
            yield f"{level.directory}: {check}"
        first = root / level.directory
        manifest = read_manifest(first)
        if original is None and not manifest.delta and manifest.builder is not None:
            original = rebuilt(first, manifest)


def _reloaded(root: Path, manifest: Manifest, original: nn.Module | None) -> nn.Module:
    try:
        network = rebuilt(root, manifest, original=original)
    except RBAError as error:
        raise ArtifactError(f"{root} does not load: {error}") from error
    flaw = manifest.probe.flaw(network) if manifest.probe else None
    if flaw is not None:
        raise ArtifactError(f"{root} loads, but it is not the network that was saved: {flaw}")
    return network


def _parity(root: Path, certificate: Certificate, network: nn.Module | None) -> str:
    """Check an exported file against the network, and return the result in words."""
    if certificate.format == "pt2":
        # Its reader unpickles parts of the archive.
        return "not opened; parity was measured when it was exported"
    file = root / certificate.file
    try:
        require_valid(file)
        runner = open_file("onnx", file)
        if network is None or certificate.probe is None:
            return "opens; parity is not checked, it needs the network"
        sizes = SIZES if certificate.dynamic else (certificate.parity[0].batch,)
        found = [
            compared(network, runner, batch, certificate.tolerance, file.name)
            for batch in certificate.probe.draws(sizes, sequences=certificate.sequences)
        ]
    except ExportError as error:
        raise ArtifactError(str(error)) from error
    furthest = max(parity.max_rel for parity in found)
    return (
        f"outputs at batch {', '.join(map(str, sizes))} are at most {furthest:.2g} of the largest "
        f"apart, allowed are {certificate.tolerance:g}"
    )
