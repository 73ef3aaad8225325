"""Ghosts: files without a name that live as long as they are open (CRIU's `ghost-file` and `remap-fpath` images).

A ghost's inode is made once, and every description of it opened through it, by the name it had, so that /proc tells
the same as before. Its names are removed again. Contents are written at the end, what is a hole stays a hole.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from phaul_engine import calls
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.checkpoint import Record
from phaul_engine.images.pb import ghost_file_pb2, regfile_pb2, remap_file_path_pb2, time_pb2
from phaul_engine.user_ids import UserIds

from . import confinement, mounted
from .base import Collection, Descriptor, Restoration
from .description import is_stateless, open_again

_DELETED = " (deleted)"
_BLOCK = 512  # of st_blocks
_DEFAULT_LIMIT = 256 << 20
_CHUNK = 1 << 20
_MAX_SIZE = 2**63 - 1
_CARRIED = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFLNK}


def collect(descriptor: Descriptor, file_id: int, collection: Collection) -> None:
    """Note that this description is of a ghost, and take the ghost along, content and all, once."""
    status = descriptor.status
    ghosts: dict[tuple[int, int], int] = collection.scratch.setdefault("ghost_file", {})
    inode = (status.st_dev, status.st_ino)
    ghost_id = ghosts.get(inode)
    if ghost_id is None:
        ghost_id = ghosts[inode] = len(ghosts) + 1
        if not _carry(descriptor, ghost_id, collection):
            return
    remap = remap_file_path_pb2.remap_file_path_entry(
        orig_id=file_id, remap_id=ghost_id, remap_type=remap_file_path_pb2.GHOST
    )
    collection.checkpoint.put("remap-fpath", None, remap)


def _carry(descriptor: Descriptor, ghost_id: int, collection: Collection) -> bool:
    status = descriptor.status
    if stat.S_IFMT(status.st_mode) not in _CARRIED and not is_stateless(status.st_mode, status.st_rdev):
        collection.block(descriptor, "a deleted socket or device file", "it cannot be made again", "close it")
        return False
    limit = int(collection.options.get("ghost_limit", _DEFAULT_LIMIT))
    if stat.S_ISREG(status.st_mode) and status.st_blocks * _BLOCK > limit:
        collection.block(
            descriptor,
            f"the deleted file {descriptor.link.removesuffix(_DELETED)}",
            f"its {status.st_blocks * _BLOCK >> 20} MiB exist nowhere else, and the limit is {limit >> 20} MiB",
            "close it, or raise --ghost-limit",
        )
        return False
    head = ghost_file_pb2.ghost_file_entry(
        uid=collection.ids.uid_inside(status.st_uid),
        gid=collection.ids.gid_inside(status.st_gid),
        mode=status.st_mode,
        dev=_kernel_dev(status.st_dev),
        ino=status.st_ino,
        rdev=_kernel_dev(status.st_rdev),
    )
    head.atim.tv_sec, head.atim.tv_usec = divmod(status.st_atime_ns // 1000, 1_000_000)
    head.mtim.tv_sec, head.mtim.tv_usec = divmod(status.st_mtime_ns // 1000, 1_000_000)
    if stat.S_ISLNK(status.st_mode):
        head.symlnk_target = os.fsencode(os.readlink("", dir_fd=descriptor.own))
    if not stat.S_ISREG(status.st_mode):
        collection.checkpoint.put("ghost-file", ghost_id, head)
        return True
    head.chunks, head.size = True, status.st_size
    collection.checkpoint.put("ghost-file", ghost_id, head)
    if not collection.survey:
        _carry_content(descriptor, ghost_id, collection)
    return True


def _carry_content(descriptor: Descriptor, ghost_id: int, collection: Collection) -> None:
    fd = open_again(descriptor.own, os.O_RDONLY)
    try:
        for offset, size in _extents(fd, descriptor.status.st_size):
            content = os.pread(fd, size, offset)
            chunk = ghost_file_pb2.ghost_chunk_entry(off=offset, len=len(content))
            collection.checkpoint.put("ghost-file", ghost_id, chunk, content)
    finally:
        os.close(fd)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """What is not a hole, in pieces."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        for offset in range(start, end, _CHUNK):
            yield offset, min(_CHUNK, end - offset)


def _kernel_dev(dev: int) -> int:
    """A device number as the kernel holds it and CRIU writes it."""
    return os.major(dev) << 20 | os.minor(dev)


def _device(kernel_dev: int) -> int:
    return os.makedev(kernel_dev >> 20, kernel_dev & 0xFFFFF)


@dataclass
class _Ghost:
    """A ghost that has been made here. `keep` is our writable descriptor of a regular one."""

    keep: int | None
    written: dict[int, bytes] = field(default_factory=dict)  # by offset


