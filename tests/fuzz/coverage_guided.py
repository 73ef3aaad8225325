"""One target of targets.py under atheris, which follows the branches that inputs take: python -m
tests.fuzz.coverage_guided NAME [libFuzzer's options and directories]."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["phaul", "phaul_engine"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Until an input does what none may, or the time is over."""
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name].feed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
