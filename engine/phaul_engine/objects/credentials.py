"""User and group ids, capabilities, securebits and no_new_privs (credentials(7), capabilities(7)).

All are told and set by the thread itself: its numbers are those of its own user namespace.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from phaul_engine.errors import GoneError, RebuildError
from phaul_engine.images.pb import core_pb2, creds_pb2
from phaul_engine.proc.access import open_thread
from phaul_engine.proc.status import Capabilities, Ids, Status, read_status
from phaul_engine.proc.tree import threads
from phaul_engine.program import Buf, Operand, Program, Results
from phaul_engine.syscalls import NR
from phaul_engine.user_ids import UserIds

from .base import Collection, Owner, Phase, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_PR_GET_SECUREBITS, _PR_SET_SECUREBITS = 27, 28
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_CAP_AMBIENT, _AMBIENT_IS_SET, _AMBIENT_RAISE, _AMBIENT_CLEAR = 47, 1, 2, 4
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_DUMPABLE_BY_ROOT = 2
_NOBODY = 65534

_CAPABILITIES = 64  # asked for; the kernel knows about 41
_CAPABILITY_HEADER = struct.pack("<Ii", 0x20080522, 0)  # version 3, the caller
_CAPABILITY_WORDS = struct.Struct("<6I")  # effective, permitted, inheritable: low words, then high words
_THREE = struct.Struct("<3I")
_GROUPS = 256  # asked for; who is in more is looked up in /proc
_OUTER = "outer credentials"
_ANYONE = 0xFFFFFFFF  # setfsuid(2): change nothing, tell


class _Asked(NamedTuple):
    uids: Buf
    gids: Buf
    fsuid: Buf
    fsgid: Buf
    group_count: Buf
    groups: Buf
    capabilities: Buf
    bounding: Buf
    ambient: Buf
    securebits: Buf
    no_new_privs: Buf


@task_kind
class Credentials(TaskKind):
    """What a thread may do."""

    name: ClassVar[str] = "credentials"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> _Asked:
        uids, gids, groups = program.space(16), program.space(16), program.space(4 * _GROUPS)
        capabilities = program.space(_CAPABILITY_WORDS.size)
        program.order(NR.getresuid, uids, uids.at(4), uids.at(8))
        program.order(NR.getresgid, gids, gids.at(4), gids.at(8))
        program.order(NR.capget, program.data(_CAPABILITY_HEADER), capabilities)
        return _Asked(
            uids=uids,
            gids=gids,
            fsuid=program.ask(NR.setfsuid, _ANYONE),
            fsgid=program.ask(NR.setfsgid, _ANYONE),
            group_count=program.ask(NR.getgroups, _GROUPS, groups),
            groups=groups,
            capabilities=capabilities,
            bounding=_ask_each(program, _PR_CAPBSET_READ),
            ambient=_ask_each(program, _PR_CAP_AMBIENT, _AMBIENT_IS_SET),
            securebits=program.ask(NR.prctl, _PR_GET_SECUREBITS, 0, 0, 0, 0),
            no_new_privs=program.ask(NR.prctl, _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
        )

    def repeats(self, asked: Any, results: Results) -> bool:
        return results.answer(asked.group_count) >= 0

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        creds = core.thread_core.creds
        creds.CopyFrom(_entry(*(results.bytes(room) for room in asked)))
        if results.answer(asked.group_count) < 0:
            creds.groups.extend(_thread_status(thread.owner, thread.tid).groups)

    def finish(self, collection: Collection) -> None:
        """What is noted of threads in user namespaces below the tree's."""
        for tid, status in collection.scratch.get(_OUTER, {}).items():
            if not collection.checkpoint.has("core", tid):  # it is about to end
                continue
            creds, ids = collection.checkpoint.one("core", tid).thread_core.creds, collection.ids
            creds.phaul_outer_uids.extend(map(ids.uid_inside, _four(status.uids)))
            creds.phaul_outer_gids.extend(map(ids.gid_inside, _four(status.gids)))
            creds.phaul_outer_groups.extend(map(ids.gid_inside, status.groups))

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """Ids change under NO_SETUID_FIXUP, so that all capabilities stay until they are taken one set after the other.

        Each step needs what a later one removes: inheritable before bounding (what is in neither cannot be added),
        ambient while its capabilities are permitted, securebits before CAP_SETPCAP goes.
        """
        present = _present(task, restoration)
        if phase is not Phase.CREDENTIALS or not core.thread_core.HasField("creds"):
            return
        creds = core.thread_core.creds
        _refuse_what_is_lacking(creds, present.capabilities, task)
        keep_capabilities(program)
        if creds.phaul_outer_uids:
            _correct_ids(creds, present, restoration.ids, program)
        else:
            _set_ids(creds, present, program)
        _set_capabilities(creds, present.capabilities, program)
        if creds.no_new_privs:
            program.order(NR.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, label="setting no_new_privs")


