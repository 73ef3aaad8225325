"""/proc/PID/limits: resource limits (getrlimit(2)).

Read from here because prlimit(2) on a task of another uid needs CAP_SYS_RESOURCE, and this does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from phaul_engine.errors import EngineError

from .access import read_bytes

INFINITY = (1 << 64) - 1
_COUNT = 16  # RLIM_NLIMITS


@dataclass(frozen=True)
class Limit:
    """One resource's limits; INFINITY is "unlimited"."""

    resource: int
    name: str
    soft: int
    hard: int


def read_limits(proc: int) -> tuple[Limit, ...]:
    """The limits of a process; index and `resource` are RLIMIT_ numbers."""
    return parse_limits(read_bytes(proc, "limits"))


def parse_limits(text: bytes) -> tuple[Limit, ...]:
    """Parse a limits table: a heading, then a line a resource in the order of their numbers, in fixed columns."""
    lines = text.decode("ascii", "replace").splitlines()
    if len(lines) != _COUNT + 1:
        raise EngineError(f"limits in an unknown form: {len(lines) - 1} resources instead of {_COUNT}")
    try:
        return tuple(
            Limit(number, line[:26].strip(), _value(line[26:47]), _value(line[47:68]))
            for number, line in enumerate(lines[1:])
        )
    except ValueError as error:
        raise EngineError(f"limits in an unknown form: {error}") from error


def _value(text: str) -> int:
    word = text.strip()
    return INFINITY if word == "unlimited" else int(word)
