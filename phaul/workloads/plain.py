"""A process tree that nobody but its parent knows of."""

from __future__ import annotations

from typing import ClassVar

from phaul.errors import UsageError

from .base import Found, Workload


class Plain(Workload):
    """Named by the PID of its first process."""

    kind: ClassVar = "pid"

    def find(self, name: str) -> Found:
        pid = int(name) if name.isdecimal() else 0
        if not 1 < pid < 1 << 22:
            raise UsageError(f"{name!r} is not the PID of a program that can move")
        return Found(pid, f"pid {pid}")
