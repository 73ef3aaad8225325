"""Programs collected, killed, and made again as skeletons on this same host, with their memory copied by hand."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phaul_engine.collect import Collector
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.objects.address_space import Status
from phaul_engine.skeleton import Skeleton
from phaul_engine.target import Tracer, Tree, stop_tree

_PAGE = 4096
_PR_SET_CHILD_SUBREAPER = 36
_WALL = 0x40000000


def private_pages(pid: int, checkpoint: Checkpoint) -> list[tuple[int, bytes]]:
    """Address and content of each page of a process that is its own."""
    pages = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem, open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for vma in checkpoint.one("mm", pid).vmas:
            if vma.status & (Status.ANON_PRIVATE | Status.FILE_PRIVATE) and not vma.status & (
                Status.VDSO | Status.VVAR
            ):
                pagemap.seek(vma.start // _PAGE * 8)
                words = pagemap.read((vma.end - vma.start) // _PAGE * 8)
                for index in range(len(words) // 8):
                    word = int.from_bytes(words[8 * index : 8 * index + 8], "little")
                    if word >> 63 and not word >> 61 & 1:  # present, and not the file's
                        mem.seek(vma.start + _PAGE * index)
                        pages.append((vma.start + _PAGE * index, mem.read(_PAGE)))
    return pages


def collect(tree: Tree, pid: int) -> tuple[Checkpoint, list[tuple[int, bytes]]]:
    """Images and pages of a stopped program that nothing stands in the way of."""
    with Collector() as collector:
        collection = collector.collect(tree, survey=False)
    assert collection.blockers == []
    return collection.checkpoint, private_pages(pid, collection.checkpoint)


def fill(pid: int, pages: list[tuple[int, bytes]]) -> None:
    """Put pages into a skeleton."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as mem:
        for address, content in pages:
            mem.seek(address)
            mem.write(content)


def take(program: subprocess.Popen[bytes]) -> tuple[Checkpoint, list[tuple[int, bytes]]]:
    """Collect a running program and kill it."""
    with Tracer() as tracer, stop_tree(tracer, program.pid, timeout_ms=1000) as tree:
        taken = collect(tree, program.pid)
        program.kill()
    program.wait()
    return taken


def remake(pid: int, checkpoint: Checkpoint, pages: list[tuple[int, bytes]]) -> None:
    """Make a program of one process again, and let it go."""
    with Tracer() as tracer, Skeleton(tracer, checkpoint) as skeleton:
        skeleton.build()
        fill(pid, pages)
        skeleton.protect()
        skeleton.finish(checkpoint)
        skeleton.release()


@dataclass
class Copy:
    """A tree's images, and the memory of its processes, by pid, and of shared objects, by id."""

    checkpoint: Checkpoint
    private: dict[int, list[tuple[int, bytes]]]
    shared: dict[int, bytes]


def copy(tree: Tree, collector: Collector) -> Copy:
    """Images and memory of a stopped tree that nothing stands in the way of."""
    collection = collector.collect(tree, survey=False)
    judge = collector.collect(tree, survey=True)
    assert [str(blocker) for blocker in (*collection.blockers, *judge.blockers)] == []
    checkpoint = Checkpoint.from_bytes(collection.checkpoint.to_bytes())
    private, shared = {}, {}
    for pid in checkpoint.idents("mm"):
        assert isinstance(pid, int)
        private[pid] = private_pages(pid, checkpoint)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
            for vma in checkpoint.one("mm", pid).vmas:
                if vma.status & Status.ANON_SHARED:
                    mem.seek(vma.start)
                    shared[vma.shmid] = mem.read(vma.end - vma.start)
    return Copy(checkpoint, private, shared)


def kill_tree(tree: Tree) -> None:
    """End all processes of a stopped tree, and take them from the table, so that their numbers are free."""
    tids = [thread.tid for process in tree.processes.values() for thread in process.threads]
    for pid in tree.processes:
        os.kill(pid, signal.SIGKILL)
    tree.let_go()
    reap(tids)


def reap(tids: list[int]) -> None:
    """Wait for processes that come to us one after the other (`adopting` must be on), and for threads that we trace."""
    deadline = time.monotonic() + 5
    left = set(tids)
    while left:
        assert time.monotonic() < deadline, f"{left} do not go away"
        for tid in list(left):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(tid, os.WNOHANG | _WALL)  # as its tracer first, then as its parent
            if not os.path.exists(f"/proc/{tid}"):
                left.discard(tid)
        time.sleep(0.01)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Orphans below us become our children meanwhile (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def fill_tree(skeleton: Skeleton, memory: Copy, pids: Iterable[int] | None = None) -> None:
    """Put all memory into a skeleton, or that of some processes."""
    known = skeleton.pids()
    for pid in memory.private if pids is None else pids:
        fill(known[pid], memory.private[pid])
    for shmid, fd in skeleton.shared.descriptors().items():
        os.pwrite(fd, memory.shared[shmid], 0)


def remake_tree(memory: Copy) -> None:
    """Make a tree again, and let it go."""
    with Tracer() as tracer, Skeleton(tracer, memory.checkpoint) as skeleton:
        skeleton.build()
        fill_tree(skeleton, memory)
        skeleton.protect()
        skeleton.finish(memory.checkpoint)
        skeleton.release()