def _present(task: SkeletonTask, restoration: Restoration) -> Status:
    """What a skeleton task was born with. Looked up early, out of the freeze."""
    notes: dict[int, Status] = restoration.scratch.setdefault(Credentials.name, {})
    if task.inner_pid not in notes:
        notes[task.inner_pid] = read_status(task.proc)
    return notes[task.inner_pid]


@task_kind
class Dumpable(TaskKind):
    """Whether a process may be dumped, and so traced by its own user.

    0 and 1 can be set. 2, dumpable by root only, the kernel gives when credentials change, if fs.suid_dumpable says
    so. As any thread's change of credentials resets it for the process, each thread sets it after its own: whichever
    is last, the right value stays.
    """

    name: ClassVar[str] = "dumpable"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        return program.ask(NR.prctl, _PR_GET_DUMPABLE, 0, 0, 0, 0)

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        collection.scratch.setdefault(self.name, {})[thread.owner.inner_pid] = results.answer(asked)

    def finish(self, collection: Collection) -> None:
        """It belongs to the address space's image."""
        for pid, dumpable in collection.scratch.get(self.name, {}).items():
            for record in collection.checkpoint.records("mm", pid):
                record.message.dumpable = dumpable

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is not Phase.CREDENTIALS:
            return
        for record in restoration.checkpoint.records("mm", task.inner_pid):
            value = record.message.dumpable if record.message.HasField("dumpable") else 1
            if value != _DUMPABLE_BY_ROOT:
                program.order(NR.prctl, _PR_SET_DUMPABLE, value, 0, 0, 0)
            else:
                _require_dumpable_by_root(task)


def _require_dumpable_by_root(task: SkeletonTask) -> None:
    with open("/proc/sys/fs/suid_dumpable") as file:
        given = int(file.read())
    if given != _DUMPABLE_BY_ROOT:
        raise RebuildError(
            f"pid {task.inner_pid} is dumpable by root only, which fs.suid_dumpable = {given} here does not give",
            advice="sysctl fs.suid_dumpable=2",
        )


def _ask_each(program: Program, option: int, *before: int) -> Buf:
    """prctl (option, *before, N) for each capability N; the answers stand one behind the other."""
    room = program.space(8 * _CAPABILITIES)
    number, answer, place, more = (program.register() for _ in range(4))
    program.set(number, 0)
    program.set(place, room)
    arguments: tuple[Operand, ...] = (option, *before, number)
    loop = program.here()
    program.call(NR.prctl, *arguments, *(0,) * (5 - len(arguments)), into=answer, keep_errors=True)
    program.store(place, answer)
    program.add(place, place, 8)
    program.add(number, number, 1)
    program.less(more, number, _CAPABILITIES)
    program.jump_if(loop, more)
    return room


