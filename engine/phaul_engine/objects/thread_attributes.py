"""Attributes of a thread that are a number each, and the addresses it has told the kernel.

(prctl(2), arch_prctl(2), personality(2), set_tid_address(2), get_robust_list(2), rseq(2))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from phaul_engine.images.pb import core_pb2
from phaul_engine.program import Buf, Program, Results
from phaul_engine.syscalls import NR

from . import last_words
from .base import Collection, Phase, RebuiltKind, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2
_PR_SET_NAME, _PR_GET_NAME = 15, 16
_PR_GET_TSC, _PR_SET_TSC, _TSC_ENABLED = 25, 26, 1
_PR_MCE_KILL, _PR_MCE_KILL_GET, _MCE_SET, _MCE_DEFAULT = 33, 34, 1, 2
_PR_GET_TID_ADDRESS = 40
_PR_GET_SPECULATION, _PR_SET_SPECULATION = 52, 53
_PR_SET_IO_FLUSHER, _PR_GET_IO_FLUSHER = 57, 58
_SPECULATIONS = 3  # store bypass, indirect branch, L1D flush
_SPEC_CHOSEN = 1 << 2 | 1 << 3 | 1 << 4  # disabled, for good, or until exec
_ARCH_GET_CPUID, _ARCH_SET_CPUID = 0x1011, 0x1012
_PERSONALITY_ASK = 0xFFFFFFFF
_NAME_SIZE = 16


@dataclass(frozen=True)
class _Asked:
    name: Buf
    death_signal: Buf
    personality: Buf
    tsc: Buf
    cpuid: Buf
    machine_check: Buf
    speculation: tuple[Buf, ...]
    io_flusher: Buf


@task_kind
class ThreadAttributes(TaskKind):
    """Name, parent death signal, personality, and what its instructions may do.

    The root of a tree loses its parent death signal: that parent stays behind, and its place is taken by the agent,
    whose end must not be the program's.
    """

    name: ClassVar[str] = "thread attributes"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> _Asked:
        name, death_signal, tsc = program.space(_NAME_SIZE), program.space(8), program.space(8)
        program.order(NR.prctl, _PR_GET_NAME, name, 0, 0, 0)
        program.order(NR.prctl, _PR_GET_PDEATHSIG, death_signal, 0, 0, 0)
        program.order(NR.prctl, _PR_GET_TSC, tsc, 0, 0, 0)
        return _Asked(
            name=name,
            death_signal=death_signal,
            personality=program.ask(NR.personality, _PERSONALITY_ASK),
            tsc=tsc,
            cpuid=program.ask(NR.arch_prctl, _ARCH_GET_CPUID, 0),
            machine_check=program.ask(NR.prctl, _PR_MCE_KILL_GET, 0, 0, 0, 0),
            speculation=tuple(
                program.ask(NR.prctl, _PR_GET_SPECULATION, which, 0, 0, 0) for which in range(_SPECULATIONS)
            ),
            io_flusher=program.ask(NR.prctl, _PR_GET_IO_FLUSHER, 0, 0, 0, 0),
        )

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        entry, own = core.thread_core, core.thread_core.phaul
        entry.comm = results.bytes(asked.name).partition(b"\0")[0]
        entry.pdeath_sig = int.from_bytes(results.bytes(asked.death_signal)[:4], "little")
        personality = results.answer(asked.personality) & 0xFFFFFFFF
        if thread.leader:
            core.tc.comm = entry.comm
            core.tc.personality = personality
        own.personality = personality
        tsc = int.from_bytes(results.bytes(asked.tsc)[:4], "little")
        if tsc != _TSC_ENABLED:
            own.tsc = tsc
        if results.answer(asked.cpuid) == 0:
            own.cpuid_faults = True
        machine_check = results.answer(asked.machine_check)
        if machine_check >= 0 and machine_check != _MCE_DEFAULT:
            own.machine_check = machine_check
        chosen = [max(0, results.answer(answer)) & _SPEC_CHOSEN for answer in asked.speculation]
        del own.speculation[:]
        if any(chosen):
            own.speculation.extend(chosen)
        if results.answer(asked.io_flusher) == 1:  # whoever may not ask could not have set it
            own.io_flusher = True

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """After the credentials, whose change clears the parent death signal."""
        if phase is not Phase.CREDENTIALS:
            return
        entry, own = core.thread_core, core.thread_core.phaul
        name = entry.comm if entry.HasField("comm") else core.tc.comm
        program.order(NR.prctl, _PR_SET_NAME, program.data(name[: _NAME_SIZE - 1].ljust(_NAME_SIZE, b"\0")), 0, 0, 0)
        if entry.pdeath_sig and not _is_root(task, restoration):
            program.order(NR.prctl, _PR_SET_PDEATHSIG, entry.pdeath_sig, 0, 0, 0)
        program.order(NR.personality, own.personality if own.HasField("personality") else core.tc.personality)
        for which, bits in enumerate(own.speculation):
            if bits:  # a host that is not affected has nothing to switch off, and says so by an error
                program.order(NR.prctl, _PR_SET_SPECULATION, which, bits & -bits, 0, 0, keep_errors=True)
        if own.HasField("machine_check"):
            program.order(NR.prctl, _PR_MCE_KILL, _MCE_SET, own.machine_check, 0, 0)
        if own.cpuid_faults:
            program.order(NR.arch_prctl, _ARCH_SET_CPUID, 0, label="making CPUID fault")
        if own.tsc:
            program.order(NR.prctl, _PR_SET_TSC, own.tsc, 0, 0, 0)


def _is_root(task: SkeletonTask, restoration: Restoration) -> bool:
    """Whether a process has its parent outside the tree."""
    records = restoration.checkpoint.records("pstree")
    return any(record.message.pid == task.inner_pid and record.message.ppid == 0 for record in records)


@task_kind
class IoFlusher(RebuiltKind):
    """The flag of threads that write back other programs' pages (PR_SET_IO_FLUSHER): needs CAP_SYS_RESOURCE to set,
    so it comes before the credentials."""

    name: ClassVar[str] = "I/O flusher"
    scope: ClassVar[Scope] = Scope.THREAD

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is Phase.FINAL and core.thread_core.phaul.io_flusher:
            program.order(NR.prctl, _PR_SET_IO_FLUSHER, 1, 0, 0, 0, label="becoming an I/O flusher")


@dataclass(frozen=True)
class _Addresses:
    tid_error: Buf
    tid: Buf
    robust: Buf


@task_kind
class ThreadAddresses(TaskKind):
    """Where the kernel writes when the thread ends or is moved: tid address, robust list, rseq area.

    They are set last: until then a copy that dies must not write into memory that others may see; and those that it
    would write to even then, still later (last_words.py). The rseq registration the engine reads by ptrace.
    """

    name: ClassVar[str] = "thread addresses"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> _Addresses:
        tid, robust = program.space(8), program.space(16)
        program.order(NR.get_robust_list, 0, robust, robust.at(8))
        return _Addresses(program.ask(NR.prctl, _PR_GET_TID_ADDRESS, tid, 0, 0, 0), tid, robust)

    def repeats(self, asked: Any, results: Results) -> bool:
        return results.answer(asked.tid_error) == 0

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        if results.answer(asked.tid_error) != 0:
            collection.block(
                thread.owner,
                "a process whose tid addresses cannot be read",
                "this kernel has no PR_GET_TID_ADDRESS",
                "a kernel with CONFIG_CHECKPOINT_RESTORE has",
            )
        core.thread_info.clear_tid_addr = int.from_bytes(results.bytes(asked.tid), "little")
        robust = results.bytes(asked.robust)
        core.thread_core.futex_rla = int.from_bytes(robust[:8], "little")
        core.thread_core.futex_rla_len = int.from_bytes(robust[8:], "little")

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is not Phase.CREDENTIALS:
            return
        entry = core.thread_core
        if entry.HasField("rseq_entry") and entry.rseq_entry.rseq_abi_pointer:
            rseq = entry.rseq_entry
            program.order(NR.rseq, rseq.rseq_abi_pointer, rseq.rseq_abi_size, 0, rseq.signature)
        if not last_words.within(core.thread_info.clear_tid_addr, task.written):
            program.order(NR.set_tid_address, core.thread_info.clear_tid_addr)
        if entry.futex_rla_len and not last_words.within(entry.futex_rla, task.written):
            program.order(NR.set_robust_list, entry.futex_rla, entry.futex_rla_len)
