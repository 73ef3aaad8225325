"""Directories that come along, beside the protocol's works: taken while the tree is built and in all rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from phaul_engine.errors import EngineError

from phaul.haul.arriving import Arriving
from phaul.haul.layers import Layers
from phaul.haul.places import NOWHERE, Places

_SYNC_PATIENCE = 15.0  # seconds for directories to come to the disk, when the program runs


class Directories:
    """Those of one migration, or none."""

    def __init__(self) -> None:
        self._arriving: Arriving | None = None
        self._room = asyncio.Event()  # there is a place for them
        self._there = asyncio.Event()  # they have come, so far
        self._syncing: asyncio.Future[None] | None = None

    def begin(
        self,
        paths: tuple[str, ...],
        migration: str,
        reply: Callable[[bytes], None],
        rooms: Mapping[str, str],
        overlays: Mapping[str, Layers],
    ) -> list[dict[str, Any]]:
        """These will come. Returned is what the journal must hold before they are made."""
        self._arriving = Arriving(paths, migration, reply, rooms, overlays)
        return self._arriving.entries()

    def make(self) -> None:
        """Make their places."""
        if self._arriving is not None:
            self._arriving.make()

    async def have_come(self) -> None:
        """Let them in, and wait for them."""
        if self._arriving is not None:
            self._room.set()
            await self._there.wait()

    async def take(self, body: bytes, *, hurried: bool) -> None:
        """Something of them. What takes long is done beside the loop, but in a freeze."""
        await self._room.wait()
        arriving = self._arriving
        if arriving is None:
            raise EngineError("the source sent files that nobody waits for")
        if hurried:
            arriving.take(body)
        else:
            await asyncio.to_thread(arriving.take, body)
        if arriving.complete and not self._there.is_set():
            self._there.set()
            self._syncing = asyncio.ensure_future(asyncio.to_thread(arriving.sync))
            self._syncing.add_done_callback(lambda task: task.cancelled() or task.exception())  # waited for in the end

    async def sync(self) -> str:
        """Bring them to the disk; why they may not be there. The first round has had the time of all others for that;
        the rest is little. A disk that takes longer keeps the source waiting no more: the program runs here in any
        case."""
        if self._arriving is None or self._syncing is None:
            return ""
        last = asyncio.ensure_future(asyncio.to_thread(self._arriving.sync))
        done, late = await asyncio.wait({self._syncing, last}, timeout=_SYNC_PATIENCE)
        problems = [str(one.exception()) for one in done if one.exception() is not None]
        if problems:
            return problems[0]
        return f"it takes longer than {_SYNC_PATIENCE:.0f} s" if late else ""

    @property
    def places(self) -> Places:
        """Where they are until they have their names."""
        return self._arriving.places if self._arriving is not None else NOWHERE

    def publish(self) -> None:
        """Give them their names. OSError names the one that keeps the name it has."""
        if self._arriving is not None:
            self._arriving.publish()

    def close(self) -> None:
        """Close what is open."""
        if self._arriving is not None:
            self._arriving.close()
