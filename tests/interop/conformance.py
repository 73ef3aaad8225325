"""`make conformance`: programs of CRIU's ZDTM suite, each of which sets up some state and judges itself when it has
been stored and restored by phaul.

A program passes, or it is refused by name before anything is touched; anything else breaks it. The programs and what
runs them are in a directory `peers` (README.md there), which PHAUL_PEERS can name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

_REFUSED = "rc=20 "  # phaul.errors.Exit.REFUSED, as the runner tells it
_GOALS = {"h": 140, "ns": 180, "uns": 160}
"""How many programs of each flavour pass at least: on this host, in a container, in one with a user namespace."""
_OPTIONS = Path(__file__).with_suffix(".json")


def peers() -> Path | None:
    """The directory with the programs, or None."""
    given = os.environ.get("PHAUL_PEERS")
    above = [parent / "shared/peers" for parent in Path(__file__).resolve().parents]
    return next((one for one in ([Path(given)] if given else above) if (one / "zdtm/run").exists()), None)


def command(
    place: Path, result: Path, *, listed: Path, rounds: int = 0, jobs: int = 1, flavour: str = "h"
) -> list[str]:
    """The runner's command line. With `rounds`, each program is stored after so many rounds of pre-copy."""
    phaul = f"{sys.executable} -m phaul"
    words = [str(place / "zdtm/run"), "--flavour", flavour, "--list", str(listed)]
    words += ["--tests-dir", str(place / "zdtm/tests")]
    words += ["--flaky", str(place / "zdtm/flaky.txt"), "--hugepages", "20", "--cgroups", "-j", str(jobs)]
    words += ["--timeout", "120", "--test-timeout", "600", "--json", str(result), "--opt-map", str(_OPTIONS)]
    words += ["--dump", f"{phaul} dump --pid {{pid}} --images {{images}} {{opts}} {{incr}}"]
    words += ["--restore", f"{phaul} restore --images {{images}} --detach --pidfile {{pidfile}} {{opts}}"]
    if rounds:
        words += ["--pre", f"{phaul} pre-dump --pid {{pid}} --images {{images}} {{opts}} {{incr}}"]
        words += ["--pre-count", str(rounds), "--incr", "--parent {parent}"]
    return words


def verdict(result: dict[str, Any]) -> str:
    """What became of one program: passed, refused, skipped or broken."""
    match result["verdict"]:
        case "PASS" | "XPASS":
            return "passed"
        case "XFAIL":
            return "refused"
        case "SKIP":
            return "skipped"
        case "FAIL" if result.get("stage") in ("dump", "pre") and result.get("why", "").startswith(_REFUSED):
            return "refused"
        case _:
            return "broken"


def run(place: Path, listed: Path, *, rounds: int = 0, jobs: int = 1, flavour: str = "h") -> dict[str, str]:
    """Run the listed programs; what became of each. What phaul said to those that it refused is printed."""
    with tempfile.TemporaryDirectory(prefix="phaul-") as work:  # a short name: sockets are bound below it
        result = Path(work, "result.json")
        words = command(place, result, listed=listed, rounds=rounds, jobs=jobs, flavour=flavour)
        subprocess.run([*words, "--workdir", work], check=False)
        told = json.loads(result.read_text())["results"]
        for one in told:
            if one.get("box") and verdict(one) == "refused":
                print(f"refused: {one['name']}: {_reason(Path(one['box']))}", flush=True)
    return {one["name"]: verdict(one) for one in told}


def _reason(box: Path) -> str:
    """The first line that phaul said."""
    for log in sorted([*box.rglob("pre.cmd.log"), *box.rglob("dump.cmd.log")]):
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("phaul: "):
                return line.removeprefix("phaul: ")
    return "no reason is given"


def main() -> int:
    """Run all of them, print the sum and the broken ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="rounds of pre-copy before each dump")
    parser.add_argument(
        "--flavour", choices=_GOALS, default="h", help="on the host, in a container, in an unprivileged one"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", type=Path, help="in place of all programs")
    given = parser.parse_args()
    place = peers()
    if place is None:
        print("the peers' directory is not here; PHAUL_PEERS can say where it is", file=sys.stderr)
        return 2
    listed = given.list or place / f"zdtm/open_{given.flavour}.txt"
    found = run(place, listed, rounds=given.rounds, jobs=given.jobs, flavour=given.flavour)
    counts = Counter(found.values())
    for name, what in sorted(found.items()):
        if what == "broken":
            print(f"broken: {name}")
    print(", ".join(f"{counts[what]} {what}" for what in ("passed", "refused", "skipped", "broken")))
    return 0 if not counts["broken"] and (given.list or counts["passed"] >= _GOALS[given.flavour]) else 1


if __name__ == "__main__":
    sys.exit(main())
