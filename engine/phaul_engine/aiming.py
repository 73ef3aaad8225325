"""Numbers for tasks whose parents may not choose them (clone3(2), set_tid).

The kernel gives the next free number after the last, and who has the right to may say what was the last one
(proc_sys_kernel(5), ns_last_pid): who is in the pid namespace, and privileged in the user namespace that it belongs to.
On a host others take numbers too. So the parent stands right before its clone3, looking at a word in the arena, while
the last number is written: a few microseconds are between the two.
"""

from __future__ import annotations

import os
import time

from .arena import Arena
from .namespaces import last_pid
from .program import Buf, Program

_PATIENCE = 5.0  # seconds


class Aim:
    """For a program in a slot of an arena, whose next task is to get a number of the engine's own pid namespace."""

    def __init__(self, arena: Arena, slot: int, number: int) -> None:
        self._arena = arena
        self._slot = slot
        self._text = last_pid.before(number)
        self._words = Buf(0, 0)

    def stand(self, program: Program) -> None:
        """Have a program say that it is there, and then wait, awake."""
        self._words = program.space(16)
        seen, waiting = program.register(), program.register()
        program.store(self._words, 1)
        loop = program.here()
        program.load(seen, self._words.at(8))
        program.less(waiting, seen, 1)
        program.jump_if(loop, waiting)

    def shoot(self) -> None:
        """While it runs: once it waits, say which number comes next, and let it go on."""
        words = self._arena.words(self._slot, self._words)
        fd = last_pid.open_last()
        try:
            deadline = time.monotonic() + _PATIENCE
            while not words[0] and time.monotonic() < deadline:  # if it fails, that is told when it ends
                time.sleep(0)
            os.write(fd, self._text)
        finally:
            words[1] = 1
            os.close(fd)


def wait_until_free(number: int, seconds: float) -> None:
    """Until nobody here has a number, or so many seconds have passed."""
    deadline = time.monotonic() + seconds
    while os.path.exists(f"/proc/{number}") and time.monotonic() < deadline:
        time.sleep(0.005)
