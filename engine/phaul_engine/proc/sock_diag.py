"""What the kernel tells about sockets by netlink (sock_diag(7), unix_diag.h, inet_diag.h).

A `DiagSocket` sees the network namespace that it was made in, whichever its user is in later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from phaul_engine.errors import EngineError

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x4, 0x300, 0x10
_NLMSG_NOOP, _NLMSG_ERROR, _NLMSG_DONE = 1, 2, 3
_ALL_STATES = 0xFFFFFFFF
_ANY = 0xFFFFFFFF  # INET_DIAG_NOCOOKIE
_INET_DIAG_MD5SIG = 18
_RECEIVE = 1 << 16
_ATTEMPTS = 5

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_UNIX_REQUEST = struct.Struct("=BBHIIIII")  # struct unix_diag_req
_UNIX_ANSWER = struct.Struct("=BBBBIQ")  # struct unix_diag_msg
_UNIX_SHOW_ALL = 0x7F  # name, vfs, peer, incoming connections, queue lengths, memory, uid
_INET_REQUEST = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2 with an empty id
_INET_ANSWER = struct.Struct("=BBBBHH16s16sIQIIIII")  # struct inet_diag_msg; ports are turned round below
_INET_EXTENSIONS = 0xFF  # bit N-1 asks for INET_DIAG_ attribute N
_ROOM_PAIR = struct.Struct("=II")


@dataclass(frozen=True)
class UnixSocket:
    """A unix socket.

    `kind` is SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET; `state` a TCP_ state: 1 established, 7 close (unconnected),
    10 listening. `name` is the bound name as in sun_path, an abstract one with its leading zero byte, None if it was
    never bound. `vfs` is inode and device of the bound path (the kernel's s_dev, major << 20 | minor). `peer` is the
    inode of the other end, 0 when it waits in a listening socket's queue and None if there is none. `waiting` are the
    inodes of the clients whose connections a listening socket has not accepted yet. `receive_queue` and `send_queue`
    are bytes (for a listening socket: connections waiting, and the backlog).
    """

    inode: int
    kind: int
    state: int
    cookie: int
    name: bytes | None
    vfs: tuple[int, int] | None
    peer: int | None
    waiting: tuple[int, ...]
    receive_queue: int
    send_queue: int
    shutdown: int
    uid: int | None


@dataclass(frozen=True)
class InetSocket:
    """A TCP, UDP or raw socket of IPv4 or IPv6.

    `inode` is 0 for what no descriptor stands for: TIME_WAIT, SYN_RECV and connections that wait to be accepted.
    `source` and `destination` are packed addresses (4 or 16 bytes). `receive_queue` and `send_queue` are bytes (for a
    listening socket: connections waiting, and the backlog). `timer` is 0 none, 1 retransmission, 2 another, 3
    TIME_WAIT, 4 zero window probe. `info` is struct tcp_info as far as the kernel has it, empty for others.
    """

    inode: int
    family: int
    protocol: int
    state: int
    cookie: int
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    interface: int
    receive_queue: int
    send_queue: int
    uid: int
    timer: int
    shutdown: int
    mark: int
    v6only: bool
    congestion: str
    info: bytes


class DiagSocket:
    """A netlink socket for questions about the sockets of one network namespace."""

    def __init__(self, net: int | None = None) -> None:
        """`net` is a descriptor of the network namespace to look at (needs CAP_SYS_ADMIN); None: the caller's."""
        self._socket = _make_socket() if net is None else _in_namespace(net)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def unix(self) -> dict[int, UnixSocket]:
        """All unix sockets, by inode."""
        request = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _UNIX_SHOW_ALL, 0, 0)
        found = [_unix(payload) for payload in self._dump(request)]
        return {entry.inode: entry for entry in found}

    def inet(self, family: int, protocol: int, states: int = _ALL_STATES) -> list[InetSocket]:
        """The sockets of AF_INET or AF_INET6 and IPPROTO_TCP, _UDP, _UDPLITE or _RAW in a set of TCP_ states (bit N
        is state N). Those without an inode are among them."""
        request = _INET_REQUEST.pack(family, protocol, _INET_EXTENSIONS, 0, states)
        return [_inet(payload, protocol) for payload in self._dump(request)]

    def inet_by_inode(self) -> dict[int, InetSocket]:
        """All TCP and UDP sockets of both families that have an inode, by it."""
        found: dict[int, InetSocket] = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            for protocol in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                found.update((entry.inode, entry) for entry in self.inet(family, protocol) if entry.inode)
        return found

    def signs(self, family: int, source: tuple[bytes, int], destination: tuple[bytes, int]) -> bool:
        """Whether a TCP socket signs its segments (TCP_MD5SIG): a listener, or a connection. False if there is none."""
        ports = struct.pack(">HH", source[1], destination[1])
        place = (
            ports + source[0].ljust(16, b"\0") + destination[0].ljust(16, b"\0") + struct.pack("=III", 0, _ANY, _ANY)
        )
        request = (
            _INET_REQUEST.pack(family, socket.IPPROTO_TCP, _INET_EXTENSIONS, 0, _ALL_STATES)[: -len(place)] + place
        )
        found = self._dump(request, _NLM_F_REQUEST | _NLM_F_ACK)
        return any(_attributes(payload, _INET_ANSWER.size).get(_INET_DIAG_MD5SIG) for payload in found)

    def _dump(self, request: bytes, flags: int = _NLM_F_REQUEST | _NLM_F_DUMP) -> list[bytes]:
        """The payloads of a whole dump. One that was disturbed is asked for again."""
        for _ in range(_ATTEMPTS):
            self._sequence += 1
            head = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, flags, self._sequence, 0)
            self._socket.send(head + request)
            payloads, disturbed = self._receive()
            if not disturbed:
                return payloads
        raise EngineError(f"the list of sockets changed during each of {_ATTEMPTS} attempts to read it")

    def _receive(self) -> tuple[list[bytes], bool]:
        payloads: list[bytes] = []
        disturbed = False
        while True:
            for kind, flags, sequence, payload in _messages(self._socket.recv(_RECEIVE)):
                if sequence != self._sequence or kind == _NLMSG_NOOP:
                    continue
                disturbed |= bool(flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    code = -int.from_bytes(payload[:4], "little", signed=True)
                    if code == errno.ENOENT:  # this kernel cannot tell about that family: it has no such sockets
                        return [], False
                    if code > 0:
                        raise EngineError(f"sock_diag answers {os.strerror(code)}")
                    return payloads, disturbed
                payloads.append(payload)


def _make_socket() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return made


def _in_namespace(net: int) -> socket.socket:
    """Make a socket in another network namespace: this thread goes there and comes back."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(net, 0) != 0:
            code = ctypes.get_errno()
            raise EngineError(f"cannot enter a network namespace: {os.strerror(code)}")
        try:
            return _make_socket()
        finally:
            if libc.setns(own, 0) != 0:
                code = ctypes.get_errno()
                raise EngineError(f"cannot return to the own network namespace: {os.strerror(code)}")
    finally:
        os.close(own)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            raise EngineError("a netlink message longer than what was received")
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += length + -length % 4


def _attributes(data: bytes, offset: int) -> dict[int, bytes]:
    found = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + -length % 4
    return found


def _numbers(data: bytes | None) -> tuple[int, ...]:
    return () if not data else struct.unpack(f"={len(data) // 4}I", data)


def _unix(payload: bytes) -> UnixSocket:
    _, kind, state, _, inode, cookie = _UNIX_ANSWER.unpack_from(payload)
    attributes = _attributes(payload, _UNIX_ANSWER.size)
    name, vfs, peer, waiting, queues, _, shutdown, uid = (attributes.get(number) for number in range(8))
    receive_queue, send_queue = _ROOM_PAIR.unpack(queues) if queues else (0, 0)
    place = _numbers(vfs)
    return UnixSocket(
        inode=inode,
        kind=kind,
        state=state,
        cookie=cookie,
        name=name,
        vfs=(place[0], place[1]) if place else None,
        peer=_numbers(peer)[0] if peer else None,
        waiting=_numbers(waiting),
        receive_queue=receive_queue,
        send_queue=send_queue,
        shutdown=shutdown[0] if shutdown else 0,
        uid=_numbers(uid)[0] if uid else None,
    )


def _inet(payload: bytes, protocol: int) -> InetSocket:
    family, state, timer, _, *id_and_rest = _INET_ANSWER.unpack_from(payload)
    source_port, destination_port, source, destination, interface, cookie, *rest = id_and_rest
    _, receive_queue, send_queue, uid, inode = rest
    attributes = _attributes(payload, _INET_ANSWER.size)
    size = 4 if family == socket.AF_INET else 16
    return InetSocket(
        inode=inode,
        family=family,
        protocol=protocol,
        state=state,
        cookie=cookie,
        source=source[:size],
        source_port=socket.ntohs(source_port),
        destination=destination[:size],
        destination_port=socket.ntohs(destination_port),
        interface=interface,
        receive_queue=receive_queue,
        send_queue=send_queue,
        uid=uid,
        timer=timer,
        shutdown=attributes.get(8, b"\0")[0],
        mark=(_numbers(attributes.get(15)) or (0,))[0],
        v6only=attributes.get(11, b"\0")[0] != 0,
        congestion=attributes.get(4, b"").rstrip(b"\0").decode("ascii", "replace"),
        info=attributes.get(2, b""),
    )