@functools.lru_cache(maxsize=64)
def _entry(
    uids: bytes,
    gids: bytes,
    fsuid: bytes,
    fsgid: bytes,
    group_count: bytes,
    groups: bytes,
    capabilities: bytes,
    bounding: bytes,
    ambient: bytes,
    securebits: bytes,
    no_new_privs: bytes,
) -> creds_pb2.creds_entry:
    """The image message of what a thread told. Remembered: most threads of a tree tell the same, each time."""
    creds = creds_pb2.creds_entry()
    creds.uid, creds.euid, creds.suid = _THREE.unpack_from(uids)
    creds.gid, creds.egid, creds.sgid = _THREE.unpack_from(gids)
    creds.fsuid, creds.fsgid = _number(fsuid) & 0xFFFFFFFF, _number(fsgid) & 0xFFFFFFFF
    creds.groups.extend(struct.unpack_from(f"<{max(0, _number(group_count))}I", groups))
    words = _CAPABILITY_WORDS.unpack(capabilities)
    creds.cap_eff.extend((words[0], words[3]))
    creds.cap_prm.extend((words[1], words[4]))
    creds.cap_inh.extend((words[2], words[5]))
    creds.cap_bnd.extend(_split(_bits(bounding)))
    creds.cap_amb.extend(_split(_bits(ambient)))
    creds.secbits = _number(securebits)
    creds.no_new_privs = int(_number(no_new_privs) == 1)
    return creds


def _number(answer: bytes) -> int:
    return int.from_bytes(answer, "little", signed=True)


def _bits(answers: bytes) -> int:
    """The set of capabilities whose answer was yes."""
    found = struct.unpack(f"<{_CAPABILITIES}q", answers)
    return sum(1 << number for number, answer in enumerate(found) if answer == 1)


def _thread_status(owner: Owner, tid: int) -> Status:
    directory = open_thread(owner.proc, tid)
    try:
        return read_status(directory)
    finally:
        os.close(directory)


def _split(mask: int) -> tuple[int, int]:
    return mask & 0xFFFFFFFF, mask >> 32


def _join(words: Iterable[int]) -> int:
    return sum(word << (32 * index) for index, word in enumerate(words))


def _members(mask: int) -> list[int]:
    return [number for number in range(mask.bit_length()) if mask >> number & 1]


def _refuse_what_is_lacking(creds: creds_pb2.creds_entry, present: Capabilities, task: SkeletonTask) -> None:
    """Capabilities that this host does not even give to phaul cannot be given on."""
    permitted = _join(creds.cap_prm) & ~present.permitted
    bounding = _join(creds.cap_bnd) & ~present.bounding
    if permitted or bounding:
        numbers = ", ".join(str(number) for number in _members(permitted | bounding))
        raise RebuildError(
            f"pid {task.inner_pid} had capabilities that phaul itself lacks on this host (number {numbers})",
            advice="run phaul's agent with them: see capabilities(7) and the limits of its container or unit",
        )


def _set_ids(creds: creds_pb2.creds_entry, present: Status, program: Program) -> None:
    if tuple(creds.groups) != present.groups:  # a user namespace may forbid setgroups
        _order_groups(creds.groups, program)
    _order_ids(NR.setresgid, NR.setfsgid, (creds.gid, creds.egid, creds.sgid, creds.fsgid), program)
    program.order(NR.setresuid, creds.uid, creds.euid, creds.suid)
    program.order(NR.setfsuid, _NOBODY if creds.fsuid != _NOBODY else 0)  # a change for certain: see Dumpable
    program.order(NR.setfsuid, creds.fsuid)


def note_outer(owner: Owner, collection: Collection) -> None:
    """Note what a process in a user namespace below the tree's is outside of that: its threads' users and groups."""
    notes: dict[int, Status] = collection.scratch.setdefault(_OUTER, {})
    for tid in threads(owner.proc):
        with contextlib.suppress(GoneError):
            status = _thread_status(owner, tid)
            if tid in collection.inner_pids and not status.state.startswith("Z"):  # it may have just come to its end
                notes[collection.inner_pids[tid]] = status


