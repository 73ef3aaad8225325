"""Which cgroups a process is in: a number in its image, of a set in that of the cgroups (`namespaces.cgroup_tree`),
which collects and rebuilds them."""

from __future__ import annotations

from typing import ClassVar

from phaul_engine.images.pb import core_pb2
from phaul_engine.program import Program

from .base import Collection, Phase, RebuiltKind, Restoration, Scope, SkeletonTask, task_kind

SETS = "cgroup sets"
"""In `Collection.scratch`: the number of each process's set, by its number in the images."""


@task_kind
class CgroupSet(RebuiltKind):
    """The number, which is known when namespaces have been looked at."""

    name: ClassVar[str] = "cgroup set"
    scope: ClassVar[Scope] = Scope.PROCESS

    def finish(self, collection: Collection) -> None:
        for inner_pid, number in collection.scratch.get(SETS, {}).items():
            collection.checkpoint.one("core", inner_pid).thread_core.cg_set = number

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        pass
