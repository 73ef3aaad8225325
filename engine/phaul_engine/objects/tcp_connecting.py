"""TCP sockets that are being connected (SYN_SENT): a request is on its way, and nothing has been said yet.

They begin anew at the destination, from the same port: after the commit the socket is connected again, without waiting.
A thread that waits in connect(2) goes on waiting. An answer to the first request that is on its way is refused by the
destination's kernel, and the peer hears the second one. getpeername(2) does not tell the peer yet; sock_diag(7) does.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from phaul_engine.images.pb import sk_inet_pb2
from phaul_engine.proc.sock_diag import DiagSocket

from . import inet
from .base import Collection, Descriptor
from .socket_options import SOL_TCP, Options
from .tcp_stream import State

_TCP_FASTOPEN_CONNECT = 30
_IN_PROGRESS = (0, errno.EINPROGRESS)


def collect(descriptor: Descriptor, isk: sk_inet_pb2.inet_sk_entry, options: Options, collection: Collection) -> None:
    """Note where it is being connected to."""
    with DiagSocket(descriptor.owner.net) as diag:
        asking = diag.inet(isk.family, socket.IPPROTO_TCP, 1 << State.SYN_SENT)
    found = next((one for one in asking if one.inode == descriptor.status.st_ino), None)
    if found is not None:
        isk.dst_addr[:] = struct.unpack(f"<{len(found.destination) // 4}I", found.destination)
        isk.dst_port = found.destination_port
    if collection.survey:
        return
    if found is None:
        block(descriptor, isk, "it has been connected just now", collection)
    elif options.integer(SOL_TCP, _TCP_FASTOPEN_CONNECT):
        block(descriptor, isk, "its request carries data (TCP_FASTOPEN_CONNECT)", collection)


def block(descriptor: Descriptor, isk: sk_inet_pb2.inet_sk_entry, why: str, collection: Collection) -> None:
    """It is no request any more, or not only one."""
    collection.block(descriptor, f"a TCP connection ({inet.spell(isk)})", why, "try again", passing=True)


def connect(sock: socket.socket, address: bytes) -> None:
    """Ask again, to a struct sockaddr; a socket that has been asked for already stays as it is. Raises `OSError`."""
    if sock.getsockopt(SOL_TCP, socket.TCP_INFO, 1)[0] != State.CLOSE:
        return
    blocking = os.get_blocking(sock.fileno())
    os.set_blocking(sock.fileno(), False)
    try:
        code = sock.connect_ex(_plain(address))
        if code not in _IN_PROGRESS:
            raise OSError(code, os.strerror(code))
    finally:
        os.set_blocking(sock.fileno(), blocking)


def _plain(address: bytes) -> inet.Address:
    family, port = address[0], int.from_bytes(address[2:4], "big")
    if family == socket.AF_INET:
        return socket.inet_ntop(family, address[4:8]), port
    return socket.inet_ntop(family, address[8:24]), port, 0, int.from_bytes(address[24:28], "little")
