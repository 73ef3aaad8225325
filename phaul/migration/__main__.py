"""`python -m phaul.migration`: docs/protocol.md on stdout."""

import sys

from .docs import text

sys.stdout.write(text())
