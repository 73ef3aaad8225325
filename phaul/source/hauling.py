"""The haul of directories as the works of the source need it: nothing at all where none go along."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from phaul_engine.errors import EngineError
from phaul_engine.proc.mountinfo import own_mounts

from phaul import events
from phaul.driver import blocking
from phaul.events import Event
from phaul.haul import beside, layers
from phaul.haul.leaving import Leaving

_BRIEF = 0.05  # seconds of a last round that may keep the loop waiting


class Hauling:
    """The directories `trees`; those in `rooms` are the runtime's, and stay where they are."""

    def __init__(
        self,
        trees: tuple[str, ...],
        report: Callable[[Event], None],
        *,
        rooms: tuple[str, ...],
        by_rsync: bool,
        bandwidth: int,
    ) -> None:
        self._trees = trees
        self._rooms = rooms
        self._report = report
        self._by_rsync = by_rsync
        self._bandwidth = bandwidth
        self._leaving: Leaving | None = None
        self._overlays = layers.among((path for path in trees if path not in rooms), own_mounts())

    @property
    def told(self) -> dict[str, Any]:
        """What the destination has to know."""
        return {"hauled": self._trees, "layers": {path: asdict(known) for path, known in self._overlays.items()}}

    @property
    def active(self) -> bool:
        """Whether anything goes along."""
        return bool(self._trees)

    def begin(self, send: Callable[[bytes], None], alive: Callable[[], None]) -> None:
        """There is a row: `send` takes letters, `alive` is told while something goes on."""
        self._leaving = Leaving(
            self._trees,
            send,
            alive=alive,
            bandwidth=self._bandwidth,
            by_rsync=self._by_rsync,
            overlays=self._overlays,
        )

    def close(self) -> None:
        """Let go of the directories."""
        if self._leaving is not None:
            self._leaving.close()

    def stop(self) -> None:
        """Whoever is in a call comes out of it soon, with an error."""
        if self._leaving is not None:
            self._leaving.stop()

    def take(self, body: bytes) -> None:
        """A word of the destination."""
        if self._leaving is None:
            raise EngineError("the destination speaks of files, and none go along")
        self._leaving.take(body)

    def first(self) -> None:
        """Everything."""
        if self._leaving is not None:
            self._leaving.first()
            self._report(events.Hauled(self._leaving.sent, self._leaving.seconds * 1000))

    def complete(self) -> None:
        """What lives on the directories can be made there."""
        if self._leaving is not None:
            self._leaving.complete()

    def round(self) -> None:
        """What was touched since the last round; it is there when this returns."""
        if self._leaving is not None:
            self._leaving.round()

    def predict(self, pids: Iterable[int]) -> float:
        """Seconds that the last round would take now, of a tree of these tasks."""
        return self._leaving.predict(pids) if self._leaving is not None else 0.0

    async def last(self, pids: Iterable[int] = ()) -> None:
        """In the freeze: what is left. Done here if it does not take long: another thread would have to wait for its
        turn."""
        if self._leaving is None:
            return
        leaving = self._leaving
        if leaving.predict(pids) < _BRIEF:
            leaving.last()
        else:
            await blocking(leaving.last)

    def left_entries(self, pids: Iterable[int]) -> list[dict[str, Any]]:
        """For the journal: what is to be done with the directories when the tree is dead here."""
        left = [path for path in self._trees if path not in self._rooms and path not in self._overlays]
        parts = [path for known in self._overlays.values() for path in (known.upper, known.work)]
        left = [*(path for path in parts if not any(layers.below(path, tree) for tree in left)), *left]
        return [beside.left_entry(left, pids, self._overlays)] if left else []
