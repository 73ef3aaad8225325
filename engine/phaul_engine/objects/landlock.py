"""Landlock domains (landlock(7)): the kernel tells nobody that a process is in one, nor its rules.

But a process in a domain may look at none outside of it, whatever its privileges. So a witness with the same user and
groups and no privileges of its own is started, and each process that could have entered a domain is asked, from inside,
to look at it (kcmp(2)): everything but Landlock allows that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import struct
from typing import Any, ClassVar, NamedTuple

from phaul_engine.images.pb import core_pb2
from phaul_engine.proc.stat import read_stat
from phaul_engine.proc.status import Status, read_status
from phaul_engine.program import Buf, Program, Results
from phaul_engine.syscalls import NR

from .base import Collection, Phase, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_LANDLOCK_CREATE_RULESET_VERSION = 1
_KCMP_VM = 1
_PR_SET_DUMPABLE = 4
_CAP_SYS_ADMIN = 21
_NO_CAPABILITIES = struct.pack("<Ii", 0x20080522, 0), bytes(24)


class _Witness:
    """A process that can be looked at by whoever has these ids. It ends with its pipe."""

    def __init__(self, uid: int, gid: int) -> None:
        waits, self._end = os.pipe()
        ready, says = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                os.close(self._end)
                os.close(ready)
                _become(uid, gid)
                os.write(says, b".")
                os.read(waits, 1)
            os._exit(0)
        os.close(waits)
        os.close(says)
        self.stands = os.read(ready, 1) == b"."
        os.close(ready)

    def close(self) -> None:
        """End it."""
        os.close(self._end)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _become(uid: int, gid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    libc.syscall(ctypes.c_long(NR.capset), *_NO_CAPABILITIES)
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


@functools.cache
def _available() -> bool:
    """Whether this kernel has Landlock, and it is on."""
    libc = ctypes.CDLL(None)
    version: int = libc.syscall(
        ctypes.c_long(NR.landlock_create_ruleset),
        None,
        ctypes.c_long(0),
        ctypes.c_long(_LANDLOCK_CREATE_RULESET_VERSION),
    )
    return version > 0


def _could_enter(status: Status) -> bool:
    """landlock_restrict_self(2) wants no_new_privs, or CAP_SYS_ADMIN, which may have been dropped since."""
    return status.no_new_privs or bool(status.capabilities.bounding >> _CAP_SYS_ADMIN & 1)


class _Asked(NamedTuple):
    """Who is asked (pid and start time), and where the answer will be."""

    who: tuple[int, int]
    answer: Buf


@task_kind
class LandlockDomain(TaskKind):
    """Whether the leader of a process is in a domain; one that only another thread entered is not seen."""

    name: ClassVar[str] = "Landlock domain"
    scope: ClassVar[Scope] = Scope.PROCESS
    varies: ClassVar[bool] = True

    def __init__(self) -> None:
        self._judged: set[tuple[int, int]] = set()  # pids and start times: once is enough, and not in the freeze
        self._witnesses: dict[tuple[int, int], _Witness] = {}

    def prepare(self, proc: int) -> None:
        stat = read_stat(proc)
        self._witness(proc, (stat.pid, stat.start))

    def _witness(self, proc: int, who: tuple[int, int]) -> _Witness | None:
        """Whom a process is to look at; None if there is nothing to be learnt so. A new one takes milliseconds."""
        if who in self._judged or not _available() or not _is_neighbour(proc):
            return None
        status = read_status(proc)
        if not _could_enter(status):
            return None
        ids = status.uids.real, status.gids.real
        if ids not in self._witnesses:
            self._witnesses[ids] = _Witness(*ids)
        return self._witnesses[ids] if self._witnesses[ids].stands else None

    def inquire(self, program: Program, thread: ThreadView) -> _Asked | None:
        who = thread.owner.pid, thread.owner.start
        witness = self._witness(thread.owner.proc, who)
        if witness is None:
            self._judged.add(who)
            return None
        return _Asked(who, program.ask(NR.kcmp, witness.pid, witness.pid, _KCMP_VM, 0, 0))

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        if asked is None:
            return
        if results.answer(asked.answer) != -errno.EPERM:
            self._judged.add(asked.who)
        else:
            collection.block(
                thread.owner,
                "in a Landlock domain",
                "the kernel does not tell its rules, and without them the program would be less confined",
                "start it without its sandbox",
            )

    def finish(self, collection: Collection) -> None:
        self.close()

    def close(self) -> None:
        for witness in self._witnesses.values():
            witness.close()
        self._witnesses.clear()

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """There is none to make."""


def _is_neighbour(proc: int) -> bool:
    """Whether a process has our pid and user namespaces: in others, numbers and privileges are not ours."""
    return all(
        os.stat(f"ns/{name}", dir_fd=proc).st_ino == os.stat(f"/proc/self/ns/{name}").st_ino for name in ("pid", "user")
    )
