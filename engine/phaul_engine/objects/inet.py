"""What IPv4 and IPv6 sockets have in common: addresses, the image entry, where they are made."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import fdinfo_pb2, sk_inet_pb2

from . import places, socket_options
from .base import Collection, Descriptor, Restoration
from .description import signal_owner, status_flags

Address: TypeAlias = tuple[str, int] | tuple[str, int, int, int]
Result = TypeVar("Result")
Sort: TypeAlias = tuple[int, int, int]  # family, type, protocol

FAMILIES = (socket.AF_INET, socket.AF_INET6)
_SIOCGSKNS = 0x894C
_IPV6_FLOWLABEL_MGR, _FLOW_LABEL_SIZE = 32, 32  # struct in6_flowlabel_req; all zeros ask for the socket's own label
_SIOCGIFNAME = 0x8910
_SO_TYPE, _SO_PROTOCOL, _SO_DOMAIN = 3, 38, 39
TRANSPARENT = {
    socket.AF_INET: (socket_options.SOL_IP, socket_options.IP_TRANSPARENT),
    socket.AF_INET6: (socket_options.SOL_IPV6, socket_options.IPV6_TRANSPARENT),
}


@functools.lru_cache(maxsize=8192)
def _sort(own: int, inode: int) -> Sort:
    with socket.socket(fileno=os.dup(own)) as sock:
        return int(sock.family), int(sock.type), int(sock.proto)


def sort_of(descriptor: Descriptor) -> Sort | None:
    """Family, type and protocol of a descriptor, None if it is no socket."""
    if not descriptor.link.startswith("socket:["):
        return None
    return _sort(descriptor.own, descriptor.status.st_ino)


@contextmanager
def borrowed(fd: int, sort: Sort) -> Iterator[socket.socket]:
    """A socket object for a descriptor that stays open afterwards."""
    sock = socket.socket(*sort, fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def make(sort: Sort, restoration: Restoration) -> socket.socket:
    """A new socket in the tree's network namespace."""
    return in_network(restoration, lambda: socket.socket(*sort))


def in_network(restoration: Restoration, act: Callable[[], Result]) -> Result:
    """Run `act` in the network namespace of the tree being rebuilt."""
    task = next(iter(restoration.tasks.values()), None)
    return places.in_network(task.net if task else None, act)


def fresh_options(sock: socket.socket, sort: Sort, restoration: Restoration) -> socket_options.Options:
    """What a new socket of this sort has here; asked once a restoration."""
    known: dict[Sort, socket_options.Options] = restoration.scratch.setdefault("fresh socket options", {})
    if sort not in known:
        known[sort] = socket_options.read(sock)
    return known[sort]


def words(address: str, family: int) -> list[int]:
    """An address as the image has it: 32-bit words as they lie in memory."""
    packed = socket.inet_pton(family, address.partition("%")[0])
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


def text(address: list[int], family: int) -> str:
    """The reverse of `words`."""
    count = 1 if family == socket.AF_INET else 4
    return socket.inet_ntop(family, struct.pack(f"<{count}I", *(address or [0] * count)))


def local(entry: sk_inet_pb2.inet_sk_entry, sock: socket.socket) -> Address:
    """The address to bind to."""
    return _address(entry, list(entry.src_addr), entry.src_port, sock)


def remote(entry: sk_inet_pb2.inet_sk_entry, sock: socket.socket) -> Address:
    """The peer's address."""
    return _address(entry, list(entry.dst_addr), entry.dst_port, sock)


def socket_address(entry: sk_inet_pb2.inet_sk_entry, sock: socket.socket, *, peer: bool = False) -> bytes:
    """An end of a socket as a struct sockaddr."""
    address, port = (entry.dst_addr, entry.dst_port) if peer else (entry.src_addr, entry.src_port)
    head = entry.family.to_bytes(2, "little") + port.to_bytes(2, "big")
    if entry.family == socket.AF_INET:
        return head + struct.pack("<I8x", *address or (0,))
    return head + struct.pack("<I4II", 0, *address or (0, 0, 0, 0), _scope(entry, list(address), sock))


def _address(entry: sk_inet_pb2.inet_sk_entry, address: list[int], port: int, sock: socket.socket) -> Address:
    host = text(address, entry.family)
    if entry.family == socket.AF_INET:
        return host, port
    return host, port, 0, _scope(entry, address, sock)


