"""Which user namespace a namespace belongs to, and which is whose parent, at the source (ioctl_ns(2)).

A tree may have user namespaces below that of its first process: a service that systemd gives one, a sandbox of a
browser.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from phaul_engine.objects import places
from phaul_engine.proc.access import open_at

_NS_GET_PARENT, _NS_GET_OWNER_UID = 0xB702, 0xB704


@dataclass(frozen=True)
class Standing:
    """Of a namespace. `above` is the number of the user namespace that it belongs to, or, of a user namespace, of its
    parent; 0 if no task of the tree, nor the engine, is in that. `maker` is, of a user namespace, who made it, as the
    engine numbers users."""

    above: int = 0
    maker: int = 0


def standing(name: str, proc: int, users: Mapping[tuple[int, int], int]) -> Standing:
    """Of the namespace `name` that a task is in. `users` numbers user namespaces, by device and inode."""
    fd = open_at(proc, f"ns/{name}")
    try:
        if name != "user":
            return Standing(_number(places.owner_of, fd, users))
        maker = fcntl.ioctl(fd, _NS_GET_OWNER_UID, bytes(4))
        return Standing(_number(parent, fd, users), struct.unpack("I", maker)[0])
    finally:
        os.close(fd)


def differs(name: str, proc: int) -> bool:
    """Whether the namespace `name` that a task is in is another one than ours."""
    fd = open_at(proc, f"ns/{name}")
    try:
        return not places.same_namespace(fd, name)
    finally:
        os.close(fd)


def parent_of(name: str, proc: int) -> tuple[int, int]:
    """Device and inode of the parent of the pid or user namespace that a task is in; zeros if we may not know it."""
    fd = open_at(proc, f"ns/{name}")
    try:
        above = parent(fd)
    except PermissionError:
        return 0, 0
    finally:
        os.close(fd)
    try:
        status = os.fstat(above)
    finally:
        os.close(above)
    return status.st_dev, status.st_ino


def parent(fd: int) -> int:
    """A descriptor of the parent of a pid or user namespace, to be closed. OSError EPERM if that is outside of ours."""
    return fcntl.ioctl(fd, _NS_GET_PARENT)


def _number(ask: Callable[[int], int], fd: int, users: Mapping[tuple[int, int], int]) -> int:
    try:
        above = ask(fd)
    except PermissionError:  # it is outside of the engine's own
        return 0
    try:
        status = os.fstat(above)
    finally:
        os.close(above)
    return users.get((status.st_dev, status.st_ino), 0)
