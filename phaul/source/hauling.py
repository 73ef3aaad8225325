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
from phaul.haul import beside, btrfs, layers
from phaul.haul.leaving import Leaving
from phaul.journal import Undo
from phaul.source.orders import Orders

_BRIEF = 0.05  # seconds of a last round that may keep the loop waiting


class Hauling:
    """The directories that the operator's `orders` name."""

    def __init__(self, orders: Orders, report: Callable[[Event], None]) -> None:
        self._orders = orders
        self._trees = orders.hauled
        self._report = report
        self._leaving: Leaving | None = None
        self._overlays = layers.among((path for path in self._trees if path not in orders.rooms), own_mounts())

    @property
    def told(self) -> dict[str, Any]:
        """What the destination has to know."""
        return {"hauled": self._trees, "layers": {path: asdict(known) for path, known in self._overlays.items()}}

    @property
    def active(self) -> bool:
        """Whether anything goes along."""
        return bool(self._trees)

    def begin(self, migration: str, send: Callable[[bytes], None], alive: Callable[[], None]) -> tuple[Undo, ...]:
        """`send` takes letters, `alive` is told while something goes on. Returned is what the row must hold before
        the first round."""
        self._leaving = Leaving(
            self._trees,
            send,
            alive=alive,
            bandwidth=self._orders.wanted.bandwidth,
            by_rsync=self._orders.rsync,
            overlays=self._overlays,
            flagged=self._orders.flagged,
            subvolumes={path: btrfs.prefix(path, migration) for path in self._orders.subvolumes},
        )
        return tuple(Undo(**btrfs.entry(path, migration)) for path in self._orders.subvolumes)

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
        left = [path for path in self._trees if path not in self._orders.rooms and path not in self._overlays]
        parts = [path for known in self._overlays.values() for path in (known.upper, known.work)]
        left = [*(path for path in parts if not any(layers.below(path, tree) for tree in left)), *left]
        return [beside.left_entry(left, pids, self._overlays)] if left else []
