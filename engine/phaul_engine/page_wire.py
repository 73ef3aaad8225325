"""The page server's protocol, CRIU's (criu/page-xfer.c), and the connections that it runs on.

A message is a head: command and flags, a number of pages, an address, and whose pages they are; the bytes of the pages
follow it. Heads have 32 bytes since CRIU 4.2, and had 24 before, with a narrower number of pages.
"""

from __future__ import annotations

import enum
import os
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from .errors import EngineError
from .images.kinds import Ident

_LARGE = struct.Struct("<IxxxxQQQ")  # command, pages, address, whose
_SMALL = struct.Struct("<IIQQ")
_WHOSE = struct.Struct("<16xQ")  # of a small head
_RUN = 1 << 20  # bytes that are moved at once
_TASKS = frozenset({1, 10, 11, 16, 17})  # the types that CRIU's versions gave to address spaces
_SHARED = frozenset({2, *range(27, 35)})  # and to shared memory
_MOST_PAGES = 1 << 52  # in 64 bits of addresses


class PageStreamError(EngineError):
    """The other side of a page stream said something impossible, or went away."""


class Command(enum.IntEnum):
    """What a head says, in its lower 16 bits."""

    ADD = 1
    HOLE = 2
    OPEN = 3
    OPEN2 = 4
    PARENT = 5
    ADD_F = 6
    GET = 7
    CLOSE = 0x1023
    FORCE_CLOSE = 0x1024


class Head(NamedTuple):
    """One message without its pages. `flags` are those of a pagemap entry (images/pages.py)."""

    command: int
    flags: int
    pages: int
    address: int
    whose: int


def whose(kind: str, ident: Ident) -> int:
    """How a head names an address space ("pagemap") or shared object ("pagemap-shmem")."""
    return int(ident or 0) << 8 | (1 if kind == "pagemap" else 2)


def owner(number: int) -> tuple[str, Ident]:
    """The opposite of `whose`."""
    kind = number & 0xFF
    if kind in _TASKS and number >> 8 < 1 << 31:
        return "pagemap", number >> 8
    if kind in _SHARED:
        return "pagemap-shmem", number >> 8
    raise PageStreamError(f"the other side names pages as {number:#x}, which is nothing that has pages")


class Wire(ABC):
    """A connection. Sizes are in bytes; PageStreamError when it ends early."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @abstractmethod
    def receive(self, size: int) -> bytes:
        """So many bytes; none at all if the other side has ended the connection before the first."""

    @abstractmethod
    def receive_file(self, fd: int, offset: int, size: int) -> None:
        """Bytes from the connection to a file."""

    @abstractmethod
    def send_file(self, fd: int, offset: int, size: int) -> None:
        """Bytes from a file to the connection."""

    def send(self, data: bytes) -> None:
        """All of these bytes."""
        self.sock.sendall(data)

    def send_head(self, head: Head) -> None:
        """A head, of the larger kind."""
        self.send(_LARGE.pack(head.command | head.flags << 16, head.pages, head.address, head.whose))

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


class PlainWire(Wire):
    """Without encryption: bytes go from socket to file inside the kernel."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)

    def receive(self, size: int) -> bytes:
        data = self.sock.recv(size, socket.MSG_WAITALL)
        if data and len(data) != size:
            raise PageStreamError("the page stream ends within a message")
        return data

    def receive_file(self, fd: int, offset: int, size: int) -> None:
        while size:
            taken = os.splice(self.sock.fileno(), self._writing, min(size, _RUN))
            if taken == 0:
                raise PageStreamError("the page stream ends within pages")
            size -= taken
            while taken:
                moved = os.splice(self._reading, fd, taken, offset_dst=offset)
                taken, offset = taken - moved, offset + moved

    def send_file(self, fd: int, offset: int, size: int) -> None:
        while size:
            sent = os.sendfile(self.sock.fileno(), fd, offset, size)
            if sent == 0:
                raise PageStreamError("the pages to be sent are not there any more")
            size, offset = size - sent, offset + sent

    def close(self) -> None:
        super().close()
        os.close(self._reading)
        os.close(self._writing)


class TlsWire(Wire):
    """TLS: both sides have shown their certificates."""

    sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        self._buffer = memoryview(bytearray(_RUN))

    def receive(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self.sock.recv(size - len(parts))
            if not part:
                if parts:
                    raise PageStreamError("the page stream ends within a message")
                return b""
            parts += part
        return bytes(parts)

    def receive_file(self, fd: int, offset: int, size: int) -> None:
        while size:
            got = 0
            wanted = min(size, _RUN)
            while got < wanted:
                part = self.sock.recv_into(self._buffer[got:wanted])
                if part == 0:
                    raise PageStreamError("the page stream ends within pages")
                got += part
            _write(fd, self._buffer[:wanted], offset)
            size, offset = size - wanted, offset + wanted

    def send_file(self, fd: int, offset: int, size: int) -> None:
        while size:
            part = os.pread(fd, min(size, _RUN), offset)
            if not part:
                raise PageStreamError("the pages to be sent are not there any more")
            self.sock.sendall(part)
            size, offset = size - len(part), offset + len(part)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


class HeadReader:
    """Reads heads, of the size that the first one turns out to have: whose pages they are stands at 16 or 24."""

    _opening: ClassVar = frozenset({Command.OPEN, Command.OPEN2, Command.PARENT})

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._form: struct.Struct | None = None

    def read(self) -> Head | None:
        """The next head; None at the end of the connection."""
        data = self._wire.receive((self._form or _SMALL).size)
        if not data:
            return None
        if self._form is None:
            data = self._decide(data)
        word, pages, address, number = (self._form or _SMALL).unpack(data)
        if pages > _MOST_PAGES:
            raise PageStreamError(f"the other side says that {pages} pages come at once")
        return Head(word & 0xFFFF, word >> 16, pages, address, number)

    def _decide(self, data: bytes) -> bytes:
        command = int.from_bytes(data[:2], "little")
        (number,) = _WHOSE.unpack(data)
        if command not in self._opening or number:
            self._form = _SMALL
            return data
        self._form = _LARGE
        return data + self._wire.receive(_LARGE.size - len(data))
