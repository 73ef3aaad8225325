"""A loop for asyncio without a world: one callback at a time, and time jumps to the next one."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any


class Clock(asyncio.BaseEventLoop):
    """A loop without a world: time passes when nothing else happens."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.set_exception_handler(lambda loop, context: None)  # tasks of killed agents

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        """One callback; may be called by one. BaseEventLoop's own keeps count of several."""
        queue: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        ready: deque[asyncio.Handle] = self._ready  # type: ignore[attr-defined]
        while queue and queue[0].cancelled():
            heapq.heappop(queue)._scheduled = False  # type: ignore[attr-defined]
        if not ready and not queue:
            raise AssertionError("nothing will ever happen again")
        if not ready:
            self.now = max(self.now, queue[0].when())
        while queue and queue[0].when() <= self.now:
            timer = heapq.heappop(queue)
            timer._scheduled = False  # type: ignore[attr-defined]
            ready.append(timer)
        handle = ready.popleft()
        if not handle.cancelled():
            handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nobody counts."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def pump(self, until: float, condition: Callable[[], object]) -> bool:
        """Let the world go on from inside of a callback."""
        self.call_at(until, lambda: None)
        while not condition() and self.now < until:
            self._run_once()
        return bool(condition())