def rebuild(file_id: int, ghost_id: int, restoration: Restoration) -> int:
    """Make the ghost and all descriptions of it; the descriptor of the one asked for."""
    maker = mounted.maker(restoration.entry(file_id).reg.mnt_id, restoration)
    return restoration.filing(lambda: _rebuild(file_id, ghost_id, restoration), maker)


def _rebuild(file_id: int, ghost_id: int, restoration: Restoration) -> int:
    ghosts = _ghosts(restoration)
    if ghost_id in ghosts:
        return _another(file_id, ghosts[ghost_id], restoration)
    records = restoration.checkpoint.records("ghost-file", ghost_id)
    if not records:
        raise ImageError(f"there is no image of the deleted file {ghost_id}")
    head = records[0].message
    if stat.S_IFMT(head.mode) not in _CARRIED and not is_stateless(head.mode, _device(head.rdev)):
        raise ImageError(f"the deleted file {ghost_id} is of an impossible type: mode {head.mode:o}")
    ids = [
        record.message.orig_id
        for record in restoration.checkpoint.records("remap-fpath")
        if record.message.remap_id == ghost_id and record.message.remap_type == remap_file_path_pb2.GHOST
    ]
    made = {}
    with ExitStack() as names:
        first: tuple[int, str] | None = None
        keep: int | None = None
        for orig_id in ids:
            reg = restoration.entry(orig_id).reg
            ghost = os.lstat(first[1], dir_fd=first[0]) if first else None
            parent, leaf, shown = names.enter_context(_free_name(reg, ghost_id, ghost, restoration))
            if not mounted.is_own(reg.mnt_id, restoration):
                owner = restoration.ids.uid_here(head.uid), restoration.ids.gid_here(head.gid)
                confinement.check_making(restoration, parent, os.fsdecode(reg.name), *owner, head.mode)
            if first is None:
                keep = _make(parent, leaf, head, restoration.ids)
                first = (parent, leaf)
            elif stat.S_ISDIR(head.mode):
                parent, leaf = first
            elif _status(parent, leaf) is None:
                os.link(first[1], leaf, src_dir_fd=first[0], dst_dir_fd=parent, follow_symlinks=False)
            made[orig_id] = _open(shown(), leaf, reg.flags)
    ghosts[ghost_id] = _Ghost(keep)
    result = made.pop(file_id)
    restoration.made.update(made)
    return result


def _ghosts(restoration: Restoration) -> dict[int, _Ghost]:
    ghosts: dict[int, _Ghost] = restoration.scratch.setdefault("ghost_file", {})
    return ghosts


def _another(file_id: int, ghost: _Ghost, restoration: Restoration) -> int:
    """One more description of a ghost that stands already: its name has been removed."""
    if ghost.keep is None:
        raise RebuildError(f"the deleted file of description {file_id} has been made and has no name any more")
    return open_again(ghost.keep, restoration.entry(file_id).reg.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC))


def settle(file_id: int, restoration: Restoration) -> None:
    """Give the ghost that a description refers to its content, if it is one; the second time there is nothing to do."""
    by_file: dict[int, int] | None = restoration.cache.get("ghost_file")
    if by_file is None:
        by_file = restoration.cache["ghost_file"] = {
            record.message.orig_id: record.message.remap_id
            for record in restoration.checkpoint.records("remap-fpath")
            if record.message.remap_type == remap_file_path_pb2.GHOST
        }
    ghost_id = by_file.pop(file_id, None)
    ghost = _ghosts(restoration).get(ghost_id) if ghost_id is not None else None
    if ghost is None or ghost.keep is None:
        return
    for other in [known for known, remap_id in by_file.items() if remap_id == ghost_id]:
        del by_file[other]
    records = restoration.checkpoint.records("ghost-file", ghost_id)
    limit = int(restoration.options.get("ghost_limit", _DEFAULT_LIMIT))
    if sum(len(record.payload) for record in records) > limit:
        raise ImageError(f"the deleted file {ghost_id} holds more than the limit, {limit >> 20} MiB")
    if records and stat.S_ISREG(records[0].message.mode):
        _write(ghost, ghost.keep, records)


def release(restoration: Restoration) -> None:
    """Close what was kept of the ghosts: they live by their descriptions alone from now on."""
    for ghost in _ghosts(restoration).values():
        if ghost.keep is not None:
            os.close(ghost.keep)
            ghost.keep = None


