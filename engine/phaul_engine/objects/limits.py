"""Resource limits (getrlimit(2))."""

from __future__ import annotations

import functools
import struct
from typing import Any, ClassVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import core_pb2
from phaul_engine.proc.limits import INFINITY, Limit, read_limits
from phaul_engine.proc.status import read_status
from phaul_engine.program import Buf, Program, Results
from phaul_engine.syscalls import NR

from .base import Collection, Phase, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_PAIR = struct.Struct("<QQ")
_COUNT = 16  # RLIM_NLIMITS
_CAP_SYS_RESOURCE = 24


@task_kind
class ResourceLimits(TaskKind):
    """Soft and hard limits of a process.

    Told by the task and set from inside while it is still ours: neither needs CAP_SYS_RESOURCE, as prlimit(2) on
    another user's task does. They come last, so that no low limit hinders what is built before.
    """

    name: ClassVar[str] = "resource limits"
    scope: ClassVar[Scope] = Scope.PROCESS

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        room = program.space(_COUNT * _PAIR.size)
        for resource in range(_COUNT):
            program.order(NR.prlimit64, 0, resource, 0, room.at(resource * _PAIR.size))
        return room

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        core.tc.rlimits.CopyFrom(_entry(results.bytes(asked)))

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        present, may_raise = _present(task, restoration)
        if phase is not Phase.CREDENTIALS or not core.tc.HasField("rlimits"):
            return
        for wanted, limit in zip(core.tc.rlimits.rlimits, present, strict=False):
            if (wanted.cur, wanted.max) == (limit.soft, limit.hard):
                continue
            if wanted.max > limit.hard and not may_raise:
                raise _cannot_raise(task, limit, wanted.max)
            pair = program.data(_PAIR.pack(wanted.cur, wanted.max))
            program.order(NR.prlimit64, 0, limit.resource, pair, 0, label=f"setting the limit {limit.name}")


@functools.lru_cache(maxsize=64)
def _entry(packed: bytes) -> core_pb2.task_rlimits_entry:
    """The limits as an image message. Remembered: they hardly ever change between passes."""
    entry = core_pb2.task_rlimits_entry()
    for soft, hard in _PAIR.iter_unpack(packed):
        entry.rlimits.add(cur=soft, max=hard)
    return entry


def _present(task: SkeletonTask, restoration: Restoration) -> tuple[tuple[Limit, ...], bool]:
    """What a skeleton task was born with, and whether it may raise it. Looked up early, out of the freeze."""
    notes = restoration.scratch.setdefault(ResourceLimits.name, {})
    if task.inner_pid not in notes:
        may_raise = bool(read_status(task.proc).capabilities.effective >> _CAP_SYS_RESOURCE & 1)
        notes[task.inner_pid] = read_limits(task.proc), may_raise
    found: tuple[tuple[Limit, ...], bool] = notes[task.inner_pid]
    return found


def _cannot_raise(task: SkeletonTask, present: Limit, wanted: int) -> RebuildError:
    return RebuildError(
        f"pid {task.inner_pid} had the hard limit {present.name} {_words(wanted)}, but phaul runs here with "
        f"{_words(present.hard)} and without CAP_SYS_RESOURCE, so it cannot raise it",
        advice="start phaul's agent with that limit, or with CAP_SYS_RESOURCE",
    )


def _words(value: int) -> str:
    return "unlimited" if value == INFINITY else str(value)
