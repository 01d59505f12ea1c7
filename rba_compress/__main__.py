"""`python -m rba_compress` is `rba-compress`."""

import sys

from rba_compress.cli.main import main

sys.exit(main())
