"""Whom a unix connection tells its ends about (SO_PEERCRED, unix(7)).

The kernel notes user and group of whoever calls listen, connect or socketpair, and its process. So these are called
with the effective ids that the image tells. A pair is made inside the task that has the number of its maker, where
there is one, and a listener listens once more in its maker, if that has it: systemctl talks to process 1 alone. Else
the process is the engine's: it cannot act as another one, and a server asks when it accepts.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import TypeVar

from phaul_engine import calls
from phaul_engine.images.pb import sk_packet_pb2, sk_unix_pb2
from phaul_engine.proc.id_map import OVERFLOW
from phaul_engine.program import Program, Results
from phaul_engine.syscalls import NR
from phaul_engine.user_ids import UserIds

from . import inet
from .base import Collection, Restoration

Result = TypeVar("Result")

_SO_PEERCRED = 17
_KEEP = (1 << 64) - 1  # an id, in setresuid(2)


def collect(sock: socket.socket, usk: sk_unix_pb2.unix_sk_entry, collection: Collection) -> None:
    """Note what a socket tells of its peer; a listener, of itself."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERCRED, 12))
    if pid > 0:
        cred = usk.phaul_peer_cred
        cred.pid = collection.inner_pids.get(pid, 0)
        cred.uid, cred.gid = collection.ids.uid_inside(uid), collection.ids.gid_inside(gid)


def acting(usk: sk_unix_pb2.unix_sk_entry, restoration: Restoration, act: Callable[[], Result]) -> Result:
    """Run `act`, which makes a connection, as the one whom `usk` is to tell of."""
    cred = usk.phaul_peer_cred
    uid, gid = restoration.ids.uid_here(cred.uid), restoration.ids.gid_here(cred.gid)
    if not usk.HasField("phaul_peer_cred") or (uid, gid) == (os.geteuid(), os.getegid()):
        return act()
    return calls.acting(uid, gid, act)


def pair(usk: sk_unix_pb2.unix_sk_entry, restoration: Restoration) -> tuple[socket.socket, socket.socket]:
    """Two ends of a new connection, made by the one whom `usk` is to tell of."""
    cred = usk.phaul_peer_cred
    if cred.pid in restoration.tasks and restoration.inside is not None:
        return _pair_inside(usk.type, cred, restoration, restoration.inside)
    return inet.in_network(
        restoration, lambda: acting(usk, restoration, lambda: socket.socketpair(socket.AF_UNIX, usk.type))
    )


def listen_again(
    usk: sk_unix_pb2.unix_sk_entry, fd: int, inner_pid: int, program: Program, restoration: Restoration
) -> None:
    """Add to a program of a task that has a listener at `fd` what makes it the one whom connections are told of, if it
    was."""
    cred = usk.phaul_peer_cred
    if cred.pid == inner_pid:
        with _as_maker(program, cred, restoration):
            program.order(NR.listen, fd, usk.backlog, label="listen as a socket's maker")


@contextlib.contextmanager
def _as_maker(program: Program, cred: sk_packet_pb2.sk_ucred_entry, restoration: Restoration) -> Iterator[None]:
    """What is added to a program of the maker meanwhile is done as user and group of `cred`."""
    creds = restoration.checkpoint.one("core", cred.pid).thread_core.creds
    uid, gid, rest = cred.uid, cred.gid, (0, 0)
    if creds.phaul_outer_uids:  # it is in a user namespace below the tree's, with its own ids, or those with no number
        number = restoration.checkpoint.one("ids", cred.pid).user_ns_id
        ids, inner = restoration.ids, UserIds(restoration.checkpoint, number)
        uid, gid = inner.uid_inside(ids.uid_here(uid)), inner.gid_inside(ids.gid_here(gid))
        rest = creds.euid, creds.egid
        if (uid, gid) == rest or OVERFLOW in (uid, gid, *rest):
            yield
            return
    program.order(NR.setresgid, _KEEP, gid, _KEEP, label="take the group of a socket's maker")
    program.order(NR.setresuid, _KEEP, uid, _KEEP, label="take the user of a socket's maker")
    yield
    program.order(NR.setresuid, _KEEP, rest[0], _KEEP, label="be oneself again")
    program.order(NR.setresgid, _KEEP, rest[1], _KEEP, label="be of one's own group again")


def _pair_inside(
    kind: int,
    cred: sk_packet_pb2.sk_ucred_entry,
    restoration: Restoration,
    inside: Callable[[int, Program], Results],
) -> tuple[socket.socket, socket.socket]:
    program = Program()
    numbers = program.space(8)
    with _as_maker(program, cred, restoration):
        program.order(NR.socketpair, socket.AF_UNIX, kind | socket.SOCK_CLOEXEC, 0, numbers, label="make a socket pair")
    left, right = struct.unpack("ii", inside(cred.pid, program).bytes(numbers))
    pidfd = os.pidfd_open(restoration.pid(cred.pid))
    try:
        ends = [socket.socket(fileno=calls.pidfd_getfd(pidfd, number)) for number in (left, right)]
    finally:
        os.close(pidfd)
    tidy = Program()
    tidy.order(NR.close, left)
    tidy.order(NR.close, right)
    inside(cred.pid, tidy)
    return ends[0], ends[1]
