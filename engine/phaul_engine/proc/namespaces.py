"""/proc/PID/ns: which namespaces a task is in (namespaces(7))."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from phaul_engine.errors import EngineError, GoneError

from .access import list_names, open_at

KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts")


@dataclass(frozen=True)
class NamespaceId:
    """A namespace's identity: equal ids are the same namespace. `ino` is the number that `lsns` shows."""

    dev: int
    ino: int


def read_namespaces(proc: int) -> dict[str, NamespaceId]:
    """The namespaces of a task, by kind. A kind that this kernel lacks is absent.

    `pid_for_children` and `time_for_children` are absent while the namespace they stand for has not begun (its first
    process is not born yet), or when the task is a zombie.
    """
    found = {}
    for kind in list_names(proc, "ns"):
        try:
            fd = open_at(proc, f"ns/{kind}", os.O_PATH)
        except EngineError:
            if kind.endswith("_for_children"):
                continue
            raise
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        found[kind] = NamespaceId(status.st_dev, status.st_ino)
    return found


def namespace_id(proc: int, kind: str) -> NamespaceId:
    """One namespace of a task."""
    fd = open_at(proc, f"ns/{kind}", os.O_PATH)
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return NamespaceId(status.st_dev, status.st_ino)


def open_namespace(proc: int, kind: str) -> int:
    """A descriptor of a namespace, for setns(2); the caller closes it."""
    return open_at(proc, f"ns/{kind}")


def identities(proc: int, kinds: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Device and inode of namespaces of a living task, by kind; those that this kernel lacks are absent. Cheap: for
    use in the freeze. The link says the inode (namespaces(7)), and to read it costs half of a look at what it leads
    to."""
    found, device = {}, _device()
    for kind in kinds:
        try:
            text = os.readlink(f"ns/{kind}", dir_fd=proc)
        except ProcessLookupError as error:
            raise GoneError(f"the process is gone: it has no {kind} namespace any more") from error
        except FileNotFoundError:
            continue
        found[kind] = device, int(text[text.index("[") + 1 : -1])
    return found


@functools.cache
def _device() -> int:
    """Of the file system that all namespaces are in."""
    return os.stat("/proc/self/ns/mnt").st_dev
