"""Simulated migrations by the hundred thousand, in parts that can be stopped and gone on with.

    python -m tests.unit.migration.campaign --state FILE [--first SEED] [--count 1000000]

One process, one core, 3 ms a run on an idle one. FILE gets a line for each part that is over; started again with it, a
campaign goes on where it stood. A violation is told with its seed, and the campaign goes on: the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.unit.migration.clock import Clock
from tests.unit.migration.simulation import simulate

_PART = 5000


def run_part(first: int, count: int) -> dict[str, Any]:
    """What came of the seeds from `first` on."""
    begun, clock = time.monotonic(), Clock()
    seen, wrong = collections.Counter[str](), list[str]()
    for seed in range(first, first + count):
        try:
            seen[simulate(seed, clock)] += 1
        except AssertionError as error:
            wrong.append(str(error))
            clock = Clock()  # nothing of that run goes on
    seconds = round(time.monotonic() - begun, 1)
    return {"first": first, "count": count, "seen": seen, "wrong": wrong, "seconds": seconds}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.unit.migration.campaign")
    parser.add_argument("--state", type=Path, required=True, help="what was done: a line a part")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1_000_000, help="how many (default: %(default)s)")
    options = parser.parse_args()
    lines = options.state.read_text().splitlines() if options.state.exists() else []
    over = {part["first"]: part for part in map(json.loads, lines)}
    with options.state.open("a") as state:
        for first in range(options.first, options.first + options.count, _PART):
            if first in over:
                continue
            part = over[first] = run_part(first, min(_PART, options.first + options.count - first))
            print(json.dumps(part), file=state, flush=True)
            for text in part["wrong"]:
                print(text, file=sys.stderr, flush=True)
    total = collections.Counter[str]()
    for part in over.values():
        total.update(part["seen"])
    wrong = sum(len(part["wrong"]) for part in over.values())
    print(f"{total.total()} runs, {dict(total)}, {wrong} violations")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
