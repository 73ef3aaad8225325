"""The few requests to rtnetlink(7) that the package makes: laid out before the freeze, one system call in it, and no
tool that may not be installed."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

REQUEST, ACK, DUMP, EXCL, CREATE, REPLACE = 0x1, 0x4, 0x300, 0x200, 0x400, 0x100
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ROOM = 1 << 17


def attribute(kind: int, value: bytes) -> bytes:
    """struct rtattr with its value, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(body: bytes) -> dict[int, bytes]:
    """What `attribute` wrote, by kind; of those that occur twice the last."""
    found: dict[int, bytes] = {}
    while len(body) >= 4:
        length, kind = struct.unpack_from("=HH", body)
        found[kind & 0x3FFF] = body[4:length]
        body = body[max(length + 3 & ~3, 4) :]
    return found


class Route:
    """A socket to rtnetlink in the calling thread's network namespace."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)

    def request(self, kind: int, flags: int, body: bytes) -> None:
        """Have something done. Raises `OSError` with what the kernel has against it."""
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), kind, REQUEST | ACK | flags, 1, 0) + body)
        answer = self._sock.recv(_ROOM)
        kind, error = struct.unpack_from("=H10xi", answer, 4)
        if kind == _NLMSG_ERROR and error:
            raise OSError(-error, os.strerror(-error))

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The bodies of all answers to a question. Raises `OSError`."""
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), kind, REQUEST | DUMP, 1, 0) + body)
        while True:
            data = self._sock.recv(_ROOM)
            while data:
                length, answer, *_ = _HEADER.unpack_from(data)
                if answer == _NLMSG_DONE:
                    return
                if answer == _NLMSG_ERROR:
                    error = -struct.unpack_from("=i", data, _HEADER.size)[0]
                    raise OSError(error, os.strerror(error))
                yield data[_HEADER.size : length]
                data = data[length + 3 & ~3 :]

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()
