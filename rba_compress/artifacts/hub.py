"""Files that make an artefact a model repository: config.json and a model card, for `huggingface_hub`.

A folded artefact is a stock network, and its config is timm's or transformers' own: they load the
directory without this package. The config of any other artefact names rba_compress as its library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from rba_compress.artifacts.architecture import Architecture
from rba_compress.reporting.report import Report

CONFIG, CARD = "config.json", "README.md"

_CARD = """---
library_name: {{ library }}
tags:
- rba_compress
- model-compression
---

# {{ name }}, made smaller without training

A {{ model }} with blocks replaced by closed-form maps
(Redundant Blocks Approximation, [arXiv 2410.04941](https://arxiv.org/abs/2410.04941)).
{% if report %}
{{ report.plan }}

| | before | after | after/before |
| --- | ---: | ---: | ---: |
{% for row in rows -%}
| {{ row | join(' | ') }} |
{% endfor %}
Measured on {{ report.fidelity.samples }} samples ({{ report.samples }}); latency on
{{ report.latency.device }}, median of {{ report.latency.pairs }} pairs.
{% for warning in report.warnings %}
Warning: {{ warning }}
{% endfor %}{% endif %}
## Load it

```python
{{ code }}
```
"""


def write_hub(
    directory: Path,
    model: nn.Module,
    report: Report | None,
    *,
    architecture: Architecture | None,
    stock: Architecture | None,
) -> None:
    """Write config.json and README.md, the model card with the measured table.

    Args:
        directory: the directory of the artefact.
        model: the network whose weights lie there.
        report: the measurements.
        architecture: the architecture of the original network.
        stock: the architecture that builds the network without this package, if it is folded.
    """
    from jinja2 import Environment

    kind, config = type(model).__name__, directory / CONFIG
    library = stock.library if stock else "rba_compress"
    name = architecture.name if architecture else kind
    if stock is None:
        known = architecture.model_dump(mode="json") if architecture else None
        content = {"library_name": library, "model": kind, "architecture": known}
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        given = "" if architecture else f", original=...  # the original {kind}\n"
        code = (
            "from huggingface_hub import snapshot_download\nfrom rba_compress import load\n\n"
            f'model = load(snapshot_download("OWNER/NAME"){given})'
        )
    elif stock.library == "timm":
        _timm_config(config, model, stock)
        code = 'import timm\n\nmodel = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)'
    else:
        _transformers_config(config, model, stock)
        code = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("OWNER/NAME")'
    # HTML escapes would break the code in the Markdown.
    environment = Environment(autoescape=False, keep_trailing_newline=True)  # nosec B701 # see above
    text = environment.from_string(_CARD).render(
        library=library,
        name=name,
        model=kind,
        report=report,
        rows=report.rows() if report else (),
        code=code,
    )
    (directory / CARD).write_text(text, encoding="utf-8")


def _timm_config(path: Path, model: nn.Module, architecture: Architecture) -> None:
    from timm.models import _hub

    arguments = {k: v for k, v in architecture.arguments.items() if k != "num_classes"}
    _hub.save_config_for_hf(model, path, model_args=arguments)
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def _transformers_config(path: Path, model: nn.Module, architecture: Architecture) -> None:
    config: Any = model.config
    config.architectures = [architecture.name]
    config.to_json_file(path)
