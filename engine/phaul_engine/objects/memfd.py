"""Memory files (memfd_create(2)): inodes with size and seals, descriptions with flags and offsets.

Contents are memory: the page stream carries them, once an inode, whether they are mapped or only written to. Files
with a name that are carried (carried_file.py) are here as inodes too; their descriptions are files like any other.
`sources` gives it what to read at the source; `inode` what to write at the destination. Seals come last, by `settle`,
which has to run when the contents are there.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from typing import ClassVar

from phaul_engine import calls
from phaul_engine.errors import ImageError
from phaul_engine.images.pb import fdinfo_pb2, memfd_pb2

from . import carried_file
from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import open_again, place, settle_status, signal_owner, status_flags

_PREFIX = "/memfd:"
_DELETED = " (deleted)"
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_HUGETLB = 1, 2, 4
_HUGE_SHIFT = 26  # MFD_HUGE_SHIFT: log2 of the page size stands above
_HUGETLBFS = 0x958458F6
_F_SEAL_SEAL = 1
_ALL_SEALS = 0x3F
_MAX_NAME = 249
_MASK = 0xFFFFFFFF
_NAMED = 0xF0000000  # files with a name are numbered from here: their inode numbers are of another file system


@dataclass(frozen=True)
class MemorySource:
    """Where the content of an inode is read at the source. `fd` is ours, and open until a pass does not find the inode
    any more. `alone`: nobody outside the tree uses it."""

    inode_id: int
    shmid: int
    size: int
    fd: int
    inode: tuple[int, int]
    alone: bool = False


def sources(collection: Collection) -> dict[tuple[int, int], MemorySource]:
    """The memory files of this pass, by device and inode number."""
    found: dict[tuple[int, int], MemorySource] = collection.scratch.setdefault("memfd", {})
    return found


@descriptor_kind
class MemFd(DescriptorKind):
    """The inode is made once; descriptions besides the first are opened through it."""

    name = "memory file"
    types: ClassVar = (fdinfo_pb2.MEMFD,)

    def claims(self, descriptor: Descriptor) -> bool:
        status = descriptor.status
        return descriptor.link.startswith(_PREFIX) and stat.S_ISREG(status.st_mode) and status.st_nlink == 0

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        entry = memfd_pb2.memfd_file_entry(
            id=file_id,
            flags=status_flags(descriptor),
            pos=descriptor.info.pos,
            fown=signal_owner(descriptor, collection),
            inode_id=_collect_inode(descriptor, collection),
        )
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.MEMFD, id=file_id, memfd=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        made = _inode(entry.memfd.inode_id, restoration)
        flags = entry.memfd.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_ASYNC)
        if flags & os.O_ACCMODE == os.O_RDWR and not flags & os.O_PATH and not made.given:
            made.given = True
            return fcntl.fcntl(made.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        return open_again(made.fd, flags)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        made = _inode(entry.memfd.inode_id, restoration)
        head = _entries(restoration)[entry.memfd.inode_id]
        if os.fstat(made.fd).st_size != head.size:
            os.ftruncate(made.fd, head.size)
        missing = head.seals & ~calls.get_seals(made.fd)
        if missing:
            calls.add_seals(made.fd, missing & ~_F_SEAL_SEAL)
            if missing & _F_SEAL_SEAL:
                calls.add_seals(made.fd, _F_SEAL_SEAL)
        settle_status(fd, entry.memfd.flags, entry.memfd.fown, restoration)
        if not entry.memfd.flags & os.O_PATH:
            place(fd, entry.memfd.pos)

    def release(self, restoration: Restoration) -> None:
        carried_file.publish({one.phaul_path for one in _entries(restoration).values()}, restoration)
        _close(restoration)

    def discard(self, restoration: Restoration) -> None:
        carried_file.publish(set(), restoration)
        _close(restoration)


def _close(restoration: Restoration) -> None:
    """What the tree has of them is its own from now on."""
    for made in restoration.scratch.pop("memfd", {}).values():
        os.close(made.fd)


def _collect_inode(descriptor: Descriptor, collection: Collection) -> int:
    found = sources(collection)
    status = descriptor.status
    key = (status.st_dev, status.st_ino)
    if key in found:
        return found[key].inode_id
    fd = collection.keep(("memfd", key), lambda: open_again(descriptor.own, os.O_RDONLY))
    # Inode numbers of memory files and of shared anonymous memory are of one file system: no two are the same.
    source = MemorySource(_number(key, collection), status.st_ino & _MASK, status.st_size, fd, key)
    found[key] = source
    entry = memfd_pb2.memfd_inode_entry(
        name=os.fsencode(descriptor.link.removeprefix(_PREFIX).removesuffix(_DELETED)),
        uid=collection.ids.uid_inside(status.st_uid),
        gid=collection.ids.gid_inside(status.st_gid),
        size=status.st_size,
        shmid=source.shmid,
        seals=calls.get_seals(fd),
        inode_id=source.inode_id,
        mode=status.st_mode,
    )
    if calls.file_system(fd) == _HUGETLBFS:
        entry.hugetlb_flag = (status.st_blksize.bit_length() - 1) << _HUGE_SHIFT
    collection.checkpoint.put("memfd", None, entry)
    return source.inode_id


def _number(key: tuple[int, int], collection: Collection) -> int:
    """What an inode is called in the images, in every pass."""
    numbers: dict[tuple[int, int], int] = collection.memory.setdefault("memfd", {})
    return numbers.setdefault(key, len(numbers) + 1)


def collect_file(descriptor: Descriptor, collection: Collection) -> None:
    """Carry a file that has a name, content and all, once."""
    found = sources(collection)
    status = descriptor.status
    key = (status.st_dev, status.st_ino)
    if key in found:
        return
    carried_file.judge(descriptor, collection)
    fd = collection.keep(("memfd", key), lambda: open_again(descriptor.own, os.O_RDONLY))
    number = _number(key, collection)
    found[key] = MemorySource(number, _NAMED + number, status.st_size, fd, key, alone=True)
    entry = memfd_pb2.memfd_inode_entry(
        name=b"",
        uid=collection.ids.uid_inside(status.st_uid),
        gid=collection.ids.gid_inside(status.st_gid),
        size=status.st_size,
        shmid=_NAMED + number,
        seals=0,
        inode_id=number,
        mode=status.st_mode,
        phaul_path=os.fsencode(descriptor.link),
        phaul_device=status.st_dev,
        phaul_inode=status.st_ino,
    )
    carried_file.describe(fd, status, entry)
    collection.checkpoint.put("memfd", None, entry)


@dataclass
class _Made:
    fd: int
    given: bool = False


def inode(inode_id: int, restoration: Restoration) -> int:
    """Our descriptor, for reading and writing, of a memory file at the destination, made now if it was not yet."""
    return _inode(inode_id, restoration).fd


def _entries(restoration: Restoration) -> dict[int, memfd_pb2.memfd_inode_entry]:
    found: dict[int, memfd_pb2.memfd_inode_entry] | None = restoration.cache.get("memfd")
    if found is None:
        records = restoration.checkpoint.records("memfd")
        found = restoration.cache["memfd"] = {record.message.inode_id: record.message for record in records}
    return found


def _inode(inode_id: int, restoration: Restoration) -> _Made:
    made: dict[int, _Made] = restoration.scratch.setdefault("memfd", {})
    if inode_id not in made:
        made[inode_id] = _Made(_create(inode_id, _entries(restoration).get(inode_id), restoration))
    return made[inode_id]


def named(path: str, restoration: Restoration) -> int | None:
    """Our descriptor of the file that the image carries under a name, made now if it was not yet."""
    by_path: dict[bytes, int] | None = restoration.cache.get("memfd by path")
    if by_path is None:
        by_path = restoration.cache["memfd by path"] = {
            one.phaul_path: one.inode_id for one in _entries(restoration).values() if one.phaul_path
        }
    inode_id = by_path.get(os.fsencode(path))
    return None if inode_id is None else inode(inode_id, restoration)


def settle_named(path: str, restoration: Restoration) -> bool:
    """Give a carried file its final state. False if the image carries none under this name."""
    fd = named(path, restoration)
    if fd is None:
        return False
    by_path: dict[bytes, int] = restoration.cache["memfd by path"]
    carried_file.settle(fd, _entries(restoration)[by_path[os.fsencode(path)]], restoration)
    return True


def _create(inode_id: int, entry: memfd_pb2.memfd_inode_entry | None, restoration: Restoration) -> int:
    if entry is None:
        raise ImageError(f"there is no image of memory file {inode_id}")
    if entry.phaul_path:
        return restoration.filing(lambda: carried_file.create(entry, restoration))
    name = entry.name
    if len(name) > _MAX_NAME or b"\0" in name or entry.seals & ~_ALL_SEALS or entry.size >= 1 << 63:
        raise ImageError(f"memory file {inode_id} has an impossible name, size or set of seals")
    huge = _MFD_HUGETLB | entry.hugetlb_flag if entry.hugetlb_flag else 0
    fd = os.memfd_create(os.fsdecode(name), _MFD_CLOEXEC | _MFD_ALLOW_SEALING | huge)
    try:
        os.ftruncate(fd, entry.size)
        os.fchown(fd, restoration.ids.uid_here(entry.uid), restoration.ids.gid_here(entry.gid))
        if entry.HasField("mode"):
            os.fchmod(fd, stat.S_IMODE(entry.mode))
    except BaseException:
        os.close(fd)
        raise
    return fd
