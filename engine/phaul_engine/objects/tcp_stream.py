"""One TCP connection: read out of a socket in TCP_REPAIR mode, and written into another.

Numbers as in CRIU's tcp_stream_entry: `received_to` (inq_seq) is RCV.NXT, `written_to` (outq_seq) is the number after
the last byte written; a FIN counts in both, though it is no byte of a queue. Sources: linux/net/ipv4/tcp.c (TCP_REPAIR,
TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS, TCP_REPAIR_WINDOW), RFC 9293 3.3.2 (states).
"""

from __future__ import annotations

import enum
import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from phaul_engine.errors import RebuildError, TargetError
from phaul_engine.images.pb import sk_inet_pb2, sk_opts_pb2, tcp_stream_pb2
from phaul_engine.native import check, ffi, lib, new_error

from . import inet, socket_options
from .socket_options import SOL_SOCKET, SOL_TCP

TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_REPAIR_WINDOW = 19, 20, 29
TCP_REPAIR_OFF_NO_WP = -1
_NO_QUEUE, _RECV_QUEUE, _SEND_QUEUE = 0, 1, 2
_SIOCINQ = 0x541B
_TCPI_TIMESTAMPS, _TCPI_WSCALE = 1, 4
_FIN, _ACK = 0x01, 0x10
_CHUNK = 1 << 16  # of a queue, at a time
_WINDOW = struct.Struct("<5I")  # struct tcp_repair_window
_MASK = 0xFFFFFFFF