def _write(ghost: _Ghost, fd: int, records: list[Record]) -> None:
    head = records[0].message
    content: dict[int, bytes] = {}
    if head.chunks:
        content = {record.message.off: record.payload for record in records[1:]}
        size = head.size if head.HasField("size") else max((off + len(d) for off, d in content.items()), default=0)
    else:
        content = {0: records[0].payload} if records[0].payload else {}
        size = len(records[0].payload)
    if size > _MAX_SIZE or any(offset + len(data) > _MAX_SIZE for offset, data in content.items()):
        raise ImageError("a deleted file of an impossible size")
    if ghost.written and content.keys() != ghost.written.keys():
        os.ftruncate(fd, 0)  # holes may have come or gone: as new
        ghost.written.clear()
    for offset, data in content.items():
        if ghost.written.get(offset) != data:
            _write_all(fd, data, offset)
    ghost.written = content
    os.ftruncate(fd, size)
    if head.HasField("mtim"):
        os.utime(fd, ns=(_nanoseconds(head.atim), _nanoseconds(head.mtim)))


def _write_all(fd: int, data: bytes, offset: int) -> None:
    """On a disk that fills up, a write may be short before one fails."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _nanoseconds(when: time_pb2.timeval) -> int:
    return int(when.tv_sec) * 1_000_000_000 + int(when.tv_usec) * 1000


def _make(parent: int, leaf: str, head: ghost_file_pb2.ghost_file_entry, ids: UserIds) -> int | None:
    """Make the inode under a name; a descriptor of it if it is a regular file or a fifo."""
    keep = None
    mode = stat.S_IMODE(head.mode)
    match stat.S_IFMT(head.mode):
        case stat.S_IFREG:
            keep = os.open(leaf, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent)
        case stat.S_IFDIR:
            os.mkdir(leaf, 0o700, dir_fd=parent)
        case stat.S_IFLNK:
            os.symlink(head.symlnk_target, leaf, dir_fd=parent)
        case kind:
            os.mknod(leaf, kind | 0o600, _device(head.rdev), dir_fd=parent)
            if kind == stat.S_IFIFO:  # both ends, so that no opening is refused
                keep = os.open(leaf, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    made = os.open(leaf, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)  # nobody puts a link in its place
    try:
        os.chown(f"/proc/self/fd/{made}", ids.uid_here(head.uid), ids.gid_here(head.gid))
        if not stat.S_ISLNK(head.mode):
            os.chmod(f"/proc/self/fd/{made}", mode)
    finally:
        os.close(made)
    return keep


def _open(parent: int, leaf: str, flags: int) -> int:
    flags &= ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_ASYNC)
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        flags &= ~os.O_TMPFILE
    return os.open(leaf, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)


@contextmanager
def _free_name(
    reg: regfile_pb2.reg_file_entry, ghost_id: int, ghost: os.stat_result | None, restoration: Restoration
) -> Iterator[tuple[int, str, Callable[[], int]]]:
    """A directory and a name in it at which a ghost may stand for a moment: its own, or one beside if something other
    than the `ghost` has that; and where the program sees that directory, once the ghost stands there.

    Directories that are gone too are made for as long as it takes. What stands at the name afterwards is removed.
    """
    path = os.fsdecode(reg.name)
    directory, _, leaf = path.rpartition("/")
    if not path.startswith("/") or leaf in ("", ".", "..") or "\0" in path or ".." in directory.split("/"):
        raise ImageError(f"the image names a deleted file {path!r}, which is no possible path")
    with ExitStack() as undo:
        making, opening = mounted.ways(reg.mnt_id, directory, restoration)
        for way in (making, opening):
            undo.callback(os.close, way.root)
        parent = making.root
        walked = ""
        for step in [part for part in making.path.split("/") if part]:
            walked += f"/{step}"
            try:
                below = calls.open_in_root(making.root, walked, os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                if not mounted.is_own(reg.mnt_id, restoration):
                    confinement.check_place(restoration, parent, walked)
                os.mkdir(step, 0o700, dir_fd=parent)
                undo.callback(os.rmdir, step, dir_fd=parent)
                below = calls.open_in_root(making.root, walked, os.O_PATH | os.O_DIRECTORY)
            undo.callback(os.close, below)
            parent = below

        def shown() -> int:
            fd = calls.open_in_root(opening.root, f"/{opening.path}", os.O_PATH | os.O_DIRECTORY)
            undo.callback(os.close, fd)
            return fd

        stands = _status(parent, leaf)
        if stands is not None and not (ghost is not None and os.path.samestat(stands, ghost)):
            leaf = f".phaul-ghost-{ghost_id}"
        before = os.fstat(parent)
        times = before.st_atime_ns, before.st_mtime_ns
        undo.callback(os.utime, ".", ns=times, dir_fd=parent)  # nobody is to see that anything stood there
        undo.callback(_remove, parent, leaf)
        yield parent, leaf, shown


def _status(parent: int, leaf: str) -> os.stat_result | None:
    try:
        return os.lstat(leaf, dir_fd=parent)
    except FileNotFoundError:
        return None


def _remove(parent: int, leaf: str) -> None:
    try:
        status = os.lstat(leaf, dir_fd=parent)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        os.rmdir(leaf, dir_fd=parent)
    else:
        os.unlink(leaf, dir_fd=parent)
