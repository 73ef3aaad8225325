"""What a tree as a whole has that cannot be carried: sessions led from outside, shared tables, other namespaces.

Single objects are judged by their own modules; this looks at how tasks stand to each other and to this host.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from . import calls, plan, sharing, vdso
from .errors import BlockedError, Blocker, ImageError
from .memory import guards
from .native import lib
from .objects import console, sysv_ipc, tty
from .objects.base import Collection
from .proc.access import open_at

if TYPE_CHECKING:
    from .members import Member
    from .target import Thread

_COMPAT_CS = 0x23
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_SWAPPED = 1 << 4
_TASK_TOP = 0x7FFFFFFFF000
_CS = 17
_SHARED = (
    (calls.KCMP_VM, "address space", "processes that share one (vfork, CLONE_VM) cannot be separated"),
    (calls.KCMP_SIGHAND, "signal handlers", "processes that share them (CLONE_SIGHAND) are not carried"),
)
_SHARED_BY_THREADS = (
    (calls.KCMP_FILES, "its process's descriptor table"),
    (calls.KCMP_FS, "its process's working directory and umask"),
)


def judge_tree(members: Sequence[Member], collection: Collection) -> None:
    """Put into `collection.blockers` what the tree as a whole cannot be moved with."""
    living = [member for member in members if not member.process.zombie]
    _judge_sessions(living, {member.owner.inner_pid for member in members}, collection)
    _judge_terminals(living, collection)
    _judge_sharing(living, collection)
    _judge_descent(collection)
    sysv_ipc.judge({member.pid: member.owner for member in living}, collection)
    for member in living:
        _judge_mode(member, collection)
        _judge_guards(member, collection)
        _judge_core_scheduling(member, collection)
        _judge_vdso(member, collection)


def _judge_sessions(members: Sequence[Member], inside: set[int], collection: Collection) -> None:
    """Sessions and groups are led from inside, if only by a zombie; or by nobody any more."""
    if _is_shell_job(collection):
        return
    for member in members:
        sid, pgid = member.sid, member.pgid
        if sid not in inside and not _dead_leader(member.stat.session):
            collection.block(
                member.owner,
                f"in a session led by pid {sid} ({_comm(member.stat.session)}), outside of the tree",
                "a session moves only with its leader",
                "move the leader, or start the program with setsid",
            )
        elif pgid not in inside and not _dead_leader(member.stat.pgrp):
            collection.block(
                member.owner,
                f"in a process group led by pid {pgid} ({_comm(member.stat.pgrp)}), outside of the tree",
                "a process group moves only with its leader",
                "move the leader too",
            )


def _dead_leader(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def _comm(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as comm:
            return comm.read().strip()
    except FileNotFoundError:
        return "gone"


def _judge_terminals(members: Sequence[Member], collection: Collection) -> None:
    """A controlling terminal comes along if both its sides do, and for all of the session alike."""
    carried = tty.controlled(collection)
    for member in members:
        number = member.stat.tty
        device = console.device_of(number)
        if carried.get(member.sid, 0) == (device if number else 0):
            continue
        collection.block(
            member.owner,
            "a process with a controlling terminal" if number else "a process without its session's terminal",
            "the program that holds its other side stays" if number else "it was started before its session had one",
            "start it with setsid, or move what holds the terminal too" if number else "start it again",
        )


def _judge_sharing(members: Sequence[Member], collection: Collection) -> None:
    for left, right in itertools.combinations(members, 2):
        for what, kind, why in _SHARED:
            if calls.kcmp(left.pid, right.pid, what) == 0:
                collection.block(left.owner, f"sharing {kind} with {right.owner}", why)
    for member in members:
        for thread in member.process.threads[1:]:
            for what, kind in _SHARED_BY_THREADS:
                if not thread.zombie and calls.kcmp(member.pid, thread.tid, what) != 0:
                    why = "threads with their own (unshare) are not carried"
                    collection.block(f"thread {thread.tid} of {member.owner}", f"apart from {kind}", why)


def _judge_descent(collection: Collection) -> None:
    """Whether the tree can be made again: by whom a task was born shows in its session only."""
    try:
        steps = plan.order(plan.read_tree(collection.checkpoint), foreign_session=_is_shell_job(collection))
    except ImageError as error:
        collection.block("the tree", "of a descent that cannot be repeated", str(error))
        return
    for child, other in sharing.apart(steps):
        why = "descriptors and directories can be shared (CLONE_FILES, CLONE_FS) with the parent only"
        collection.block(f"pid {child.pid}", f"sharing a table with pid {other.pid}, which is not its parent", why)


def _is_shell_job(collection: Collection) -> bool:
    return bool(collection.options.get("shell_job"))


def _judge_mode(member: Member, collection: Collection) -> None:
    for thread in member.process.threads:
        if not thread.zombie and thread.state.regs[_CS] == _COMPAT_CS:
            why = "32-bit programs are not carried"
            collection.block(f"thread {thread.tid} of {member.owner}", "running 32-bit code", why)


def judge_threads(threads: Iterable[Thread]) -> None:
    """What stands in the way of looking further: programs run inside the threads would not work. BlockedError, with
    all of it."""
    found = []
    for thread in threads:
        if not thread.state.peculiar:
            continue
        where = f"thread {thread.tid} of pid {thread.pid} ({_comm(thread.pid)})"
        if thread.state.peculiar & lib.PH_PECULIAR_DISPATCH:
            kind, why = "dispatching its system calls", "syscall user dispatch cannot be interrupted safely"
            found.append(Blocker(where, kind, why, "run it without (Wine and emulators use it)"))
        if thread.state.peculiar & lib.PH_PECULIAR_PORTS:
            kind, why = "using I/O ports", "devices of this host (ioperm) do not move"
            found.append(Blocker(where, kind, why, "stop using the device before the program moves"))
    if found:
        raise BlockedError(found)


def _judge_core_scheduling(member: Member, collection: Collection) -> None:
    """A cookie says which tasks may share a core; the kernel makes them, and nobody can ask for a given one."""
    for thread in member.process.threads:
        if not thread.zombie and calls.core_cookie(thread.tid):
            where = f"thread {thread.tid} of {member.owner}"
            why = "cookies cannot be made again (PR_SCHED_CORE)"
            collection.block(where, "in a core scheduling group", why, "start it without core scheduling")


def _judge_guards(member: Member, collection: Collection) -> None:
    """Guard pages (madvise(2), MADV_GUARD_INSTALL) look like swapped pages where the kernel does not show them."""
    seen = collection.memory.setdefault("guards", set())
    if guards.visible() or not guards.installable() or member.pid in seen:  # once tracked, memory has markers of ours
        return
    seen.add(member.pid)
    found = bytearray(96)
    region = bytearray(24)
    vector = (ctypes.c_char * len(region)).from_buffer(region)
    # struct pm_scan_arg (linux/fs.h): size, flags, start, end, walk_end, vec, vec_len, max_pages, four masks
    words = (len(found), 0, 0, _TASK_TOP, 0, ctypes.addressof(vector), 1, 1, 0, _PAGE_IS_SWAPPED, 0, _PAGE_IS_SWAPPED)
    struct.pack_into("<12Q", found, 0, *words)
    pagemap = open_at(member.process.proc, "pagemap")
    try:
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, found)
    finally:
        os.close(pagemap)
    if count:
        start, _, _ = struct.unpack("<3Q", region)
        why = "this kernel (Linux 6.13 or 6.14) does not tell guard pages (MADV_GUARD_INSTALL) from swapped ones"
        advice = "run swapoff, or move it from Linux 6.15 or newer"
        collection.block(f"address {start:x} of {member.owner}", "a swapped page or a guard page", why, advice)


def _judge_vdso(member: Member, collection: Collection) -> None:
    """A program's vDSO is this kernel's, whole and as it was: then this host's own stands for it."""
    here = vdso.local()
    for area in member.areas:
        if area.path != "[vdso]" or here is None:
            continue
        where = f"area {area.start:x}-{area.end:x} of {member.owner}"
        if area.size != len(here.code.data):
            collection.block(where, "a part of the vDSO", "the rest was unmapped")
            continue
        mem = open_at(member.process.proc, "mem")
        try:
            code = here.code.data.rstrip(b"\0")  # behind it may be a way in for injections (gadgets.py)
            written = os.pread(mem, len(code), area.start) != code
        finally:
            os.close(mem)
        if written:
            collection.block(where, "a vDSO that was written to", "a debugger or the program itself changed its code")
