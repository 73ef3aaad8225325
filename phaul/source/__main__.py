"""`python -m phaul.source MIGRATION LISTENER STATE_DIRECTORY`: what a keeper starts."""

import sys
from pathlib import Path

from phaul import logs
from phaul.source.agent import run

logs.set_up_agent(sys.argv[1], "source")
sys.exit(run(int(sys.argv[2]), Path(sys.argv[3])))
