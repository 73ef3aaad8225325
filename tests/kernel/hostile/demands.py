"""What hostile images of `subject` say: each with what it is refused with, and how whole images become it.

The checkpoint is of two processes: the root, with a thread, and its child.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import (
    core_pb2,
    eventpoll_pb2,
    fdinfo_pb2,
    ghost_file_pb2,
    pstree_pb2,
    remap_file_path_pb2,
    tcp_stream_pb2,
)
from phaul_engine.images.vma import Status

from tests.unit.images.checkpoints import fill

Break = Callable[[Checkpoint], object]

MISPLACED, KIND, OFFSET = "which is misplaced", "(of an unknown kind|not of its kind)", "at offset"
OTHER_TYPE, CANNOT_OPEN = "a file of another type here", "cannot open"
KERNEL_HALF = 0xFFFF800000000000
HUGE32, HUGE64 = 0xFFFFFFFF, (1 << 64) - 1
UNKNOWN = 4_000_000


# -- finding what to break --------------------------------------------------------------------------------------------


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
        c.put("fdinfo", ids(c).files_id, fdinfo_pb2.fdinfo_entry(id=number, flags=0, type=kind, fd=700))
    return number


def add_named(c: Checkpoint, path: bytes, mode: int | None = None, flags: int = os.O_RDONLY) -> None:
    add_file(c, fdinfo_pb2.REG, "reg", name=path, flags=flags, **({} if mode is None else {"mode": mode}))


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


# -- what they say ----------------------------------------------------------------------------------------------------

TREE: dict[str, tuple[str, Break]] = {
    "no process": ("holds no process", lambda c: c.adopt("pstree", None, [])),
    "process 0": ("with the number 0", lambda c: add_process(c, 0, root(c).pid)),
    "process beyond all numbers": ("with the number 4194305", lambda c: add_process(c, (1 << 22) + 1, root(c).pid)),
    "process -1": ("with the number 4294967295", lambda c: add_process(c, HUGE32, root(c).pid)),
    "thread 0": ("with the number 0", lambda c: root(c).threads.append(0)),
    "thread -1": ("with the number 4294967295", lambda c: root(c).threads.append(HUGE32)),
    "thread twice": ("is listed 2 times", lambda c: root(c).threads.append(root(c).threads[1])),
    "thread of another process": ("is listed 2 times", lambda c: child(c).threads.append(root(c).threads[1])),
    "thread without an image": ("core-4000000.img: is missing", lambda c: root(c).threads.append(UNKNOWN)),
    "a hundred thousand threads": (
        "generations and 1000",
        lambda c: root(c).threads.extend(range(10**6, 10**6 + 10**5)),
    ),
    "process that is not its own thread": ("its own first thread", lambda c: root(c).threads.reverse()),
    "parent that is not there": ("before its parent 4000000", lambda c: setattr(child(c), "ppid", UNKNOWN)),
    "process that is its own parent": ("before its parent", lambda c: setattr(child(c), "ppid", child(c).pid)),
    "two that are each other's parents": (
        "before its parent",
        lambda c: (add_process(c, UNKNOWN, UNKNOWN + 1), add_process(c, UNKNOWN + 1, UNKNOWN)),
    ),
    "child before its parent": ("before its parent", lambda c: c.share("pstree").reverse()),  # type: ignore[union-attr]
    "two roots": ("a second root", lambda c: add_process(c, UNKNOWN, 0)),
    "300 generations": ("has 301 generations", lambda c: chain_of(c, 300)),
    "huge process group": ("group 4294967295", lambda c: setattr(child(c), "pgid", HUGE32)),
    "huge session": ("session 4294967295", lambda c: setattr(child(c), "sid", HUGE32)),
    "session of a sibling": (
        "never was in|cannot|in task",
        lambda c: (add_process(c, UNKNOWN, root(c).pid, sid=child(c).pid), setattr(child(c), "sid", child(c).pid)),
    ),
    "dead root": ("has a lock of descriptor", lambda c: setattr(core(c).tc, "task_state", 2)),
    "root in a state that there is not": (
        "has a lock of descriptor",
        lambda c: setattr(core(c).tc, "task_state", 77),
    ),
    "no image of the root": ("is missing", lambda c: c.remove("core", root(c).pid)),
    "no table": ("ids-[0-9]+.img", lambda c: c.remove("ids", root(c).pid)),
    "no memory": ("is missing", lambda c: c.remove("mm", root(c).pid)),
    "no directories": ("is missing", lambda c: c.remove("fs", root(c).pid)),
}

THREAD: dict[str, tuple[str, Break]] = {
    "another machine": ("machine type 3", lambda c: setattr(core(c), "mtype", 3)),
    "no registers": ("lacks the registers", lambda c: core(c).ClearField("thread_info")),
    "half a register area": (
        "extended registers of 100 bytes",
        lambda c: setattr(core(c).thread_info, "xstate", b"x" * 100),
    ),
    "endless register area": (
        "extended registers of",
        lambda c: setattr(core(c).thread_info, "xstate", bytes(1 << 17)),
    ),
    "half a layout": ("laid out in 9", lambda c: setattr(core(c).thread_info, "xstate_layout", bytes(9))),
    "too few SSE registers": (
        "32 words of x87 and 3 of SSE",
        lambda c: (
            core(c).thread_info.ClearField("xstate"),
            core(c).thread_info.fpregs.st_space.__setitem__(slice(None), [0] * 32),
            core(c).thread_info.fpregs.xmm_space.__setitem__(slice(None), [1, 2, 3]),
        ),
    ),
    "wide control word": ("more than 16 bits", lambda c: setattr(core(c).thread_info.fpregs, "cwd", 1 << 16)),
    "segment that is the kernel's": (" registers|task", lambda c: setattr(core(c).thread_info.gpregs, "cs", 0x10)),
    "short signal": ("not 128 bytes", lambda c: signal_info(c, 12)),
    "long signal": ("not 128 bytes", lambda c: signal_info(c, 4096)),
    "signal 0 queued": ("queueing signal", lambda c: core(c).tc.signals_s.signals.add(siginfo=b"\xff" * 128)),
    "hundred signal actions": (
        "signal actions",
        lambda c: [core(c).tc.sigactions.add(sigaction=0, flags=0, restorer=0, mask=0) for _ in range(100)],
    ),
    "thirty limits": ("limits", lambda c: [core(c).tc.rlimits.rlimits.add(cur=1, max=1) for _ in range(30)]),
    "soft limit above the hard": (
        "setting the limit",
        lambda c: (setattr(core(c).tc.rlimits.rlimits[4], "max", 5), setattr(core(c).tc.rlimits.rlimits[4], "cur", 10)),
    ),
    "stopped by signal 200": ("names signal 200", lambda c: setattr(core(c).tc, "stop_signo", 200)),
    "dies by signal 77": ("names signal 77", lambda c: setattr(thread(c), "pdeath_sig", 77)),
    "sleep of 584 years": ("sleeps for", lambda c: setattr(thread(c), "remaining_ns", 1 << 63)),
    "interval timer that overflows": (
        "has an interval timer",
        lambda c: setattr(core(c).tc.timers.real, "vsec", 1 << 63),
    ),
    "interval timer with a million microseconds": (
        "has an interval timer",
        lambda c: setattr(core(c).tc.timers.prof, "iusec", 10**6),
    ),
    "POSIX timer that overflows": ("an impossible time", lambda c: setattr(core(c).tc.timers.posix[0], "isec", HUGE64)),
    "POSIX timer with a billion nanoseconds": (
        "an impossible time",
        lambda c: setattr(core(c).tc.timers.posix[0], "vnsec", 10**9),
    ),
    "POSIX timer -1": ("an impossible POSIX timer", lambda c: setattr(core(c).tc.timers.posix[0], "it_id", HUGE32)),
    "POSIX timer twice": ("or has it twice", lambda c: core(c).tc.timers.posix.append(core(c).tc.timers.posix[0])),
    "POSIX timer on a clock that there is not": (
        "timer_create",
        lambda c: setattr(core(c).tc.timers.posix[0], "clock_id", 77),
    ),
    "POSIX timer that signals 9999": ("timer_create", lambda c: setattr(core(c).tc.timers.posix[0], "si_signo", 9999)),
    "capabilities of 96 bits": ("more than 64 bits", lambda c: thread(c).creds.cap_eff.append(1)),
    "capabilities that there are not": ("lacks on this host", lambda c: thread(c).creds.cap_prm.__setitem__(1, HUGE32)),
    "ambient capabilities that are not permitted": (
        "ambient",
        lambda c: (
            thread(c).creds.cap_prm.__setitem__(slice(None), [0, 0]),
            thread(c).creds.cap_eff.__setitem__(slice(None), [0, 0]),
            thread(c).creds.cap_amb.__setitem__(slice(None), [0, 1 << 31]),
        ),
    ),
    "in seventy thousand groups": ("is in 70000 groups", lambda c: thread(c).creds.groups.extend(range(70000))),
    "more groups than fit": ("too large|setgroups", lambda c: thread(c).creds.groups.extend(range(65536))),
    "securebits that there are not": ("securebits", lambda c: setattr(thread(c).creds, "secbits", HUGE32)),
    "CPUs of 2000 bytes": ("masks of 2000 bytes", lambda c: setattr(thread(c).phaul, "affinity", b"\xff" * 2000)),
    "CPUs that are not here": (
        "none of which is here",
        lambda c: setattr(thread(c).phaul, "affinity", bytes(1000) + b"\x80"),
    ),
    "NUMA nodes of 2000 bytes": ("of NUMA nodes", lambda c: setattr(thread(c).phaul, "numa_nodes", b"\xff" * 2000)),
    "NUMA policy that there is not": ("set_mempolicy", lambda c: setattr(thread(c).phaul, "numa_policy", 77)),
    "nice as nobody": ("nice value 50", lambda c: setattr(thread(c), "sched_nice", 50)),
    "priority 1000": ("priority 1000", lambda c: setattr(thread(c), "sched_prio", 1000)),
    "scheduling policy 77": ("sched_setattr", lambda c: setattr(thread(c), "sched_policy", 77)),
    "I/O priority -1": ("ioprio_set", lambda c: setattr(thread(c).phaul, "ioprio", HUGE32)),
    "machine check policy 99": ("prctl", lambda c: setattr(thread(c).phaul, "machine_check", 99)),
    "time stamp counter 9": ("prctl", lambda c: setattr(thread(c).phaul, "tsc", 9)),
    "barriers that there are not": (
        "registering for membarrier",
        lambda c: setattr(core(c).tc, "membarrier_registration_mask", HUGE32),
    ),
    "dies at 5000": ("oom_score_adj 5000", lambda c: setattr(core(c).tc, "oom_score_adj", 5000)),
    "filter that is not there": ("refers to seccomp filter 77", lambda c: setattr(thread(c), "seccomp_filter", 77)),
    "no filters": ("seccomp.img: is missing", lambda c: c.remove("seccomp")),
    "filter of an odd size": ("filter 0 of 9 bytes", lambda c: seccomp(c, filter=bytes(9))),
    "empty filter": ("filter 0 of 0 bytes", lambda c: seccomp(c, filter=b"")),
    "filter without end": ("filter 0 of 524288 bytes", lambda c: seccomp(c, filter=bytes(1 << 19))),
    "filter that is no program": ("seccomp", lambda c: seccomp(c, filter=b"\xff" * 8)),
    "filter that hands out a listener": ("filter 0 with flags 0x8", lambda c: seccomp(c, flags=8)),
    "filter of unknown kind": ("filter 0 with flags 0x10", lambda c: seccomp(c, flags=16)),
    "filter upon itself": ("filter 0 that follows filter 0", lambda c: seccomp(c, prev=0)),
    "robust list of an odd size": ("set_robust_list", lambda c: setattr(thread(c), "futex_rla_len", 7)),
    "alternate stack in the kernel": (
        "sigaltstack",
        lambda c: (setattr(thread(c).sas, "ss_flags", 0xFF), setattr(thread(c).sas, "ss_size", 1 << 20)),
    ),
}

MEMORY: dict[str, tuple[str, Break]] = {
    "area in the kernel's half": (
        MISPLACED,
        lambda c: (setattr(mm(c).vmas[-2], "start", KERNEL_HALF), setattr(mm(c).vmas[-2], "end", KERNEL_HALF + 4096)),
    ),
    "area across the end of the program's half": (MISPLACED, lambda c: setattr(mm(c).vmas[-2], "end", 0x800000001000)),
    "area at half a page": (MISPLACED, lambda c: setattr(areas(c)[0], "start", areas(c)[0].start + 7)),
    "area upside down": (MISPLACED, lambda c: setattr(areas(c)[0], "end", areas(c)[0].start - 4096)),
    "empty area": (MISPLACED, lambda c: setattr(areas(c)[0], "end", areas(c)[0].start)),
    "areas that overlap": (MISPLACED, lambda c: grow(c, mm(c).vmas[0], mm(c).vmas[2].end - mm(c).vmas[0].start)),
    "areas out of order": (MISPLACED, lambda c: mm(c).vmas.append(mm(c).vmas[0])),
    "area of no kind": (KIND, lambda c: setattr(areas(c)[0], "status", int(Status.REGULAR))),
    "area of two kinds": (
        KIND,
        lambda c: setattr(areas(c)[0], "status", int(Status.ANON_PRIVATE | Status.ANON_SHARED)),
    ),
    "area of device memory": (
        KIND,
        lambda c: setattr(areas(c)[0], "status", int(Status.ANON_PRIVATE | Status.AIO_RING)),
    ),
    "private area that is shared": (KIND, lambda c: setattr(areas(c)[0], "flags", 0x21)),
    "anonymous area of a file": (KIND, lambda c: setattr(areas(c)[0], "flags", 0x02)),
    "file that is anonymous": (KIND, lambda c: setattr(area(c, Status.FILE_PRIVATE), "flags", 0x22)),
    "protection that there is not": ("with protection 0xff", lambda c: setattr(areas(c)[0], "prot", 0xFF)),
    "odd offset": (OFFSET, lambda c: setattr(area(c, Status.FILE_PRIVATE), "pgoff", 17)),
    "offset that wraps": (OFFSET, lambda c: setattr(area(c, Status.FILE_PRIVATE), "pgoff", HUGE64 - 4095)),
    "file that is not there": (
        "refers to file 4000000",
        lambda c: setattr(area(c, Status.FILE_PRIVATE), "shmid", UNKNOWN),
    ),
    "memory file that is none": (
        "no MEMFD of that id",
        lambda c: setattr(area(c, Status.FILE_PRIVATE), "status", area(c, Status.FILE_PRIVATE).status | Status.MEMFD),
    ),
    "shared memory that is not there": (
        "pagemap-shmem-4000000.img: is missing",
        lambda c: setattr(area(c, Status.ANON_SHARED), "shmid", UNKNOWN),
    ),
    "segment that is not there": (
        "System V shared memory 4000000",
        lambda c: setattr(area(c, Status.SYSVIPC), "shmid", UNKNOWN),
    ),
    "segment of 16 exabytes": ("has System V shared memory", lambda c: setattr(segment(c), "size", HUGE64)),
    "segment of 4 exabytes": ("cannot be made again here", lambda c: setattr(segment(c), "size", 1 << 62)),
    "segment -1": ("has System V shared memory", lambda c: setattr(segment(c).desc, "id", HUGE32)),
    "offset of 8 exabytes in shared memory": (
        "cannot be made again here",
        lambda c: setattr(area(c, Status.ANON_SHARED), "pgoff", 1 << 62),
    ),
    "areas that leave no room": (
        "leave no room",
        lambda c: (setattr(mm(c), "vmas", None) if False else None, everything(c)),
    ),
    "pages outside of the areas": (
        "not within the areas",
        lambda c: setattr(biggest(c), "end", biggest(c).start + 4096),
    ),
    "guard pages in the kernel's half": ("has guard pages", lambda c: guard(c, KERNEL_HALF, KERNEL_HALF + 4096)),
    "guard pages where nothing is": ("guard pages|lacks", lambda c: guard(c, 0x10000, 0x11000)),
    "advice that there is not": ("advise", lambda c: setattr(areas(c)[1], "madv", 1 << 31)),
    "huge pages that are not here": (
        "map |cannot",
        lambda c: (setattr(areas(c)[1], "flags", areas(c)[1].flags | 0x40000),),
    ),
    "auxiliary vector without end": ("auxiliary vector of", lambda c: mm(c).mm_saved_auxv.extend(range(1000))),
    "heap in the kernel's half": ("the bounds of memory", lambda c: setattr(mm(c), "mm_start_brk", KERNEL_HALF)),
    "code upside down": ("the bounds of memory", lambda c: setattr(mm(c), "mm_end_code", 1)),
    "dumpable as 7": ("is dumpable as 7", lambda c: setattr(mm(c), "dumpable", 7)),
    "executable that is not there": ("refers to file 4000000", lambda c: setattr(mm(c), "exe_file_id", UNKNOWN)),
    "executable that is a directory": (
        "the bounds of memory",
        lambda c: setattr(mm(c), "exe_file_id", c.one("fs", root(c).pid).cwd_id),
    ),
    "vDSO that is none": ("vDSO cannot be read", lambda c: setattr(c.one("inventory"), "phaul_vdso", b"nonsense")),
    "vDSO of a hundred kilobytes": (
        "a vDSO of 100000 bytes",
        lambda c: setattr(c.one("inventory"), "phaul_vdso", bytes(100_000)),
    ),
    "vDSO whose headers lie beyond it": ("vDSO cannot be read", lambda c: vdso_with(c, 32, HUGE64)),
    "vDSO with 65535 headers": ("vDSO cannot be read", lambda c: vdso_with(c, 54, 0xFFFFFFFF)),
    "clock of 500 billion years": ("has a clock at", lambda c: setattr(c.one("timens", 0).monotonic, "tv_sec", HUGE64)),
    "clock with a billion nanoseconds": (
        "has a clock at",
        lambda c: setattr(c.one("timens", 0).boottime, "tv_nsec", 10**9),
    ),
}


def segment(c: Checkpoint) -> Any:
    (ident,) = c.idents("ipcns-shm")
    return c.records("ipcns-shm", ident)[0].message


def biggest(c: Checkpoint) -> Any:
    return area(c, Status.HEAP)


def everything(c: Checkpoint) -> None:
    """Private memory without gaps, from the first area to the last."""
    for process in (root(c), child(c)):
        vmas = c.one("mm", process.pid).vmas
        at = 0x10000
        for one in list(vmas):
            if one.start > at and not one.status & Status.VSYSCALL:
                hole = vmas.add(start=at, end=one.start, pgoff=0, shmid=0, prot=3, flags=0x4022, fd=-1)
                hole.status = Status.REGULAR | Status.ANON_PRIVATE
            at = one.end if not one.status & Status.VSYSCALL else at
        ordered = sorted(vmas, key=lambda vma: int(vma.start))
        del vmas[:]
        vmas.extend(ordered)


def guard(c: Checkpoint, start: int, end: int) -> None:
    one = mm(c).vmas.add(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, fd=-1)
    one.status = Status.GUARD


def vdso_with(c: Checkpoint, offset: int, value: int) -> None:
    text = bytearray(c.one("inventory").phaul_vdso)
    size = 8 if value > HUGE32 else 4
    text[offset : offset + size] = value.to_bytes(size, "little")
    c.one("inventory").phaul_vdso = bytes(text)


FILES: dict[str, tuple[str, Break]] = {
    "type of another sort": ("is of type", lambda c: setattr(file(c, "pipe"), "type", fdinfo_pb2.EVENTFD)),
    "two sorts at once": ("is of type", lambda c: fill(file(c, "efd").pipe)),
    "no sort at all": ("is of type 6 and has nothing", lambda c: file(c, "efd").ClearField("efd")),
    "id that differs inside": ("holds the id 4000000", lambda c: setattr(file(c, "efd").efd, "id", UNKNOWN)),
    "sort that nobody can make": ("cannot be made again", lambda c: add_file(c, fdinfo_pb2.BPFMAP, "bpf")),
    "descriptor of nothing": (
        "refers to file 4000000",
        lambda c: c.put("fdinfo", ids(c).files_id, fdinfo_pb2.fdinfo_entry(id=UNKNOWN, flags=0, type=1, fd=99)),
    ),  # type: ignore[arg-type]
    "descriptor two billion": (
        "has descriptor 2147483647",
        lambda c: setattr(c.records("fdinfo", ids(c).files_id)[0].message, "fd", (1 << 31) - 1),
    ),
    "descriptor ten million": (
        "dup3|descriptor",
        lambda c: setattr(c.records("fdinfo", ids(c).files_id)[0].message, "fd", 10_000_000),
    ),
    "descriptor with strange flags": (
        "has flags 0x6",
        lambda c: setattr(c.records("fdinfo", ids(c).files_id)[0].message, "flags", 6),
    ),
    "directory that is not there": (
        "refers to file 4000000",
        lambda c: setattr(c.one("fs", root(c).pid), "cwd_id", UNKNOWN),
    ),
    "directory that is a file": (
        "working directory",
        lambda c: setattr(c.one("fs", root(c).pid), "cwd_id", data(c).id),
    ),
    "root that is a file": ("root directory", lambda c: setattr(c.one("fs", root(c).pid), "root_id", data(c).id)),
    "relative path": ("no absolute path", lambda c: setattr(data(c), "name", b"etc/passwd")),
    "empty path": ("no absolute path", lambda c: setattr(data(c), "name", b"")),
    "path with a zero byte": ("has a file named", lambda c: setattr(data(c), "name", b"/etc/passwd\0/x")),
    "path of five thousand bytes": ("has a file named", lambda c: setattr(data(c), "name", b"/" + b"a/" * 2500)),
    "path out of the root": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/../../../../no/such/file")),
    "path through a link of /proc": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/self/root/etc/passwd")),
    "path to a descriptor of ours": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/self/fd/0")),
    "path to our own executable": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/self/exe")),
    "path to another's directory": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/1/cwd/etc/passwd")),
    "path with a ring of links": (
        CANNOT_OPEN,
        lambda c: setattr(data(c), "name", os.path.dirname(data(c).name) + b"/ring"),
    ),
    "path through a file": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/etc/passwd/x")),
    "fifo that is said to be a file": (OTHER_TYPE, lambda c: setattr(data(c), "name", named(c, b"/fifo").name)),
    "fifo that says nothing": (
        OTHER_TYPE,
        lambda c: (
            data(c).ClearField("mode"),
            setattr(data(c), "flags", 0),
            setattr(data(c), "name", named(c, b"/fifo").name),
        ),
    ),
    "device that is said to be a file": (OTHER_TYPE, lambda c: setattr(data(c), "name", b"/dev/tty")),
    "device that says nothing": (
        OTHER_TYPE,
        lambda c: (data(c).ClearField("mode"), setattr(data(c), "name", b"/dev/tty")),
    ),
    "device with state": (OTHER_TYPE, lambda c: add_named(c, b"/dev/tty", stat.S_IFCHR | 0o666)),
    "socket that is said to be a file": (
        OTHER_TYPE,
        lambda c: setattr(data(c), "name", os.path.dirname(data(c).name) + b"/stale"),
    ),
    "file of another size": ("bytes here and had", lambda c: setattr(data(c), "size", 1 << 40)),
    "file of another mode": ("has mode", lambda c: setattr(data(c), "mode", stat.S_IFREG | 0o4777)),
    "offset of 16 exabytes": ("cannot be made again here", lambda c: setattr(data(c), "pos", HUGE64)),
    "signals for nobody": (
        "an owner of signals",
        lambda c: (setattr(data(c).fown, "pid", UNKNOWN), setattr(data(c).fown, "pid_type", 1)),
    ),
    "signals for a kind that there is not": (
        "of unknown kind 9",
        lambda c: (setattr(data(c).fown, "pid", root(c).pid), setattr(data(c).fown, "pid_type", 9)),
    ),
    "signal 1000": ("cannot be made again here", lambda c: setattr(data(c).fown, "signum", 1000)),
    "second name that is a precious file": (
        "for the time of the move",
        lambda c: linked(c, os.path.dirname(data(c).name) + b"/victim"),
    ),
    "second name through another directory": (
        "for the time of the move",
        lambda c: linked(c, b"/etc/link_remap.5/passwd"),
    ),
    "second name that is not there": (CANNOT_OPEN, lambda c: linked(c, b"/tmp/link_remap.77")),
    "two stand-ins for a file": (
        "more than once",
        lambda c: linked(c, b"/tmp/link_remap.77", 2),
    ),
    "deleted file without an image": (
        "ghost-file-63.img: is missing",
        lambda c: (ghost(c), c.remove("ghost-file", 99)),
    ),
    "deleted file with a relative path": ("no possible path", lambda c: ghost(c, path=b"tmp/x")),
    "deleted file above": ("no possible path", lambda c: ghost(c, path=b"/tmp/../etc/x")),
    "deleted file that is a directory's own entry": ("no possible path", lambda c: ghost(c, path=b"/tmp/..")),
    "deleted file below a file": ("cannot be made again here", lambda c: ghost(c, path=b"/etc/passwd/x")),
    "deleted disk": ("impossible type", lambda c: ghost(c, stat.S_IFBLK | 0o666, rdev=8 << 20)),
    "deleted physical memory": ("impossible type", lambda c: ghost(c, stat.S_IFCHR | 0o666, rdev=1 << 20 | 1)),
    "deleted socket": ("impossible type", lambda c: ghost(c, stat.S_IFSOCK | 0o666)),
    "deleted file of 16 exabytes": (
        "deleted file of 18446744073709551615 bytes",
        lambda c: ghost(c, size=HUGE64, chunks=True),
    ),
    "deleted file that the file system cannot hold": (
        "cannot be made again here",
        lambda c: ghost(c, size=(1 << 63) - 1, chunks=True),
    ),
    "piece of a deleted file that wraps": (
        "of a deleted file at",
        lambda c: (
            ghost(c, chunks=True, size=9),
            c.put("ghost-file", 99, ghost_file_pb2.ghost_chunk_entry(len=1, off=HUGE64), b"x"),
        ),
    ),
    "deleted file of the year 10^12": (
        "of the time",
        lambda c: (
            ghost(c),
            setattr(fill(c.one("ghost-file", 99).mtim), "tv_sec", HUGE64),
            fill(c.one("ghost-file", 99).atim),
        ),
    ),
    "deleted link without end": (
        "deleted file of",
        lambda c: ghost(c, stat.S_IFLNK | 0o777, symlnk_target=b"x" * 5000),
    ),
    "carried file on a disk": ("is no tmpfs here", lambda c: carried(c, b"/etc/phaul-hostile")),
    "carried file with a relative path": ("no absolute path", lambda c: carried(c, b"dev/shm/x")),
    "carried file above": ("no absolute path|cannot make|no tmpfs", lambda c: carried(c, b"/dev/shm/..")),
    "carried file where one is": ("exists here", lambda c: carried(c, b"/dev/shm/phaul-hostile-victim")),
    "memory file without an inode": (
        "refers to inode 4000000",
        lambda c: setattr(file(c, "memfd").memfd, "inode_id", UNKNOWN),
    ),
    "memory file of 16 exabytes": ("has memory file", lambda c: setattr(memory(c), "size", HUGE64)),
    "memory file with a long name": ("an impossible name", lambda c: setattr(memory(c), "name", b"n" * 300)),
    "memory file with seals that there are not": ("an impossible name", lambda c: setattr(memory(c), "seals", 0x1000)),
    "memory file with flags of others": ("with flags 0x7", lambda c: setattr(memory(c), "hugetlb_flag", 7)),
    "memory file with pages that there are not": (
        "cannot be made again here",
        lambda c: setattr(memory(c), "hugetlb_flag", 63 << 26),
    ),
    "lock of an unknown kind": ("unknown kind", lambda c: lock(c, flag=4096)),
    "lock of an impossible type": ("impossible file lock", lambda c: lock(c, type=9)),
    "lock before the beginning": ("impossible file lock", lambda c: lock(c, start=-5)),
    "lock of a descriptor that is not there": ("which is not there", lambda c: lock(c, fd=900)),
    "lock of a process that is not there": ("which is not there", lambda c: lock(c, pid=UNKNOWN)),
    "lock that wraps": ("lock fd", lambda c: lock(c, start=(1 << 63) - 1, len=(1 << 63) - 1)),
    "version of the future": ("version 9", lambda c: setattr(c.one("inventory"), "img_version", 9)),
    "layout of the past": ("out of use", lambda c: c.one("inventory").ClearField("fdinfo_per_id")),
}

OBJECTS: dict[str, tuple[str, Break]] = {
    "pipe that is over-full": ("cannot be made again here|holds less", lambda c: overfull(c)),
    "pipe of four gigabytes": ("has pipe .* of 4294967295 bytes", lambda c: setattr(pipe_data(c), "size", HUGE32)),
    "pipe of two gigabytes": ("cannot make a pipe", lambda c: setattr(pipe_data(c), "size", 1 << 31)),
    "packets that do not add up": ("do not add up", lambda c: pipe_data(c).phaul_packets.extend([1, 2])),
    "empty packet": ("empty packets", lambda c: pipe_data(c).phaul_packets.extend([11, 0])),
    "data of no pipe": ("which nobody has open", lambda c: setattr(pipe_data(c), "pipe_id", UNKNOWN)),
    "fifo that is a file": (OTHER_TYPE, lambda c: setattr(file(c, "fifo").fifo, "regf_id", data(c).id)),
    "fifo that is a device": (OTHER_TYPE, lambda c: (setattr(named(c, b"/fifo"), "name", b"/dev/null"),)),
    "fifo without a name": ("refers to file 4000000", lambda c: setattr(file(c, "fifo").fifo, "regf_id", UNKNOWN)),
    "counter beyond its limit": ("impossible counter", lambda c: setattr(file(c, "efd").efd, "counter", HUGE64)),
    "timer on no clock": ("unknown clock 77", lambda c: setattr(file(c, "tfd").tfd, "clockid", 77)),
    "timer that overflows": ("impossible time", lambda c: setattr(file(c, "tfd").tfd, "vsec", HUGE64)),
    "timer with a billion nanoseconds": ("impossible time", lambda c: setattr(file(c, "tfd").tfd, "insec", 10**9)),
    "epoll that watches nothing": ("no file 4000000", lambda c: watch(c, 60, UNKNOWN)),
    "epoll that watches itself": ("cannot be made again here", lambda c: watch(c, 60, epolls(c)[0].id)),
    "epolls that watch each other": ("cannot be made again here", watch_each_other),
    "epoll that watches a file": ("cannot be made again here", lambda c: watch(c, 60, data(c).id)),
    "epoll that watches descriptor two billion": (
        "watches descriptor 2000000000",
        lambda c: watch(c, 2_000_000_000, data(c).id),
    ),
    "epoll that watches twice": (
        "watches 60 twice",
        lambda c: (watch(c, 60, file(c, "efd").id), watch(c, 60, file(c, "efd").id)),
    ),
    "inotify watch 0": ("with watch number", lambda c: setattr(inotify(c).wd[0], "wd", 0)),
    "inotify watch two billion": (
        "with watch number 2000000000",
        lambda c: setattr(inotify(c).wd[0], "wd", 2_000_000_000),
    ),
    "inotify watch twice": ("impossible watch number", lambda c: inotify(c).wd.append(inotify(c).wd[0])),
    "inotify watches beyond patience": (
        "to be counted through",
        lambda c: [inotify_instance(c, number) for number in range(3)],
    ),
    "inotify watch without a path": ("tells no path", lambda c: inotify(c).wd[0].f_handle.ClearField("path")),
    "inotify watch of nothing": (CANNOT_OPEN, lambda c: setattr(inotify(c).wd[0].f_handle, "path", b"no/such/file")),
    "inotify watch through a link of /proc": (
        CANNOT_OPEN,
        lambda c: setattr(inotify(c).wd[0].f_handle, "path", b"proc/self/root/tmp"),
    ),
    "inotify watch of no event": ("cannot be made again here", lambda c: setattr(inotify(c).wd[0], "mask", 0)),
    "pid descriptor of a stranger": ("which is not there", lambda c: setattr(file(c, "pidfd").pidfd, "nspid", 1)),
    "pid descriptor of process -5": ("which is not there", lambda c: setattr(file(c, "pidfd").pidfd, "nspid", -5)),
    "terminal that is not there": (
        "not in tty-info.img",
        lambda c: add_file(c, fdinfo_pb2.TTY, "tty", tty_info_id=UNKNOWN),
    ),
}


def pipe_data(c: Checkpoint) -> Any:
    return c.records("pipes-data")[0].message


def overfull(c: Checkpoint) -> None:
    record = c.records("pipes-data")[0]
    record.payload = bytes(1 << 20)
    record.message.bytes, record.message.size = 1 << 20, 65536


def inotify_instance(c: Checkpoint, number: int) -> None:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.INOTIFY, id=9100 + number)
    entry.ify.CopyFrom(inotify(c))
    entry.ify.id, entry.ify.wd[0].wd = 9100 + number, 1 << 19
    c.put("files", None, entry)


SOCKETS: dict[str, tuple[str, Break]] = {
    "unix socket of type 77": ("unix socket .* of type 77", lambda c: setattr(unix(c), "type", 77)),
    "unix socket in state 55": ("in state 55", lambda c: setattr(unix(c), "state", 55)),
    "unix socket with a long name": ("with the name", lambda c: setattr(unix(c), "name", b"/" + b"n" * 200)),
    "unix socket with a zero byte in its path": ("with the name", lambda c: setattr(unix(c), "name", b"/tmp/a\0b")),
    "unix socket at a long path": (
        "has a unix socket named",
        lambda c: setattr(unix(c), "phaul_path", b"/" + b"p/" * 3000),
    ),
    "unix socket where nothing can be": (
        "cannot bind",
        lambda c: setattr(unix(c), "phaul_path", b"/etc/passwd/socket"),
    ),
    "unix socket in place of a file": (
        "is no socket here",
        lambda c: setattr(unix(c), "phaul_path", os.path.dirname(data(c).name) + b"/victim"),
    ),
    "unix socket in place of a directory": ("is no socket here", lambda c: setattr(unix(c), "phaul_path", b"/etc")),
    "unix socket without a peer": ("is not in the checkpoint", lambda c: setattr(pair(c), "peer", UNKNOWN)),
    "unix sockets that wait at each other": ("needs another file that needs it", wait_at_each_other),
    "unix socket that waits at itself": (
        "needs another file that needs it",
        lambda c: (
            setattr(pair(c), "phaul_waits_at", pair(c).ino),
            setattr(unix(c, lambda usk: usk.peer == pair(c).ino), "phaul_waits_at", unix(c).ino),
        ),
    ),
    "unix socket that waits nowhere": ("waits at a listener", lambda c: setattr(pair(c), "phaul_waits_at", UNKNOWN)),
    "unix socket shut down in no direction": ("", lambda c: None),
    "message with a descriptor that is not there": (
        "carries file 4000000",
        lambda c: packet(c).scm[0].rights.append(UNKNOWN),
    ),
    "message with 300 descriptors": (
        "a message with 300 descriptors",
        lambda c: packet(c).scm[0].rights.extend([file(c, "efd").id] * 299),
    ),
    "message from a long address": (
        "from an address of 500 bytes",
        lambda c: setattr(packet(c), "phaul_address", b"a" * 500),
    ),
    "message for nobody": ("which nobody has open", lambda c: setattr(packet(c), "id_for", UNKNOWN)),
    "option that replaces the packet filter": ("none that is carried", lambda c: option(c, 0, 64, bytes(100))),
    "option that attaches a BPF program": ("none that is carried", lambda c: option(c, 1, 50, bytes(4))),
    "option of repair mode": ("none that is carried", lambda c: option(c, 6, 19, b"\1\0\0\0")),
    "option with a long value": ("none that is carried", lambda c: option(c, 1, 7, bytes(5000))),
    "group to join with a short value": (
        "cannot be made again here",
        lambda c: datagrams(c).opts.phaul_options.add(level=0, name=42, value=b"lo"),
    ),
    "filter of a hundred thousand instructions": (
        "a filter of 100000 instructions",
        lambda c: datagrams(c).opts.so_filter.extend([6] * 100_000),
    ),
    "interface that is not here": ("cannot be set", lambda c: setattr(listener(c).opts, "so_bound_dev", "nowhere0")),
    "linger beyond all times": (
        "cannot be made again here|impossible",
        lambda c: setattr(listener(c).opts, "so_linger", HUGE32),
    ),
    "time-out beyond all times": (
        "cannot be made again here|impossible",
        lambda c: setattr(listener(c).opts, "so_rcv_tmo_sec", HUGE64),
    ),
    "socket of family 99": ("of family 99", lambda c: setattr(listener(c), "family", 99)),
    "socket of type 77": ("type 77", lambda c: setattr(listener(c), "type", 77)),
    "socket in state 99": ("in state 99", lambda c: setattr(listener(c), "state", 99)),
    "socket in state 6": ("no TCP stream|in state 6", lambda c: setattr(listener(c), "state", 6)),
    "socket with three words of address": ("addresses of 3", lambda c: listener(c).src_addr.extend([0, 0])),
    "socket at port 70000": ("ports 70000", lambda c: setattr(listener(c), "src_port", 70_000)),
    "socket with a backlog of -1": ("in state 10", lambda c: setattr(listener(c), "backlog", HUGE32)),
    "connection without a stream": ("tcp-stream-[0-9a-f]+.img: is missing", lambda c: setattr(listener(c), "state", 1)),
    "connection with a stream of nonsense": ("cannot rebuild the connection|cannot be made", lambda c: nonsense(c)),
    "datagrams of protocol 250": ("cannot be made again here", lambda c: setattr(datagrams(c), "proto", 250)),
}


def nonsense(c: Checkpoint) -> None:
    one = listener(c)
    one.state = 1
    stream = tcp_stream_pb2.tcp_stream_entry(
        inq_len=0, inq_seq=1, outq_len=0, outq_seq=1, opt_mask=HUGE32, snd_wscale=HUGE32, mss_clamp=0, rcv_wscale=99
    )
    c.put("tcp-stream", one.ino, stream)


del SOCKETS["unix socket shut down in no direction"]
ALL = {"tree": TREE, "thread": THREAD, "memory": MEMORY, "files": FILES, "objects": OBJECTS, "sockets": SOCKETS}


def cases() -> Iterator[tuple[str, str, Break]]:
    """Name, what it is refused with (a pattern), and what makes it."""
    for group, some in ALL.items():
        for name, (refusal, make) in some.items():
            yield f"{group}: {name}", refusal, make
