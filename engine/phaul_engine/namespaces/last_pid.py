"""What was the last number given to a task of a pid namespace (proc_sys_kernel(5), ns_last_pid): who may say so chooses
the next. To be called in a process of its own, too (`inside`)."""

from __future__ import annotations

import os

_LAST = "/proc/sys/kernel/ns_last_pid"


def open_last() -> int:
    """What the number before the next is written to; of the pid namespace of whoever writes."""
    return os.open(_LAST, os.O_WRONLY | os.O_CLOEXEC)


def before(number: int) -> bytes:
    """What is written so that a number comes next."""
    return str(number - 1).encode()


def say(number: int) -> None:
    """Have a number come next, here."""
    fd = open_last()
    try:
        os.write(fd, before(number))
    finally:
        os.close(fd)
