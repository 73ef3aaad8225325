"""TCP connections that have ended before the program has noticed: bytes that it has not read, an error not yet told.

The state is CLOSE, but reading gives the bytes first, then the error or the end. No interface puts this into a socket,
so the destination lets it happen: the socket is connected to one of ours over lo, is sent the bytes, and is reset or
closed by it. Which error waits cannot be asked without taking it: a connection that never stood is taken for refused,
any other for reset.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import sk_inet_pb2, tcp_stream_pb2

from . import inet, tcp_stream
from .base import Collection, Restoration
from .socket_options import SOL_SOCKET, SOL_TCP
from .tcp_stream import State

_RTT = 68  # tcpi_rtt in struct tcp_info
_TIMEOUT = 2.0  # seconds, over lo
_RESET = struct.pack("ii", 1, 0)  # struct linger: close says RST


def collect(sock: socket.socket, isk: sk_inet_pb2.inet_sk_entry, collection: Collection) -> None:
    """Note what a socket in CLOSE has for the program, if anything."""
    length = tcp_stream.unread(sock)
    if events(sock) & select.POLLERR:
        (rtt,) = struct.unpack_from("I", sock.getsockopt(SOL_TCP, socket.TCP_INFO, _RTT + 4), _RTT)
        isk.phaul_error = errno.ECONNRESET if rtt else errno.ECONNREFUSED
    elif not length:
        return
    content = sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT) if length else b""
    message = tcp_stream_pb2.tcp_stream_entry(
        inq_len=len(content), inq_seq=0, outq_len=0, outq_seq=0, opt_mask=0, snd_wscale=0, mss_clamp=0
    )
    collection.checkpoint.put("tcp-stream", isk.ino, message, content)


def is_one(isk: sk_inet_pb2.inet_sk_entry, restoration: Restoration) -> bool:
    """Whether an image entry is of such a connection."""
    return isk.state == State.CLOSE and restoration.checkpoint.has("tcp-stream", isk.ino)


def settle(sock: socket.socket, isk: sk_inet_pb2.inet_sk_entry, restoration: Restoration) -> None:
    """Let it happen to a fresh socket."""
    content = restoration.checkpoint.records("tcp-stream", isk.ino)[0].payload
    blocking = os.get_blocking(sock.fileno())
    os.set_blocking(sock.fileno(), False)
    try:
        with tcp_stream.room(sock, len(content), 0), inet.make((isk.family, isk.type, 0), restoration) as listener:
            _let_happen(sock, listener, content, isk.phaul_error)
    except OSError as error:
        raise RebuildError(f"what a TCP connection that has ended has left cannot be made again: {error}") from error
    finally:
        os.set_blocking(sock.fileno(), blocking)
    failed = bool(events(sock) & select.POLLERR)
    if (tcp_stream.unread(sock), failed) != (len(content), bool(isk.phaul_error)):
        raise RebuildError("what a TCP connection that has ended has left could not be made again")


def _let_happen(sock: socket.socket, listener: socket.socket, content: bytes, error: int) -> None:
    listener.bind(("127.0.0.1" if listener.family == socket.AF_INET else "::1", 0))
    address = listener.getsockname()
    if error == errno.ECONNREFUSED:
        sock.connect_ex(address)  # nobody listens
        return
    listener.listen(1)
    listener.settimeout(_TIMEOUT)
    sock.connect_ex(address)
    peer, _ = listener.accept()
    with peer:
        peer.settimeout(_TIMEOUT)
        peer.sendall(content)
        if error:
            peer.setsockopt(SOL_SOCKET, socket.SO_LINGER, _RESET)
            return
        peer.shutdown(socket.SHUT_WR)
        sock.shutdown(socket.SHUT_WR)
        peer.recv(1)  # its end


def events(sock: socket.socket) -> int:
    """What poll(2) tells of a socket."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLPRI | select.POLLRDHUP)
    found = poll.poll(0)
    return found[0][1] if found else 0
