"""UDP, ICMP ("ping") and raw sockets of IPv4 and IPv6.

Until the commit a rebuilt socket hears nothing: a filter drops all that comes for it, while it has its port already.
Datagrams that wait unread are played again after the commit, from their senders' addresses, through lo; they are
carried in `sk-queues`. Raw sockets see copies of packets whose order with the rest of the stack cannot be made again:
unread ones are a blocker.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from phaul_engine import calls
from phaul_engine.errors import EngineError, RebuildError
from phaul_engine.images.pb import fdinfo_pb2, sk_inet_pb2, sk_packet_pb2

from . import inet, multicast, socket_options, waking
from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status
from .socket_options import SO_LOCK_FILTER, SO_PEEK_OFF, SOL_SOCKET, SOL_UDP, Options
from .tcp_stream import State, checksum

_UDP_ENCAP, _SIOCOUTQ = 100, 0x5411
_LOOKS, _BETWEEN_LOOKS = 8, 0.00025  # seconds
_IPPROTO_UDPLITE = 136
_SO_MEMINFO = 55  # its first word: bytes taken by what waits unread (linux/sock_diag.h, SK_MEMINFO_RMEM_ALLOC)
_DROP_ALL = struct.pack("<HBBI", 6, 0, 0, 0)  # BPF_RET 0
_LARGEST = 1 << 16
_PING_GROUPS = Path("/proc/sys/net/ipv4/ping_group_range")  # of the reader's network namespace
_PING = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)
_DATAGRAMS = (0, socket.IPPROTO_UDP, _IPPROTO_UDPLITE, *_PING)
_LATE = frozenset({(SOL_SOCKET, SO_LOCK_FILTER)})


@dataclass
class _Made:
    """A socket at the destination."""

    sort: inet.Sort
    options: Options
    connected: bool = False
    datagrams: list[tuple[inet.Address, bytes]] = field(default_factory=list)
    target: inet.Address = ("", 0)


@descriptor_kind
class Datagrams(DescriptorKind):
    """A socket of IPv4 or IPv6 that is no stream."""

    name = "datagram socket"
    types = (fdinfo_pb2.INETSK,)

    def claims(self, descriptor: Descriptor) -> bool:
        sort = inet.sort_of(descriptor)
        if sort is None or sort[0] not in inet.FAMILIES:
            return False
        return sort[1] == socket.SOCK_RAW or (sort[1] == socket.SOCK_DGRAM and sort[2] in _DATAGRAMS)

    def rebuilds(self, entry: fdinfo_pb2.file_entry) -> bool:
        return bool(entry.isk.type in (socket.SOCK_DGRAM, socket.SOCK_RAW))

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        sort = cast("inet.Sort", inet.sort_of(descriptor))
        with inet.borrowed(descriptor.own, sort) as sock:
            state = State.ESTABLISHED if _is_connected(sock) else State.CLOSE
            entry, options = inet.describe(descriptor, sock, file_id, collection, state)
            for level, value in multicast.memberships(descriptor, sock, collection):
                entry.isk.opts.phaul_options.add(level=level, name=socket_options.MCAST_JOIN_GROUP, value=value)
            if sort[1] == socket.SOCK_RAW or sort[2] in _PING:
                _check_unread(descriptor, sock, collection)
            else:
                _check_udp(descriptor, sock, entry.isk, options, collection)
                if not collection.survey:
                    for address, content in _peek(sock, descriptor):
                        packet = sk_packet_pb2.sk_packet_entry(id_for=file_id, length=len(content))
                        packet.phaul_address = address
                        collection.checkpoint.put("sk-queues", None, packet, content)
        return entry

    def settles(self, early: fdinfo_pb2.file_entry, final: fdinfo_pb2.file_entry) -> bool:
        """Once bound or connected, it stays so; memberships are joined once."""
        return _relation(early.isk) == _relation(final.isk)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        isk = entry.isk
        sort = (isk.family, isk.type, isk.proto)
        sock = _open(sort, restoration)
        try:
            made = _Made(sort, socket_options.decode(isk.opts))
            present = inet.fresh_options(sock, sort, restoration)
            socket_options.write_filter(sock, _DROP_ALL)
            sock.setsockopt(*inet.TRANSPARENT[socket.AddressFamily(isk.family)], 1)
            socket_options.write(sock, made.options, _without(isk), present, filtering=False)
            if inet.is_bound(isk) and isk.type != socket.SOCK_RAW:
                inet.bind(sock, isk)
            elif any(isk.src_addr):
                sock.bind((inet.local(isk, sock)[0], 0))
            for level, value in multicast.joins(isk):
                multicast.join(sock, level, value)
            if isk.state == State.ESTABLISHED:
                _connect(sock, isk)
        except BaseException:
            sock.close()
            raise
        _all_made(restoration)[entry.id] = made
        return sock.detach()

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        isk = entry.isk
        made = _all_made(restoration)[entry.id]
        settle_status(fd, isk.flags, isk.fown, restoration)
        with inet.borrowed(fd, made.sort) as sock:
            wanted = socket_options.decode(isk.opts)
            socket_options.write(sock, wanted, _without(isk), made.options, filtering=False)
            made.options = wanted
            made.target = inet.local(isk, sock)
        waking.noted(restoration)[entry.id] = waking.plan(made.sort, wanted, muted=True)
        queues: dict[int, list[tuple[inet.Address, bytes]]] | None = restoration.scratch.get("UDP queues")
        if queues is None:
            queues = restoration.scratch["UDP queues"] = {}
            for record in restoration.checkpoint.records("sk-queues"):
                packet = record.message
                if len(packet.phaul_address) in (8, 20):
                    queues.setdefault(packet.id_for, []).append((_read_address(packet.phaul_address), record.payload))
        if datagrams := queues.get(entry.id):
            made.datagrams = datagrams
            _player(restoration, made.sort[0])

    def release(self, restoration: Restoration) -> None:
        waking.wake(restoration, list(_all_made(restoration)))
        for made in _all_made(restoration).values():
            for address, content in made.datagrams:
                with suppress(OSError):  # as any datagram it may get lost
                    _player(restoration, made.sort[0]).play(address, made.target, content)
            made.datagrams = []
        for player in restoration.scratch.pop("UDP players", {}).values():
            player.close()


def _all_made(restoration: Restoration) -> dict[int, _Made]:
    return cast("dict[int, _Made]", restoration.scratch.setdefault("udp", {}))


def _without(isk: sk_inet_pb2.inet_sk_entry) -> frozenset[socket_options.Key]:
    joins = {(level, socket_options.MCAST_JOIN_GROUP) for level in (socket_options.SOL_IP, socket_options.SOL_IPV6)}
    return _LATE | joins | {inet.TRANSPARENT[socket.AddressFamily(isk.family)]}


def _open(sort: inet.Sort, restoration: Restoration) -> socket.socket:
    """A new socket. A group has to be among those that may have one for "ping" (icmp(7), ping_group_range)."""
    if sort[1] != socket.SOCK_DGRAM or sort[2] not in _PING:
        return inet.make(sort, restoration)

    def act() -> socket.socket:
        lowest = int(_PING_GROUPS.read_text().split()[0])
        return calls.acting(os.geteuid(), lowest, lambda: socket.socket(*sort))

    return inet.in_network(restoration, act)


def _relation(isk: sk_inet_pb2.inet_sk_entry) -> tuple[object, ...]:
    joined = sorted(multicast.joins(isk))
    return (
        *(isk.family, isk.type, isk.proto, isk.state, isk.src_port, isk.dst_port),
        *(list(isk.src_addr), list(isk.dst_addr), joined),
    )


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _connect(sock: socket.socket, isk: sk_inet_pb2.inet_sk_entry) -> None:
    try:
        sock.connect(inet.remote(isk, sock))
    except OSError as error:
        raise RebuildError(
            f"cannot connect a datagram socket to {inet.spell(isk, peer=True)}: {error.strerror}"
        ) from error


def _check_udp(
    descriptor: Descriptor,
    sock: socket.socket,
    isk: sk_inet_pb2.inet_sk_entry,
    options: Options,
    collection: Collection,
) -> None:
    what = f"a UDP socket ({inet.spell(isk)})"
    if options.integer(SOL_UDP, _UDP_ENCAP):
        collection.block(descriptor, what, "the kernel takes packets of a tunnel out of it (UDP_ENCAP)")
    if not collection.survey and _has_unsent(sock):
        why = "a datagram is being put together in it (UDP_CORK, MSG_MORE)"
        collection.block(descriptor, what, why, "try again", passing=True)


def _has_unsent(sock: socket.socket) -> bool:
    """Whether a datagram stays in a socket: what only passes through the device's queue is gone in a moment."""
    for _ in range(_LOOKS):
        if not struct.unpack("i", fcntl.ioctl(sock, _SIOCOUTQ, bytes(4)))[0]:
            return False
        time.sleep(_BETWEEN_LOOKS)
    return True


