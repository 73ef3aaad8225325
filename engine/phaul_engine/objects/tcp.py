"""TCP sockets: listening, connected, half-closed, or neither.

A connection is read and rebuilt in TCP_REPAIR mode (tcp(7), linux/net/ipv4/tcp.c), in which a socket is bound,
connected and filled without a packet. The survey leaves repair alone, since a running program would see EPERM; it
reads addresses and options. The final pass reads streams in `seal`, when the tree is frozen and its packets are held,
and leaves the sockets in repair: so they die silently when the destination has taken over. `streams.resume_source`
gives them back to the program.

At the destination nothing may be heard of a socket before the commit. A listener listens early, so that a taken port
is found while there is time, behind a filter that drops every packet. A connection is a bare socket in repair until
`settle` binds, connects and fills it; it cannot speak before `release`, which leaves repair. What was sent and not
acknowledged is in the queue as sent; what was not sent yet waits behind a closed window, which the peer's first
answer opens. So nothing but leaving repair is left to do after the commit, except for a FIN that the peer had sent:
`release` plays it to the socket again.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from phaul_engine import calls
from phaul_engine.clocks import own_clocks, tree_clocks
from phaul_engine.errors import RebuildError, TargetError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2, sk_inet_pb2, sk_opts_pb2
from phaul_engine.native import check, ffi, lib, new_error
from phaul_engine.proc.sock_diag import DiagSocket

from . import inet, socket_options, tcp_connecting, tcp_ended, tcp_stream, waking
from .base import SETTABLE_FLAGS, Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status
from .socket_options import SOL_SOCKET, SOL_TCP, Options
from .tcp_stream import TCP_REPAIR, TCP_REPAIR_OFF_NO_WP, State

_IPPROTO_MPTCP = 262
_CLOCK_SLACK = 10_000_000  # nanoseconds between the reading of a socket and of the tree's clock, at most
_TCP_INFO = socket.TCP_INFO
_TCP_AO_INFO, _AO_INFO_SIZE = 40, 40  # struct tcp_ao_info_opt
_ENDS = 2  # where they begin in struct ph_tcp_look
_DROP_ALL = struct.pack("<HBBI", 6, 0, 0, 0)  # BPF_RET 0

# Not written before the commit: what repair mode changes, and what `release` sets.
_LATE = frozenset({(SOL_SOCKET, socket_options.SO_LOCK_FILTER)})
# Of a connection, only what these options said when it was made counts.
_BOUND_BY_PEER = frozenset({(SOL_TCP, socket_options.TCP_MAXSEG), (SOL_TCP, socket_options.TCP_WINDOW_CLAMP)})


_Status: TypeAlias = tuple[int, int, int]  # settable flags; signal and pid of the owner of signals


@dataclass
class _Made:
    """A socket at the destination: what it is by now."""

    sort: inet.Sort
    options: Options
    bound: bool = False
    listening: bool = False
    in_repair: bool = False
    stream: tcp_stream.Stream | None = None
    status: _Status = (0, 0, 0)
    ended: bool = False


@dataclass
class _Known:
    """A connection that the last survey has described. As long as all of this is the same, so is its entry."""

    entry: fdinfo_pb2.file_entry
    ends: bytes
    options: Options
    flags: int
    signals: tuple[bytes, int]


@dataclass
class _Notes:
    """Of one pass over the source."""

    streams: list[tuple[Descriptor, fdinfo_pb2.file_entry]] = field(default_factory=list)
    listeners: list[tuple[Descriptor, fdinfo_pb2.file_entry]] = field(default_factory=list)
    connecting: list[tuple[Descriptor, fdinfo_pb2.file_entry]] = field(default_factory=list)


@descriptor_kind
class Tcp(DescriptorKind):
    """A TCP socket."""

    name = "TCP socket"
    types = (fdinfo_pb2.INETSK,)

    def claims(self, descriptor: Descriptor) -> bool:
        sort = inet.sort_of(descriptor)
        return (
            sort is not None and sort[0] in inet.FAMILIES and sort[1] == socket.SOCK_STREAM and sort[2] in (0, 6, 262)
        )

    def rebuilds(self, entry: fdinfo_pb2.file_entry) -> bool:
        return bool(entry.isk.type == socket.SOCK_STREAM)

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        sort = cast("inet.Sort", inet.sort_of(descriptor))
        known = _known(collection).get(descriptor.status.st_ino)
        if known is not None and not collection.survey and _is_same(known, file_id, descriptor, sort):
            _notes(collection).streams.append((descriptor, known.entry))
            return known.entry
        with inet.borrowed(descriptor.own, sort) as sock:
            info = sock.getsockopt(SOL_TCP, _TCP_INFO, 104)
            state = State(info[0])
            entry, options = inet.describe(descriptor, sock, file_id, collection, state)
            _set_tcp_options(entry.isk, options)
            if sort[2] == _IPPROTO_MPTCP:
                collection.block(
                    descriptor,
                    "an MPTCP socket",
                    "multipath TCP has no repair mode",
                    "use plain TCP (GODEBUG=multipathtcp=0)",
                )
            elif collection.survey and _signs(descriptor, sock, entry.isk, collection):
                collection.block(
                    descriptor,
                    f"a TCP socket with keys ({inet.spell(entry.isk)})",
                    "its segments are signed (TCP_MD5SIG, TCP_AO) with keys that the kernel keeps",
                    "close it, or switch the signatures off",
                )
            elif state is State.LISTEN:
                entry.isk.backlog = struct.unpack_from("I", info, 28)[0]
                if not collection.survey:
                    _check_waiting(descriptor, sock, entry.isk, collection)
                    _notes(collection).listeners.append((descriptor, entry))
            elif state is State.CLOSE:
                _check_closed(sock, entry.isk, collection)
            else:
                self._stream(descriptor, sock, state, entry, options, collection)
                if state in tcp_stream.CONNECTED and _is_stream(entry.isk):
                    look, signals = _look(descriptor.own), calls.signal_state(descriptor.own)
                    known = _Known(entry, look[_ENDS:], options, descriptor.info.flags, signals)
                    _known(collection)[descriptor.status.st_ino] = known
        return entry

    def _stream(
        self,
        descriptor: Descriptor,
        sock: socket.socket,
        state: State,
        entry: fdinfo_pb2.file_entry,
        options: Options,
        collection: Collection,
    ) -> None:
        choice = collection.options.get("tcp", "established")
        ulp = sock.getsockopt(SOL_TCP, socket_options.TCP_ULP, 16).rstrip(b"\0")
        if choice == "refuse":
            collection.block(
                descriptor, _spell(entry.isk), "--tcp refuse was given", "use --tcp established or --tcp close"
            )
        elif ulp:
            collection.block(
                descriptor,
                _spell(entry.isk),
                f"the kernel runs {ulp.decode()} on it",
                "switch kernel TLS off in the program",
            )
        elif choice == "close":
            _end(entry.isk)
        elif state is State.SYN_SENT:
            tcp_connecting.collect(descriptor, entry.isk, options, collection)
            _notes(collection).connecting.append((descriptor, entry))
        elif not collection.survey:
            _check_events(descriptor, sock, entry.isk, collection)
            _notes(collection).streams.append((descriptor, entry))

    def seal(self, collection: Collection) -> None:
        for descriptor, entry in _notes(collection).streams:
            with inet.borrowed(descriptor.own, cast("inet.Sort", inet.sort_of(descriptor))) as sock:
                stream = tcp_stream.read(sock)
                if stream is None:
                    entry.isk.state = State.CLOSE
                    collection.block(descriptor, _spell(entry.isk), "it has ended just now", "try again", passing=True)
                    continue
                entry.isk.state = stream.state
                entry.isk.ClearField("shutdown")  # CRIU takes one that says "none" for a mistake
                if stream.shutdown:
                    entry.isk.shutdown = cast("sk_opts_pb2.sk_shutdown", stream.shutdown)
                message = stream.encode()
                message.nodelay, message.cork = entry.isk.tcp_opts.nodelay, entry.isk.tcp_opts.cork
                payload = stream.received + stream.sent
                collection.checkpoint.put("tcp-stream", entry.isk.ino, message, payload)
        for descriptor, entry in _notes(collection).listeners:  # again, since nothing comes in any more
            with inet.borrowed(descriptor.own, cast("inet.Sort", inet.sort_of(descriptor))) as sock:
                _check_waiting(descriptor, sock, entry.isk, collection)
        for descriptor, entry in _notes(collection).connecting:
            if _look(descriptor.own)[0] != State.SYN_SENT:
                tcp_connecting.block(descriptor, entry.isk, "its request has been answered just now", collection)

    def finish(self, collection: Collection) -> None:
        for diag in collection.scratch.pop("tcp diag", {}).values():
            diag.close()

    def settles(self, early: fdinfo_pb2.file_entry, final: fdinfo_pb2.file_entry) -> bool:
        """A bare socket in repair becomes any connection; a bound one stays where it is bound."""
        a, b = early.isk, final.isk
        if (a.family, a.type, a.proto) != (b.family, b.type, b.proto):
            return False
        if _is_stream(a):
            return True
        same_place = (a.src_port, list(a.src_addr)) == (b.src_port, list(b.src_addr))
        return (a.state != State.LISTEN and (same_place or not inet.is_bound(a))) or (a.state == b.state and same_place)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        isk = entry.isk
        sort = (isk.family, isk.type, isk.proto)
        sock = inet.make(sort, restoration)
        try:
            made = _Made(sort, inet.fresh_options(sock, sort, restoration))
            sock.setsockopt(*inet.TRANSPARENT[socket.AddressFamily(isk.family)], 1)
            self._write_options(sock, made, isk, sharing=_shared(isk, restoration))
            if _is_stream(isk):
                sock.setsockopt(SOL_TCP, TCP_REPAIR, 1)
                made.in_repair = True
            else:
                _bind_and_listen(sock, made, isk)
        except BaseException:
            sock.close()
            raise
        _all_made(restoration)[entry.id] = made
        return sock.detach()

    def _write_options(
        self, sock: socket.socket, made: _Made, isk: sk_inet_pb2.inet_sk_entry, *, sharing: bool = False
    ) -> None:
        """`sharing` lets sockets be bound to one port: they could when they were, whatever SO_REUSEPORT says since.
        `settle` writes what it says."""
        wanted = _decode_options(isk)
        if sharing:
            wanted = Options({**wanted.values, (SOL_SOCKET, socket.SO_REUSEPORT): struct.pack("i", 1)}, wanted.filter)
        without = _LATE | {inet.TRANSPARENT[socket.AddressFamily(isk.family)]}
        if _is_stream(isk) or isk.shutdown == sk_opts_pb2.BOTH:  # is connected, or was
            without |= _BOUND_BY_PEER
        if made.in_repair:  # where SO_REUSEADDR is the kernel's own; `release` sets it
            without |= {(SOL_SOCKET, socket_options.SO_REUSEADDR)}
        socket_options.write(sock, wanted, without, made.options, filtering=isk.state != State.LISTEN)
        made.options = wanted

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        isk = entry.isk
        made = _all_made(restoration)[entry.id]
        with inet.borrowed(fd, made.sort) as sock:
            status = (isk.flags & SETTABLE_FLAGS, isk.fown.signum, isk.fown.pid)
            if status != made.status or isk.fown.pid:
                settle_status(fd, isk.flags, isk.fown, restoration)
                made.status = status
            wanted = _decode_options(isk)
            if wanted is not made.options:
                self._write_options(sock, made, isk)
            if not _is_stream(isk):
                if made.in_repair:  # made for a connection that has ended since
                    sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
                    made.in_repair = False
                if made.stream is None:
                    self._settle_unconnected(sock, made, isk, restoration)
                waking.noted(restoration)[entry.id] = waking.plan(made.sort, made.options, muted=made.listening)
                return
            if made.stream is not None:
                return
            if isk.state == State.SYN_SENT:
                self._plan_request(entry, sock, made, restoration)
                return
            records = restoration.checkpoint.records("tcp-stream", isk.ino)
            if len(records) != 1:
                raise RebuildError(f"the image has no TCP stream for socket {isk.ino}")
            if isk.state not in tcp_stream.CONNECTED:
                raise RebuildError(f"the image has a TCP connection in state {isk.state}, which cannot be rebuilt")
            made.stream = _aged(tcp_stream.decode(records[0].message, records[0].payload, isk), restoration)
            try:
                if not made.in_repair:
                    sock.setsockopt(SOL_TCP, TCP_REPAIR, 1)
                made.stream.write(sock, made.bound)
            except (OSError, TargetError) as error:
                raise RebuildError(
                    f"cannot rebuild the connection {inet.spell(isk)} to {inet.spell(isk, peer=True)}: {error}"
                ) from error
            self._plan_connection(entry.id, made, restoration)

    def _settle_unconnected(
        self, sock: socket.socket, made: _Made, isk: sk_inet_pb2.inet_sk_entry, restoration: Restoration
    ) -> None:
        _bind_and_listen(sock, made, isk)
        if made.ended:
            return
        if tcp_ended.is_one(isk, restoration):
            tcp_ended.settle(sock, isk, restoration)
            made.ended = True
        elif isk.shutdown:
            with suppress(OSError):  # ENOTCONN, and yet it is shut down from now on (linux/net/ipv4/af_inet.c)
                sock.shutdown(isk.shutdown - 1)

    def _plan_request(
        self, entry: fdinfo_pb2.file_entry, sock: socket.socket, made: _Made, restoration: Restoration
    ) -> None:
        if not made.bound:
            inet.bind(sock, entry.isk)
            made.bound = True
        plan = waking.plan(made.sort, made.options, muted=False)
        plan.in_repair, plan.connect = made.in_repair, inet.socket_address(entry.isk, sock, peer=True).hex()
        waking.noted(restoration)[entry.id] = plan

    def _plan_connection(self, file_id: int, made: _Made, restoration: Restoration) -> None:
        stream = cast("tcp_stream.Stream", made.stream)
        plan = waking.plan(made.sort, made.options, muted=False)
        probe = restoration.options.get("tcp_probe", "outstanding")
        plan.in_repair, plan.played = True, stream.played()
        plan.probe = probe == "always" or bool(stream.unsent) or (probe == "outstanding" and stream.outstanding)
        if plan.played is not None:
            waking.replayer(restoration, plan.played.family)  # made now: in the end there is no time
        waking.noted(restoration)[file_id] = plan

    def release(self, restoration: Restoration) -> None:
        waking.wake(restoration, list(_all_made(restoration)))


def close_connections(checkpoint: Checkpoint) -> None:
    """Change images so that their connections come back as ended ones."""
    for record in checkpoint.records("files"):
        isk = record.message.isk
        if record.message.HasField("isk") and isk.type == socket.SOCK_STREAM and _is_stream(isk):
            checkpoint.remove("tcp-stream", isk.ino)
            _end(isk)


def _end(isk: sk_inet_pb2.inet_sk_entry) -> None:
    """Make it a connection that has ended."""
    isk.state, isk.shutdown = State.CLOSE, sk_opts_pb2.BOTH
    del isk.dst_addr[:]
    isk.dst_port = 0


def _known(collection: Collection) -> dict[int, _Known]:
    """By inode; a survey begins anew."""
    if collection.survey and "tcp" not in collection.scratch:
        _notes(collection)
        collection.memory["TCP connections"] = {}
    return cast("dict[int, _Known]", collection.memory.setdefault("TCP connections", {}))


def _look(fd: int) -> bytes:
    """A struct ph_tcp_look: state, events, both ends."""
    look, err = ffi.new("struct ph_tcp_look *"), new_error()
    check(lib.ph_tcp_look(fd, look, err), err)
    return bytes(ffi.buffer(look))


def _is_same(known: _Known, file_id: int, descriptor: Descriptor, sort: inet.Sort) -> bool:
    """Whether a connection can have changed only in what `seal` reads."""
    look = _look(descriptor.own)
    return (
        known.entry.id == file_id
        and look[0] in tcp_stream.CONNECTED
        and not look[1]
        and look[_ENDS:] == known.ends
        and known.flags == descriptor.info.flags
        and known.signals == calls.signal_state(descriptor.own)
        and socket_options.unchanged(descriptor.own, sort, known.options)
    )


def _notes(collection: Collection) -> _Notes:
    return cast("_Notes", collection.scratch.setdefault("tcp", _Notes()))


def _all_made(restoration: Restoration) -> dict[int, _Made]:
    return cast("dict[int, _Made]", restoration.scratch.setdefault("tcp", {}))


def _aged(stream: tcp_stream.Stream, restoration: Restoration) -> tcp_stream.Stream:
    """The connection with its timestamps where they would be by now, by the tree's own clock, which goes on."""
    if stream.timestamp is None or not restoration.checkpoint.has("timens", 0):
        return stream
    ahead: int | None = restoration.cache.get("tree's clock")
    if ahead is None:  # how far it is ahead of ours
        task = next(iter(restoration.tasks.values()), None)
        ours = own_clocks().monotonic
        ahead = restoration.cache["tree's clock"] = 0 if task is None else tree_clocks(task.proc).monotonic - ours
    read_at = restoration.checkpoint.one("timens", 0).monotonic
    elapsed = time.monotonic_ns() + ahead - read_at.tv_sec * 1_000_000_000 - read_at.tv_nsec
    stream.timestamp = tcp_stream.later(stream.timestamp, max(elapsed, 0) + _CLOCK_SLACK)
    return stream