def _scope(entry: sk_inet_pb2.inet_sk_entry, address: list[int], sock: socket.socket) -> int:
    """The interface of a link-local address, which travels as a name."""
    if not entry.ifname or not address or address[0] & 0xC0FF != 0x80FE:
        return 0
    try:
        request = fcntl.ioctl(sock, 0x8933, struct.pack("16s24x", entry.ifname.encode()))  # SIOCGIFINDEX
    except OSError as error:
        host = text(address, entry.family)
        raise RebuildError(f"{host} needs the interface {entry.ifname}, which is not here") from error
    return int(struct.unpack_from("i", request, 16)[0])


def is_bound(entry: sk_inet_pb2.inet_sk_entry) -> bool:
    """Whether the socket has a local address or port of its own."""
    return bool(entry.src_port or any(entry.src_addr))


def spell(entry: sk_inet_pb2.inet_sk_entry, peer: bool = False) -> str:
    """An end of a socket, for people."""
    address, port = (entry.dst_addr, entry.dst_port) if peer else (entry.src_addr, entry.src_port)
    host = text(list(address), entry.family)
    return f"[{host}]:{port}" if entry.family == socket.AF_INET6 else f"{host}:{port}"


def describe(
    descriptor: Descriptor, sock: socket.socket, file_id: int, collection: Collection, state: int
) -> tuple[fdinfo_pb2.file_entry, socket_options.Options]:
    """The image entry of an inet socket (addresses, flags, owner of signals, all options), and its options."""
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.INETSK, id=file_id)
    isk = entry.isk
    isk.id, isk.ino, isk.state = file_id, descriptor.status.st_ino & 0xFFFFFFFF, state
    isk.family, isk.type, isk.proto = sock.family, sock.type, sock.proto
    isk.flags, isk.backlog = status_flags(descriptor), 0
    isk.fown.CopyFrom(signal_owner(descriptor, collection))
    here = sock.getsockname()
    isk.src_addr.extend(words(here[0], sock.family))
    isk.src_port = here[1]
    try:
        there = sock.getpeername()
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.EINVAL):
            raise
        there = ("0.0.0.0" if sock.family == socket.AF_INET else "::", 0)
    isk.dst_addr.extend(words(there[0], sock.family))
    isk.dst_port = there[1]
    if sock.family == socket.AF_INET6 and (scope := here[3] or (there[3] if len(there) > 3 else 0)):
        isk.ifname = _interface(sock, scope)
    options = _options(descriptor, sock, collection)
    socket_options.encode(options, isk.opts)
    if sock.family == socket.AF_INET6:
        isk.v6only = bool(options.integer(socket_options.SOL_IPV6, socket_options.IPV6_V6ONLY))
    _check(descriptor, sock, options, collection)
    return entry, options


def _interface(sock: socket.socket, index: int) -> str:
    request = fcntl.ioctl(sock, _SIOCGIFNAME, struct.pack("16si20x", b"", index))
    return request[:16].rstrip(b"\0").decode()


def _options(descriptor: Descriptor, sock: socket.socket, collection: Collection) -> socket_options.Options:
    before: dict[int, socket_options.Options] = collection.memory.setdefault("socket options", {})
    options = socket_options.read(sock, before.get(descriptor.status.st_ino))
    before[descriptor.status.st_ino] = options
    return options


def _check(
    descriptor: Descriptor, sock: socket.socket, options: socket_options.Options, collection: Collection
) -> None:
    if options.unreadable_filter:
        collection.block(
            descriptor,
            "a socket with an eBPF filter",
            "the kernel does not give such a program back",
            "detach it (SO_DETACH_FILTER) or use a classic one",
        )
    if not collection.survey:
        return
    if sock.family == socket.AF_INET6 and socket_options.asked(
        sock.fileno(), socket_options.SOL_IPV6, _IPV6_FLOWLABEL_MGR, _FLOW_LABEL_SIZE
    ):
        collection.block(
            descriptor,
            "a socket with an IPv6 flow label of its own",
            "the lease of the label is this kernel's (IPV6_FLOWLABEL_MGR)",
            "let the kernel choose flow labels",
        )
    namespace = fcntl.ioctl(sock, _SIOCGSKNS)
    try:
        if os.fstat(namespace).st_ino != os.fstat(descriptor.owner.net).st_ino:
            collection.block(
                descriptor,
                "a socket of another network namespace",
                "it was made in a namespace that its process is not in now",
                "move the container that the namespace belongs to",
            )
    finally:
        os.close(namespace)


def bind(sock: socket.socket, entry: sk_inet_pb2.inet_sk_entry) -> None:
    """Bind as the image says; IP_TRANSPARENT is on, so the address need not be here yet."""
    try:
        sock.bind(local(entry, sock))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise RebuildError(
            f"cannot bind to {spell(entry)} here: {os.strerror(error.errno or 0)}",
            advice="stop the program on this host that uses the port (ss -lntup)" if taken else "",
        ) from error
