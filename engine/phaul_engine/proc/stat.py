"""/proc/PID/stat (proc_pid_stat(5), fs/proc/array.c)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from phaul_engine.errors import EngineError

from .access import open_process, read_bytes


@dataclass(frozen=True)
class Stat:
    """What is used of a task's stat line.

    `pid`, `ppid`, `pgrp`, `session` are numbers of the reader's pid namespace, 0 where there is none in it. `start`
    is the start time in clock ticks after boot, which together with the pid names a process for good.
    `exit_signal` is what its parent gets at its end. Addresses are 0 unless the reader may ptrace the task.
    """

    pid: int
    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    tty: int
    tty_pgrp: int
    flags: int
    priority: int
    nice: int
    threads: int
    start: int
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    rt_priority: int
    policy: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int

    @property
    def dead(self) -> bool:
        """Whether it is a zombie, or beyond."""
        return self.state in "ZXx"


# Numbers of fields behind the state (field 3 of proc_pid_stat(5)), in the order of the class.
_AFTER_STATE = (4, 5, 6, 7, 8, 9, 18, 19, 20, 22, 26, 27, 28, 38, 40, 41, 45, 46, 47, 48, 49, 50, 51, 52)


def read_stat(proc: int) -> Stat:
    """The stat of a process or thread directory."""
    return parse_stat(read_bytes(proc, "stat"))


def stat_of(pid: int) -> Stat:
    """The stat of a process by its number. GoneError if there is none."""
    proc = open_process(pid)
    try:
        return read_stat(proc)
    finally:
        os.close(proc)


def parse_stat(text: bytes) -> Stat:
    """Parse a stat line. The name in parentheses may itself hold parentheses, spaces and newlines."""
    head, paren, tail = text.rpartition(b")")
    pid, _, comm = head.partition(b" (")
    fields = tail.split()
    if not paren or len(fields) < 50:
        raise EngineError(f"stat in an unknown form: {text[:200]!r}")
    try:
        state, *numbers = fields[0].decode("ascii"), *(int(fields[number - 3]) for number in _AFTER_STATE)
        return Stat(int(pid), comm.decode("utf-8", "surrogateescape"), state, *numbers)
    except ValueError as error:
        raise EngineError(f"stat in an unknown form: {text[:200]!r}") from error
