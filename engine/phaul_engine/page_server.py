"""The receiving side of a page stream: pagemaps and pages of a dump elsewhere, written into a directory of images.

It serves one dump. What came is there when the client has said that it is done; a client that goes away before has
sent nothing that counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from .images.directory import ImageDirectory
from .images.kinds import Ident
from .images.pages import PAGE_SIZE, Flag, PageImages, PageWriter
from .page_store import Stored
from .page_wire import Command, Head, HeadReader, PageStreamError, Wire, owner

_FIRST_ID = 0x10001  # of pages files: a local dump into the same directory begins with 1
_MOST_IMAGES = 1 << 20
_KNOWN_FLAGS = int(Flag.PARENT | Flag.LAZY | Flag.PRESENT)


class PageServer:
    """One session. `parent` are the pages of the round before."""

    def __init__(self, wire: Wire, directory: ImageDirectory, parent: PageImages | None = None) -> None:
        self.stored = Stored()
        self._wire = wire
        self._directory = directory
        self._parent = parent
        self._images = 0
        self._writer: PageWriter | None = None
        self._known: Iterator[tuple[int, int]] = iter(())
        self._span = (0, 0)

    def serve(self) -> None:
        """Until the client is done. PageStreamError or ImageError if it says something impossible, or goes away."""
        reader = HeadReader(self._wire)
        try:
            while (head := reader.read()) is not None:
                if head.command in (Command.CLOSE, Command.FORCE_CLOSE):
                    self._finish()
                    self._wire.send(struct.pack("<i", 0))
                    return
                self._take(head)
        finally:
            if self._writer is not None:
                self._writer.close()
        raise PageStreamError(
            "the client went away before it was done", advice="what came of its pages is not complete"
        )

    def _take(self, head: Head) -> None:
        match head.command:
            case Command.OPEN:
                self._open(head)
            case Command.OPEN2:
                self._wire.send(bytes([self._open(head)]))
            case Command.PARENT:
                self._wire.send(struct.pack("<i", self._has(*owner(head.whose))))
            case Command.ADD:
                self._add(head, Flag.PRESENT)
            case Command.HOLE:
                self._add(head, Flag.PARENT)
            case Command.ADD_F:
                if head.flags & ~_KNOWN_FLAGS:
                    raise PageStreamError(f"the client sends pages with flags {head.flags:#x}")
                self._add(head, head.flags)
            case _:
                raise PageStreamError(f"the client sends command {head.command:#x}, which is not for a page server")

    def _has(self, kind: str, ident: Ident) -> bool:
        return self._parent is not None and self._parent.has(kind, ident)

    def _open(self, head: Head) -> bool:
        """Begin with the pages of one owner; whether the round before has some of it."""
        self._finish()
        kind, ident = owner(head.whose)
        if self._images == _MOST_IMAGES:
            raise PageStreamError(f"the client sends pages of more than {_MOST_IMAGES} owners")
        self._writer = PageWriter(self._directory, kind, ident, _FIRST_ID + self._images)
        self._images += 1
        has = self._has(kind, ident)
        self._known, self._span = iter(()), (0, 0)
        if has and self._parent is not None:
            stored = self._parent.extents(kind, ident)
            self._known = ((one.vaddr, one.vaddr + one.pages * PAGE_SIZE) for one in stored)
        return has

    def _add(self, head: Head, flags: int) -> None:
        if self._writer is None:
            raise PageStreamError("the client sends pages and has not said whose they are")
        if flags & Flag.PARENT:
            self._find(head.address, head.address + head.pages * PAGE_SIZE)
            self.stored.in_parent += head.pages
        offset = self._writer.add([head.address], [head.pages], flags)
        if flags & Flag.PRESENT:
            self._wire.receive_file(self._writer.fd, offset, head.pages * PAGE_SIZE)
            self.stored.pages += head.pages

    def _find(self, start: int, end: int) -> None:
        """All of a hole must be in the round before; holes come in address order."""
        while start < end:
            while self._span[1] <= start:
                span = next(self._known, None)
                if span is None:
                    raise PageStreamError(f"the page at {start:#x} is not in the round before")
                self._span = span
            if self._span[0] > start:
                raise PageStreamError(f"the page at {start:#x} is not in the round before")
            start = self._span[1]

    def _finish(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.finish()
