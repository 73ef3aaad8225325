"""What images may ask for: every number in them is bounded before anything is made of it.

Images may come from a stranger, and a migration's come from the other host. Here stands what no program has, on any
kernel: a process with the number 0, an area in the kernel's half, a terabyte of groups. What a program may have is for
others to say: the host (its limits), and its policy.

Each record is looked at by itself, so that in a freeze only those are looked at that have changed; how records refer to
each other is for `verify.check`. Limits are the kernel's own where it has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.kinds import Ident
from phaul_engine.images.pages import PAGE_SIZE
from phaul_engine.images.vma import Status

MAX_PID = 1 << 22  # PID_MAX_LIMIT (include/linux/threads.h)
MAX_THREADS = 1 << 15  # of a whole tree
MAX_DEPTH = 256  # generations of a tree
MAX_WATCHES = 1 << 20  # watch numbers of inotify instances: all up to the highest of each are counted through
MAX_NUMBER = 1 << 24  # of a descriptor; the host's RLIMIT_NOFILE is lower
TASK_TOP = 0x7FFFFFFFF000  # TASK_SIZE_MAX of x86-64 with four levels of page tables
_SIGNED = 1 << 63
_SECOND = 1_000_000_000
_SIGNALS = 64
_SIGINFO = 128
_GROUPS = 1 << 16  # NGROUPS_MAX
_AUXV = 128  # words; AT_VECTOR_SIZE is less than half of it
_XSTATE = 1 << 16  # bytes; with AMX it is 11 KiB
_CPU_BYTES, _NODE_BYTES = 1024, 128
_RLIMITS = 16  # RLIM_NLIMITS
_INSTRUCTION, _INSTRUCTIONS = 8, 4096  # struct sock_filter; BPF_MAXINSNS
_FILTER_FLAGS = 0x1 | 0x2 | 0x4  # TSYNC, which CRIU notes and nobody follows; LOG, SPEC_ALLOW
_PATH, _UNIX_NAME, _RIGHTS = 4096, 108, 253
_PIPE = 1 << 31
_VDSO = 1 << 16
_UNIX_TYPES, _UNIX_STATES = (1, 2, 5), (0, 1, 2, 3, 7, 10)
_KINDS = int(Status.ANON_PRIVATE | Status.ANON_SHARED | Status.FILE_PRIVATE | Status.FILE_SHARED)
_SHARING = int(Status.ANON_SHARED | Status.FILE_SHARED)
_ANONYMOUS = int(Status.ANON_PRIVATE | Status.ANON_SHARED)
_SPECIAL = int(Status.VDSO | Status.VVAR)
_GUARD, _PLACELESS = int(Status.GUARD), int(Status.GUARD | Status.VSYSCALL)
_SEGMENT = int(Status.SYSVIPC)
_UNCARRIED = int(Status.SOCKET | Status.AIO_RING | Status.SHADOW_STACK | Status.UPROBES)
_MAP_SHARED, _MAP_TYPE, _MAP_ANONYMOUS = 0x1, 0xF, 0x20


def require(checkpoint: Checkpoint, before: Checkpoint | None = None) -> None:
    """ImageError unless all records can be. Those that `before` has too were looked at then."""
    problems = list(itertools.islice(wrong(checkpoint, before), 8))
    if problems:
        raise ImageError(
            "\n".join(f"{stem}{'' if ident is None else f'-{ident}'}.img {text}" for stem, ident, text in problems)
        )


def rehearse(checkpoint: Checkpoint, tids: Iterable[int]) -> None:
    """Look once more at some of the records that will have changed, to no effect: the next time takes less."""
    for tid in tids:
        list(_core(checkpoint.one("core", tid)))


def wrong(checkpoint: Checkpoint, before: Checkpoint | None = None) -> Iterator[tuple[str, Ident, str]]:
    """What records ask for that cannot be, in words, each with its file; `before` as for `require`."""
    for stem, ident in checkpoint.files():
        if stem not in _JUDGES:
            continue
        records = checkpoint.share(stem, ident) or []
        known = (before.share(stem, ident) if before is not None else None) or []
        if records is known:
            continue
        for record, earlier in itertools.zip_longest(records, known[: len(records)]):
            if record is not earlier:
                for problem in _JUDGES[stem](record.message):
                    yield stem, ident, problem


# -- processes and threads -----------------------------------------------------------------------------------------


def _pstree(process: Any) -> Iterator[str]:
    ended = list(process.threads) == [0]  # as CRIU lists it
    for number in (process.pid, *(() if ended else process.threads)):
        if not 0 < number <= MAX_PID:
            yield f"has a task with the number {number}"
    for number in (process.ppid, process.pgid, process.sid):  # 0: not of this pid namespace
        if number > MAX_PID:
            yield f"has process {process.pid} with parent {process.ppid}, group {process.pgid}, session {process.sid}"
    for name in process.phaul_numbers:
        if not name.below or not all(0 < number <= MAX_PID for number in (name.number, *name.below)):
            yield f"calls task {name.number} {list(name.below)} in pid namespaces below the first process's"


def _core(core: Any) -> Iterator[str]:
    thread, task, info = core.thread_core, core.tc, core.thread_info
    yield from _extended(info)
    yield from _credentials(thread.creds)
    yield from _scheduling(thread)
    yield from _timers(task.timers)
    queues = (*task.signals_s.signals, *thread.signals_p.signals)
    if any(len(one.siginfo) != _SIGINFO for one in queues):
        yield f"has a queued signal that is not {_SIGINFO} bytes long"
    if thread.remaining_ns >= _SIGNED:
        yield f"has a thread that sleeps for {thread.remaining_ns} ns"
    if max(task.stop_signo, thread.pdeath_sig) > _SIGNALS:
        yield f"names signal {max(task.stop_signo, thread.pdeath_sig)}"
    if len(task.sigactions) > _SIGNALS or len(task.rlimits.rlimits) > _RLIMITS:
        yield f"has {len(task.sigactions)} signal actions and {len(task.rlimits.rlimits)} limits"


def _extended(info: Any) -> Iterator[str]:
    fp = info.fpregs
    if len(info.xstate) > _XSTATE or 0 < len(info.xstate) < 512 or len(info.xstate_layout) % 8:
        yield f"has extended registers of {len(info.xstate)} bytes, laid out in {len(info.xstate_layout)}"
    elif not info.xstate and (len(fp.st_space) not in (0, 32) or len(fp.xmm_space) not in (0, 64)):
        yield f"has {len(fp.st_space)} words of x87 and {len(fp.xmm_space)} of SSE registers"
    if max(fp.cwd, fp.swd, fp.twd, fp.fop) > 0xFFFF:
        yield "has x87 control words of more than 16 bits"


def _credentials(creds: Any) -> Iterator[str]:
    sets = (creds.cap_inh, creds.cap_prm, creds.cap_eff, creds.cap_bnd, creds.cap_amb)
    if any(len(words) > 2 for words in sets):
        yield "has capabilities of more than 64 bits"
    if len(creds.groups) > _GROUPS:
        yield f"is in {len(creds.groups)} groups"


def _scheduling(thread: Any) -> Iterator[str]:
    own = thread.phaul
    if len(own.affinity) > _CPU_BYTES or len(own.numa_nodes) > _NODE_BYTES:
        yield f"has masks of {len(own.affinity)} bytes of CPUs and {len(own.numa_nodes)} of NUMA nodes"
    if not -20 <= thread.sched_nice <= 19 or thread.sched_prio > 99:
        yield f"has the nice value {thread.sched_nice} and the priority {thread.sched_prio}"


def _timers(timers: Any) -> Iterator[str]:
    for timer in (timers.real, timers.virt, timers.prof):
        if max(timer.isec, timer.vsec) >= _SIGNED or max(timer.iusec, timer.vusec) >= 1_000_000:
            yield f"has an interval timer of {timer.vsec}.{timer.vusec:06} s, {timer.isec}.{timer.iusec:06} s"
    seen: set[int] = set()
    for timer in timers.posix:
        if max(timer.isec, timer.vsec) >= _SIGNED or max(timer.insec, timer.vnsec) >= _SECOND:
            yield f"has POSIX timer {timer.it_id} with an impossible time"
        if timer.it_id >= 1 << 31 or timer.it_id in seen or max(timer.si_signo, timer.it_sigev_notify) >= 1 << 31:
            yield f"has an impossible POSIX timer {timer.it_id}, or has it twice"
        seen.add(timer.it_id)


def _seccomp(entry: Any) -> Iterator[str]:
    for index, one in enumerate(entry.seccomp_filters):
        count, rest = divmod(len(one.filter), _INSTRUCTION)
        if rest or not 0 < count <= _INSTRUCTIONS:
            yield f"has filter {index} of {len(one.filter)} bytes"
        if one.flags & ~_FILTER_FLAGS:
            yield f"has filter {index} with flags {one.flags:#x}"
        if one.HasField("prev") and one.prev >= index:
            yield f"has filter {index} that follows filter {one.prev}"


# -- memory ----------------------------------------------------------------------------------------------------------


def _mm(mm: Any) -> Iterator[str]:
    if len(mm.mm_saved_auxv) > _AUXV:
        yield f"has an auxiliary vector of {len(mm.mm_saved_auxv)} words"
    if not 0 <= mm.dumpable <= 2:
        yield f"is dumpable as {mm.dumpable}"
    end = 0
    for area in mm.vmas:
        if area.status & _PLACELESS:  # the kernel's own page; within other areas
            if area.status & _GUARD and not 0 < area.start < area.end <= TASK_TOP:
                yield f"has guard pages at {area.start:#x}-{area.end:#x}"
            continue
        if area.start < end or not area.start < area.end <= TASK_TOP or (area.start | area.end) % PAGE_SIZE:
            yield f"has the area {area.start:#x}-{area.end:#x}, which is misplaced"
        end = max(end, area.end)
        yield from _area(area)


def _area(area: Any) -> Iterator[str]:
    status, where = area.status, f"has the area {area.start:#x}-{area.end:#x}"
    if status & _UNCARRIED or (status & _KINDS).bit_count() != 1:
        yield f"{where} of an unknown kind {status:#x}"
        return
    if area.prot > 7:
        yield f"{where} with protection {area.prot:#x}"
    if bool(status & _SHARING) != (area.flags & _MAP_TYPE in (_MAP_SHARED, 0x3)):
        yield f"{where} with flags {area.flags:#x}, which are not of its kind {status:#x}"
    if bool(status & _ANONYMOUS) != bool(area.flags & _MAP_ANONYMOUS) and not status & (_SPECIAL | _SEGMENT):
        yield f"{where} with flags {area.flags:#x}, which are not of its kind {status:#x}"
    if area.pgoff % PAGE_SIZE or area.pgoff + area.end - area.start >= _SIGNED:
        yield f"{where} at offset {area.pgoff:#x}"


def _memfd(inode: Any) -> Iterator[str]:
    if inode.size >= _SIGNED or len(inode.phaul_path) > _PATH:
        yield f"has memory file {inode.inode_id} of {inode.size} bytes"
    if inode.hugetlb_flag & ~(0x3F << 26):
        yield f"has memory file {inode.inode_id} with flags {inode.hugetlb_flag:#x}"


def _segment(entry: Any) -> Iterator[str]:
    if entry.size >= _SIGNED or entry.desc.id >= 1 << 31:
        yield f"has System V shared memory {entry.desc.id} of {entry.size} bytes"


def _timens(entry: Any) -> Iterator[str]:
    for clock in (entry.monotonic, entry.boottime):
        if clock.tv_sec >= _SIGNED // _SECOND or clock.tv_nsec >= _SECOND:
            yield f"has a clock at {clock.tv_sec}.{clock.tv_nsec:09} s"


def _inventory(entry: Any) -> Iterator[str]:
    if len(entry.phaul_vdso) > _VDSO:
        yield f"has a vDSO of {len(entry.phaul_vdso)} bytes"


# -- files -----------------------------------------------------------------------------------------------------------


def _fdinfo(entry: Any) -> Iterator[str]:
    if entry.fd >= MAX_NUMBER:
        yield f"has descriptor {entry.fd}"


def _files(entry: Any) -> Iterator[str]:
    yield from _path("file", entry.reg.name)
    if entry.HasField("usk"):
        yield from _unix(entry.usk)
    if entry.HasField("isk"):
        yield from _inet(entry.isk)
    if entry.HasField("epfd") and any(one.tfd >= MAX_NUMBER for one in entry.epfd.tfd):
        yield f"has epoll instance {entry.id} that watches descriptor {max(one.tfd for one in entry.epfd.tfd)}"
    if entry.HasField("ify"):
        numbers = [watch.wd for watch in entry.ify.wd]
        if numbers and not 0 < min(numbers) <= max(numbers) <= MAX_WATCHES:
            yield f"has inotify instance {entry.id} with watch number {max(numbers)}"


def _unix(usk: Any) -> Iterator[str]:
    if usk.type not in _UNIX_TYPES or usk.state not in _UNIX_STATES or usk.backlog >= 1 << 31:
        yield f"has unix socket {usk.id} of type {usk.type} in state {usk.state} with a backlog of {usk.backlog}"
    for name in (usk.name, usk.phaul_peer_name):
        plain = name.rstrip(b"\0")  # sock_diag, and so the image, ends a path with a zero byte
        if len(plain) > _UNIX_NAME or (name[:1] != b"\0" and b"\0" in plain):
            yield f"has unix socket {usk.id} with the name {name[:120]!r}"
    for path in (usk.phaul_path, usk.name_dir):
        yield from _path("unix socket", path)
    yield from _options(usk.opts)


def _inet(isk: Any) -> Iterator[str]:
    words = {2: 1, 10: 4}.get(isk.family)
    if words is None or isk.type not in (1, 2, 3) or not 0 < isk.state <= 12 or isk.backlog >= 1 << 31:
        yield f"has socket {isk.id} of family {isk.family}, type {isk.type}, in state {isk.state}"
        return
    if any(len(address) not in (0, words) for address in (isk.src_addr, isk.dst_addr)):
        yield f"has socket {isk.id} with addresses of {len(isk.src_addr)} and {len(isk.dst_addr)} words"
    if max(isk.src_port, isk.dst_port) > 0xFFFF:
        yield f"has socket {isk.id} with ports {isk.src_port} and {isk.dst_port}"
    yield from _options(isk.opts)


def _options(opts: Any) -> Iterator[str]:
    if len(opts.so_filter) > _INSTRUCTIONS:
        yield f"has a socket with a filter of {len(opts.so_filter)} instructions"


def _path(what: str, path: bytes) -> Iterator[str]:
    if len(path) >= _PATH or b"\0" in path:
        yield f"has a {what} named {path[:120]!r}"


def _packet(packet: Any) -> Iterator[str]:
    rights = sum(len(scm.rights) for scm in packet.scm)
    if rights > _RIGHTS or len(packet.phaul_address) > _UNIX_NAME + 2:
        yield f"has a message with {rights} descriptors from an address of {len(packet.phaul_address)} bytes"


def _pipe_data(entry: Any) -> Iterator[str]:
    if entry.size > _PIPE or any(not size for size in entry.phaul_packets):
        yield f"has pipe {entry.pipe_id} of {entry.size} bytes, or with empty packets"


def _ghost(entry: Any) -> Iterator[str]:
    if entry.DESCRIPTOR.name == "ghost_chunk_entry":
        if entry.off + entry.len >= _SIGNED:
            yield f"has {entry.len} bytes of a deleted file at {entry.off}"
        return
    if entry.size >= _SIGNED or len(entry.symlnk_target) >= _PATH or b"\0" in entry.symlnk_target:
        yield f"has a deleted file of {entry.size} bytes"
    for time in (entry.atim, entry.mtim):
        if time.tv_sec >= _SIGNED // _SECOND or time.tv_usec >= 1_000_000:
            yield f"has a deleted file of the time {time.tv_sec}.{time.tv_usec:06} s"


_JUDGES: dict[str, Callable[[Any], Iterable[str]]] = {
    "inventory": _inventory,
    "pstree": _pstree,
    "core": _core,
    "seccomp": _seccomp,
    "mm": _mm,
    "memfd": _memfd,
    "ipcns-shm": _segment,
    "timens": _timens,
    "fdinfo": _fdinfo,
    "files": _files,
    "sk-queues": _packet,
    "pipes-data": _pipe_data,
    "fifo-data": _pipe_data,
    "ghost-file": _ghost,
}
