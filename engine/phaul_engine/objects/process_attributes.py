"""Attributes of a process that are a number each: prctl(2), arch_prctl(2), /proc/PID, membarrier(2)."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from phaul_engine.errors import EngineError, RebuildError
from phaul_engine.images.pb import core_pb2
from phaul_engine.proc.access import open_at, read_bytes, read_text
from phaul_engine.program import Buf, Program, Results
from phaul_engine.syscalls import NR

from .base import Collection, Phase, RebuiltKind, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_PR_SET_THP_DISABLE, _PR_GET_THP_DISABLE = 41, 42
_PR_SET_MDWE, _PR_GET_MDWE = 65, 66
_PR_SET_MEMORY_MERGE, _PR_GET_MEMORY_MERGE = 67, 68
_ARCH_GET_XCOMP_PERM, _ARCH_REQ_XCOMP_PERM = 0x1022, 0x1023
_ARCH_GET_UNTAG_MASK = 0x4001
_ALL_ONES = (1 << 64) - 1
_XSTATE_ON_REQUEST = (18,)  # AMX tile data: what a process has to ask for before it may use it


@dataclass(frozen=True)
class _Asked:
    subreaper: Buf
    thp_disable: Buf
    mdwe: Buf
    memory_merge: Buf
    xstate_error: Buf
    xstate: Buf
    tags_error: Buf
    tags: Buf
    descriptor_table: Buf


@task_kind
class ProcessAttributes(TaskKind):
    """Whether it reaps orphans, uses huge pages and the like."""

    name: ClassVar[str] = "process attributes"
    scope: ClassVar[Scope] = Scope.PROCESS

    def inquire(self, program: Program, thread: ThreadView) -> _Asked:
        subreaper, xstate, tags, descriptor = (program.space(8) for _ in range(4))
        program.order(NR.prctl, _PR_GET_CHILD_SUBREAPER, subreaper, 0, 0, 0)
        return _Asked(
            subreaper=subreaper,
            thp_disable=program.ask(NR.prctl, _PR_GET_THP_DISABLE, 0, 0, 0, 0),
            mdwe=program.ask(NR.prctl, _PR_GET_MDWE, 0, 0, 0, 0),
            memory_merge=program.ask(NR.prctl, _PR_GET_MEMORY_MERGE, 0, 0, 0, 0),
            xstate_error=program.ask(NR.arch_prctl, _ARCH_GET_XCOMP_PERM, xstate),
            xstate=xstate,
            tags_error=program.ask(NR.arch_prctl, _ARCH_GET_UNTAG_MASK, tags),
            tags=tags,
            descriptor_table=program.ask(NR.modify_ldt, 0, descriptor, 8),
        )

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        own = core.tc.phaul
        core.tc.child_subreaper = bool(_word(results, asked.subreaper) & 0xFFFFFFFF)
        thp = results.answer(asked.thp_disable)
        if thp > 1:
            own.thp_disable_flags = thp & ~1
        if results.answer(asked.mdwe) > 0:
            own.mdwe = results.answer(asked.mdwe)
        if results.answer(asked.memory_merge) == 1:
            own.memory_merge = True
        if results.answer(asked.xstate_error) == 0:
            own.xstate_permissions = _word(results, asked.xstate)
        collection.scratch.setdefault(self.name, {})[thread.owner.inner_pid] = thp > 0
        if results.answer(asked.tags_error) == 0 and _word(results, asked.tags) != _ALL_ONES:
            collection.block(
                thread.owner,
                "a process with tagged addresses",
                "Linear Address Masking cannot be carried",
                "start it without",
            )
        if results.answer(asked.descriptor_table) > 0:
            collection.block(
                thread.owner,
                "a process with a local descriptor table",
                "segments of modify_ldt cannot be carried",
                "start it without (16-bit and old Wine programs need them)",
            )

    def finish(self, collection: Collection) -> None:
        """Whether huge pages are off belongs to the address space's image."""
        for pid, thp_disabled in collection.scratch.get(self.name, {}).items():
            for record in collection.checkpoint.records("mm", pid):
                record.message.thp_disabled = thp_disabled

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        own = core.tc.phaul
        match phase:
            case Phase.EARLY:
                _ask_for_xstate(own.xstate_permissions, program)
                if own.memory_merge:
                    program.order(NR.prctl, _PR_SET_MEMORY_MERGE, 1, 0, 0, 0, label="merging of equal pages")
            case Phase.FINAL:
                program.order(NR.prctl, _PR_SET_CHILD_SUBREAPER, int(core.tc.child_subreaper), 0, 0, 0)
                for record in restoration.checkpoint.records("mm", task.inner_pid):
                    disabled = int(record.message.thp_disabled)
                    program.order(NR.prctl, _PR_SET_THP_DISABLE, disabled, own.thp_disable_flags, 0, 0)
            case Phase.CREDENTIALS:
                if own.mdwe:
                    program.order(NR.prctl, _PR_SET_MDWE, own.mdwe, 0, 0, 0, label="setting MDWE")


