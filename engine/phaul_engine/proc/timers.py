"""/proc/PID/timers: POSIX timers of a process (timer_create(2), fs/proc/base.c)."""

from __future__ import annotations

from dataclasses import dataclass

from phaul_engine.errors import EngineError

from .access import read_text

SIGEV_SIGNAL = 0
SIGEV_NONE = 1
SIGEV_THREAD = 2
SIGEV_THREAD_ID = 4

_NOTIFY = {"signal": SIGEV_SIGNAL, "none": SIGEV_NONE, "thread": SIGEV_THREAD}


@dataclass(frozen=True)
class PosixTimer:
    """How one POSIX timer was created. Its time, interval and overrun only the process itself can tell.

    `value` is the sigev_value's 64 bits, `notify` one of SIGEV_. `target` is the process or, with SIGEV_THREAD_ID,
    the thread that is notified, in the pid namespace of the mounted procfs.
    """

    id: int
    signo: int
    value: int
    notify: int
    target: int
    clock: int


def read_timers(proc: int) -> tuple[PosixTimer, ...]:
    """The POSIX timers of a process, as the kernel lists them."""
    return parse_timers(read_text(proc, "timers"))


def parse_timers(text: str) -> tuple[PosixTimer, ...]:
    """Parse a timers text: four lines a timer, from Linux 6.16 on maybe more, which are ignored."""
    records: list[dict[str, str]] = []
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "ID":
            records.append({})
        if not records:
            raise EngineError(f"timers in an unknown form: {text[:200]!r}")
        records[-1][key] = value.strip()
    try:
        return tuple(_timer(record) for record in records)
    except (KeyError, ValueError) as error:
        raise EngineError(f"timers in an unknown form ({error!r}): {text[:200]!r}") from error


def _timer(record: dict[str, str]) -> PosixTimer:
    signo, value = record["signal"].split("/")
    how, target = record["notify"].split("/")
    scope, number = target.split(".")
    notify = _NOTIFY[how] | (SIGEV_THREAD_ID if scope == "tid" else 0)
    return PosixTimer(int(record["ID"]), int(signo), int(value, 16), notify, int(number), int(record["ClockID"]))