class State(enum.IntEnum):
    """A TCP socket's state (linux/include/net/tcp_states.h)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11


CONNECTED = frozenset(
    {
        State.ESTABLISHED,
        State.FIN_WAIT1,
        State.FIN_WAIT2,
        State.CLOSE_WAIT,
        State.LAST_ACK,
        State.CLOSING,
    }
)
_WE_CLOSED = frozenset({State.FIN_WAIT1, State.FIN_WAIT2, State.LAST_ACK, State.CLOSING})
_PEER_CLOSED = frozenset({State.CLOSE_WAIT, State.LAST_ACK, State.CLOSING})


@dataclass
class Played:
    """A segment without data that a socket is to hear as if from its peer; `then_close` our own FIN follows."""

    source: tuple[str, int]
    target: tuple[str, int]
    sequence: int
    acknowledgment: int
    flags: int
    window: int
    then_close: bool = False

    @property
    def family(self) -> int:
        """Of its packet: IPv4 also for a mapped address."""
        host = self.target[0]
        return socket.AF_INET if ":" not in host or host.startswith("::ffff:") else socket.AF_INET6


@dataclass
class Stream:
    """A connection. `received` is unread, `sent` unacknowledged; its last `unsent` bytes were never sent."""

    state: State
    received: bytes
    sent: bytes
    unsent: int
    received_to: int
    written_to: int
    options: int  # TCPI_OPT_*
    snd_wscale: int
    rcv_wscale: int
    mss: int
    timestamp: int | None
    window: tuple[int, int, int, int, int] | None  # snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
    ends: sk_inet_pb2.inet_sk_entry = field(default_factory=sk_inet_pb2.inet_sk_entry)  # its addresses and ports

    @property
    def we_closed(self) -> bool:
        """Whether our FIN is queued, sent or acknowledged."""
        return self.state in _WE_CLOSED

    @property
    def peer_closed(self) -> bool:
        """Whether the peer's FIN has come, or our FIN's acknowledgment must be told to the new socket."""
        return self.state in _PEER_CLOSED or self.state is State.FIN_WAIT2

    @property
    def shutdown(self) -> int:
        """The directions that are closed, as CRIU's sk_shutdown."""
        reading = sk_opts_pb2.READ if self.state in _PEER_CLOSED else 0
        return int(reading | (sk_opts_pb2.WRITE if self.we_closed else 0))

    @property
    def outstanding(self) -> bool:
        """Whether the peer owes an acknowledgment."""
        return bool(self.sent) or (self.we_closed and self.state is not State.FIN_WAIT2)

    def encode(self) -> tcp_stream_pb2.tcp_stream_entry:
        """The image message; the queues follow it."""
        message = tcp_stream_pb2.tcp_stream_entry(
            inq_len=len(self.received),
            inq_seq=self.received_to,
            outq_len=len(self.sent),
            outq_seq=self.written_to,
            opt_mask=self.options,
            snd_wscale=self.snd_wscale,
            mss_clamp=self.mss,
            rcv_wscale=self.rcv_wscale,
            unsq_len=self.unsent,
        )
        if self.timestamp is not None:
            message.timestamp = self.timestamp
        if self.window is not None:
            message.snd_wl1, message.snd_wnd, message.max_window, message.rcv_wnd, message.rcv_wup = self.window
        return message

    def write(self, sock: socket.socket, bound: bool) -> None:
        """Make a socket in repair mode this connection. No packet leaves; it stays in repair."""
        native, err = ffi.new("struct ph_tcp_stream *"), new_error()
        native.received_to = (self.received_to - (self.state in _PEER_CLOSED) - len(self.received)) & _MASK
        native.written_to = (self.written_to - self.we_closed - len(self.sent)) & _MASK
        native.options, native.mss = self.options, self.mss
        native.scales = self.snd_wscale | self.rcv_wscale << 4
        native.timestamp = self.timestamp or 0
        here = inet.socket_address(self.ends, sock)
        there = inet.socket_address(self.ends, sock, peer=True)
        check(lib.ph_tcp_connect(sock.fileno(), native, here, there, len(here), bound, err), err)
        if self.received or self.sent or self.we_closed:
            with room(sock, len(self.received), len(self.sent)):
                self._fill(sock)
            sock.setsockopt(SOL_TCP, _TCP_REPAIR_QUEUE, _NO_QUEUE)
        self._set_window(sock)

    def _fill(self, sock: socket.socket) -> None:
        if self.received:
            _fill(sock, _RECV_QUEUE, self.received)
        old = len(self.sent) - self.unsent
        if old:
            _fill(sock, _SEND_QUEUE, self.sent[:old])
        if self.unsent:
            self._write_unsent(sock, old)
        elif self.we_closed and self.state is not State.LAST_ACK:
            sock.setsockopt(SOL_TCP, _TCP_REPAIR_QUEUE, _SEND_QUEUE)
            sock.shutdown(socket.SHUT_WR)  # in repair: the FIN counts as sent

    def _write_unsent(self, sock: socket.socket, old: int) -> None:
        """Queue what was never sent. Repair mode can only queue what was, so it is left, with a closed window."""
        self._set_window(sock, send_window=old)
        sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
        _send(sock, self.sent[old:])
        if self.we_closed and self.state is not State.LAST_ACK:
            sock.shutdown(socket.SHUT_WR)
        sock.setsockopt(SOL_TCP, TCP_REPAIR, 1)

    def _set_window(self, sock: socket.socket, send_window: int | None = None) -> None:
        if self.window is None:
            return
        snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup = self.window
        if self.state in _PEER_CLOSED:  # its FIN is not in the new socket yet
            rcv_wnd, rcv_wup = rcv_wnd + 1, rcv_wup - 1
        if send_window is not None:
            snd_wnd = send_window
        packed = _WINDOW.pack(snd_wl1 & _MASK, snd_wnd, max_window, rcv_wnd, rcv_wup & _MASK)
        sock.setsockopt(SOL_TCP, _TCP_REPAIR_WINDOW, packed)

    def played(self) -> Played | None:
        """What must be played to the socket when it is out of repair mode: the peer's FIN, or its acknowledgment of
        ours. Heard twice it does no harm."""
        if not self.peer_closed:
            return None
        peer_fin = self.state in _PEER_CLOSED
        acknowledged = (
            self.written_to if self.state is State.FIN_WAIT2 else self.written_to - len(self.sent) - self.we_closed
        )
        window = self.window[1] >> self.snd_wscale if self.window else 0xFFFF
        ends = self.ends
        return Played(
            source=(inet.text(list(ends.dst_addr), ends.family), ends.dst_port),
            target=(inet.text(list(ends.src_addr), ends.family), ends.src_port),
            sequence=(self.received_to - peer_fin) & _MASK,
            acknowledgment=acknowledged & _MASK,
            flags=_ACK | (_FIN if peer_fin else 0),
            window=min(window, 0xFFFF),
            then_close=self.state is State.LAST_ACK,
        )


