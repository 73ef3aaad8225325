"""The rules of docs/reliability.md, each broken on purpose: a test must fail then.

    python -m tests.rules [WORD...]        only rules whose name has one of the words

To be run as root in a checkout of its own, which nobody else uses meanwhile: files are changed, and put back. Exit
status 1 if a rule can be broken without a test that notices.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Rule:
    """`old` in `file` becomes `new`, and of `tests` at least one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


RULES = (
    Rule(
        "nothing is heard of the copy before RESUMED",
        "phaul/migration/destination.py",
        "return Step(Deciding(), (Swap(Row.PARKED, Row.RESUMED),))",
        "return Step(Deciding(), (Start(Work.WAKE), Swap(Row.PARKED, Row.RESUMED)))",
        "tests/unit/migration/test_order.py",
    ),
    Rule(
        "COMMITTED is written before COMMIT leaves",
        "phaul/migration/source.py",
        "return Step(Committing(), (Swap(Row.FROZEN, Row.COMMITTED),))",
        "return Step(Committing(), (Send(Message.COMMIT), Swap(Row.FROZEN, Row.COMMITTED)))",
        "tests/unit/migration/test_order.py tests/unit/migration/test_model.py",
    ),
    Rule(
        "ABORTED is written before the program goes on",
        "phaul/migration/source.py",
        "(Swap(held, Row.ABORTED, why),))",
        "(Start(Work.UNDO), Swap(held, Row.ABORTED, why)))",
        "tests/unit/migration/test_order.py tests/unit/migration/test_model.py",
    ),
    Rule(
        "a committed source waits for the destination's answer",
        "phaul/migration/source.py",
        '            return _undecided(state, limits, "the destination does not answer")',
        '            return _abort(Row.COMMITTED, Outcome.STAYED, "the destination does not answer")',
        "tests/unit/migration/test_model.py",
    ),
    Rule(
        "an undecided row is decided by being asked",
        "phaul/migration/destination.py",
        "        case Row.PREPARED | Row.PARKED if same_boot:\n            return _discard(row",
        "        case Row.PREPARED | Row.PARKED if same_boot:\n            return _kill(str(row))\n"
        "            return _discard(row",
        "tests/unit/migration/test_model.py tests/kernel/test_recovery.py",
    ),
    Rule(
        "an unknown migration is in doubt, not discarded",
        "phaul/migration/destination.py",
        "(Send(Message.UNKNOWN),))",
        "(Send(Message.DISCARDED),))",
        "tests/unit/migration/test_model.py",
    ),
    Rule(
        "a PARKED row of an earlier boot decides nothing",
        "phaul/migration/destination.py",
        "unfinished=True), (Send(Message.DEAD, why),))",
        "unfinished=True), (Send(Message.DISCARDED, why),))",
        "tests/unit/migration/test_model.py",
    ),
    Rule(
        "RESUMED is on the disk before anybody is told",
        "phaul/migration/destination.py",
        "            return Step(Syncing(), (Start(Work.SYNC),))",
        "            return Step(Resumed(), (Send(Message.RESUMED), Start(Work.TIDY)))",
        "tests/unit/migration/test_order.py",
    ),
    Rule(
        "RESUMED is kept until the source is known to know",
        "phaul/migration/destination.py",
        'return Step(Ended(Outcome.MIGRATED, "the source has not said that it knows", unfinished=True))',
        "return _forget(state.tidy)",
        "tests/unit/migration/test_order.py",
    ),
    Rule(
        "the copy at the source is killed when its row says so",
        "phaul/migration/source.py",
        "    return Step(Granting(here, tries), (Swap(Row.COMMITTED, Row.RELEASED),))",
        "    return Step(Granting(here, tries), (Start(Work.RELEASE), Swap(Row.COMMITTED, Row.RELEASED)))",
        "tests/unit/migration/test_order.py",
    ),
    Rule(
        "rows change by compare-and-set",
        "phaul/journal.py",
        '            if self._content["state"] != expected:',
        "            if False:",
        "tests/unit/test_journal.py",
    ),
    Rule(
        "no sync inside the freeze: the rows",
        "phaul/journal.py",
        '            self._append({"from": expected, "state": to, "why": why}, undo, facts, reserve=0, blank=blank)',
        '            self._append({"from": expected, "state": to, "why": why}, undo, facts, reserve=0, blank=blank)\n'
        "            os.fdatasync(self._fd)",
        "tests/unit/test_journal.py",
    ),
    Rule(
        "no sync inside the freeze: the protocol",
        "phaul/migration/source.py",
        "(Swap(Row.FROZEN, Row.COMMITTED),))\n\n\n@handles(Committing)",
        "(Swap(Row.FROZEN, Row.COMMITTED, sync=True),))\n\n\n@handles(Committing)",
        "tests/unit/migration/test_order.py",
    ),
    Rule(
        "rows have their space before the freeze",
        "phaul/journal.py",
        "_write_all(fd, first + bytes(size - len(first)))",
        "_write_all(fd, first); os.truncate(fd, size)",
        "tests/unit/test_journal.py",
    ),
    Rule(
        "space is kept for transitions",
        "phaul/journal.py",
        'reserve=0 if self._content.get("ended") else _RESERVED, blank=blank)',
        "reserve=0, blank=blank)",
        "tests/unit/test_journal.py",
    ),
    Rule(
        "a dead agent is recovered",
        "phaul/keeper.py",
        "        status = _run(recovery, ())",
        "        status = 0",
        "tests/kernel/test_keeper.py",
    ),
    Rule(
        "recovery ends a hung agent before it acts",
        "phaul/recovery.py",
        "        if row.same_boot:\n            fence(row.owner)",
        "        if False:\n            fence(row.owner)",
        "tests/kernel/test_recovery.py",
    ),
    Rule(
        "the hold is the freezer, which no signal undoes",
        "engine/phaul_engine/cgroup.py",
        '        self._control("cgroup.freeze", b"1")\n        if not self._wait(lambda: self.frozen, timeout):',
        "        for pid in self.members():\n            os.kill(pid, 19)\n"
        "        if not self._wait(lambda: True, timeout):",
        "tests/kernel/test_cgroup.py",
    ),
    Rule(
        "connections are touched when the tree is frozen",
        "engine/phaul_engine/collect.py",
        "            hold()\n"
        "            if survey:\n"
        "                self._look_outside(members, begun.files, collection)\n"
        "                self._complete(begun, collection)\n"
        "            self._seal(collection, seal, surrender)\n",
        "            if survey:\n"
        "                self._look_outside(members, begun.files, collection)\n"
        "                self._complete(begun, collection)\n"
        "            self._seal(collection, seal, surrender)\n"
        "            hold()\n",
        "tests/kernel/network/test_order.py",
    ),
    Rule(
        "a dead agent leaves a drop, not an open socket",
        "engine/phaul_engine/network/ingress.py",
        "            bpf.pin(link, f\"{BPF_FS}/{name}-{interface}{'-out' if leaving else ''}\")",
        "            pass",
        "tests/kernel/network/test_hold.py",
    ),
    Rule(
        "a skeleton dies with its tracer",
        "engine/native/src/birth.h",
        "(PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD",
        "(PTRACE_O_TRACESYSGOOD",
        "tests/kernel/test_skeleton.py",
    ),
    Rule(
        "a copy that dies says nothing",
        "engine/phaul_engine/silence.py",
        "    return hush(tree)\n",
        '    return ""\n',
        "tests/kernel/test_silence.py",
    ),
    Rule(
        "shared mappings of files are not written at the destination",
        "engine/phaul_engine/memory/areas.py",
        "    return Care.SHARED_MEMORY if memory else Care.SHARED_FILE",
        "    return Care.SHARED_MEMORY if memory else Care.PRIVATE_FILE",
        "tests/unit/memory/test_sent_areas.py",
    ),
    Rule(
        "an injected program goes home by itself",
        "engine/native/src/inject.c",
        "				  .patience_ms = (uint32_t) patience_ms };",
        "				  .patience_ms = 0 };",
        "tests/kernel/test_target.py tests/faults/test_injection.py",
    ),
    Rule(
        "an injection survives its tracer",
        "engine/native/src/inject.c",
        "	if (write_spare_frame (job, err) < 0)\n		return -1;\n	const uint64_t arena_args",
        "	const uint64_t arena_args",
        "tests/faults/test_injection.py",
    ),
)


def broken(rule: Rule) -> bool:
    """Whether a test notices that the rule is broken."""
    path = ROOT / rule.file
    before = path.read_text()
    if before.count(rule.old) != 1:
        raise SystemExit(
            f"{rule.name}: {rule.file} has changed; {rule.old!r} stands there {before.count(rule.old)} times"
        )
    path.write_text(before.replace(rule.old, rule.new))
    try:
        words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *rule.tests.split()]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        path.write_text(before)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{rule.name}: {failed[0] if failed else 'NOBODY NOTICES: ' + done.stdout[-500:]}", flush=True)
    return bool(failed)


def main(words: list[str]) -> int:
    """The command line."""
    chosen = [rule for rule in RULES if not words or any(word in rule.name for word in words)]
    begun = time.monotonic()
    unnoticed = [rule for rule in chosen if not broken(rule)]
    print(f"{len(chosen)} rules broken, {len(unnoticed)} without notice, {time.monotonic() - begun:.0f} s")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
