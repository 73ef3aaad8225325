"""Names of unix sockets in the file system, made unseen and published with one rename.

The name that getsockname(2) tells is the string that bind(2) was given, and bind makes the file it names; but before
the commit nothing may be seen there, least of all where the directory is shared with the source, whose own socket has
that name. So a thread whose root directory is a fresh one beside the final place binds the socket there, whatever the
name. The file then has its owner and mode, and `publish` renames it to where it belongs, over the old one, at once. A
socket whose file is gone is bound in a file system of its own, which nobody sees.

Nothing is mounted where the file stands: the kernel would go on to tell its path from a mount that is no more.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from phaul_engine import calls
from phaul_engine.errors import RebuildError
from phaul_engine.proc.sock_diag import DiagSocket

from . import confinement, mounted, places, staged
from .base import Restoration, SkeletonTask

SIOCUNIXFILE = 0x89E0
"""ioctl(2): an O_PATH descriptor of the file that a socket is bound to (include/uapi/linux/un.h)."""

_numbers = itertools.count(1)
_ATTIC = "unix attic"
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass
class Permissions:
    """Of a socket's file."""

    mode: int
    uid: int
    gid: int


@dataclass
class Place:
    """Where a socket's file is, by its name in the tree's mount namespace, and on which mount, if that is told."""

    path: bytes
    mount: int = mounted.NOWHERE

    def directory(self, restoration: Restoration) -> int:
        """An O_PATH descriptor of the directory that it is in. Where another mount hides it now, it is that of a mount
        that is attached nowhere: the socket is the same, but the kernel tells its file's path from there."""
        making, opening = mounted.ways(self.mount, os.path.dirname(os.fsdecode(self.path)), restoration)
        try:
            found = calls.open_in_root(opening.root, opening.path or ".", _DIRECTORY)
            if self.mount == mounted.NOWHERE or calls.mount_id(found) == calls.mount_id(opening.root):
                return found
            os.close(found)
            return calls.open_in_root(making.root, making.path, _DIRECTORY)
        finally:
            os.close(making.root)
            os.close(opening.root)


def task_of(restoration: Restoration) -> SkeletonTask | None:
    """A task of the tree, in whose namespaces its sockets are."""
    return next(iter(restoration.tasks.values()), None)


def bind(
    sock: socket.socket, name: bytes, place: Place, permissions: Permissions | None, restoration: Restoration
) -> staged.Staged:
    """Bind a socket to `name`, as its program spelled it; the file belongs at `place`."""
    path = os.fsdecode(place.path)
    parent, base = os.path.split(path)
    staging = staged.fresh_name()
    tree = "tree" if base != "tree" else "branch"
    confinement.prepare()
    ids = restoration.ids

    def act(descriptor: int) -> None:
        with ExitStack() as failed:
            owner = permissions or Permissions(stat.S_IFSOCK, 0, 0)
            uid, gid = ids.uid_here(owner.uid), ids.gid_here(owner.gid)
            if not mounted.is_own(place.mount, restoration):
                confinement.check_making(restoration, descriptor, path, uid, gid, owner.mode)
            os.mkdir(staging, 0o700, dir_fd=descriptor)
            fresh = os.open(staging, _DIRECTORY, dir_fd=descriptor)
            failed.callback(shutil.rmtree, staging, ignore_errors=True, dir_fd=descriptor)
            try:
                _bind_below(sock, name, fresh, tree)
                if permissions is not None:
                    os.chown(name, uid, gid)
                    os.chmod(name, permissions.mode & 0o7777)
                os.rename(name, base, dst_dir_fd=fresh)
                shutil.rmtree(tree, dir_fd=fresh)
            finally:
                os.close(fresh)
            failed.pop_all()

    try:
        with ExitStack() as failed:
            descriptor = place.directory(restoration)
            failed.callback(os.close, descriptor)
            maker = mounted.maker(place.mount, restoration)
            inside(restoration, lambda: restoration.filing(lambda: act(descriptor), maker))
            failed.pop_all()
    except OSError as error:
        advice = f"make the directory {parent} here, as it was at the source" if error.errno == errno.ENOENT else ""
        what = f"cannot bind a unix socket to {path} here: {error.strerror}"
        raise RebuildError(what, advice=advice) from error
    return staged.Staged(descriptor, staging, base, path, tuple(restoration.tasks.values()), maker)


def bind_hidden(sock: socket.socket, name: bytes, restoration: Restoration) -> None:
    """Bind a socket to `name` where nobody finds it, as if its file had been removed."""
    attic: int | None = restoration.scratch.get(_ATTIC)
    if attic is None:
        attic = restoration.scratch[_ATTIC] = places.hidden_directory()
    tree = str(next(_numbers))

    def act() -> None:
        _bind_below(sock, name, attic, tree)
        os.unlink(name)

    try:
        places.in_root(None, None, attic, act)
    except OSError as error:
        raise RebuildError(f"cannot bind a unix socket to {os.fsdecode(name)}: {error.strerror}") from error


def close_hidden(restoration: Restoration) -> None:
    """No more sockets will be bound unseen."""
    attic: int | None = restoration.scratch.pop(_ATTIC, None)
    if attic is not None:
        os.close(attic)


def _bind_below(sock: socket.socket, name: bytes, place: int, tree: str) -> None:
    """Make directory `tree` in `place` the calling thread's root, and in it all that `name` needs, and bind."""
    os.mkdir(tree, 0o700, dir_fd=place)
    root = os.open(tree, _DIRECTORY, dir_fd=place)
    try:
        os.fchdir(root)
    finally:
        os.close(root)
    os.chroot(".")
    if not name.startswith(b"/"):
        depth = b"d/" * name.split(b"/").count(b"..")  # so that it does not lead out
        os.makedirs(depth or b".", exist_ok=True)
        os.chdir(depth or b".")
    os.makedirs(os.path.dirname(name) or b".", exist_ok=True)
    sock.bind(name)


@contextmanager
def address_of(sock: socket.socket) -> Iterator[bytes]:
    """An address by which a socket of ours that is bound to a file can be reached, wherever that is."""
    fd = fcntl.ioctl(sock, SIOCUNIXFILE)
    try:
        yield b"/proc/self/fd/%d" % fd
    finally:
        os.close(fd)


def inside(restoration: Restoration, act: Any) -> Any:
    """Run `act` with the tree's root directory as root, in its network and mount namespaces."""
    task = task_of(restoration)
    root = restoration.root if restoration.root is not None else (task.root if task else None)
    mnt = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=task.proc) if task else None
    try:
        return places.in_root(task.net if task else None, mnt, root, act)
    finally:
        if mnt is not None:
            os.close(mnt)


def check_free(place: Place, restoration: Restoration) -> None:
    """Make sure that no living socket of this host has the path, and nothing else than a socket stands there: a stale
    one or the source's own is no obstacle."""
    task, path = task_of(restoration), place.path
    try:
        directory = place.directory(restoration)
    except OSError:
        return
    try:
        status = os.lstat(os.path.basename(path), dir_fd=directory)
    except OSError:
        return
    finally:
        os.close(directory)
    if not stat.S_ISSOCK(status.st_mode):
        raise RebuildError(f"{os.fsdecode(path)} is no socket here", advice="move away what stands there")
    device = os.major(status.st_dev) << 20 | os.minor(status.st_dev)
    with DiagSocket(task.net if task else None) as diag:
        if any(sock.vfs == (status.st_ino & 0xFFFFFFFF, device) for sock in diag.unix().values()):
            raise RebuildError(
                f"{os.fsdecode(path)} is the socket of another program here",
                advice="stop that program, or move to a host where the path is free",
            )
