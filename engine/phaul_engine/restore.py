"""Images on disk to a running tree: the same skeleton as a migration's, with files as its page source."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import vdso
from .births import Task
from .clocks import Clocks, machine_clocks
from .errors import ImageError
from .images.checkpoint import Checkpoint
from .images.directory import ImageDirectory
from .images.pages import Extent, PageImages
from .images.verify import verify
from .memory.extents import Extents, Place
from .memory.files import Piece, fill_pages
from .network import criu_lock, lock
from .objects import memfd, sysv_shm, tcp
from .skeleton import Skeleton
from .target import Tracer

_SECOND = 1_000_000_000


def restore(
    tracer: Tracer,
    directory: ImageDirectory,
    *,
    options: dict[str, Any] | None = None,
    ready: Callable[[int], None] = lambda pid: None,
) -> int:
    """Make the tree again and let it run; returns its root's pid, a child of ours.

    `ready` is called with that pid when everything is there and nothing runs yet. If it fails, or anything before,
    nothing is left. With the option `tcp` "close", connections come back as ended ones.
    """
    problems = verify(directory)
    if problems:
        raise ImageError("\n".join(map(str, problems)), advice="phaul images verify tells the same")
    checkpoint = Checkpoint.load(directory, pagemaps=False)
    if not checkpoint.has("pstree"):
        raise ImageError(
            f"{directory.label} holds the pages of a pre-dump only", advice="restore the images of the dump after it"
        )
    if options and options.get("tcp") == "close":
        tcp.close_connections(checkpoint)
    _note_vdso(directory, checkpoint)
    with Skeleton(tracer, checkpoint, clocks=_clocks(checkpoint), options=options) as skeleton:
        with PageImages(directory) as pages:
            skeleton.build(functools.partial(_fill, skeleton, pages))
            _fill_objects(skeleton, pages)
        skeleton.protect()
        skeleton.finish(checkpoint)
        sysv_shm.condemn(checkpoint)
        root = skeleton.pids()[checkpoint.records("pstree")[0].message.pid]
        ready(root)
        lock.lift(checkpoint)
        criu_lock.lift(checkpoint)
        skeleton.release()
    return root


def _note_vdso(directory: ImageDirectory, checkpoint: Checkpoint) -> None:
    """CRIU's images hold the vDSO among the pages only."""
    inventory = checkpoint.one("inventory")
    if inventory.phaul_vdso:
        return
    with PageImages(directory) as pages:
        for ident in checkpoint.idents("mm"):
            vmas = checkpoint.one("mm", ident).vmas
            code = vdso.stored_code(vmas, list(pages.extents("pagemap", ident))) if pages.has("pagemap", ident) else b""
            if code:
                inventory.phaul_vdso = code
                return


def _clocks(checkpoint: Checkpoint) -> Clocks | None:
    """How far the tree's clocks have to be ahead of this machine's, to go on from the dump."""
    (ident, *_) = checkpoint.idents("timens") or [None]
    if ident is None:
        return None
    saved = checkpoint.one("timens", ident)
    then = Clocks(*(one.tv_sec * _SECOND + one.tv_nsec for one in (saved.monotonic, saved.boottime)))
    return then.minus(machine_clocks())


def _fill(skeleton: Skeleton, pages: PageImages, task: Task) -> None:
    """Private memory; of one that has its parent's, what is other."""
    found = _private(skeleton, pages, task.node.pid)
    if task.heir_of:
        gone = _runs(_private(skeleton, pages, task.heir_of))
        gone.exclude(_runs(found))
        skeleton.drop(task, gone)
    with _open(f"/proc/{task.pid}/mem") as mem:
        _fill_place(Place(task.pid, mem), found, compare=bool(task.heir_of))


def _private(skeleton: Skeleton, pages: PageImages, inner_pid: int) -> list[Extent]:
    if not pages.has("pagemap", inner_pid):
        return []
    vmas = skeleton.restoration.checkpoint.one("mm", inner_pid).vmas
    return vdso.leave_out(vmas, pages.extents("pagemap", inner_pid))


def _runs(found: Iterable[Extent]) -> Extents:
    runs = Extents()
    for one in found:
        runs.add(one.vaddr, one.pages)
    return runs


def _fill_objects(skeleton: Skeleton, pages: PageImages) -> None:
    """Shared memory."""
    checkpoint = skeleton.restoration.checkpoint
    for shmid, fd in skeleton.shared.descriptors().items():
        _fill_shared(pages, shmid, fd)
    for record in checkpoint.records("memfd"):
        file = record.message
        _fill_shared(pages, file.shmid, memfd.inode(file.inode_id, skeleton.restoration))


def _fill_shared(pages: PageImages, shmid: int, fd: int) -> None:
    if pages.has("pagemap-shmem", shmid):
        _fill_place(Place(0, fd), pages.extents("pagemap-shmem", shmid))


def _fill_place(place: Place, found: Iterable[Extent], *, compare: bool = False) -> None:
    fill_pages(place, [Piece(one.vaddr, one.offset, one.pages, one.fd) for one in found], compare=compare)


@contextlib.contextmanager
def _open(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
