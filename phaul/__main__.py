"""`python -m phaul` is the command `phaul`.

What SSH starts, and sudo, is told apart first: an agent need not wait for what only a command line imports.
"""

from __future__ import annotations

import sys

from phaul.errors import PhaulError, report


def main() -> None:
    """Run a command; an error ends it with its exit status."""
    if sys.argv[1:] != ["agent", "--stdio"]:
        from phaul.cli.main import main as command

        command()
        return
    from phaul import agent

    try:
        agent.run()
    except PhaulError as error:
        report(error)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
