"""The network of simulated migrations: connections whose letters take their time, wait for a partition to heal, or are
lost with a cut."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from phaul_engine.errors import EngineError

from phaul.migration import Message
from phaul.transport.direct import Kind, Letter

if TYPE_CHECKING:
    from tests.unit.migration.simulation import Simulation


class End:
    """One end of a connection. `handler` is told of letters where nobody reads."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self._inbox: deque[Letter] = deque()
        self._came = asyncio.Event()
        self._last = 0.0
        self.cut = False
        self.other: End | None = None
        self.handler: Callable[[Letter], None] | None = None

    def has_news(self) -> bool:
        """Whether there is anything to take, or never will be."""
        return self.cut or bool(self._inbox)

    def send_protocol(self, message: Message, why: str = "") -> None:
        if self.cut:
            raise EngineError("the connection is gone")
        letter = Letter(Kind.PROTOCOL, json.dumps({"message": message.value, "why": why}).encode())
        arrives = max(self._last, self._world.arrival())
        self._last = arrives
        self._world.clock.call_at(arrives, self._deliver, letter)

    def _deliver(self, letter: Letter) -> None:
        other = self.other
        if other is None or other.cut:
            return
        if self._world.partitioned:
            self._world.clock.call_at(self._world.heals, self._deliver, letter)
            return
        if other.handler is not None:
            other.handler(letter)
        else:
            other._inbox.append(letter)
            other._came.set()

    async def next(self) -> Letter:
        while not self._inbox:
            if self.cut:
                raise EngineError("the peer closed the connection")
            self._came.clear()
            await self._came.wait()
        return self._inbox.popleft()

    def receive(self, timeout: float) -> Letter:
        """The clock stands meanwhile: only what is there already."""
        if not self._inbox:
            raise EngineError("nothing has come")
        return self._inbox.popleft()

    def take(self) -> Letter | None:
        return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        """Both ends see it; what is on the way is lost."""
        for end in (self, self.other):
            if end is not None:
                end.cut = True
                end._came.set()
