"""Pages of the repository outside of `docs/` that the site links to, under `repository/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHARED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "export/*.md")
RESULTS = ("benchmarks/*.md", "benchmarks/clinical/*.md", "benchmarks/results/*")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that pages link to."""
    files.remove(files.src_uris["hooks.py"])
    for pattern in (*SHARED, *RESULTS):
        for path in sorted(ROOT.glob(pattern)):
            name = f"repository/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that lead out of `docs/`, or into it, to where the files are on the site."""
    if not page.file.src_uri.startswith("repository/"):
        return markdown.replace("](../", "](repository/")
    depth = "../" * page.file.src_uri.count("/")
    return markdown.replace("](docs/", f"]({depth}").replace("](../docs/", f"]({depth}")
