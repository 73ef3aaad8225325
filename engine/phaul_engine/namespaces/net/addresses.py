"""Addresses of a network namespace (address(7) of rtnetlink). The raw image is what `ip address save` writes."""

from __future__ import annotations

import errno
import os
import socket
import struct

from phaul_engine.errors import RebuildError

from . import link
from .netlink import (
    CREATE,
    EXCL,
    REPLACE,
    Message,
    Namespace,
    attribute,
    attribute_list,
    attributes,
    image_messages,
    pack,
    pack_messages,
)

_NEW, _DELETE, _GET = 20, 21, 22  # RTM_*ADDR
_HEAD = struct.Struct("=BBBBi")  # struct ifaddrmsg
_ADDRESS, _LOCAL, _LABEL, _BROADCAST, _CACHE, _FLAGS, _PRIORITY, _PROTOCOL = 1, 2, 3, 4, 6, 8, 9, 11
_KEPT = (_ADDRESS, _LOCAL, _LABEL, _BROADCAST, _PRIORITY, _PROTOCOL)
# IFA_F_*: what can be set (HOMEADDRESS, MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN, NODAD); the rest is the kernel's.
_SETTABLE, _NODAD = 0x10 | 0x100 | 0x200 | 0x400 | 0x02, 0x02
_MAGIC = struct.pack("<I", 0x47361222)
_HOST = 254  # RT_SCOPE_HOST


def read(namespace: Namespace) -> list[Message]:
    """All addresses, in the kernel's order."""
    return namespace.route.dump(_GET, _HEAD.pack(0, 0, 0, 0, 0))


def to_image(messages: list[Message]) -> bytes:
    """The raw image."""
    return _MAGIC + pack_messages(messages)


def from_image(data: bytes) -> list[Message]:
    """The opposite."""
    return image_messages(data, _MAGIC, _NEW, _HEAD.size, ("addresses", "an address"))


def _settable(message: Message) -> bytes:
    """The request that adds an address, but for how long it lives."""
    family, prefix, flags, scope, index = _HEAD.unpack_from(message.body)
    told = attributes(message.body[_HEAD.size :])
    flags |= int.from_bytes(told.get(_FLAGS, b""), "little")
    kept = [one for one in attribute_list(message.body[_HEAD.size :]) if one.kind in _KEPT]
    body = _HEAD.pack(family, prefix, 0, scope, index) + pack(kept)
    return body + attribute(_FLAGS, struct.pack("=I", flags & _SETTABLE))


def _lifetimes(message: Message) -> bytes:
    """Seconds that it is preferred and valid for, as an attribute (struct ifa_cacheinfo)."""
    told = attributes(message.body[_HEAD.size :]).get(_CACHE)
    return b"" if told is None else attribute(_CACHE, told[:8] + bytes(8))


def apply(namespace: Namespace, wanted: list[Message]) -> None:
    """Have these and no others. The order of those of one device decides which are primary."""
    there = {_settable(message): message for message in read(namespace)}
    goal = {_settable(message): message for message in wanted}
    for index in {_index(body) for body in (*there, *goal)}:
        if [body for body in there if _index(body) == index] == [body for body in goal if _index(body) == index]:
            continue
        for body in [body for body in there if _index(body) == index and body not in goal]:
            _remove(namespace, body)
        now = [_settable(message) for message in read(namespace)]
        left = [body for body in now if _index(body) == index and _family(body) == socket.AF_INET]
        ordered = [body for body in goal if _index(body) == index and _family(body) == socket.AF_INET]
        if left != ordered[: len(left)]:
            for body in left:
                _remove(namespace, body)
        there = {body: message for body, message in there.items() if _index(body) != index} | {
            _settable(message): message for message in read(namespace) if _index(message.body) == index
        }
    devices = link.read_links(namespace)
    missing = [(body, message) for body, message in goal.items() if body not in there and _index(body) in devices]
    # Of IPv6 addresses the kernel puts the last before the others.
    newer = [one for one in missing if _family(one[0]) == socket.AF_INET6]
    for body, message in [one for one in missing if one not in newer] + newer[::-1]:
        _add(namespace, body, _lifetimes(message), devices[_index(body)].name)


def index_of(message: Message) -> int:
    """The index of its device."""
    return _index(message.body)


def _index(body: bytes) -> int:
    return int(_HEAD.unpack_from(body)[4])


def _family(body: bytes) -> int:
    return body[0]


def _remove(namespace: Namespace, body: bytes) -> None:
    try:
        namespace.route.request(_DELETE, 0, body)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:  # went with its primary one
            raise


def _add(namespace: Namespace, body: bytes, lifetimes: bytes, device: str) -> None:
    """Put one on. It was somebody's already, so nobody is asked whether he has it: it works at once."""
    try:
        if _family(body) == socket.AF_INET6:
            namespace.route.request(_NEW, CREATE | EXCL, _with_flag(body, _NODAD) + lifetimes)
            namespace.route.request(_NEW, REPLACE, body + lifetimes)
        else:
            namespace.route.request(_NEW, CREATE | EXCL, body + lifetimes)
    except OSError as error:
        if error.errno == errno.EEXIST:
            return
        raise RebuildError(f"the address {spell(body)} cannot be put on {device}: {error.strerror}") from error


def _with_flag(body: bytes, flag: int) -> bytes:
    """With a flag more in IFA_FLAGS, which stands last."""
    flags = int.from_bytes(body[-4:], "little")
    return body[:-4] + struct.pack("=I", flags | flag)


def spell(body: bytes) -> str:
    """For people."""
    told = attributes(body[_HEAD.size :])
    packed = told.get(_LOCAL) or told.get(_ADDRESS, b"")
    try:
        return f"{socket.inet_ntop(_family(body), packed)}/{body[1]}"
    except (ValueError, OSError):
        return os.fsdecode(packed.hex())


def fleeting(message: Message) -> bool:
    """Whether it has a time to live."""
    told = attributes(message.body[_HEAD.size :]).get(_CACHE)
    return told is not None and told[:8] != b"\xff" * 8


def announced(messages: list[Message]) -> dict[int, list[str]]:
    """The addresses that neighbours may know, by device: neither of the host itself nor multicast."""
    found: dict[int, list[str]] = {}
    for message in messages:
        if _HEAD.unpack_from(message.body)[3] != _HOST:
            found.setdefault(_index(message.body), []).append(spell(message.body).partition("/")[0])
    return found
