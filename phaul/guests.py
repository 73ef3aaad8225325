"""Processes in a container that others than its first process have begun (runc exec, podman exec, lxc-attach, nsenter):
they are no part of the tree that moves, and die with the pid namespace that they are in (pid_namespaces(7))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from phaul_engine.proc import tree

from phaul.events import Finding


def guests(root: tree.Process) -> Iterator[Finding]:
    """Those in the pid namespace whose first process `root` is."""
    own = {process.pid for process in root}
    for pid in sorted(_inside(root.pid) - own):
        with contextlib.suppress(OSError):  # it has ended
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            text = f"pid {pid} ({name}) came into the container from outside, and would be killed"
            yield Finding(
                "blocker", "guest", text, "end it first: it was begun by an exec or attach of the runtime, or nsenter"
            )


def _inside(first: int) -> set[int]:
    """The processes of a pid namespace. In one below it they are descendants of one that is in it."""
    namespace, found = os.readlink(f"/proc/{first}/ns/pid"), set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                found.add(int(name))
    return found
