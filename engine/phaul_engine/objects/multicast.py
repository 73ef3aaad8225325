"""Multicast memberships of a socket.

No interface lists them. But the kernel answers a question for the source filter of one group at one interface, and
refuses it (EADDRNOTAVAIL) to a socket that is no member: so every group that the host has joined is tried. They travel
among the options, as MCAST_JOIN_GROUP with the interface's name in place of its number. Sources: RFC 3678,
linux/net/ipv4/igmp.c (ip_mc_gsfget), linux/net/ipv6/mcast.c (ip6_mc_msfget).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import sk_inet_pb2

from . import places
from .base import Collection, Descriptor
from .socket_options import MCAST_JOIN_GROUP, SOL_IP, SOL_IPV6

_MCAST_MSFILTER = 48
_EXCLUDE = 0
_ALL_HOSTS = (socket.inet_aton("224.0.0.1"), socket.inet_pton(socket.AF_INET6, "ff02::1"))
_SIOCGIFINDEX = 0x8933
_JOINED = struct.Struct("<16s128s")  # interface's name, struct sockaddr_storage of the group

_libc = ctypes.CDLL(None, use_errno=True)


def _groups(net: int, family: int) -> list[tuple[str, bytes]]:
    """Interface and group of everything joined in a network namespace."""
    name = "igmp" if family == socket.AF_INET else "igmp6"

    def read() -> list[str]:
        with open(f"/proc/thread-self/net/{name}") as lines:
            return lines.read().splitlines()

    lines = places.in_network(net, read)
    if family == socket.AF_INET6:
        return [(words[1], bytes.fromhex(words[2])) for words in map(str.split, lines)]
    found = []
    interface = ""
    for line in lines[1:]:
        words = line.split()
        if line[0].isdigit():
            interface = words[1].rstrip(":")
        else:
            found.append((interface, int(words[0], 16).to_bytes(4, "little")))
    return found


def _storage(group: bytes) -> bytes:
    if len(group) == 4:
        return struct.pack("<HH4s120x", socket.AF_INET, 0, group)
    return struct.pack("<HHI16sI100x", socket.AF_INET6, 0, 0, group, 0)


def memberships(descriptor: Descriptor, sock: socket.socket, collection: Collection) -> list[tuple[int, bytes]]:
    """The memberships of a socket: level and value of the option that joins again."""
    joined = []
    for family, level in ((socket.AF_INET, SOL_IP), (socket.AF_INET6, SOL_IPV6)):
        if family == socket.AF_INET6 and sock.family != socket.AF_INET6:
            continue
        key = f"multicast groups {os.fstat(descriptor.owner.net).st_ino} {family}"
        if key not in collection.scratch:
            collection.scratch[key] = _groups(descriptor.owner.net, family)
        for name, group in collection.scratch[key]:
            if group in _ALL_HOSTS:
                continue
            index = _index(sock, name)
            mode = _mode(sock, level, index, group)
            if mode is None:
                continue
            if mode != (_EXCLUDE, 0):
                collection.block(
                    descriptor,
                    "a socket with a multicast source filter",
                    f"it has joined {socket.inet_ntop(family, group)} at {name} for chosen sources",
                    "join the group for all sources",
                )
            joined.append((level, _JOINED.pack(name.encode(), _storage(group))))
    return joined


def _index(sock: socket.socket, name: str) -> int:
    return int(struct.unpack_from("i", fcntl.ioctl(sock, _SIOCGIFINDEX, struct.pack("16s24x", name.encode())), 16)[0])


def _mode(sock: socket.socket, level: int, index: int, group: bytes) -> tuple[int, int] | None:
    """Filter mode and number of sources of a membership, None if there is none."""
    request = struct.pack("<Ixxxx", index) + _storage(group) + struct.pack("<II", 0, 0) + bytes(128)
    room = ctypes.create_string_buffer(request, len(request))
    length = ctypes.c_uint(len(request))
    if _libc.getsockopt(sock.fileno(), level, _MCAST_MSFILTER, room, ctypes.byref(length)) < 0:
        return None
    mode, sources = struct.unpack_from("<II", room.raw, 8 + 128)
    return mode, sources


def joins(isk: sk_inet_pb2.inet_sk_entry) -> list[tuple[int, bytes]]:
    """The memberships among the options of an image entry."""
    return [
        (option.level, option.value)
        for option in isk.opts.phaul_options
        if option.name == MCAST_JOIN_GROUP and option.level in (SOL_IP, SOL_IPV6)
    ]


def join(sock: socket.socket, level: int, value: bytes) -> None:
    """Join again."""
    name, group = _JOINED.unpack(value)
    text = name.rstrip(b"\0").decode()
    try:
        sock.setsockopt(level, MCAST_JOIN_GROUP, struct.pack("<Ixxxx128s", _index(sock, text), group))
    except OSError as error:
        raise RebuildError(f"a multicast group cannot be joined at {text} here: {error.strerror}") from error
