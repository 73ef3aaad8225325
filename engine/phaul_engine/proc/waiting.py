"""What a sleeping thread waits in, and since when: /proc/PID/task/TID/{syscall,wchan,sched} (proc_pid_syscall(5), Linux
kernel/sched/debug.c)."""

from __future__ import annotations

import contextlib
import os
import time
from typing import NamedTuple

from phaul_engine.errors import EngineError

from .access import open_at, read_bytes, read_text

_AFTER_NAME_CPU = 36  # field 39 of proc_pid_stat(5), counted from the state
_MILLION = 1_000_000


class Waiting(NamedTuple):
    """The system call a thread sleeps in: number, arguments, and the registers it comes back with."""

    nr: int
    args: tuple[int, ...]
    sp: int
    ip: int


class LastRun(NamedTuple):
    """When a thread ran last, in nanoseconds of the run queue clock of `cpu`; `switches` is how often it has given the
    processor away (until then)."""

    time: int
    switches: int
    cpu: int


def read_waiting(proc: int, tid: int) -> Waiting | None:
    """None if it runs, or sleeps elsewhere than in a system call."""
    words = read_text(proc, f"task/{tid}/syscall").split()
    if len(words) != 9:
        return None
    nr, *rest = (int(word, 0) for word in words)
    return Waiting(nr, tuple(rest[:6]), rest[6], rest[7])


def read_wait_channel(proc: int, tid: int) -> str:
    """The kernel function a thread sleeps in, "" where the kernel does not tell."""
    name = read_text(proc, f"task/{tid}/wchan").strip()
    return "" if name == "0" else name


def read_last_run(proc: int, tid: int) -> LastRun | None:
    """None where the kernel does not tell (CONFIG_SCHED_DEBUG, needed before Linux 6.15)."""
    try:
        when, switches = _scheduling(read_text(proc, f"task/{tid}/sched"))
        stat = read_bytes(proc, f"task/{tid}/stat").rpartition(b")")[2].split()
        return LastRun(when, switches, int(stat[_AFTER_NAME_CPU]))
    except (EngineError, KeyError, ValueError, IndexError):
        return None


def read_switches(proc: int, tid: int) -> int:
    """How often a thread has given the processor away."""
    for line in read_bytes(proc, f"task/{tid}/status").splitlines():
        if line.startswith(b"voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise EngineError("the kernel does not tell how often a thread has given the processor away")


def read_runs(proc: int, tid: int) -> int:
    """How often a thread has been given a processor, 0 where the kernel does not count (CONFIG_SCHED_INFO). This is
    cheaper than `read_switches`, but counts also what it was interrupted for."""
    try:
        return int(read_bytes(proc, f"task/{tid}/schedstat").split()[2])
    except (EngineError, IndexError, ValueError):
        return 0


def clock_ahead(cpu: int) -> int:
    """By how many nanoseconds our CLOCK_MONOTONIC is ahead of a processor's run queue clock.

    That clock stands while the processor serves interrupts or another guest of its host, so what is told holds for
    now. The calling thread goes to that processor for a moment, if it may.
    """
    allowed = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu} & allowed)
        os.sched_yield()  # our own last run is now
        now = time.monotonic_ns()
        thread = open_at(None, "/proc/thread-self", os.O_PATH | os.O_DIRECTORY)
        try:
            return now - _scheduling(read_text(thread, "sched"))[0]
        finally:
            os.close(thread)
    finally:
        os.sched_setaffinity(0, allowed)


def _scheduling(text: str) -> tuple[int, int]:
    fields = {name.strip(): value.strip() for name, colon, value in (line.partition(":") for line in text.splitlines())}
    milliseconds, _, millionths = fields["se.exec_start"].partition(".")
    return int(milliseconds) * _MILLION + int(millionths), int(fields["nr_voluntary_switches"])
