"""Unix sockets whose other end is outside of the tree, and does not move."""

from __future__ import annotations

import os
import socket

from phaul_engine.images.pb import sk_unix_pb2

from . import inet
from .base import Collection, Descriptor


def collect(descriptor: Descriptor, usk: sk_unix_pb2.unix_sk_entry, peer: int, collection: Collection) -> None:
    """The other end does not move. A datagram socket finds its way back by the name of it; others cannot."""
    if usk.type == socket.SOCK_DGRAM:
        with inet.borrowed(descriptor.own, (socket.AF_UNIX, usk.type, 0)) as sock:
            name = sock.getpeername()
        usk.phaul_peer_name = name if isinstance(name, bytes) else os.fsencode(name)
        if usk.phaul_peer_name:
            return
    collection.block(
        descriptor,
        "a connected unix socket",
        f"its other end is {_holder(peer)}, which does not move",
        "let both move, or close the connection",
    )


def _holder(inode: int) -> str:
    """The process that has a socket, found the slow way: it is only for a message."""
    wanted = f"socket:[{inode}]"
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            for fd in os.listdir(f"/proc/{name}/fd"):
                if os.readlink(f"/proc/{name}/fd/{fd}") == wanted:
                    with open(f"/proc/{name}/comm") as comm:
                        return f"fd {fd} of pid {name} ({comm.read().strip()})"
        except OSError:
            continue
    return "with a program that cannot be found"
