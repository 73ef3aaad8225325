"""Contents of memory on disk: which pages there are, and where their bytes stand.

A pagemap image lists runs of pages in address order. The bytes of the runs that are *present* follow each other in a
file of their own, pages-N.img; a run that is *in the parent* is found in the images of the round before, by its
address. Whoever moves pages works on lists of runs and does the reading and writing natively: nothing here is done
page by page.
"""

from __future__ import annotations

import enum
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from phaul_engine.errors import ImageError
from phaul_engine.images import framing
from phaul_engine.images.directory import ImageDirectory, Location, chain, file_name
from phaul_engine.images.framing import Record
from phaul_engine.images.kinds import Ident, kind_of
from phaul_engine.images.pb import pagemap_pb2

PAGE_SIZE = 4096
_LIMIT = 1 << 64  # no run may end beyond
_COMPAT_LIMIT = 1 << 32  # what the old page count can say


class Flag(enum.IntFlag):
    """What a run of pages is."""

    PARENT = 1  # the same pages are in the images of the round before
    LAZY = 2  # may be fetched after the restart; says nothing about where they are
    PRESENT = 4  # the bytes are in the pages file of these images


# Sets and integers, since operators of IntFlag are slow and a pagemap may have very many runs.
_POSSIBLE = frozenset((1, 3, 4, 6))
_PRESENT = int(Flag.PRESENT)


@dataclass
class Runs:
    """A pagemap: runs of pages in address order, as parallel arrays (addresses in bytes, lengths in pages)."""

    pages_id: int
    vaddr: array[int] = field(default_factory=lambda: array("Q"))
    pages: array[int] = field(default_factory=lambda: array("Q"))
    flags: array[int] = field(default_factory=lambda: array("I"))

    def __len__(self) -> int:
        return len(self.vaddr)

    def append(self, vaddr: int, pages: int, flags: int, name: str = "a pagemap") -> None:
        """Add a run behind the others, joined to the last one where they touch. `ImageError` if it is impossible."""
        if vaddr % PAGE_SIZE or pages <= 0 or vaddr < 0 or vaddr + pages * PAGE_SIZE > _LIMIT:
            raise ImageError(f"{name} has a run of {pages} pages at {vaddr:#x}, which cannot be")
        if flags not in _POSSIBLE:
            raise ImageError(
                f"the pages at {vaddr:#x} in {name} are neither here nor in the parent (flags {flags:#x})",
                advice="they may have been left with a lazy page server",
            )
        if self.vaddr:
            end = self.vaddr[-1] + self.pages[-1] * PAGE_SIZE
            if vaddr < end:
                raise ImageError(f"{name} has a run at {vaddr:#x} after one that ends at {end:#x}")
            if vaddr == end and flags == self.flags[-1]:
                self.pages[-1] += pages
                return
        self.vaddr.append(vaddr)
        self.pages.append(pages)
        self.flags.append(flags)

    def present(self) -> int:
        """How many pages are in the pages file."""
        return sum(pages for pages, flags in zip(self.pages, self.flags, strict=True) if flags & _PRESENT)

    def records(self) -> Iterator[Record]:
        """The records of the pagemap image. Both page counts are given: readers before CRIU 4.2 know only the old."""
        yield Record(pagemap_pb2.pagemap_head(pages_id=self.pages_id))
        for vaddr, pages, flags in zip(self.vaddr, self.pages, self.flags, strict=True):
            compat = pages if pages < _COMPAT_LIMIT else 0
            entry = pagemap_pb2.pagemap_entry(vaddr=vaddr, compat_nr_pages=compat, flags=flags, nr_pages=pages)
            yield Record(entry)


def parse_runs(records: Sequence[Record], name: str) -> Runs:
    """The runs in the records of a pagemap image. `ImageError` if they are impossible or not in order."""
    runs = Runs(records[0].message.pages_id)
    for record in records[1:]:
        entry = record.message
        pages = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
        if entry.compat_nr_pages not in (0, pages):
            raise ImageError(f"the two page counts of {entry.vaddr:#x} in {name} differ")
        flags = entry.flags if entry.HasField("flags") else 0 if entry.in_parent else _PRESENT
        runs.append(entry.vaddr, pages, flags | entry.in_parent, name)  # Flag.PARENT is 1
    return runs


def read_runs(directory: ImageDirectory, kind: str, ident: Ident) -> Runs:
    """The pagemap of a kind ("pagemap", "pagemap-shmem") and ident."""
    name = file_name(kind, ident)
    return parse_runs(framing.decode(kind_of(kind), directory.read(name), name), name)