def _check_unread(descriptor: Descriptor, sock: socket.socket, collection: Collection) -> None:
    (unread,) = struct.unpack_from("I", sock.getsockopt(SOL_SOCKET, _SO_MEMINFO, 36))  # ping sockets have no SIOCINQ
    if unread and not collection.survey:
        collection.block(
            descriptor,
            "a raw or ICMP socket",
            "packets wait unread in it",
            "try again when they have been read",
            passing=True,
        )


def _peek(sock: socket.socket, descriptor: Descriptor) -> list[tuple[bytes, bytes]]:
    """Senders and datagrams of the queue, which stays as it is."""
    room = bytearray(_LARGEST)
    found: list[tuple[bytes, bytes]] = []
    before = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        while True:
            try:
                length, _, flags, address = sock.recvmsg_into([room], 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except OSError:  # an ICMP message that waited, and may get lost as any of them
                continue
            if flags & socket.MSG_TRUNC:
                raise EngineError(f"a datagram in the queue of {descriptor} is too large")
            found.append((_write_address(address), bytes(room[:length])))
    finally:
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, before)


def _write_address(address: inet.Address) -> bytes:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    packed = socket.inet_pton(family, address[0].partition("%")[0])
    return struct.pack(f"<H2s{len(packed)}s", family, struct.pack(">H", address[1]), packed)


