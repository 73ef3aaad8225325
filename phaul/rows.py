"""What a journal says about one migration on one side (phaul.journal)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from phaul_engine.errors import GoneError
from phaul_engine.proc.stat import stat_of
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from phaul.migration import Role
from phaul.migration import Row as State

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A migration's."""


class Task(BaseModel):
    """A process by its number and its start time in clock ticks after boot, which no other ever has together."""

    model_config = ConfigDict(frozen=True)

    pid: int = Field(ge=1)
    start: int = Field(ge=0)

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process that has this number now. GoneError where there is none."""
        return cls(pid=pid, start=stat_of(pid).start)

    @classmethod
    def living(cls, pids: Iterable[int]) -> Iterator[Self]:
        """Those of them that have not ended since they were counted."""
        for pid in pids:
            with contextlib.suppress(GoneError):
                yield cls.of(pid)

    @property
    def alive(self) -> bool:
        """Whether it is still there. Only to be asked in the boot that it was noted in."""
        try:
            return stat_of(self.pid).start == self.start
        except GoneError:
            return False


class Undo(BaseModel):
    """Something that was done to the host or the network, and what is needed to take it back.

    `kind` names who knows how (see phaul.recovery). To take back twice, or what was never done, must be harmless:
    an entry is written before its deed.
    """

    model_config = ConfigDict(frozen=True)

    kind: str = Field(min_length=1, max_length=64)
    data: dict[str, JsonValue] = {}


class Row(BaseModel):
    """What a journal says about one migration on one side.

    `boot` is the boot id of the host when the row was made, `owner` the agent that works on it. `peer` is how the
    other side is reached, `program` the moving program in words for people. `cgroup` is the tree's hold, `tasks` its
    processes. `ended` is when nothing was left to do, in seconds since the epoch; 0 for an unfinished row. `warning` is
    what did not work, but kept nobody. `link` is what a recovery needs to ask the other side by itself. `caller` is who
    asked for it here (phaul.policy). `workload` is its kind (phaul.workloads), with `facts` at the source and `notes`
    at the destination: what the runtime of this host has to be told in the end.
    `arbiter` says how the arbiter is reached (its settings), empty without one. `heard`, at the destination: the source
    is known to go on by itself, and will not ask.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    migration: str = Field(pattern=f"^{NAME.pattern}$")
    role: Role
    state: State = State.PREPARED
    boot: str
    owner: Task
    peer: str = ""
    program: str = ""
    cgroup: str = ""
    tasks: tuple[Task, ...] = ()
    addresses: tuple[str, ...] = ()
    undo: tuple[Undo, ...] = ()
    why: str = ""
    since: float = 0.0
    ended: float = 0.0
    warning: str = ""
    link: dict[str, JsonValue] = {}
    caller: str = ""
    workload: dict[str, JsonValue] = {}
    arbiter: dict[str, JsonValue] = {}
    heard: bool = False

    @property
    def same_boot(self) -> bool:
        """Whether the host has stayed up since."""
        return self.boot == boot_id()

    @property
    def owned(self) -> bool:
        """Whether its agent lives."""
        return self.same_boot and self.owner.alive


def boot_id() -> str:
    """This boot's id (proc_sys_kernel(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
