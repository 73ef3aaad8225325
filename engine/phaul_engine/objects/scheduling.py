"""How a thread is scheduled: policy, priorities, CPUs, I/O priority, timer slack, NUMA policy (sched(7))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import core_pb2, phaul_task_pb2
from phaul_engine.proc.sched import Scheduling as Attributes
from phaul_engine.proc.sched import pack_scheduling, read_scheduling, unpack_scheduling
from phaul_engine.program import Buf, Program, Results
from phaul_engine.syscalls import NR

from .base import Collection, Phase, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_SCHED_DEADLINE = 6
_SCHED_RESET_ON_FORK = 0x40000000  # as sched_getscheduler(2) tells it, and CRIU's image
_FLAG_RESET_ON_FORK = 1
_ATTRIBUTES_SIZE = 56
_CPU_BYTES = 1024  # 8192 CPUs, NR_CPUS of the largest kernels
_IOPRIO_WHO_PROCESS = 1
_PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 29, 30
_DEFAULT_SLACK = 50_000
_NODE_BYTES = 128  # 1024 nodes
_MPOL_DEFAULT = 0


@dataclass(frozen=True)
class _Asked:
    attributes: Buf
    affinity_size: Buf
    affinity: Buf
    ioprio: Buf
    slack: Buf
    numa_error: Buf
    numa_mode: Buf
    numa_nodes: Buf


@task_kind
class Scheduling(TaskKind):
    """A thread's scheduling.

    A thread that may run on every CPU of the source may do so at the destination, however many there are.
    """

    name: ClassVar[str] = "scheduling"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> _Asked:
        attributes, affinity = program.space(_ATTRIBUTES_SIZE), program.space(_CPU_BYTES)
        mode, nodes = program.space(8), program.space(_NODE_BYTES)
        program.order(NR.sched_getattr, 0, attributes, _ATTRIBUTES_SIZE, 0)
        return _Asked(
            attributes=attributes,
            affinity_size=program.ask(NR.sched_getaffinity, 0, _CPU_BYTES, affinity),
            affinity=affinity,
            ioprio=program.ask(NR.ioprio_get, _IOPRIO_WHO_PROCESS, 0),
            slack=program.ask(NR.prctl, _PR_GET_TIMERSLACK, 0, 0, 0, 0),
            numa_error=program.ask(NR.get_mempolicy, mode, nodes, 8 * _NODE_BYTES, 0, 0),
            numa_mode=mode,
            numa_nodes=nodes,
        )

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        attributes = unpack_scheduling(results.bytes(asked.attributes))
        entry = core.thread_core
        entry.sched_nice = attributes.nice
        entry.sched_prio = attributes.priority
        entry.sched_policy = attributes.policy
        if attributes.flags & _FLAG_RESET_ON_FORK:
            entry.sched_policy |= _SCHED_RESET_ON_FORK
        own = entry.phaul
        if attributes.policy == _SCHED_DEADLINE:
            own.sched_deadline, own.sched_period = attributes.deadline, attributes.period
        if attributes.runtime not in (0, _usual_slice(collection)):
            own.sched_runtime = attributes.runtime
        affinity = results.bytes(asked.affinity)[: max(0, results.answer(asked.affinity_size))].rstrip(b"\0")
        if _cpus(affinity) != _online(collection):
            own.affinity = affinity
        if results.answer(asked.ioprio) > 0:
            own.ioprio = results.answer(asked.ioprio)
        if results.answer(asked.slack) not in (0, _DEFAULT_SLACK):  # 0 is what real-time threads have anyway
            own.timer_slack = results.answer(asked.slack)
        mode = int.from_bytes(results.bytes(asked.numa_mode)[:4], "little")
        if results.answer(asked.numa_error) == 0 and mode != _MPOL_DEFAULT:
            own.numa_policy = mode
            own.numa_nodes = results.bytes(asked.numa_nodes).rstrip(b"\0")

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """Late, so that a low priority does not slow down the rest.

        What is absent is set too: a skeleton is born with the agent's own scheduling.
        """
        if phase is not Phase.CREDENTIALS:
            return
        entry, own = core.thread_core, core.thread_core.phaul
        if own.HasField("affinity"):
            _require_a_cpu(own.affinity, task)
        affinity = program.data(own.affinity or b"\xff" * _CPU_BYTES)
        program.order(NR.sched_setaffinity, 0, affinity.size, affinity)
        program.order(NR.ioprio_set, _IOPRIO_WHO_PROCESS, 0, own.ioprio)
        program.order(NR.prctl, _PR_SET_TIMERSLACK, own.timer_slack or _DEFAULT_SLACK, 0, 0, 0)
        if own.HasField("numa_policy"):
            nodes = program.data(own.numa_nodes.ljust(_NODE_BYTES, b"\0"))
            program.order(NR.set_mempolicy, own.numa_policy, nodes if own.numa_nodes else 0, 8 * _NODE_BYTES)
        if entry.HasField("sched_policy"):
            program.order(NR.sched_setattr, 0, program.data(pack_scheduling(_attributes(entry, own))), 0)


def _attributes(entry: core_pb2.thread_core_entry, own: phaul_task_pb2.phaul_thread_entry) -> Attributes:
    return Attributes(
        policy=entry.sched_policy & ~_SCHED_RESET_ON_FORK,
        flags=_FLAG_RESET_ON_FORK if entry.sched_policy & _SCHED_RESET_ON_FORK else 0,
        nice=entry.sched_nice,
        priority=entry.sched_prio,
        runtime=own.sched_runtime,
        deadline=own.sched_deadline,
        period=own.sched_period,
        util_min=0,
        util_max=0,
    )


def _usual_slice(collection: Collection) -> int:
    """The runtime that a thread reads (Linux >= 6.12) which never asked for a slice of its own: ours, as the first
    pass has it, since in the freeze we may be real-time ourselves."""
    notes = collection.memory.setdefault(Scheduling.name, {})
    if "slice" not in notes:
        notes["slice"] = read_scheduling(0).runtime
    usual: int = notes["slice"]
    return usual


def _online(collection: Collection) -> frozenset[int]:
    notes = collection.memory.setdefault(Scheduling.name, {})
    if "online" not in notes:
        notes["online"] = online_cpus()
    online: frozenset[int] = notes["online"]
    return online


def online_cpus() -> frozenset[int]:
    """The CPUs of this host that are on (/sys/devices/system/cpu/online)."""
    cpus: set[int] = set()
    for part in Path("/sys/devices/system/cpu/online").read_text().strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _cpus(mask: bytes) -> frozenset[int]:
    return frozenset(at * 8 + bit for at, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1)


def _require_a_cpu(mask: bytes, task: SkeletonTask) -> None:
    wanted = _cpus(mask)
    if not wanted & os.sched_getaffinity(task.pid):
        raise RebuildError(
            f"pid {task.inner_pid} may run on CPUs {sorted(wanted)} only, none of which is here",
            advice="give it other CPUs at the source (taskset -p)",
        )
