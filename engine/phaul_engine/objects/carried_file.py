"""Files that the tree can write and the destination does not see: files on tmpfs, such as POSIX shared memory
(shm_overview(7)), and files on disks of this host.

A migration carries them: content like that of a memory file (memfd.py), owner, mode and name, of files on disks
attributes and times too. At the destination the file is made unseen and gets its name after the commit; there must be
none before. When the tree's copy at the source is dead, the name of a file on tmpfs goes: what would be left would be
memory that nobody uses. A file on a disk is left, and marked as what the program has left behind, so that it may be
replaced when the program comes back. Nobody else may use such files: they cannot be in two places.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from phaul_engine import calls
from phaul_engine.errors import EngineError, RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import memfd_pb2
from phaul_engine.proc import access, lives

from . import confinement, mounted
from .base import Collection, Descriptor, Restoration
from .staged import Staged, fresh_name

OPTION = "carry_tmpfs"
"""Of a pass: without it, files on tmpfs are files like any other, as for images that are restored on the same host."""
DIRECTORIES = "carry_directories"
"""Of a pass: the directories on disks whose files are carried."""
KIND, LEFT_KIND = "tmpfs-file", "left-file"
"""Of journal entries."""
_MARK = "trusted.phaul.left"
"""Of a file that the program has left behind: its size and st_mtime in nanoseconds then (xattr(7))."""
_NOT_CARRIED = (_MARK, "trusted.overlay.")
_ATTRIBUTES_MAX = 1 << 16
_TMPFS = 0x01021994
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MADE = "carried_file"
_UNSYNCED = "carried_file unsynced"

_devices: dict[int, bool] = {}  # whether a device is a tmpfs


def carries(descriptor: Descriptor, collection: Collection) -> bool:
    """Whether a description of a file with a name is one to be carried. Once it was asked, `own` may be closed."""
    if descriptor.info.flags & os.O_ACCMODE == os.O_RDONLY or descriptor.info.flags & os.O_PATH:
        return False
    if os.path.dirname(descriptor.link) in collection.options.get(DIRECTORIES, ()):
        return True
    device = descriptor.status.st_dev
    if not collection.options.get(OPTION) or mounted.comes_along(device, collection):
        return False
    if mounted.in_tree(descriptor, collection):
        return False
    return on_tmpfs(descriptor.own, device)


def on_tmpfs(fd: int, device: int) -> bool:
    """Whether a descriptor's file lies on tmpfs."""
    if device not in _devices:
        _devices[device] = calls.file_system(fd) == _TMPFS
    return _devices[device]


def judge(descriptor: Descriptor, collection: Collection) -> None:
    """Put into the blockers what speaks against taking a file along. The whole machine is searched for others that use
    it, once a file."""
    status, name = descriptor.status, f"the file {descriptor.link}"
    if status.st_nlink > 1:
        collection.block(descriptor, name, "it has other names, under which it would be missed", "remove those")
    known: set[tuple[int, int]] = collection.memory.setdefault(_MADE, set())
    if (status.st_dev, status.st_ino) in known:
        return
    other = _other_user(descriptor, collection)
    if other:
        why = f"it goes with the program, and {other} uses it too: it cannot be in two places"
        collection.block(descriptor, name, why, "end that program, or move it along")
    else:
        known.add((status.st_dev, status.st_ino))


