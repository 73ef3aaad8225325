"""What an agent at the source does to a program, again and again, to be killed in the middle: with deadly.c preloaded.

    LD_PRELOAD=deadly.so python doomed_agent.py < requests

A request is a line of JSON: {"pid", "act": "look" or "ask", "at", "steps"}, as for `deadly_arm`. Each is answered by a
line of two words: "acts" and how many there were, or "killed" and the steps made before.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

from phaul_engine.departure import Departure
from phaul_engine.gadgets import find_gadgets
from phaul_engine.program import Program
from phaul_engine.syscalls import NR
from phaul_engine.target import Tracer, Visit, stop_tree

_DEADLY = ctypes.CDLL(None)
_PATIENT = 5000


def look(pid: int) -> None:
    """A survey, and the freeze: all that the source ever does inside a program."""
    with Tracer() as tracer, Departure(tracer, pid) as departure:
        departure.survey(timeout_ms=_PATIENT)
        departure.freeze(timeout_ms=_PATIENT)
        departure.collect(hold=lambda: None, seal=lambda _: None, note=lambda _: None)
        departure.let_go()


def ask(pid: int) -> None:
    """One question, small enough to be interrupted at each of its instructions."""
    with Tracer() as tracer, stop_tree(tracer, pid, timeout_ms=_PATIENT) as tree:
        process = tree.processes[pid]
        tree.read_states()
        areas = process.areas()
        program = Program()
        program.call(NR.getpid)
        tree.ask([Visit(process, find_gadgets(pid, areas), areas, {process.driver.tid: program})])


def main() -> None:
    """Answer requests."""
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _DEADLY.deadly_arm(ctypes.c_long(request["at"]), ctypes.c_long(request["steps"]), writer)
            {"look": look, "ask": ask}[request["act"]](request["pid"])
            os.write(writer, str(_DEADLY.deadly_count()).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        print({0: "acts", 9: "killed"}.get(status, f"status {status}"), said, flush=True)


if __name__ == "__main__":
    main()
