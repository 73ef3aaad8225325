"""`python -m phaul.dest MIGRATION LISTENER STATE_DIRECTORY`: what a keeper starts."""

import sys
from pathlib import Path

from phaul import logs
from phaul.dest.agent import run

logs.set_up_agent(sys.argv[1], "destination")
sys.exit(run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