def _is_stream(isk: sk_inet_pb2.inet_sk_entry) -> bool:
    return isk.state not in (State.CLOSE, State.LISTEN)


def _spell(isk: sk_inet_pb2.inet_sk_entry) -> str:
    return f"a TCP connection ({inet.spell(isk)} to {inet.spell(isk, peer=True)})"


def _set_tcp_options(isk: sk_inet_pb2.inet_sk_entry, options: Options) -> None:
    """The fields that CRIU reads; our own options say it all."""
    chosen = isk.tcp_opts
    chosen.nodelay = bool(options.integer(SOL_TCP, socket.TCP_NODELAY))
    chosen.cork = bool(options.integer(SOL_TCP, socket.TCP_CORK))
    chosen.keepcnt = options.integer(SOL_TCP, socket.TCP_KEEPCNT)
    chosen.keepidle = options.integer(SOL_TCP, socket.TCP_KEEPIDLE)
    chosen.keepintvl = options.integer(SOL_TCP, socket.TCP_KEEPINTVL)


def _decode_options(isk: sk_inet_pb2.inet_sk_entry) -> Options:
    """The options, also of an image by CRIU, which has some of them in other fields."""
    options = socket_options.decode(isk.opts)
    if isk.opts.phaul_options:
        return options
    values = dict(options.values)
    if isk.HasField("tcp_opts"):
        for name, value in ((socket.TCP_NODELAY, isk.tcp_opts.nodelay), (socket.TCP_CORK, isk.tcp_opts.cork)):
            values[SOL_TCP, name] = struct.pack("i", value)
    if isk.HasField("v6only"):
        values[socket_options.SOL_IPV6, socket_options.IPV6_V6ONLY] = struct.pack("i", isk.v6only)
    return Options(values, options.filter)