def read(sock: socket.socket) -> Stream | None:
    """Put a socket into repair mode, leave it there, and read its connection; None if that has ended.

    Packets should be held meanwhile: repair mode does not keep a socket from receiving.
    """
    native, err = ffi.new("struct ph_tcp_stream *"), new_error()
    for _attempt in range(3):
        check(lib.ph_tcp_read(sock.fileno(), native, err), err)
        state, options = State(native.state), native.options
        if state not in CONNECTED:
            sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
            return None
        unread_bytes, unacknowledged, unsent = native.unread, native.unacknowledged, native.unsent
        if state in _WE_CLOSED:  # the FIN counts in the numbers, and is no byte
            unacknowledged, unsent = max(unacknowledged - 1, 0), max(unsent - 1, 0)
        received, sent = _read_queues(sock, unread_bytes, unacknowledged)
        if (len(received), len(sent)) != (unread_bytes, unacknowledged):
            continue  # a packet came in between
        return Stream(
            state=state,
            received=received,
            sent=sent,
            unsent=unsent,
            received_to=native.received_to,
            written_to=native.written_to,
            options=options,
            snd_wscale=native.scales & 15 if options & _TCPI_WSCALE else 0,
            rcv_wscale=native.scales >> 4 if options & _TCPI_WSCALE else 0,
            mss=native.mss,
            timestamp=native.timestamp if options & _TCPI_TIMESTAMPS else None,
            window=tuple(native.window),
        )
    raise TargetError(f"the queues of the TCP connection to {sock.getpeername()} do not hold still")


def later(timestamp: int, elapsed_ns: int) -> int:
    """A timestamp of TCP_TIMESTAMP as it would be some time after. The lowest bit tells the unit, which is a
    millisecond or (since Linux 6.7) a microsecond (net/ipv4/tcp.c).

    Timestamps must not go back: the peer would drop our segments as old (PAWS, RFC 7323 5).
    """
    units = elapsed_ns // 1_000 if timestamp & 1 else elapsed_ns // 1_000_000
    return (timestamp + (units & ~1)) & _MASK


def decode(message: tcp_stream_pb2.tcp_stream_entry, payload: bytes, isk: sk_inet_pb2.inet_sk_entry) -> Stream:
    """A connection out of the image."""
    if len(payload) != message.inq_len + message.outq_len:
        raise RebuildError(f"the queues of TCP stream {isk.ino} have {len(payload)} bytes in the image")
    has_window = message.HasField("snd_wnd")
    return Stream(
        state=State(isk.state),
        received=payload[: message.inq_len],
        sent=payload[message.inq_len :],
        unsent=min(message.unsq_len, message.outq_len),
        received_to=message.inq_seq,
        written_to=message.outq_seq,
        options=message.opt_mask,
        snd_wscale=message.snd_wscale,
        rcv_wscale=message.rcv_wscale,
        mss=message.mss_clamp,
        timestamp=message.timestamp if message.HasField("timestamp") else None,
        window=(message.snd_wl1, message.snd_wnd, message.max_window, message.rcv_wnd, message.rcv_wup)
        if has_window
        else None,
        ends=isk,
    )


def resume_source(sock: socket.socket, reuse: bool) -> bool:
    """Give a socket back to the program it was read from: leave repair mode, which forgets SO_REUSEADDR.

    Whether there was anything to do. What was held meanwhile must be played to it afterwards, not before: the steal is
    switched off first.
    """
    if not sock.getsockopt(SOL_TCP, TCP_REPAIR):
        return False
    sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
    sock.setsockopt(SOL_SOCKET, socket_options.SO_REUSEADDR, int(reuse))
    return True