def _read_address(packed: bytes) -> inet.Address:
    """The reverse; `IMPOSSIBLE` if it is none."""
    family, port = struct.unpack("<H", packed[:2])[0], struct.unpack(">H", packed[2:4])[0]
    return socket.inet_ntop(family, packed[4:]), port


def _player(restoration: Restoration, family: int) -> _Player:
    players: dict[int, _Player] = restoration.scratch.setdefault("UDP players", {})
    if family not in players:
        players[family] = inet.in_network(restoration, _Player)
    return players[family]


class _Player:
    """Raw sockets that play datagrams to sockets of this host, with their senders' addresses."""

    def __init__(self) -> None:
        self._socks = {family: socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) for family in inet.FAMILIES}

    def close(self) -> None:
        """Close them."""
        for sock in self._socks.values():
            sock.close()

    def play(self, source: inet.Address, target: inet.Address, content: bytes) -> None:
        """Deliver a datagram; what is bound to every address gets it at the loopback address."""
        sender = source[0].removeprefix("::ffff:")
        family = socket.AF_INET6 if ":" in sender else socket.AF_INET
        host = target[0].removeprefix("::ffff:")
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1" if family == socket.AF_INET else "::1"
        packed = socket.inet_pton(family, sender) + socket.inet_pton(family, host)
        datagram = struct.pack(">HHHH", source[1], target[1], 8 + len(content), 0) + content
        pseudo = packed + struct.pack(">II", len(datagram), socket.IPPROTO_UDP)
        datagram = datagram[:6] + struct.pack(">H", checksum(pseudo + datagram) or 0xFFFF) + content
        if family == socket.AF_INET:
            head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, socket.IPPROTO_UDP, 0)
        else:
            head = struct.pack(">IHBB", 6 << 28, len(datagram), socket.IPPROTO_UDP, 64)
        self._socks[socket.AddressFamily(family)].sendto(head + packed + datagram, (host, 0))