def _signs(descriptor: Descriptor, sock: socket.socket, isk: sk_inet_pb2.inet_sk_entry, collection: Collection) -> bool:
    """Whether a socket has keys. Of one that is neither connected nor listening the kernel does not tell."""
    if socket_options.asked(sock.fileno(), SOL_TCP, _TCP_AO_INFO, _AO_INFO_SIZE) is not None:
        return True
    net = os.fstat(descriptor.owner.net).st_ino
    asking: dict[int, DiagSocket] = collection.scratch.setdefault("tcp diag", {})
    if net not in asking:
        asking[net] = collection.passing.enter_context(DiagSocket(descriptor.owner.net))
    ends = (isk.src_addr, isk.src_port), (isk.dst_addr, isk.dst_port)
    source, destination = ((struct.pack(f"<{len(words)}I", *words), port) for words, port in ends)
    return asking[net].signs(isk.family, source, destination)


def _check_waiting(
    descriptor: Descriptor, sock: socket.socket, isk: sk_inet_pb2.inet_sk_entry, collection: Collection
) -> None:
    """What has been promised to clients and is not accepted: tcpi_unacked of a listener."""
    (waiting,) = struct.unpack_from("I", sock.getsockopt(SOL_TCP, _TCP_INFO, 28), 24)
    if waiting:
        collection.block(
            descriptor,
            f"a listening socket ({inet.spell(isk)})",
            f"{waiting} connections wait to be accepted",
            "they will have been accepted at the next try",
            passing=True,
        )


