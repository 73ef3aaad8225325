"""Conversations with the kernel about one network namespace (netlink(7), rtnetlink(7)).

A netlink socket speaks of the namespace that it was made in, whoever uses it: only its making needs a thread there.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self, TypeVar

from phaul_engine.errors import ImageError
from phaul_engine.network.rtnetlink import ACK, CREATE, DUMP, EXCL, REPLACE, REQUEST, attribute
from phaul_engine.objects import places

__all__ = ["ACK", "APPEND", "CREATE", "DUMP", "EXCL", "REPLACE", "REQUEST", "attribute"]

Result = TypeVar("Result")

APPEND = 0x800
NESTED = 0x8000
NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP, _EXT_ACK, _STRICT_CHECK = 270, 1, 11, 12
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INTERRUPTED, _CAPPED, _ACK_ATTRIBUTES = 0x10, 0x100, 0x200  # NLM_F_DUMP_INTR, NLM_F_CAPPED, NLM_F_ACK_TLVS
_ROOM = 1 << 18
_TRIES = 10


class Attribute(NamedTuple):
    """One attribute: its number without flags, its value, the flags (NLA_F_NESTED and the like)."""

    kind: int
    value: bytes
    flags: int = 0


class Message(NamedTuple):
    """One message: what it is, and what follows its header (a fixed part and attributes)."""

    kind: int
    body: bytes

    def packed(self) -> bytes:
        """As it lies in a raw image: a whole message, padded."""
        return _HEADER.pack(_HEADER.size + len(self.body), self.kind, 2, 0, 0) + self.body + bytes(-len(self.body) % 4)


def attribute_list(body: bytes) -> list[Attribute]:
    """The attributes in `body`, in their order. `ImageError` if their lengths make no sense."""
    found = []
    while len(body) >= 4:
        length, kind = struct.unpack_from("=HH", body)
        if not 4 <= length <= len(body):
            raise ImageError("a netlink attribute does not end where it should")
        found.append(Attribute(kind & 0x3FFF, body[4:length], kind & ~0x3FFF))
        body = body[length + 3 & ~3 :]
    return found


def attributes(body: bytes) -> dict[int, bytes]:
    """The same by number; of those that occur twice the last."""
    return {one.kind: one.value for one in attribute_list(body)}


def pack(found: Iterable[Attribute]) -> bytes:
    """Attributes, one behind the other."""
    return b"".join(attribute(kind | flags, value) for kind, value, flags in found)


def unpack_messages(data: bytes, what: str) -> list[Message]:
    """The messages of a raw image. `ImageError` if their lengths make no sense."""
    found = []
    while data:
        length = struct.unpack_from("=I", data)[0] if len(data) >= _HEADER.size else 0
        if not _HEADER.size <= length <= len(data):
            raise ImageError(f"{what} has a message that does not end where it should")
        found.append(Message(struct.unpack_from("=H", data, 4)[0], data[_HEADER.size : length]))
        data = data[length + 3 & ~3 :]
    return found


def image_messages(data: bytes, magic: bytes, kind: int, size: int, names: tuple[str, str]) -> list[Message]:
    """The messages of one kind in a raw image that begins with `magic`, each with a head of `size` bytes. `names` are
    what the image is of, and what one of it is. `ImageError` if it is none."""
    what, one = names
    if data[: len(magic)] != magic:
        raise ImageError(f"the image of {what} does not begin as such")
    found = [message for message in unpack_messages(data[len(magic) :], f"the image of {what}") if message.kind == kind]
    if any(len(message.body) < size for message in found):
        raise ImageError(f"the image of {what} has a message without {one}")
    return found


def pack_messages(messages: Iterable[Message]) -> bytes:
    """The opposite of `unpack_messages`."""
    return b"".join(message.packed() for message in messages)


class Netlink:
    """A socket for requests to one namespace. `OSError` tells what the kernel has against one, in its own words."""

    def __init__(self, net: int | None, protocol: int = socket.NETLINK_ROUTE) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._sock = places.in_network(net, lambda: socket.socket(socket.AF_NETLINK, kind, protocol))
        self._sock.setsockopt(_SOL_NETLINK, _EXT_ACK, 1)
        self._sock.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM * 4)
        self._sock.settimeout(10)
        self._sequence = 0
        self._interrupted = False  # something changed while the last dump was read

    def request(self, kind: int, flags: int, body: bytes) -> None:
        """Have something done."""
        self._send(kind, REQUEST | ACK | flags, body)
        for _ in self._answers():
            pass

    def ask(self, kind: int, body: bytes) -> Message:
        """The one answer to a question."""
        self._send(kind, REQUEST | ACK, body)
        answers = list(self._answers())
        if not answers:
            raise OSError(71, "the kernel acknowledges a question and does not answer it")  # EPROTO
        return answers[0]

    def dump(self, kind: int, body: bytes) -> list[Message]:
        """All answers to a question; asked again where something changed meanwhile."""
        for _ in range(_TRIES):
            self._send(kind, REQUEST | DUMP, body)
            self._interrupted = False
            found = list(self._answers())
            if not self._interrupted:
                return found
        raise OSError(4, "it changes faster than it can be read")  # EINTR

    def listen(self, groups: Iterable[int]) -> None:
        """From now on, be told of changes; this socket is for nothing else then."""
        self._sock.bind((0, 0))  # one without a number is taken for the kernel itself, and told of nothing
        for group in groups:
            self._sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._sock.setblocking(False)

    def heard(self) -> list[Message]:
        """What has been told since the last time; an empty message stands for what did not find room."""
        found: list[Message] = []
        while True:
            try:
                data = self._sock.recv(_ROOM)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found.append(Message(_NLMSG_DONE, b""))
                continue
            position = 0
            while position < len(data):
                length, kind, *_ = _HEADER.unpack_from(data, position)
                found.append(Message(kind, data[position + _HEADER.size : position + length]))
                position += length + 3 & ~3

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)

    def _answers(self) -> Iterator[Message]:
        """What answers the last request, to its end."""
        while True:
            data = self._sock.recv(_ROOM)
            position = 0
            while position < len(data):
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data, position)
                body = data[position + _HEADER.size : position + length]
                position += length + 3 & ~3
                if sequence != self._sequence:
                    continue
                self._interrupted |= bool(flags & _INTERRUPTED)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _check(body, flags, kind)
                    return
                yield Message(kind, body)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check(body: bytes, flags: int, kind: int) -> None:
    error = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
    if error <= 0:
        return
    told = ""
    if flags & _ACK_ATTRIBUTES:
        start = 4
        if kind == _NLMSG_ERROR:  # the request stands before the attributes, whole or its header
            start += _HEADER.size if flags & _CAPPED else struct.unpack_from("=I", body, 4)[0] + 3 & ~3
        told = attributes(body[start:]).get(1, b"").rstrip(b"\0").decode(errors="replace")
    raise OSError(error, told or os.strerror(error))


@dataclass
class Namespace:
    """A network namespace under our hands: a descriptor of it, and what has been opened to it so far."""

    net: int
    _sockets: dict[int, Netlink] = field(default_factory=dict)

    def netlink(self, protocol: int = socket.NETLINK_ROUTE) -> Netlink:
        """A socket that speaks of it."""
        if protocol not in self._sockets:
            self._sockets[protocol] = Netlink(self.net, protocol)
        return self._sockets[protocol]

    @property
    def route(self) -> Netlink:
        """A socket to rtnetlink."""
        return self.netlink()

    def inside(self, act: Callable[[], Result]) -> Result:
        """Run `act` in a thread that is in the namespace; programs that it starts are too."""
        return places.in_network(self.net, act)

    def close(self) -> None:
        """Close what was opened; the descriptor is the caller's."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