class PageWriter:
    """Writes one pagemap and its pages file.

    Its user announces runs in address order with `add`, and writes their bytes to `fd` at the offset that comes back:
    in any order, by any means. `finish` holds the one against the other. A context manager, which finishes unless
    there was an error.
    """

    def __init__(self, directory: ImageDirectory, kind: str, ident: Ident, pages_id: int) -> None:
        self._directory = directory
        self._kind = kind
        self._ident = ident
        self._runs = Runs(pages_id)
        self._present = 0
        self.name = file_name("pages", pages_id)
        self.fd = directory.create(self.name)

    def add(self, vaddr: Sequence[int], pages: Sequence[int], flags: int = Flag.PRESENT) -> int:
        """Announce runs, which must lie behind all earlier ones; where in the file the bytes of the first belong."""
        name = file_name(self._kind, self._ident)
        offset = self._present * PAGE_SIZE
        for start, count in zip(vaddr, pages, strict=True):
            self._runs.append(start, count, flags, name)
            if flags & _PRESENT:
                self._present += count
        return offset

    def finish(self) -> None:
        """Write the pagemap. `ImageError` if the pages file is not as long as what was announced."""
        size = os.fstat(self.fd).st_size
        self.close()
        if size != self._present * PAGE_SIZE:
            raise ImageError(f"{self.name} has {size} bytes, not the {self._present} pages that were announced")
        name = file_name(self._kind, self._ident)
        self._directory.write(name, framing.encode(kind_of(self._kind), self._runs.records(), name))

    def close(self) -> None:
        """Close the pages file. More than once does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.fd >= 0:
            self.finish()
        self.close()


class Extent(NamedTuple):
    """A run of pages and where its bytes are: in the file `fd` from `offset` on."""

    vaddr: int
    pages: int
    fd: int
    offset: int


class PageImages:
    """The pages of a directory of images and of all its parents; a context manager.

    The descriptors of its extents are its own and are closed with it.
    """

    def __init__(self, location: Location) -> None:
        """Open a directory; parents are opened when pages turn out to be there."""
        self._owned = not isinstance(location, ImageDirectory)
        self._levels = [location if isinstance(location, ImageDirectory) else ImageDirectory(location)]
        self._chain = chain(self._levels[0])
        next(self._chain)
        self._files: dict[tuple[int, int], int] = {}

    def has(self, kind: str, ident: Ident) -> bool:
        """Whether the directory itself has such a pagemap."""
        return self._levels[0].has(file_name(kind, ident))

    def extents(self, kind: str, ident: Ident) -> list[Extent]:
        """Every page of an address space or shared object, in address order and in runs as long as they can be.

        `ImageError` if a page is in none of the images, or a file is shorter than its pagemap says.
        """
        found: list[Extent] = []
        wanted: list[tuple[int, int]] | None = None
        level = 0
        while level == 0 or wanted:
            directory = self._level(level)
            if directory is None:
                assert wanted
                raise ImageError(f"the page at {wanted[0][0]:#x} of {file_name(kind, ident)} is in a missing parent")
            wanted = self._resolve(level, directory, kind, ident, wanted, found)
            level += 1
        return _joined(found)

    def _resolve(
        self,
        level: int,
        directory: ImageDirectory,
        kind: str,
        ident: Ident,
        wanted: list[tuple[int, int]] | None,
        found: list[Extent],
    ) -> list[tuple[int, int]]:
        """Put what is present here into `found`; what is further up is returned, as (start, end)."""
        runs = read_runs(directory, kind, ident)
        name = f"{directory.label}/{file_name(kind, ident)}"
        fd = self._file(level, directory, runs) if runs.present() else -1
        further: list[tuple[int, int]] = []
        for start, end, flags, offset in _pieces(runs, wanted, name):
            if flags & _PRESENT:
                found.append(Extent(start, (end - start) // PAGE_SIZE, fd, offset))
            else:
                further.append((start, end))
        return further

    def _level(self, level: int) -> ImageDirectory | None:
        while len(self._levels) <= level:
            parent = next(self._chain, None)
            if parent is None:
                return None
            self._levels.append(parent)
        return self._levels[level]

    def _file(self, level: int, directory: ImageDirectory, runs: Runs) -> int:
        fd = self._files.get((level, runs.pages_id))
        name = file_name("pages", runs.pages_id)
        if fd is None:
            fd = self._files[level, runs.pages_id] = directory.open(name)
        size = os.fstat(fd).st_size
        if size < runs.present() * PAGE_SIZE:
            raise ImageError(f"{directory.label}/{name} has {size} bytes, less than its {runs.present()} pages")
        return fd

    def close(self) -> None:
        """Close all files, and all directories that were opened here."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        for directory in self._levels if self._owned else self._levels[1:]:
            directory.close()
        self._levels.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pieces(runs: Runs, wanted: list[tuple[int, int]] | None, name: str) -> Iterator[tuple[int, int, int, int]]:
    """The wanted ranges cut along the runs: start, end, flags, offset of the bytes. All runs if `wanted` is None."""
    pieces = iter(wanted or ())
    start, end = next(pieces, (0, 0))
    offset = 0
    for vaddr, pages, flags in zip(runs.vaddr, runs.pages, runs.flags, strict=True):
        stop = vaddr + pages * PAGE_SIZE
        if wanted is None:
            yield vaddr, stop, flags, offset
        while wanted is not None and start < min(stop, end):
            if start < vaddr:
                raise ImageError(f"the page at {start:#x} should be in {name}, and is not")
            cut = min(stop, end)
            yield start, cut, flags, offset + start - vaddr
            start = cut
            if start == end:
                start, end = next(pieces, (0, 0))
        if flags & _PRESENT:
            offset += pages * PAGE_SIZE
    if start < end:
        raise ImageError(f"the page at {start:#x} should be in {name}, and is not")


def _joined(extents: list[Extent]) -> list[Extent]:
    """The same in address order, with neighbours in memory that are neighbours in a file made one."""
    joined: list[Extent] = []
    for extent in sorted(extents):
        if joined:
            last = joined[-1]
            size = last.pages * PAGE_SIZE
            if (last.vaddr + size, last.fd, last.offset + size) == (extent.vaddr, extent.fd, extent.offset):
                joined[-1] = last._replace(pages=last.pages + extent.pages)
                continue
        joined.append(extent)
    return joined
