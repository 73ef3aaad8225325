"""An agent in a hurry: while the program stands still, nothing else on the host comes first.

Every thread of the agent runs as SCHED_FIFO, so that it neither waits behind other programs nor for timer slack
(nanosleep(2), "timer slack" in prctl(2)); children and new
threads are ordinary again (SCHED_RESET_ON_FORK in sched(7)).
The cyclic garbage collector stands still too, and no page of the agent faults because it has forked. Without the
privilege (CAP_SYS_NICE), or where the cgroup grants no real-time budget, that is all: the freeze is longer then on a
busy host.
"""

from __future__ import annotations

import contextlib
import gc
import os

from phaul_engine import own_memory

_PRIORITY = 1


class Urgency:
    """Begun and ended any number of times. `begin` costs some milliseconds: before the freeze, not inside it."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, os.sched_param]] = {}
        self._urgent = False

    def begin(self) -> None:
        """From here on it is urgent."""
        if self._urgent:
            return
        self._urgent = True
        gc.collect(0)
        gc.disable()
        own_memory.make_ready()
        for tid in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(OSError):  # it ended, or we may not
                before = os.sched_getscheduler(tid), os.sched_getparam(tid)
                os.sched_setscheduler(tid, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
                self._before[tid] = before

    def end(self) -> None:
        """No hurry any more: as it was before."""
        if not self._urgent:
            return
        self._urgent = False
        for tid, (policy, parameters) in self._before.items():
            with contextlib.suppress(OSError):
                os.sched_setscheduler(tid, policy, parameters)
        self._before.clear()
        gc.enable()
