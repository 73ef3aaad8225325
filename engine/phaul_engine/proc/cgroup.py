"""/proc/PID/cgroup: the cgroups of a task (cgroups(7))."""

from __future__ import annotations

from dataclasses import dataclass

from phaul_engine.errors import EngineError

from .access import read_text


@dataclass(frozen=True)
class CgroupMembership:
    """A task's place in one hierarchy.

    `hierarchy` is 0 for version 2, whose `controllers` are empty. `path` is seen from the reader's cgroup namespace.
    """

    hierarchy: int
    controllers: tuple[str, ...]
    path: str

    @property
    def unified(self) -> bool:
        """Whether this is the version 2 hierarchy."""
        return self.hierarchy == 0


def read_cgroups(proc: int) -> tuple[CgroupMembership, ...]:
    """A task's place in each hierarchy."""
    return parse_cgroups(read_text(proc, "cgroup"))


def parse_cgroups(text: str) -> tuple[CgroupMembership, ...]:
    """Parse a cgroup text: `HIERARCHY:CONTROLLERS:PATH` a line."""
    found = []
    for line in text.split("\n"):
        if not line:
            continue
        try:
            hierarchy, controllers, path = line.split(":", 2)
            names = tuple(name for name in controllers.split(",") if name)
            found.append(CgroupMembership(int(hierarchy), names, path))
        except ValueError as error:
            raise EngineError(f"cgroup membership in an unknown form: {line!r}") from error
    return tuple(found)


def unified_path(proc: int) -> str | None:
    """A task's path in the version 2 hierarchy, None if there is none."""
    return next((group.path for group in read_cgroups(proc) if group.unified), None)
