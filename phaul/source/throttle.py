"""Slow a program down so that rounds converge: its cgroup is frozen for a part of every short period."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Self

from phaul_engine.cgroup import FreezeTimeoutError, Hold
from phaul_engine.errors import EngineError

STEPS = (70, 45, 25, 12, 6)  # percent of the time that the program runs, one step after the other
_PERIOD = 0.02  # seconds: short against what a client waits for, long against the 0.1 ms of a freeze and a thaw
_STOP_TIMEOUT = 0.01  # seconds: who does not stop that fast is let run in this period


class Throttle:
    """While in its `with`, the program runs `percent` of the time. It runs freely whatever ends the `with`; if we are
    killed in it, recovery thaws the cgroup."""

    def __init__(self, hold: Hold, percent: int) -> None:
        self._hold = hold
        self._running = _PERIOD * percent / 100
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="throttle", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(EngineError, OSError):  # a cgroup that is gone has nobody to slow down
            try:
                while not self._over.wait(self._running):
                    with contextlib.suppress(FreezeTimeoutError):
                        self._hold.freeze(_STOP_TIMEOUT)
                        self._over.wait(_PERIOD - self._running)
                    self._hold.thaw()
            finally:
                self._hold.thaw()
