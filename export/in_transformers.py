"""A stock checkpoint in transformers, without rba_compress: continues a prompt, and prints the text and
the tokens a second as one JSON line.

`result.save(dir, fold=True, hub=True)` writes the checkpoint, for a plan of `Config(stock=True)`.

    python export/in_transformers.py compressed/ --prompt "Once upon a time" --tokens 64
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="stock checkpoint with its tokenizer")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    if not (given.directory / "config.json").is_file():
        print(
            f"{given.directory} is no stock checkpoint: it has no config.json; compress with "
            "Config(stock=True), and save with fold=True, hub=True",
            file=sys.stderr,
        )
        return 4
    local = str(given.directory)
    tokenizer = AutoTokenizer.from_pretrained(local, local_files_only=True)  # nosec B615 # a directory
    model = AutoModelForCausalLM.from_pretrained(local, local_files_only=True)  # nosec B615
    prompt = tokenizer(given.prompt, return_tensors="pt", return_token_type_ids=False)
    start = time.perf_counter()
    tokens = model.generate(**prompt, max_new_tokens=given.tokens, do_sample=False)[0]
    seconds = time.perf_counter() - start
    new = tokens[prompt["input_ids"].shape[1] :]
    said = {"text": tokenizer.decode(new), "tokens_per_second": round(len(new) / seconds, 2)}
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
