"""Processes in a container that others than its first process have begun (runc exec, podman exec, lxc-attach, nsenter):
they are no part of the tree that moves, and die with the pid namespace that they are in (pid_namespaces(7))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from phaul_engine.errors import GoneError
from phaul_engine.proc.stat import stat_of

from phaul.events import Finding


def guests(first: int) -> Iterator[Finding]:
    """Those in the pid namespace whose first process is `first`. It runs, and so may others begin and end."""
    namespace = _namespace(first)
    for pid in sorted(map(int, filter(str.isdecimal, os.listdir("/proc")))):
        with contextlib.suppress(OSError, GoneError):  # it, or its parent, has ended
            if _namespace(pid) == namespace and _is_from_outside(pid, first, namespace):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                text = f"pid {pid} ({name}) came into the container from outside, and would be killed"
                yield Finding(
                    "blocker", "guest", text, "end it first: the runtime's exec or attach, or nsenter, began it"
                )


def _is_from_outside(pid: int, first: int, namespace: str) -> bool:
    """Whether those that it comes from lead out of the namespace, and not to its first process."""
    while pid != first:
        pid = stat_of(pid).ppid
        if pid == 0 or _namespace(pid) != namespace:  # 0 is nobody that can be seen from here
            return True
    return False


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/pid")