def _word(results: Results, room: Buf) -> int:
    return int.from_bytes(results.bytes(room), "little")


def _ask_for_xstate(permissions: int, program: Program) -> None:
    """Ask for the parts of the CPU's state that a process gets only on request, before registers hold them."""
    for number in _XSTATE_ON_REQUEST:
        if permissions >> number & 1:
            program.order(NR.arch_prctl, _ARCH_REQ_XCOMP_PERM, number, label=f"asking for XSAVE component {number}")


@task_kind
class Umask(RebuiltKind):
    """The file mode creation mask. It is collected with the working directory, whose image it is in."""

    name: ClassVar[str] = "umask"
    scope: ClassVar[Scope] = Scope.PROCESS

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is Phase.FINAL:
            for record in restoration.checkpoint.records("fs", task.inner_pid):
                if record.message.HasField("umask"):
                    program.order(NR.umask, record.message.umask)


@task_kind
class ProcFiles(TaskKind):
    """What is read and written in files of /proc/PID: oom_score_adj, coredump_filter, loginuid.

    The login uid is for the audit log; where the host does not let it be changed, it stays the agent's.
    """

    name: ClassVar[str] = "attributes in /proc"
    scope: ClassVar[Scope] = Scope.PROCESS

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        proc = thread.owner.proc
        core.tc.oom_score_adj = int(read_text(proc, "oom_score_adj"))
        core.tc.phaul.coredump_filter = int(read_text(proc, "coredump_filter") or "0", 16)
        loginuid = _read_optional(proc, "loginuid")
        if loginuid is not None:
            core.tc.loginuid = loginuid

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is Phase.EARLY:
            if core.tc.HasField("loginuid") and _read_optional(task.proc, "loginuid") != core.tc.loginuid:
                _write_from_inside(program, b"/proc/self/loginuid", b"%d" % core.tc.loginuid)
        elif phase is Phase.CREDENTIALS:
            if core.tc.HasField("oom_score_adj"):
                _write(task, "oom_score_adj", core.tc.oom_score_adj, int(read_text(task.proc, "oom_score_adj")))
            if core.tc.phaul.HasField("coredump_filter"):
                present = int(read_text(task.proc, "coredump_filter"), 16)
                _write(task, "coredump_filter", core.tc.phaul.coredump_filter, present)


def _read_optional(proc: int, name: str) -> int | None:
    """A number in a file that not every kernel has."""
    try:
        return int(read_bytes(proc, name))
    except EngineError:
        return None


def _write(task: SkeletonTask, name: str, value: int, present: int) -> None:
    """Write a number to a file of the task's, from outside."""
    if value == present:
        return
    fd = open_at(task.proc, name, os.O_WRONLY)
    try:
        os.write(fd, b"%d" % value)
    except OSError as error:
        advice = ""
        if name == "oom_score_adj" and error.errno in (errno.EACCES, errno.EPERM):
            advice = "run phaul's agent with CAP_SYS_RESOURCE, or with so low an oom_score_adj itself"
        raise RebuildError(
            f"pid {task.inner_pid} had {name} {value}, which cannot be set here: {error.strerror}", advice=advice
        ) from error
    finally:
        os.close(fd)


def _write_from_inside(program: Program, path: bytes, content: bytes) -> None:
    """Write to a file that only the task itself may write, as far as the host lets it."""
    fd = program.call(NR.open, program.data(path + b"\0"), os.O_WRONLY | os.O_CLOEXEC, keep_errors=True)
    program.order(NR.write, fd, program.data(content), len(content), keep_errors=True)
    program.order(NR.close, fd, keep_errors=True)


