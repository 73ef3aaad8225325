"""What lets a rebuilt inet socket be heard of after the commit: data, so that whoever comes later can do it too.

If the destination's agent dies after RESUMED is written, the tree's sockets are complete but mute: in repair mode, or
behind a filter that drops everything. A `Wake` says what is left to do for one socket; `entry` lists all of a tree for
the journal, by process and descriptor, and `redo` does it from there. Each act is harmless when done twice.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

from phaul_engine import calls

from . import inet, socket_options, tcp_connecting, tcp_stream
from .base import Restoration
from .socket_options import SO_LOCK_FILTER, SO_REUSEADDR, SOL_SOCKET, SOL_TCP, Options
from .tcp_stream import Played, Replayer

KIND = "wake-sockets"
_TCP_REPAIR_OFF = 0


@dataclass
class Wake:
    """For one socket. `filter` (hexadecimal) takes the place of the one that drops all; None if there is none.
    `connect` (hexadecimal) is a struct sockaddr to ask for a connection, if not empty."""

    sort: inet.Sort
    in_repair: bool
    probe: bool
    reuse: bool
    filter: str | None
    lock: bool
    transparent: bool
    played: Played | None = None
    connect: str = ""

    def act(self, sock: socket.socket, replayer: Callable[[int], Replayer]) -> None:
        """Do it. Raises `OSError`."""
        if self.in_repair and sock.getsockopt(SOL_TCP, tcp_stream.TCP_REPAIR):
            sock.setsockopt(
                SOL_TCP, tcp_stream.TCP_REPAIR, _TCP_REPAIR_OFF if self.probe else tcp_stream.TCP_REPAIR_OFF_NO_WP
            )
            if self.reuse:
                sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        if self.connect:
            tcp_connecting.connect(sock, bytes.fromhex(self.connect))
        if self.played is not None:
            replayer(self.played.family).play(self.played)
            if self.played.then_close:
                with suppress(OSError):  # ENOTCONN: closed already
                    sock.shutdown(socket.SHUT_WR)
        if self.filter is not None:
            with suppress(PermissionError):  # locked: it was done before
                socket_options.write_filter(sock, bytes.fromhex(self.filter))
        if not self.transparent:
            sock.setsockopt(*inet.TRANSPARENT[socket.AddressFamily(self.sort[0])], 0)
        if self.lock:
            sock.setsockopt(SOL_SOCKET, SO_LOCK_FILTER, 1)


def plan(sort: inet.Sort, options: Options, *, muted: bool) -> Wake:
    """For a socket that is not a connection; `muted` if a filter drops all that comes for it."""
    return copy(_plan(sort, options, muted))


@functools.lru_cache(maxsize=256)
def _plan(sort: inet.Sort, options: Options, muted: bool) -> Wake:
    transparent = inet.TRANSPARENT[socket.AddressFamily(sort[0])]
    return Wake(
        sort=sort,
        in_repair=False,
        probe=False,
        reuse=bool(options.integer(SOL_SOCKET, SO_REUSEADDR)),
        filter=options.filter.hex() if muted else None,
        lock=bool(options.integer(SOL_SOCKET, SO_LOCK_FILTER)),
        transparent=bool(options.integer(*transparent)),
    )


def noted(restoration: Restoration) -> dict[int, Wake]:
    """What kinds have planned, by image id."""
    plans: dict[int, Wake] = restoration.scratch.setdefault(KIND, {})
    return plans


def wake(restoration: Restoration, file_ids: Iterable[int]) -> None:
    """After the commit: let these be heard of. One that fails does not keep the others mute: a connection may have
    been reset meanwhile, and the program will see it."""
    failures: list[str] = restoration.scratch.setdefault("wake failures", [])
    for file_id in file_ids:
        one, fd = noted(restoration).pop(file_id, None), restoration.made.get(file_id)
        if one is None or fd is None:
            continue
        with inet.borrowed(fd, one.sort) as sock:
            try:
                one.act(sock, lambda family: replayer(restoration, family))
            except OSError as error:
                failures.append(f"socket {file_id}: {error}")
    for made in restoration.scratch.pop("TCP replay", {}).values():
        made.close()


def replayer(restoration: Restoration, family: int) -> Replayer:
    """A raw socket through which segments can be played to sockets of the tree's network namespace."""
    replayers: dict[int, Replayer] = restoration.scratch.setdefault("TCP replay", {})
    if family not in replayers:
        replayers[family] = inet.in_network(restoration, lambda: Replayer(family))
    return replayers[family]


def entry(restoration: Restoration, path: str) -> dict[str, Any] | None:
    """The journal's entry for `redo`, None if nothing is mute; to be made when everything is settled and the tree has
    its descriptors. What is to be done is written to `path`, which need not survive a reboot: nor does the tree."""
    if not noted(restoration):
        return None
    places: dict[int, tuple[int, int]] = {}
    for inner, task in restoration.tasks.items():
        if not restoration.checkpoint.has("ids", inner):
            continue
        files_id = restoration.checkpoint.one("ids", inner).files_id
        for record in restoration.checkpoint.records("fdinfo", files_id):
            places.setdefault(record.message.id, (task.pid, record.message.fd))
    sockets = []
    for file_id, one in noted(restoration).items():
        if file_id in places and file_id in restoration.made:
            inode = os.fstat(restoration.made[file_id]).st_ino
            fields = {**vars(one), "played": None if one.played is None else vars(one.played)}
            sockets.append({"place": places[file_id], "inode": inode, "wake": fields})
    if not sockets:
        return None
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(path, "w") as out:
        json.dump(sockets, out)
    return {"kind": KIND, "data": {"file": path}}


def forget(data: dict[str, Any]) -> None:
    """All of it is done, or the tree is gone."""
    with suppress(FileNotFoundError):
        os.unlink(data["file"])


def redo(data: dict[str, Any]) -> None:
    """Do what a journal entry lists, as far as it was not done. The address must be here already."""
    try:
        with open(data["file"]) as source:
            sockets = json.load(source)
    except FileNotFoundError:  # done
        return
    replayers: dict[int, Replayer] = {}

    def make(family: int) -> Replayer:
        if family not in replayers:
            replayers[family] = Replayer(family)
        return replayers[family]

    for one in sockets:
        pid, fd = one["place"]
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            own = calls.pidfd_getfd(pidfd, fd)
        except OSError:
            continue
        finally:
            os.close(pidfd)
        with socket.socket(fileno=own) as sock:
            if os.fstat(own).st_ino == one["inode"]:
                fields = dict(one["wake"])
                fields["sort"] = tuple(fields["sort"])
                fields["played"] = Played(**fields["played"]) if fields["played"] else None
                with suppress(OSError):
                    Wake(**fields).act(sock, make)
    for made in replayers.values():
        made.close()
    forget(data)