def unread(sock: socket.socket) -> int:
    """Bytes in the receive queue (SIOCINQ)."""
    return _ioctl(sock, _SIOCINQ)


def _ioctl(sock: socket.socket, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, request, b"\0\0\0\0"))[0])


def _read_queues(sock: socket.socket, unread_bytes: int, unacknowledged: int) -> tuple[bytes, bytes]:
    """What is in the queues of a socket in repair mode; where there is nothing, nothing is asked."""
    contents = []
    for queue, length in ((_RECV_QUEUE, unread_bytes), (_SEND_QUEUE, unacknowledged)):
        content = b""
        if length:
            sock.setsockopt(SOL_TCP, _TCP_REPAIR_QUEUE, queue)
            content = sock.recv(length + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)  # one more: is that all?
            sock.setsockopt(SOL_TCP, _TCP_REPAIR_QUEUE, _NO_QUEUE)
        contents.append(content)
    return contents[0], contents[1]


@contextmanager
def room(sock: socket.socket, received: int, sent: int) -> Iterator[None]:
    """Room for the queues while they are filled. The kernel counts its overhead, which can be more than the data."""
    changed = []
    lock = b""
    for name, length in ((socket_options.SO_RCVBUF, received), (socket_options.SO_SNDBUF, sent)):
        if length and (size := sock.getsockopt(SOL_SOCKET, name)) < 4 * length + _CHUNK:
            lock = lock or sock.getsockopt(SOL_SOCKET, socket_options.SO_BUF_LOCK, 4)
            socket_options.set_buffer(sock, name, 4 * length + _CHUNK)
            changed.append((name, size))
    yield
    for name, size in changed:
        socket_options.set_buffer(sock, name, size)
    if changed:
        sock.setsockopt(SOL_SOCKET, socket_options.SO_BUF_LOCK, lock)


def _fill(sock: socket.socket, queue: int, content: bytes) -> None:
    sock.setsockopt(SOL_TCP, _TCP_REPAIR_QUEUE, queue)
    _send(sock, content)


def _send(sock: socket.socket, content: bytes) -> None:
    view, chunk = memoryview(content), _CHUNK
    while view:
        try:
            view = view[sock.send(view[:chunk], socket.MSG_DONTWAIT) :]
        except OSError:  # a piece of the receive queue is one allocation
            if chunk <= 1024:
                raise
            chunk >>= 1


class Replayer:
    """A raw socket that plays single segments to sockets of this host as if their peers had sent them.

    They are routed to the local address, so that address must be here; they arrive through lo.
    """

    def __init__(self, family: int) -> None:
        self._family = family
        self._sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)  # headers are ours

    def close(self) -> None:
        """Close the raw socket."""
        self._sock.close()

    def play(self, what: Played) -> None:
        """Send a segment. Raises `OSError`."""
        source, target = what.source, what.target
        packed = [socket.inet_pton(self._family, end[0].removeprefix("::ffff:")) for end in (source, target)]
        numbers = (source[1], target[1], what.sequence, what.acknowledgment)
        segment = struct.pack(">HHIIBBHHH", *numbers, 5 << 4, what.flags, what.window, 0, 0)
        pseudo = b"".join(packed) + struct.pack(">II", len(segment), socket.IPPROTO_TCP)
        segment = segment[:16] + struct.pack(">H", checksum(pseudo + segment)) + segment[18:]
        if self._family == socket.AF_INET:
            head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0, 64, socket.IPPROTO_TCP, 0)
        else:
            head = struct.pack(">IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64)
        host = target[0].removeprefix("::ffff:")
        self._sock.sendto(head + b"".join(packed) + segment, (host, 0))


def checksum(content: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(content) % 2:
        content += b"\0"
    total = sum(struct.unpack(f">{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)