def descend(creds: creds_pb2.creds_entry, present: Status, here: UserIds, ids: UserIds, program: Program) -> None:
    """Before a task goes into a user namespace below the tree's: take the users and groups that it is to have, while it
    may take any. Its capabilities stay. `here` is how its user namespace numbers them, `ids` how the tree's does."""
    keep_capabilities(program)
    uids = tuple(map(ids.uid_here, creds.phaul_outer_uids))
    gids = tuple(map(ids.gid_here, creds.phaul_outer_gids))
    groups = tuple(map(ids.gid_here, creds.phaul_outer_groups))
    if groups != present.groups:
        _order_groups([here.gid_inside(group) for group in groups], program)
    if gids != _four(present.gids):
        _order_ids(NR.setresgid, NR.setfsgid, map(here.gid_inside, gids), program)
    if uids != _four(present.uids):
        _order_ids(NR.setresuid, NR.setfsuid, map(here.uid_inside, uids), program)


def _four(ids: Ids) -> tuple[int, ...]:
    return ids.real, ids.effective, ids.saved, ids.fs


def keep_capabilities(program: Program) -> None:
    """Have a task keep its capabilities whatever user it becomes. In a user namespace that it enters it begins anew."""
    program.order(NR.prctl, _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0, label="setting securebits")


def _order_groups(groups: Sequence[int], program: Program) -> None:
    program.order(NR.setgroups, len(groups), program.data(struct.pack(f"<{len(groups)}I", *groups)))


def _order_ids(set_three: NR, set_fs: NR, ids: Iterable[int], program: Program) -> None:
    *three, last = ids
    program.order(set_three, *three)
    program.order(set_fs, last)


def _correct_ids(creds: creds_pb2.creds_entry, present: Status, ids: UserIds, program: Program) -> None:
    """In a user namespace below the tree's a process has its ids already (`descend`); a thread may have others."""
    if tuple(map(ids.gid_here, creds.phaul_outer_groups)) != present.groups:
        _order_groups(creds.groups, program)
    if tuple(map(ids.gid_here, creds.phaul_outer_gids)) != _four(present.gids):
        _order_ids(NR.setresgid, NR.setfsgid, (creds.gid, creds.egid, creds.sgid, creds.fsgid), program)
    if tuple(map(ids.uid_here, creds.phaul_outer_uids)) != _four(present.uids):
        _order_ids(NR.setresuid, NR.setfsuid, (creds.uid, creds.euid, creds.suid, creds.fsuid), program)


def _set_capabilities(creds: creds_pb2.creds_entry, present: Capabilities, program: Program) -> None:
    header = program.data(_CAPABILITY_HEADER)
    inheritable, ambient = _join(creds.cap_inh), _join(creds.cap_amb)
    _capset(program, header, present.permitted, present.permitted, inheritable)
    for number in _members(present.bounding & ~_join(creds.cap_bnd)):
        program.order(NR.prctl, _PR_CAPBSET_DROP, number, 0, 0, 0, label=f"dropping capability {number}")
    program.order(NR.prctl, _PR_CAP_AMBIENT, _AMBIENT_CLEAR, 0, 0, 0)
    for number in _members(ambient):
        label = f"raising ambient capability {number}"
        program.order(NR.prctl, _PR_CAP_AMBIENT, _AMBIENT_RAISE, number, 0, 0, label=label)
    program.order(NR.prctl, _PR_SET_SECUREBITS, creds.secbits, 0, 0, 0, label="setting securebits")
    _capset(program, header, _join(creds.cap_eff), _join(creds.cap_prm), inheritable)


def _capset(program: Program, header: Buf, effective: int, permitted: int, inheritable: int) -> None:
    low = tuple(mask & 0xFFFFFFFF for mask in (effective, permitted, inheritable))
    high = tuple(mask >> 32 for mask in (effective, permitted, inheritable))
    program.order(NR.capset, header, program.data(_CAPABILITY_WORDS.pack(*low, *high)))
