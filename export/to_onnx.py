"""An artefact as ONNX with its certificate; prints one JSON line. The same as `rba-compress export`.

python export/to_onnx.py compressed/ --inputs images/
"""

from __future__ import annotations

import sys

from rba_compress.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:], "--json"]))
