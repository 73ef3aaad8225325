"""Files on storage that both hosts reach over a network: what was written is there before the destination reads.

A network file system keeps written data in the memory of the host that wrote (fs/nfs/file.c, nfs(5) "Data and metadata
coherence"), and what it knows of a file for seconds. So what the tree has written is brought to the storage in every
round, by write or through a mapping alike, and in the freeze what is left; and the destination, which has opened the
files early, asks for their state again and forgets what it has read.

A file system that only one kernel can have mounted needs none of it: if both sides see the same file there, they are
one host.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from phaul_engine import calls
from phaul_engine.errors import EngineError, RebuildError

from .base import Collection, Descriptor

# Magic numbers of file systems that one kernel alone mounts (include/uapi/linux/magic.h and their own sources).
_LOCAL = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0x2FC12FC1,  # zfs
        0xF2F52010,  # f2fs
        0xCA451A4E,  # bcachefs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x958458F6,  # hugetlbfs
        0x794C7630,  # overlayfs
        0x73717368,  # squashfs
        0x4D44,  # vfat
        0x9FA0,  # proc
        0x62656572,  # sysfs
        0x63677270,  # cgroup v2
    }
)
_NAME = "network files"

Kept = dict[tuple[int, int], int]  # descriptors by device and inode


def is_network(fd: int) -> bool:
    """Whether a descriptor is of a file that other kernels may write too."""
    return calls.file_system(fd) not in _LOCAL


def find(collection: Collection) -> None:
    """At the end of a pass: keep a descriptor of each such file that the tree writes.

    It is one of our own opening: an error of writing is told once to each open file description, and is the program's
    to hear. Mapped files that a pass did not look at again are as they were.
    """
    before: Kept = collection.memory.get(_NAME, {})
    network: dict[int, bool] = collection.memory.setdefault("network devices", {})
    now: Kept = {}
    for descriptor in collection.descriptors.values():
        status = descriptor.status
        if not stat.S_ISREG(status.st_mode) or descriptor.info.flags & os.O_ACCMODE == os.O_RDONLY:
            continue
        if status.st_dev not in network:
            network[status.st_dev] = is_network(descriptor.own)
        if network[status.st_dev]:
            _keep(descriptor, collection, now)
    for key, fd in before.items() if not collection.survey else ():
        now.setdefault(key, collection.keep((_NAME, *key), lambda fd=fd: os.dup(fd)))  # type: ignore[misc]
    collection.memory[_NAME] = now


def _keep(descriptor: Descriptor, collection: Collection, now: Kept) -> None:
    key = descriptor.status.st_dev, descriptor.status.st_ino
    leased = any(lock.kind in ("LEASE", "DELEG") for lock in descriptor.info.locks)

    def opener() -> int:
        if leased:  # to open it would break the lease
            return os.dup(descriptor.own)
        return os.open(f"/proc/self/fd/{descriptor.own}", os.O_RDONLY | os.O_CLOEXEC)

    try:
        now[key] = collection.keep((_NAME, *key), opener)
    except OSError as error:
        collection.block(
            descriptor,
            "a file on network storage",
            f"it cannot be opened, to bring what was written to the storage: {error.strerror}",
            "let root read it there (no_root_squash)",
        )


def kept(collection_memory: dict[str, object]) -> Iterable[int]:
    """The descriptors that the last pass has kept."""
    found = collection_memory.get(_NAME, {})
    assert isinstance(found, dict)
    return list(found.values())


def flush(fds: Iterable[int]) -> None:
    """Bring all that was written to the storage. What is there already costs nothing."""
    for fd in fds:
        try:
            os.fdatasync(fd)
        except OSError as error:
            where = os.readlink(f"/proc/self/fd/{fd}")
            raise EngineError(
                f"what was written to {where} does not reach its storage: {error.strerror}",
                advice="the program will be told so too; see to that storage",
            ) from error


def refresh(fd: int) -> None:
    """At the destination, when the source has written its last: see the file as it is on its storage now."""
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode) and is_network(fd):
            calls.refresh_status(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise RebuildError(f"cannot look again at {os.readlink(f'/proc/self/fd/{fd}')}: {error.strerror}") from error
