"""/proc/PID/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass

from phaul_engine.errors import EngineError

from .access import read_bytes

_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One mount as the process sees it.

    `root` is the directory of the file system that is mounted at `point`, both seen from the process's root. `options`
    are the mount's own, `super_options` the file system's. `propagation` holds what stands between: shared:N,
    master:N, propagate_from:N, unbindable.
    """

    id: int
    parent: int
    dev: int
    root: str
    point: str
    options: tuple[str, ...]
    propagation: tuple[str, ...]
    fstype: str
    source: str
    super_options: tuple[str, ...]

    def propagates(self, kind: str) -> int | None:
        """The peer group of `shared`, `master` or `propagate_from`, None if the mount has none."""
        for field in self.propagation:
            name, colon, group = field.partition(":")
            if name == kind and colon:
                return int(group)
        return None


def read_mounts(proc: int) -> tuple[Mount, ...]:
    """The mounts of a process's mount namespace that are under its root, in order of mounting."""
    return parse_mounts(read_bytes(proc, "mountinfo"))


def own_mounts() -> tuple[Mount, ...]:
    """The mounts that this process sees."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse_mounts(file.read())


@functools.lru_cache(maxsize=16)
def parse_mounts(text: bytes) -> tuple[Mount, ...]:
    """Parse a mountinfo text. The last ones are remembered: a freeze asks for the same again and again."""
    return tuple(_parse_line(line) for line in text.split(b"\n") if line)


def _parse_line(line: bytes) -> Mount:
    fields = line.split(b" ")
    try:
        dash = fields.index(b"-", 6)
        major, minor = fields[2].split(b":")
        return Mount(
            id=int(fields[0]),
            parent=int(fields[1]),
            dev=os.makedev(int(major), int(minor)),
            root=_unescape(fields[3]),
            point=_unescape(fields[4]),
            options=_options(fields[5]),
            propagation=tuple(_unescape(field) for field in fields[6:dash]),
            fstype=_unescape(fields[dash + 1]),
            source=_unescape(fields[dash + 2]),
            super_options=_options(fields[dash + 3]),
        )
    except (ValueError, IndexError) as error:
        raise EngineError(f"mountinfo in an unknown form: {line!r}") from error


def _options(field: bytes) -> tuple[str, ...]:
    return tuple(_unescape(option) for option in field.split(b",") if option)


def _unescape(field: bytes) -> str:
    """Space, tab, newline, backslash (and # in sources) are written as octal."""
    plain = _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)
    return plain.decode("utf-8", "surrogateescape")