def _check_closed(sock: socket.socket, isk: sk_inet_pb2.inet_sk_entry, collection: Collection) -> None:
    """A socket that was never connected, or whose connection is over. Only the latter is shut down (tcp_poll)."""
    if tcp_ended.events(sock) & select.POLLRDHUP:
        isk.shutdown = sk_opts_pb2.BOTH
    if not collection.survey:
        tcp_ended.collect(sock, isk, collection)


def _check_events(
    descriptor: Descriptor, sock: socket.socket, isk: sk_inet_pb2.inet_sk_entry, collection: Collection
) -> None:
    events = tcp_ended.events(sock)
    if events & select.POLLPRI:
        collection.block(
            descriptor,
            _spell(isk),
            "urgent data is waiting in it",
            "try again when the program has read it",
            passing=True,
        )
    if events & select.POLLERR:
        collection.block(
            descriptor,
            _spell(isk),
            "an error or a notification waits in it",
            "try again when it has been read",
            passing=True,
        )


def _bind_and_listen(sock: socket.socket, made: _Made, isk: sk_inet_pb2.inet_sk_entry) -> None:
    if inet.is_bound(isk) and not made.bound and not _is_over(isk):
        inet.bind(sock, isk)
        made.bound = True
    if isk.state == State.LISTEN:
        if not made.listening:
            _guard(sock)
        try:
            sock.listen(isk.backlog)
        except OSError as error:
            raise RebuildError(f"cannot listen at {inet.spell(isk)} here: {os.strerror(error.errno or 0)}") from error
        made.listening = True


def _is_over(isk: sk_inet_pb2.inet_sk_entry) -> bool:
    """Whether it was a connection, and has ended. Such a socket still tells its address, and does not hold it any more:
    the port is free for others (linux/net/ipv4/inet_hashtables.c, __inet_put_port)."""
    return isk.state == State.CLOSE and isk.shutdown == sk_opts_pb2.BOTH


def _shared(isk: sk_inet_pb2.inet_sk_entry, restoration: Restoration) -> bool:
    """Whether other sockets of the tree are bound to the same port."""
    counts: Counter[int] | None = restoration.cache.get("TCP ports")
    if counts is None:
        entries = (record.message.isk for record in restoration.checkpoint.records("files"))
        counts = Counter(
            one.src_port for one in entries if one.type == socket.SOCK_STREAM and not (_is_stream(one) or _is_over(one))
        )
        restoration.cache["TCP ports"] = counts
    return bool(isk.src_port) and counts[isk.src_port] > 1


def _guard(sock: socket.socket) -> None:
    """Let no packet in: connection requests are dropped without an answer, and so are repeated by the client."""
    socket_options.write_filter(sock, _DROP_ALL)
