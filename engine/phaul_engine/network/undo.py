"""Undoing what a migration did to the network, or doing it again, from its journal alone.

An entry is {"kind": ..., "data": {...}}, plain JSON. `undo` and, where the tree goes on, `redo` may be called by
anyone, any number of times, after any crash. The order matters on the source: first the hold, so that nothing is
stolen any more, then the sockets, and only then the thaw, which is not ours.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from phaul_engine import calls
from phaul_engine.errors import EngineError
from phaul_engine.objects import staged, tcp_stream, waking
from phaul_engine.objects.base import Collection

from . import address, hold


def repair_entry(collection: Collection) -> dict[str, Any]:
    """The entry for the sockets that a final pass puts into repair mode. It must be in the journal before `seal`."""
    sockets = []
    for descriptor, entry in collection.scratch["tcp"].streams if "tcp" in collection.scratch else ():
        sockets.append([descriptor.owner.pid, descriptor.fd, descriptor.status.st_ino, bool(entry.isk.opts.reuseaddr)])
    return {"kind": "tcp-repair", "data": {"sockets": sockets}}


def _leave_repair(data: dict[str, Any]) -> None:
    """Give sockets back to processes that still have them."""
    for pid, fd, inode, reuse in data["sockets"]:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            own = calls.pidfd_getfd(pidfd, fd)
        except OSError:  # closed, or the process is dying
            continue
        finally:
            os.close(pidfd)
        if os.fstat(own).st_ino != inode:
            os.close(own)
            continue
        with socket.socket(fileno=own) as sock:
            tcp_stream.resume_source(sock, reuse)


UNDO: dict[str, Callable[[dict[str, Any]], None]] = {
    "hold": hold.undo,
    "address": address.undo,
    "tcp-repair": _leave_repair,
    staged.KIND: staged.undo,
    waking.KIND: waking.forget,
}
REDO: dict[str, Callable[[dict[str, Any]], None]] = {
    "address": address.redo,
    "hold": hold.undo,  # what was to be injected through it has died with the agent: the peers send it again
    staged.KIND: staged.redo,
    waking.KIND: waking.redo,
}


def undo(entry: dict[str, Any]) -> None:
    """Undo one entry."""
    _known(entry, UNDO)(entry["data"])


def redo(entry: dict[str, Any]) -> None:
    """Make sure that what an entry stands for is done: the tree goes on here."""
    if entry["kind"] in REDO:
        REDO[entry["kind"]](entry["data"])


def _known(
    entry: dict[str, Any], acts: dict[str, Callable[[dict[str, Any]], None]]
) -> Callable[[dict[str, Any]], None]:
    if entry["kind"] not in acts:
        raise EngineError(f"the journal holds an entry of unknown kind {entry['kind']!r}")
    return acts[entry["kind"]]
