"""Copies of a program that must die without a word, because the other one lives.

A thread that dies still writes: the kernel walks its robust list and marks every lock on it as its owner's death, and
zeroes its tid word (get_robust_list(2), set_tid_address(2); kernel/futex/core.c, kernel/fork.c). In memory that others
see - a file that both copies map - that is a lie about the copy that lives: the same thread holds the lock there.

So the kernel is made to forget both, from inside, before the copy is killed. What is frozen can run nothing: it is
seized with EXITKILL first, and only then thawed, so that from there on it can do nothing but die.
"""

from __future__ import annotations

import contextlib
import os

from .cgroup import Hold
from .errors import EngineError, GoneError
from .gadgets import find_gadgets
from .proc.access import open_process
from .proc.maps import read_maps
from .program import Program
from .syscalls import NR
from .target import Process, Tracer, Tree, stop_doomed

_LIST_HEAD = 24  # sizeof (struct robust_list_head)
_STOP_MS = 5000


def hush(tree: Tree) -> str:
    """Make a stopped tree, which is about to be killed, forget its robust lists and tid words, wherever others may see
    what is written there. Returns what did not work, empty if nothing."""
    problems = []
    noisy = [process for process in tree.processes.values() if not process.zombie and _shares_memory(process.pid)]
    if noisy:
        tree.read_states()
    for process in noisy:
        try:
            _forget(tree, process)
        except GoneError:
            continue
        except EngineError as error:
            problems.append(f"pid {process.pid} could not be silenced: {error}")
    return "; ".join(problems)


def kill(hold: Hold, timeout: float) -> str:
    """Kill all that lives in a frozen cgroup, silently; returns when nothing lives, and what did not work: then the
    dead have perhaps spoken.

    OccupiedError after `timeout` seconds, HoldGoneError where there is no such cgroup any more.
    """
    members = hold.members()
    problem = ""
    with contextlib.ExitStack() as stack:
        try:
            if any(_shares_memory(pid) for pid in members):
                tracer = stack.enter_context(Tracer())
                tree = stack.enter_context(stop_doomed(tracer, sorted(members), timeout_ms=_STOP_MS))
                problem = _hush_held(hold, tree)
                tree.kill()
        except GoneError:
            problem = ""
        except EngineError as error:
            problem = f"{hold.path} could not be silenced: {error}"
        hold.kill(timeout)
    return problem


def _hush_held(hold: Hold, tree: Tree) -> str:
    if not hold.members() <= tree.processes.keys():
        return f"{hold.path} holds tasks that could not be traced, and so not be silenced"
    hold.thaw()
    return hush(tree)


def _shares_memory(pid: int) -> bool:
    """Whether others may see what a process writes. Memory that only its own tree shares dies with it, but from here
    that cannot be told."""
    with contextlib.suppress(GoneError):
        proc = open_process(pid)
        try:
            return any(area.shared and not area.special for area in read_maps(proc))
        finally:
            os.close(proc)
    return False


def _forget(tree: Tree, process: Process) -> None:
    areas = process.areas()
    program = Program()
    program.call(NR.set_robust_list, 0, _LIST_HEAD)
    program.call(NR.set_tid_address, 0)
    threads = [thread.tid for thread in process.threads if not thread.zombie]
    with tree.interpreter(process, find_gadgets(process.pid, areas), areas) as interpreter:
        interpreter.run(dict.fromkeys(threads, program))
