"""A GGUF file in llama.cpp, without torch: continues a prompt, and prints the text and the tokens a
second as one JSON line.

`rba-compress export compressed/ --to gguf --inputs text.txt` writes the file; all that is needed here
is `pip install xllamacpp`.

    python export/in_llama_cpp.py compressed/model.gguf --prompt "Once upon a time" --tokens 64
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path


def certified(file: Path) -> bool:
    """Return whether the certificate beside the file has its hash."""
    certificate = file.with_name(f"{file.name}.certificate.json")
    if not certificate.is_file():
        return False
    return (
        json.loads(certificate.read_bytes())["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    if not certified(given.file):
        print(f"no certificate beside {given.file} is of this file", file=sys.stderr)
        return 4
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path = str(given.file)
    how.n_parallel, how.warmup = 1, False
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = given.threads
    server = xllamacpp.Server(how)
    asked = {"prompt": given.prompt, "n_predict": given.tokens, "temperature": 0.0}
    start = time.perf_counter()
    found = server.handle_completions(asked)
    seconds = time.perf_counter() - start
    speed = found["usage"]["completion_tokens"] / seconds
    print(json.dumps({"text": found["choices"][0]["text"], "tokens_per_second": round(speed, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
