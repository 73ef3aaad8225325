"""The sending side of a page stream: a store for a dump whose pages go to another host."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from .images.kinds import Ident
from .images.pages import PAGE_SIZE, Flag
from .memory.extents import Extents, Place
from .memory.files import dump_pages
from .page_store import PageStore
from .page_wire import Command, Head, PageStreamError, Wire, whose

_BATCH = 8192  # pages that are read before they are sent


class RemoteStore(PageStore):
    """Sends pages to a page server, CRIU's or ours. Every page is sent: what the server has of the round before
    cannot be compared with from here."""

    def __init__(self, wire: Wire) -> None:
        super().__init__()
        self._wire = wire
        self._buffer = os.memfd_create("phaul-pages", os.MFD_CLOEXEC)

    def put(self, kind: str, ident: Ident, place: Place, extents: Extents) -> None:
        number = whose(kind, ident)
        self._wire.send_head(Head(Command.OPEN2, 0, 0, 0, number))
        if len(self._wire.receive(1)) != 1:
            raise PageStreamError("the page server closed the connection")
        for batch in _batches(extents):
            offset = 0
            found = dump_pages(place, batch, self._buffer)
            for start, pages, _ in found:
                self._wire.send_head(Head(Command.ADD_F, Flag.PRESENT, pages, start, number))
                self._wire.send_file(self._buffer, offset, pages * PAGE_SIZE)
                offset += pages * PAGE_SIZE
            self.stored.pages += offset // PAGE_SIZE

    def finish(self) -> None:
        self._wire.send_head(Head(Command.CLOSE, 0, 0, 0, 0))
        answer = self._wire.receive(4)
        if len(answer) != 4 or struct.unpack("<i", answer)[0] != 0:
            raise PageStreamError("the page server did not take the pages", advice="see what it says where it runs")

    def close(self) -> None:
        """Close the connection."""
        self._wire.close()
        os.close(self._buffer)


def _batches(extents: Extents) -> Iterator[Extents]:
    """The same runs in lists of `_BATCH` pages at most."""
    batch, room = Extents(), _BATCH
    for start, pages, kind in extents:
        at, left = start, pages
        while left:
            part = min(left, room)
            batch.add(at, part, kind)
            at, left, room = at + part * PAGE_SIZE, left - part, room - part
            if room == 0:
                yield batch
                batch, room = Extents(), _BATCH
    if len(batch):
        yield batch
