"""A PID namespace for a tree whose numbers are taken at the destination (pid_namespaces(7)).

Its process 1 is ours: a small init (native/interp/init.c) that reaps, passes on signals and ends with the last process.
While the tree is being made it interprets, as the tree's tasks do, and bears the tree's first process; before all is
let go it executes the init. It has a mount namespace too, in which /proc shows the new numbers and everything else is
as the host mounts it, now and later.
"""

from __future__ import annotations

import contextlib
import os
import struct

from phaul_engine.errors import EngineError, GoneError, RebuildError
from phaul_engine.native import ffi, lib
from phaul_engine.proc.access import open_process, read_bytes
from phaul_engine.proc.stat import read_stat
from phaul_engine.proc.status import parse_status, read_status
from phaul_engine.proc.tree import children, threads
from phaul_engine.program import Program
from phaul_engine.syscalls import NR

NAME = "phaul-init"
CLONE_FLAGS = 0x20000000 | 0x00020000  # CLONE_NEWPID, CLONE_NEWNS
SHARED = ("pid", "mnt")
"""The namespaces that a tree has in common with its init, and not with the host."""

_LINK = f"/memfd:{NAME}"
_AT_EMPTY_PATH, _MFD_EXEC = 0x1000, 0x10
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 0x4000, 0x80000


def settle(program: Program) -> None:
    """In the new process 1: a session of its own, and a /proc of its own. Mounts of the host still come in."""
    program.order(NR.setsid)
    nothing = program.data(b"none\0")
    program.order(NR.mount, nothing, program.data(b"/\0"), 0, _MS_REC | _MS_SLAVE, 0, label="leave the host's mounts")
    proc, place = program.data(b"proc\0"), program.data(b"/proc\0")
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    program.order(NR.mount, proc, place, proc, flags, 0, label="mount /proc of the PID namespace")


def image() -> int:
    """The init as a memory file of ours."""
    size = ffi.new("size_t *")
    content = bytes(ffi.buffer(lib.ph_init_image(size), size[0]))
    try:
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:  # Linux before 6.3 has no such flag
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def execute(program: Program, descriptor: int, first: int) -> None:
    """Become the init of a tree whose first process is `first`. Such a program does not come to its end."""
    name, argument = program.data(NAME.encode() + b"\0"), program.data(b"%d\0" % first)
    words, nothing = program.data(struct.pack("<3Q", 0, 0, 0)), program.data(bytes(8))
    program.store(words, name)
    program.store(words.at(8), argument)
    empty = program.data(b"\0")
    program.order(NR.execveat, descriptor, empty, words, nothing, _AT_EMPTY_PATH, label="execute the init")


def is_init(pid: int) -> bool:
    """Whether a process is such an init, and executes it."""
    try:
        return os.readlink(f"/proc/{pid}/exe").startswith(_LINK)
    except OSError:
        return False


def init_above(pid: int) -> int | None:
    """The init of ours that is the parent of a process, if it has one."""
    try:
        proc = open_process(pid)
    except GoneError:
        return None
    try:
        parent = read_stat(proc).ppid
    finally:
        os.close(proc)
    return parent if parent and is_init(parent) else None


def number_here(parent: int, seen: int, *, thread: bool, bearer: int) -> int:
    """Our number of a child of process `bearer`, or of a thread of it, that process `parent` calls `seen`."""
    proc, above = open_process(bearer), open_process(parent)
    try:
        level = len(read_status(above).ns_pid) - 1
        for number in reversed(threads(proc) if thread else children(proc)):  # it is the newest, most likely
            with contextlib.suppress(EngineError):
                if _numbers(proc, number, thread=thread)[level] == seen:
                    return number
    finally:
        os.close(proc)
        os.close(above)
    raise RebuildError(f"task {seen} was born, and is not there")


def numbers_of(bearer: int, number: int, *, thread: bool) -> tuple[int, ...]:
    """All numbers of a child or thread of process `bearer`, ours being `number`."""
    proc = open_process(bearer)
    try:
        return _numbers(proc, number, thread=thread)
    finally:
        os.close(proc)


def _numbers(proc: int, number: int, *, thread: bool) -> tuple[int, ...]:
    if thread:
        return parse_status(read_bytes(proc, f"task/{number}/status")).ns_pid
    child = open_process(number)
    try:
        return read_status(child).ns_pid
    finally:
        os.close(child)