_MCL_FUTURE = 2
_PAGE = 4096
_PROT_READ_WRITE, _PRIVATE_ANONYMOUS = 3, 0x22


@task_kind
class LockedFuture(TaskKind):
    """Whether memory that is mapped from now on is locked (mlockall(2), MCL_FUTURE): the kernel does not tell, but a
    new page is there before it is touched. With MCL_ONFAULT too it is not, and that is not seen."""

    name: ClassVar[str] = "locking of future memory"
    scope: ClassVar[Scope] = Scope.PROCESS

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        there = program.space(8)
        args = (0, _PAGE, _PROT_READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        page = program.call(NR.mmap, *args, keep_errors=True)
        program.order(NR.mincore, page, _PAGE, there, keep_errors=True)
        program.order(NR.munmap, page, _PAGE, keep_errors=True)
        return there

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        if results.bytes(asked)[0] & 1:
            core.tc.phaul.lock_future = True
        else:
            core.tc.phaul.ClearField("lock_future")

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is Phase.FINAL and core.tc.phaul.lock_future:
            program.order(NR.mlockall, _MCL_FUTURE, label="locking of future memory")


_KEYCTL_GET_KEYRING_ID = 0
_KEYRINGS = {-1: "a thread keyring", -2: "a process keyring"}


@task_kind
class Keyrings(TaskKind):
    """Keys that only a thread or process holds (keyrings(7)) are in this host's kernel, which gives them to nobody."""

    name: ClassVar[str] = "keyrings"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> tuple[Buf, ...]:
        return tuple(program.ask(NR.keyctl, _KEYCTL_GET_KEYRING_ID, which, 0) for which in _KEYRINGS)

    def repeats(self, asked: Any, results: Results) -> bool:
        return all(results.answer(one) < 0 for one in asked)

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        for answer, kind in zip(asked, _KEYRINGS.values(), strict=True):
            if results.answer(answer) > 0:
                where = f"thread {thread.inner_tid} of {thread.owner}"
                collection.block(where, kind, "keys are in this host's kernel", "let the program use user keyrings")

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """There are none to make."""


_MEMBARRIER_GET_REGISTRATIONS = 1 << 9  # Linux 6.3
_MEMBARRIER_KINDS = (1 << 3, 1 << 5, 1 << 7)  # private expedited, with core sync, with rseq; registration: one bit up


@task_kind
class Membarrier(TaskKind):
    """For which barriers of membarrier(2) a process has registered.

    Before Linux 6.3 the private ones are found by trying them, and the global one is not seen.
    Registering costs milliseconds once a process has threads, so it is done early.
    """

    name: ClassVar[str] = "membarrier registrations"
    scope: ClassVar[Scope] = Scope.PROCESS

    def inquire(self, program: Program, thread: ThreadView) -> tuple[Buf, tuple[Buf, ...]]:
        registered = program.ask(NR.membarrier, _MEMBARRIER_GET_REGISTRATIONS, 0, 0)
        if _knows_registrations():
            return registered, ()
        return registered, tuple(program.ask(NR.membarrier, kind, 0, 0) for kind in _MEMBARRIER_KINDS)

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        registered, tried = asked
        mask = max(0, results.answer(registered))
        for kind, answer in zip(_MEMBARRIER_KINDS, tried, strict=False):
            if results.answer(answer) == 0:
                mask |= kind << 1
        if mask:
            core.tc.membarrier_registration_mask = mask
        else:
            core.tc.ClearField("membarrier_registration_mask")

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is Phase.CREDENTIALS:
            return
        mask = core.tc.membarrier_registration_mask
        for bit in range(mask.bit_length()):
            if mask >> bit & 1:
                program.order(NR.membarrier, 1 << bit, 0, 0, label=f"registering for membarrier {1 << bit:#x}")


def _knows_registrations() -> bool:
    """Whether this kernel tells registrations (Linux >= 6.3)."""
    result: int = ctypes.CDLL(None).syscall(int(NR.membarrier), _MEMBARRIER_GET_REGISTRATIONS, 0, 0)
    return result >= 0
