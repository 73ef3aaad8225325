"""Where a dump puts the contents of memory: files in a directory of images, or a page server on another host.

A store is told one address space or shared object after the other. What the images of the round before hold already,
byte for byte, is not stored again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .images.directory import ImageDirectory
from .images.kinds import Ident
from .images.pages import Flag, PageImages, PageWriter
from .memory.extents import Extents, Kind, Place
from .memory.files import Piece, dump_changed, dump_pages


@dataclass
class Stored:
    """How many pages were stored, and how many were found in the round before."""

    pages: int = 0
    in_parent: int = 0


class PageStore(ABC):
    """Takes the pages of one dump."""

    def __init__(self) -> None:
        self.stored = Stored()

    @abstractmethod
    def put(self, kind: str, ident: Ident, place: Place, extents: Extents) -> None:
        """Store the pages of an address space ("pagemap") or a shared object ("pagemap-shmem"), in address order."""

    @abstractmethod
    def finish(self) -> None:
        """Everything has been put: returns when it is safe there."""


class DirectoryStore(PageStore):
    """Pages go into files beside the other images. `parent` are the pages of the round before."""

    def __init__(self, directory: ImageDirectory, parent: PageImages | None = None) -> None:
        super().__init__()
        self._directory = directory
        self._parent = parent
        self._next_id = 1

    def put(self, kind: str, ident: Ident, place: Place, extents: Extents) -> None:
        with PageWriter(self._directory, kind, ident, self._next_id) as writer:
            self._next_id += 1
            if self._parent is None or not self._parent.has(kind, ident):
                found = dump_pages(place, extents, writer.fd)
            else:
                known = [Piece(one.vaddr, one.offset, one.pages, one.fd) for one in self._parent.extents(kind, ident)]
                found = dump_changed(place, extents, known, writer.fd)
            for start, pages, what in found:
                writer.add([start], [pages], Flag.PARENT if what is Kind.SAME else Flag.PRESENT)
        self.stored.pages += found.pages(Kind.DATA)
        self.stored.in_parent += found.pages(Kind.SAME)

    def finish(self) -> None:
        """They are in the page cache: a dump survives the death of a process, as a program does, not of the host."""