def _other_user(descriptor: Descriptor, collection: Collection) -> str:
    """A process outside the tree that has the file open or mapped; empty if there is none."""
    status = descriptor.status
    mapped = b"%02x:%02x %d " % (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in collection.inner_pids or int(name) == os.getpid():
            continue
        try:
            proc = access.open_process(int(name))
        except (EngineError, OSError):
            continue
        try:
            if mapped in access.read_bytes(proc, "maps") or _has_open(proc, status, os.path.basename(descriptor.link)):
                return f"pid {name} ({access.read_text(proc, 'comm').strip()})"
        except (EngineError, OSError):
            continue
        finally:
            os.close(proc)
    return ""


def _has_open(proc: int, status: os.stat_result, leaf: str) -> bool:
    for fd in access.list_numbers(proc, "fd"):
        try:  # the text first: to stat what lies on a dead file server would take for ever
            alike = access.read_link(proc, f"fd/{fd}").endswith(f"/{leaf}")
            if alike and os.path.samestat(os.stat(f"fd/{fd}", dir_fd=proc), status):
                return True
        except (EngineError, OSError):
            continue
    return False


def describe(fd: int, status: os.stat_result, entry: memfd_pb2.memfd_inode_entry) -> None:
    """What is kept of a file on a disk besides its content, owner and mode."""
    if on_tmpfs(fd, status.st_dev):
        return
    entry.phaul_mtime = status.st_mtime_ns
    for name in os.listxattr(fd):
        if not name.startswith(_NOT_CARRIED):
            entry.phaul_xattrs.add(name=os.fsencode(name), value=os.getxattr(fd, name))


# -- at the destination ------------------------------------------------------------------------------------------


def left_behind(path: str) -> bool:
    """Whether a file is what a program that has moved away left here, and nobody has written to it since."""
    try:
        size, written = map(int, os.getxattr(path, _MARK, follow_symlinks=False).split())
        status = os.lstat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (size, written)


def create(entry: memfd_pb2.memfd_inode_entry, restoration: Restoration) -> int:
    """Make a file beside its place; our descriptor of it, for reading and writing."""
    path = os.fsdecode(entry.phaul_path)
    directory, leaf = os.path.split(path)
    if not path.startswith("/") or "\0" in path or leaf in ("", ".", ".."):
        raise RebuildError(f"the image names a file {path!r}, which is no absolute path")
    root = os.dup(restoration.root) if restoration.root is not None else os.open("/", _DIRECTORY)
    try:
        parent = calls.open_in_root(root, directory, _DIRECTORY)
    except OSError as error:
        raise RebuildError(
            f"cannot make {path} here: {error.strerror}",
            advice=f"make the directory {directory} as it was at the source",
        ) from error
    finally:
        os.close(root)
    staging = fresh_name()
    try:
        owner = restoration.ids.uid_here(entry.uid), restoration.ids.gid_here(entry.gid)
        confinement.check_making(restoration, parent, path, *owner, stat.S_IMODE(entry.mode))
        there = f"/proc/self/fd/{parent}/{leaf}"
        if not entry.HasField("phaul_mtime") and calls.file_system(parent) != _TMPFS:
            raise RebuildError(f"{directory} is no tmpfs here", advice="mount it as it was at the source")
        if os.path.lexists(there) and not (entry.HasField("phaul_mtime") and left_behind(there)):
            raise RebuildError(f"{path} exists here", advice="remove it if nothing on this host uses it")
        os.mkdir(staging, 0o700, dir_fd=parent)
        fd = os.open(f"{staging}/{leaf}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            os.fchown(fd, *owner)
            os.fchmod(fd, stat.S_IMODE(entry.mode))
            os.ftruncate(fd, entry.size)
            _attribute(fd, entry, path, restoration)
        except BaseException:
            os.close(fd)
            raise
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True, dir_fd=parent)
        os.close(parent)
        raise
    made = Staged(parent, staging, leaf, path, tuple(restoration.tasks.values()))
    restoration.scratch.setdefault(_MADE, {})[bytes(entry.phaul_path)] = made
    return fd


def _attribute(fd: int, entry: memfd_pb2.memfd_inode_entry, path: str, restoration: Restoration) -> None:
    """Give a file on a disk its extended attributes."""
    for one in entry.phaul_xattrs:
        confinement.check_attribute(restoration, path, os.fsdecode(one.name))
        if one.name.startswith(tuple(map(os.fsencode, _NOT_CARRIED))) or len(one.value) > _ATTRIBUTES_MAX:
            raise RebuildError(f"the image gives {path} the attribute {one.name[:40]!r}, which no file is sent with")
        try:
            os.setxattr(fd, one.name, one.value)
        except OSError as error:
            raise RebuildError(
                f"cannot give {path} the attribute {os.fsdecode(one.name)} here: {error.strerror}",
                advice="its file system has to know extended attributes, as the source's does",
            ) from error


def settle(fd: int, entry: memfd_pb2.memfd_inode_entry, restoration: Restoration) -> None:
    """Give a file its final size, owner, mode and time, when its content is there."""
    path = os.fsdecode(entry.phaul_path)
    owner = restoration.ids.uid_here(entry.uid), restoration.ids.gid_here(entry.gid)
    confinement.check_owner(restoration, path, *owner, stat.S_IMODE(entry.mode))
    status = os.fstat(fd)
    if status.st_size != entry.size:
        os.ftruncate(fd, entry.size)
    if (status.st_uid, status.st_gid) != owner:
        os.fchown(fd, *owner)
    if stat.S_IMODE(status.st_mode) != stat.S_IMODE(entry.mode):
        os.fchmod(fd, stat.S_IMODE(entry.mode))
    if entry.HasField("phaul_mtime"):
        os.utime(fd, ns=(status.st_atime_ns, entry.phaul_mtime))


def staged_entries(restoration: Restoration) -> list[dict[str, Any]]:
    """What the destination's journal must hold so that files are removed, or published, whoever does it."""
    return [one.entry() for one in _made(restoration).values()]


def publish(paths: set[bytes], restoration: Restoration) -> None:
    """Give these files their names, and remove the others: the program deleted them, or will not run here."""
    made = _made(restoration)
    for path in list(made):
        one = made.pop(path)
        if path in paths:
            flags = os.O_RDONLY | os.O_CLOEXEC
            unsynced(restoration).append(os.open(f"{one.directory}/{one.name}", flags, dir_fd=one.parent))
            unsynced(restoration).append(os.open(".", flags | os.O_DIRECTORY, dir_fd=one.parent))
            one.publish()
        else:
            one.discard()


def unsynced(restoration: Restoration) -> list[int]:
    """Our descriptors of published files, and their directories, that may not have come to the disk yet."""
    found: list[int] = restoration.scratch.setdefault(_UNSYNCED, [])
    return found


def sync(restoration: Restoration) -> None:
    """Bring published files to the disk, before their last copy elsewhere is given up. OSError if that fails."""
    try:
        for fd in unsynced(restoration):
            os.fsync(fd)
    finally:
        forget(restoration)


def forget(restoration: Restoration) -> None:
    """Close what `sync` was to bring to the disk."""
    while unsynced(restoration):
        os.close(unsynced(restoration).pop())


def _made(restoration: Restoration) -> dict[bytes, Staged]:
    made: dict[bytes, Staged] = restoration.scratch.setdefault(_MADE, {})
    return made


# -- at the source, when the tree is gone ------------------------------------------------------------------------


def undo_entries(checkpoint: Checkpoint, pids: Iterable[int]) -> list[dict[str, Any]]:
    """What a journal must hold for files whose tree, tasks `pids`, is killed here: none outlives it in memory, and
    those on disks are marked.

    Paths are the tree's, and recovery has this host's: a file that is not the same one here, as where the tree has
    mounts or a root of its own, is left out. What only a tree mounts goes with it."""
    files: dict[str, list[list[Any]]] = {KIND: [], LEFT_KIND: []}
    for record in checkpoint.records("memfd"):
        one = record.message
        if one.phaul_path:
            kind = LEFT_KIND if one.HasField("phaul_mtime") else KIND
            noted = [os.fsdecode(one.phaul_path), one.phaul_device, one.phaul_inode]
            with _same_file(*noted) as found:
                if found is not None:
                    files[kind].append(noted)
    tasks = lives.tasks(pids) if any(files.values()) else []
    return [{"kind": kind, "data": {"files": some, "tasks": tasks}} for kind, some in files.items() if some]


def remove(data: dict[str, Any]) -> None:
    """Remove the files, if the tree that used them here is dead; else do nothing."""
    for file in _left(data):
        os.unlink(file.leaf, dir_fd=file.parent)


def mark(data: dict[str, Any]) -> None:
    """Mark the files as left behind, if the tree that used them here is dead; else do nothing. Where a file system has
    no such attributes, a program that comes back finds them in its way."""
    for file in _left(data):
        status = os.fstat(file.fd)
        with suppress(OSError):
            os.setxattr(f"/proc/self/fd/{file.fd}", _MARK, b"%d %d" % (status.st_size, status.st_mtime_ns))


class _File(NamedTuple):
    """A file by its directory and name, and itself."""

    parent: int
    leaf: str
    fd: int


def _left(data: dict[str, Any]) -> Iterator[_File]:
    """The files that are there still, and the same; none while a task lives."""
    if lives.any_lives(data["tasks"]):
        return
    for noted in data["files"]:
        with _same_file(*noted) as found:
            if found is not None:
                yield found


@contextmanager
def _same_file(path: str, device: int, inode: int) -> Iterator[_File | None]:
    """The regular file of that name on this host, if it is that one. No link is followed: whoever can write to a
    directory on the way could lead us elsewhere by it, between this look and what is done."""
    directory, leaf = os.path.split(path)
    with ExitStack() as stack:
        found = None
        with suppress(OSError):
            root = os.open("/", _DIRECTORY)
            stack.callback(os.close, root)
            parent = calls.open_beneath(root, directory.lstrip("/") or ".", _DIRECTORY)
            stack.callback(os.close, parent)
            fd = os.open(leaf, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            stack.callback(os.close, fd)
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (device, inode) and stat.S_ISREG(status.st_mode):
                found = _File(parent, leaf, fd)
        yield found
