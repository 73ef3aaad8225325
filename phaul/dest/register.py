"""The arbiter's register of a migration, as the destination uses it: one claim, in the freeze."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from phaul_engine.errors import EngineError

from phaul import config
from phaul.errors import ArbiterError, OverruledError

if TYPE_CHECKING:
    from phaul.arbiter import Arbiter


class Register:
    """One that the source has made; `find` it first."""

    def __init__(self, migration: str) -> None:
        self._migration = migration
        self._arbiter: Arbiter | None = None
        self._warming: asyncio.Task[None] | None = None
        self.overruled = False  # the source has had the arbiter decide: it waits for no answer

    @property
    def found(self) -> bool:
        """Whether an arbiter decides about this migration."""
        return self._arbiter is not None

    def find(self) -> dict[str, Any]:
        """Connect to it; what the journal must hold of it. EngineError where this host's arbiter is another."""
        from phaul.arbiter import OPEN, Arbiter

        settings, file = config.load().arbiter, config.SYSTEM_FILE
        if not settings.endpoints:
            raise EngineError("the source has an arbiter, and this host none", advice=f"[arbiter] in {file}")
        self._arbiter = Arbiter(settings, self._migration)
        if self._arbiter.says() != OPEN:
            what = "this host's arbiter knows nothing of the migration"
            raise EngineError(what, advice=f"[arbiter] in {file} must be the same on both hosts")
        return settings.model_dump(mode="json")

    def warm(self) -> None:
        """Have a connection that stands when the freeze needs it."""
        self._warming = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        if self._arbiter is not None:
            with contextlib.suppress(ArbiterError):
                await asyncio.to_thread(self._arbiter.says)

    async def claim(self) -> None:
        """One round trip to the arbiter, in the freeze: nothing else has anything to do meanwhile."""
        if self._arbiter is None:
            raise EngineError("there is no arbiter")
        if self._warming is not None:
            await asyncio.wait({self._warming})  # called off, a claim must not take it along: the next waits for it too
        try:
            self._arbiter.decide("resumed")
        except OverruledError:
            self.overruled = True
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._arbiter is not None:
            self._arbiter.close()
