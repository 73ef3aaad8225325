"""The parts of the freeze, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from phaul import events
from phaul.events import Event


class Phases:
    """Times the parts of the freeze, and reports them when it is over: not inside it."""

    def __init__(self, report: Callable[[Event], None]) -> None:
        self._report = report
        self._marks: list[tuple[str, float]] = []
        self._last = time.monotonic()

    def begin(self, at: float | None = None) -> float:
        """The first part begins, or has begun; when, by CLOCK_MONOTONIC."""
        self._last = time.monotonic() if at is None else at
        return self._last

    def over(self, name: str) -> None:
        """A part has ended."""
        now = time.monotonic()
        self._marks.append((name, now - self._last))
        self._last = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for name, seconds in self._marks:
            self._report(events.Phase(name, seconds * 1000))
