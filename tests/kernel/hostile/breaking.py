"""What hostile images are made with: ways to find what a checkpoint of `subject` holds, and to change it.

The checkpoint is of two processes: the root, with a thread, and its child.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable
from typing import Any

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import (
    core_pb2,
    eventpoll_pb2,
    fdinfo_pb2,
    ghost_file_pb2,
    pstree_pb2,
    remap_file_path_pb2,
)
from phaul_engine.images.vma import Status

from tests.unit.images.checkpoints import fill

Break = Callable[[Checkpoint], Any]

MISPLACED, KIND, OFFSET = "which is misplaced", "(of an unknown kind|not of its kind)", "at offset"
OTHER_TYPE, CANNOT_OPEN = "a file of another type here", "cannot open"
KERNEL_HALF = 0xFFFF800000000000
HUGE32, HUGE64 = 0xFFFFFFFF, (1 << 64) - 1
UNKNOWN = 4_000_000


def root(c: Checkpoint) -> Any:
    return c.records("pstree")[0].message


def child(c: Checkpoint) -> Any:
    return c.records("pstree")[1].message


def core(c: Checkpoint) -> Any:
    return c.one("core", root(c).pid)


def thread(c: Checkpoint) -> Any:
    return core(c).thread_core


def mm(c: Checkpoint) -> Any:
    return c.one("mm", root(c).pid)


def areas(c: Checkpoint) -> list[Any]:
    return [area for area in mm(c).vmas if area.status & Status.ANON_PRIVATE and not area.status & Status.VSYSCALL]


def area(c: Checkpoint, status: Status) -> Any:
    return next(one for one in mm(c).vmas if one.status & status)


def ids(c: Checkpoint) -> Any:
    return c.one("ids", root(c).pid)


def file(c: Checkpoint, member: str, which: Callable[[Any], bool] = lambda one: True) -> Any:
    """The first description of a sort."""
    entries = (record.message for record in c.records("files"))
    return next(one for one in entries if one.HasField(member) and which(getattr(one, member)))


def named(c: Checkpoint, end: bytes) -> Any:
    return file(c, "reg", lambda reg: reg.name.endswith(end)).reg


def data(c: Checkpoint) -> Any:
    """A regular file, open for reading and writing."""
    return named(c, b"/data")


def unix(c: Checkpoint, which: Callable[[Any], bool] = lambda usk: usk.state == 10) -> Any:
    return file(c, "usk", which).usk


def pair(c: Checkpoint) -> Any:
    return unix(c, lambda usk: usk.peer != 0)


def listener(c: Checkpoint) -> Any:
    return file(c, "isk", lambda isk: isk.type == 1).isk


def datagrams(c: Checkpoint) -> Any:
    return file(c, "isk", lambda isk: isk.type == 2).isk


def packet(c: Checkpoint) -> Any:
    return c.records("sk-queues")[0].message


def add_file(c: Checkpoint, kind: int, member: str, open_in_root: bool = True, **values: Any) -> int:
    """One more description, number 9000, open in the root's table."""
    number = 9000
    entry = fdinfo_pb2.file_entry(type=kind, id=number)  # type: ignore[arg-type]
    detail = getattr(entry, member)
    detail.id = number
    for name, value in values.items():
        setattr(detail, name, value)
    c.put("files", None, fill(entry))
    fill(detail)
    if open_in_root:
        one = fdinfo_pb2.fdinfo_entry(id=number, flags=0, type=kind, fd=700)  # type: ignore[arg-type]
        c.put("fdinfo", ids(c).files_id, one)
    return number


def add_named(c: Checkpoint, path: bytes, mode: int | None = None, flags: int = os.O_RDONLY) -> None:
    add_file(c, fdinfo_pb2.REG, "reg", name=path, flags=flags, **({} if mode is None else {"mode": mode}))  # type: ignore[arg-type]


def add_process(c: Checkpoint, pid: int, ppid: int, **others: int) -> None:
    """One more process, which is dead."""
    given = {"pgid": root(c).pgid, "sid": root(c).sid, **others}
    c.put("pstree", None, pstree_pb2.pstree_entry(pid=pid, ppid=ppid, threads=[pid], **given))
    dead = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    fill(dead.tc).task_state = 2
    c.put("core", pid, dead)


def ghost(
    c: Checkpoint, mode: int = stat.S_IFREG | 0o600, path: bytes = b"/tmp/phaul-hostile-ghost", **head: Any
) -> None:
    """A deleted file."""
    add_named(c, path, mode)
    remap = remap_file_path_pb2.remap_file_path_entry(orig_id=9000, remap_id=99, remap_type=remap_file_path_pb2.GHOST)
    c.put("remap-fpath", None, remap)
    c.put("ghost-file", 99, fill(ghost_file_pb2.ghost_file_entry(mode=mode, **head)))


def seccomp(c: Checkpoint, **values: Any) -> None:
    one = c.one("seccomp").seccomp_filters[0]
    for name, value in values.items():
        setattr(one, name, value)


def option(c: Checkpoint, level: int, name: int, value: bytes) -> None:
    unix(c).opts.phaul_options.add(level=level, name=name, value=value)


def signal_info(c: Checkpoint, size: int) -> None:
    core(c).tc.signals_s.signals.add(siginfo=struct.pack("<i", 10).ljust(size, b"\0")[:size])


def chain_of(c: Checkpoint, length: int) -> None:
    parent = root(c).pid
    for number in range(length):
        add_process(c, UNKNOWN + number, parent)
        parent = UNKNOWN + number


def epolls(c: Checkpoint) -> list[Any]:
    return [record.message.epfd for record in c.records("files") if record.message.HasField("epfd")]


def watch_each_other(c: Checkpoint) -> None:
    one, other = epolls(c)
    for left, right in ((one, other), (other, one)):
        del left.tfd[:]
        left.tfd.append(
            eventpoll_pb2.eventpoll_tfd_entry(id=left.id, tfd=50, events=1, data=0, phaul_target_id=right.id)
        )


def watch(c: Checkpoint, number: int, target: int) -> None:
    one = epolls(c)[0]
    one.tfd.append(eventpoll_pb2.eventpoll_tfd_entry(id=one.id, tfd=number, events=1, data=0, phaul_target_id=target))


def inotify(c: Checkpoint) -> Any:
    return file(c, "ify").ify


def wait_at_each_other(c: Checkpoint) -> None:
    left = pair(c)
    right = unix(c, lambda usk: usk.ino == left.peer)
    left.phaul_waits_at, right.phaul_waits_at = right.ino, left.ino
    left.peer = right.peer = 0


def carried(c: Checkpoint, path: bytes) -> None:
    """The memory file is a file on tmpfs that is carried."""
    memory(c).name, memory(c).phaul_path = b"", path
    add_named(c, path, stat.S_IFREG | 0o644, os.O_RDWR)


def memory(c: Checkpoint) -> Any:
    return c.records("memfd")[0].message


def linked(c: Checkpoint, path: bytes, times: int = 1) -> None:
    """A deleted file with another name, which is removed after it was opened."""
    add_named(c, path)
    for _ in range(times):
        remap = remap_file_path_pb2.remap_file_path_entry(orig_id=data(c).id, remap_id=9000)
        remap.remap_type = remap_file_path_pb2.LINKED
        c.put("remap-fpath", None, remap)


def lock(c: Checkpoint, **values: int) -> None:
    one = c.records("filelocks")[0].message
    for name, value in values.items():
        setattr(one, name, value)


def grow(c: Checkpoint, one: Any, size: int) -> None:
    one.end = one.start + size
