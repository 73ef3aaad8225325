"""Files that are opened by name: regular files, directories, whatever is open with O_PATH, files of /proc and /sys.

A name in the image is the one that the kernel tells for the open file, from the root of the tree's mount namespace.
It is checked: it has to lead to the very inode that is open. Where it does not, the file has been deleted (a ghost,
`ghost_file`, or one that has other names still), or something else hides it, and that is a blocker.

Contents of files do not travel here: `FileUse` says what is open, and what the destination has to have.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from phaul_engine import calls
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import fdinfo_pb2, regfile_pb2, remap_file_path_pb2
from phaul_engine.proc import access

from . import carried_file, confinement, ghost_file, memfd, mounted, network_files
from .base import Collection, Descriptor, DescriptorKind, Owner, Restoration, descriptor_kind
from .description import is_stateless, open_again, place, settle_status, signal_owner, status_flags

DELETED = " (deleted)"
_MEMORY_FILE = "/memfd:"
_SECOND = "link_remap."  # how CRIU, too, begins a name that is given for the time of the move
_SECOND_NAME = re.compile(r"link_remap\.[0-9]{1,10}")
_PROC = "/proc/"
_READ_SIZE = 1 << 20

# What open(2) does once, and what only F_SETFL can do for certain.
_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | os.O_ASYNC | os.O_NONBLOCK
_WITH_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True)
class FileUse:
    """A file that the tree uses by name, for those who decide how its content gets to the destination.

    `root` names the process from whose root `path` is resolved. `writable` says whether the tree can change it through
    this description or mapping. Times in nanoseconds, size in bytes.
    """

    file_id: int
    path: str
    where: str
    dev: int
    ino: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    writable: bool

    def digest(self, root: int) -> bytes:
        """SHA-256 of its content now; `root` is a descriptor of the directory that `path` starts from."""
        fd = calls.open_in_root(root, self.path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            total = hashlib.sha256()
            while chunk := os.read(fd, _READ_SIZE):
                total.update(chunk)
            return total.digest()
        finally:
            os.close(fd)


def uses(collection: Collection) -> list[FileUse]:
    """The files of regular type that this pass looked at. A pass in the freeze looks only at what has changed."""
    found: list[FileUse] = collection.scratch.setdefault("regular_file", [])
    return found


@descriptor_kind
class RegularFile(DescriptorKind):
    """Opened by its name with its flags, never created or truncated; the offset comes at the end."""

    name = "file"
    types: ClassVar = (fdinfo_pb2.REG,)
    settled: ClassVar = ("fown", "pos", "size")

    def claims(self, descriptor: Descriptor) -> bool:
        if not descriptor.link.startswith("/") or descriptor.link.startswith(_MEMORY_FILE):
            return False
        mode = descriptor.status.st_mode
        by_path = bool(descriptor.info.flags & os.O_PATH)
        return by_path or stat.S_ISREG(mode) or stat.S_ISDIR(mode)

    def rebuilds(self, entry: fdinfo_pb2.file_entry) -> bool:
        return not stat.S_ISCHR(entry.reg.mode) or bool(entry.reg.flags & os.O_PATH)  # char_device has those

    def steady(self, descriptor: Descriptor, collection: Collection) -> bool:
        if carried_file.carries(descriptor, collection):
            return False
        return descriptor.status.st_nlink > 0 and not descriptor.link.endswith(DELETED)

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        return collect_named(descriptor, file_id, collection)

    def finish(self, collection: Collection) -> None:
        network_files.find(collection)

    def seal(self, collection: Collection) -> None:
        network_files.flush(network_files.kept(collection.memory))

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        return open_named(entry, restoration)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        ghost_file.settle(entry.id, restoration)
        if not memfd.settle_named(os.fsdecode(entry.reg.name), restoration):
            if not entry.reg.flags & os.O_PATH and entry.reg.flags & os.O_ACCMODE != os.O_RDONLY:
                network_files.refresh(fd)
            _check_content(entry.reg, fd, restoration)
        settle_status(fd, entry.reg.flags, entry.reg.fown, restoration)
        fifo = stat.S_ISFIFO(os.fstat(fd).st_mode)  # the name of a fifo is an entry of this kind too
        if not fifo and not entry.reg.flags & os.O_PATH and entry.reg.pos != os.lseek(fd, 0, os.SEEK_CUR):
            place(fd, entry.reg.pos)

    def lasting(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> bool:
        remapped: set[int] | None = restoration.cache.get("remapped")
        if remapped is None:
            records = restoration.checkpoint.records("remap-fpath")
            remapped = restoration.cache["remapped"] = {record.message.orig_id for record in records}
        return entry.id not in remapped and not _may_grow(entry, restoration)

    def release(self, restoration: Restoration) -> None:
        ghost_file.release(restoration)
        for path, mount in restoration.scratch.pop("link_remaps", ()):
            _unlink_and_close(mounted.names_start(mount, restoration), path)

    def discard(self, restoration: Restoration) -> None:
        ghost_file.release(restoration)


def collect_named(descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
    """The entry of anything opened by name, with the remaps that a deleted file needs."""
    status = descriptor.status
    mount = mounted.number_of(descriptor, collection)
    name = _name(descriptor, mount, file_id, collection)
    entry = regfile_pb2.reg_file_entry(
        id=file_id,
        flags=status_flags(descriptor),
        pos=descriptor.info.pos,
        fown=signal_owner(descriptor, collection),
        name=os.fsencode(name),
        mnt_id=mount,
        mode=status.st_mode,
    )
    if stat.S_ISREG(status.st_mode):
        entry.size = status.st_size
    if stat.S_ISDIR(status.st_mode) and entry.fown.pid:
        collection.block(
            descriptor,
            "a directory with a receiver of signals",
            "it may be watched with F_NOTIFY, for what the kernel does not tell",
            "let the program use inotify, or close it before it moves",
        )
    return fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=file_id, reg=entry)


def _name(descriptor: Descriptor, mount: int, file_id: int, collection: Collection) -> str:
    link, status = descriptor.link, descriptor.status
    if link.startswith(_PROC) and _blocked_proc(descriptor, collection):
        return link
    deleted = link.endswith(DELETED)
    bare = link.removesuffix(DELETED)
    if status.st_nlink == 0:
        ghost_file.collect(descriptor, file_id, collection)
        return bare
    found = _status_at(descriptor.owner, link)
    if found is not None and (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
        _note_use(descriptor, file_id, collection)
        return link
    attached = mounted.is_attached(descriptor, mount, collection)
    same_device = found is not None and stat.S_ISCHR(status.st_mode) and found.st_rdev == status.st_rdev
    if same_device and (not attached or mount == mounted.NOWHERE):
        return link  # another node of it
    if not attached:
        collection.block(
            descriptor,
            f"the file {link}",
            "it is on a mount that the program does not see any more",
            "close the file, or leave the directory",
        )
        return bare
    if deleted and stat.S_ISDIR(status.st_mode):  # some file systems keep a link count on removed directories
        ghost_file.collect(descriptor, file_id, collection)
    elif deleted:
        _link_again(descriptor, bare, mount, file_id, collection)
    elif mounted.is_hidden(descriptor, mount, collection):
        return link
    else:
        collection.block(
            descriptor,
            f"the file {link}",
            "nothing stands there now" if found is None else "another file stands at that name now",
            "a mount may hide it: unmount that, or close the file",
        )
    return bare


def _note_use(descriptor: Descriptor, file_id: int, collection: Collection) -> None:
    status = descriptor.status
    if not stat.S_ISREG(status.st_mode) or descriptor.info.flags & os.O_PATH:
        return
    if carried_file.carries(descriptor, collection):
        memfd.collect_file(descriptor, collection)
        return
    if mounted.comes_along(status.st_dev, collection):
        return
    uses(collection).append(
        FileUse(
            file_id=file_id,
            path=descriptor.link,
            where=str(descriptor),
            dev=status.st_dev,
            ino=status.st_ino,
            mode=status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            size=status.st_size,
            mtime=status.st_mtime_ns,
            writable=descriptor.info.flags & os.O_ACCMODE != os.O_RDONLY,
        )
    )


def _blocked_proc(descriptor: Descriptor, collection: Collection) -> bool:
    """Files of /proc/PID are of that process: it has to come along, and to live."""
    first = descriptor.link.removeprefix(_PROC).partition("/")[0]
    if descriptor.link.endswith(DELETED) or (
        first.isdecimal() and int(first) not in mounted.processes(descriptor, collection)
    ):
        collection.block(
            descriptor,
            f"the file {descriptor.link}",
            f"it tells about process {first}, which " + ("has ended" if descriptor.link.endswith(DELETED) else "stays"),
            "close it",
        )
        return True
    return False


def names_root(owner: Owner) -> int | None:
    """A descriptor, to be closed by the caller, of the directory that the kernel's names for the files of a process
    start from: the root of its mount namespace. None if a changed root hides it."""
    if owner.top >= 0:
        return os.dup(owner.top)
    return os.dup(owner.root) if access.read_link(owner.proc, "root") == "/" else None


def _status_at(owner: Owner, name: str) -> os.stat_result | None:
    root = names_root(owner)
    if root is None:
        return None
    try:
        fd = calls.open_in_root(root, name, os.O_PATH | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            return None
        raise
    finally:
        os.close(root)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _link_again(descriptor: Descriptor, bare: str, mount: int, file_id: int, collection: Collection) -> None:
    """A file whose name is gone while it has others: give it one beside, which the destination opens and removes.

    Nothing is changed in a survey. The option `link_remap` says whether the name may stay (images that are restored
    later need it) or must not be made; without it, it is removed when the engine is through with the tree.
    """
    allowed = collection.options.get("link_remap")
    if allowed is False:
        collection.block(
            descriptor,
            f"the file {bare}, deleted under this name",
            "it needs another name until it is restored",
            "allow that with --link-remap",
        )
        return
    if collection.survey:
        return
    root = names_root(descriptor.owner)
    directory, _, _ = bare.rpartition("/")
    made = f"{directory}/{_SECOND}{file_id}"
    try:
        if root is None:
            raise FileNotFoundError(errno.ENOENT, "its mount namespace is hidden")
        parent = calls.open_in_root(root, directory or "/", os.O_PATH | os.O_DIRECTORY)
        try:
            _link(descriptor, parent, f"{_SECOND}{file_id}")
        finally:
            os.close(parent)
    except OSError as error:
        if root is not None:
            os.close(root)
        collection.block(
            descriptor,
            f"the file {bare}, deleted under this name",
            f"it cannot be linked again as {made}: {error.strerror}",
            "close it, or give its directory back",
        )
        return
    if allowed:
        os.close(root)
    else:
        collection.undo(lambda: _unlink_and_close(root, made))
    remap_id = _remap_id(file_id)
    entry = regfile_pb2.reg_file_entry(
        id=remap_id,
        flags=0,
        pos=0,
        fown=signal_owner(descriptor, collection),
        name=os.fsencode(made),
        mnt_id=mount,
        size=descriptor.status.st_size,
        mode=descriptor.status.st_mode,
    )
    collection.checkpoint.put("files", None, fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=remap_id, reg=entry))
    remap = remap_file_path_pb2.remap_file_path_entry(
        orig_id=file_id, remap_id=remap_id, remap_type=remap_file_path_pb2.LINKED
    )
    collection.checkpoint.put("remap-fpath", None, remap)


def _link(descriptor: Descriptor, parent: int, name: str) -> None:
    """Link an open file, unless an earlier pass has done so."""
    try:
        calls.link_descriptor(descriptor.own, parent, name)
    except FileExistsError:
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if not os.path.samestat(there, descriptor.status):
            raise


def _unlink_and_close(root: int, path: str) -> None:
    try:
        _unlink(root, path)
    finally:
        os.close(root)


def _unlink(root: int, path: str) -> None:
    """Remove a second name, unless somebody else has done so."""
    directory, _, leaf = path.rpartition("/")
    parent = calls.open_in_root(root, directory or "/", os.O_PATH | os.O_DIRECTORY)
    try:
        os.unlink(leaf, dir_fd=parent)
    except FileNotFoundError:
        pass
    finally:
        os.close(parent)


def _remap_id(file_id: int) -> int:
    """Ids of the second names, above all that a tree's descriptions reach."""
    return (1 << 30) + file_id


def remaps(restoration: Restoration) -> dict[int, remap_file_path_pb2.remap_file_path_entry]:
    """Where files are found that are not at their names, by image id."""
    found: dict[int, remap_file_path_pb2.remap_file_path_entry] | None = restoration.cache.get("remaps")
    if found is None:
        records = restoration.checkpoint.records("remap-fpath")
        found = restoration.cache["remaps"] = {record.message.orig_id: record.message for record in records}
    return found


def ordinary(status: os.stat_result) -> bool:
    """Whether to open a file does nothing but open it: other devices may begin to work, a fifo wait."""
    mode = status.st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_stateless(mode, status.st_rdev)


def open_named(
    entry: fdinfo_pb2.file_entry,
    restoration: Restoration,
    also: int = 0,
    *,
    fits: Callable[[os.stat_result], bool] = ordinary,
) -> int:
    """Open what an entry names, wherever it is to be found, with its flags and `also` these; RebuildError unless that
    `fits`, and then it is not opened."""
    reg = entry.reg
    remap = remaps(restoration).get(entry.id)
    if remap is not None and remap.remap_type == remap_file_path_pb2.GHOST:
        return ghost_file.rebuild(entry.id, remap.remap_id, restoration)
    path = os.fsdecode(reg.name)
    if remap is not None and remap.remap_type == remap_file_path_pb2.LINKED:
        path = os.fsdecode(restoration.entry(remap.remap_id).reg.name)
        if not _SECOND_NAME.fullmatch(path.rpartition("/")[2]):  # it is removed afterwards
            raise ImageError(f"the image calls {path!r} a name that was given for the time of the move")
        restoration.scratch.setdefault("link_remaps", set()).add((path, reg.mnt_id))
    if memfd.named(path, restoration) is not None:
        return open_at_root(path, reg.flags, restoration, also, reg.mnt_id)
    hidden = mounted.hidden(entry.id, restoration)
    there = os.dup(hidden) if hidden is not None else _look(path, reg, restoration)
    try:
        _check_type(reg, there, None if reg.flags & os.O_PATH else fits)
        if reg.flags & os.O_PATH:
            return os.dup(there)
        if hidden is None and reg.flags & os.O_NOFOLLOW:  # a flag that does not go through /proc
            return _open_same(there, path, reg, restoration, also)

        def again() -> int:
            return open_again(there, _lasting_flags(reg.flags) & ~os.O_NOFOLLOW | also)

        if hidden is not None or mounted.is_own(reg.mnt_id, restoration):
            return again()
        return confinement.opened(restoration, path, again)
    finally:
        os.close(there)


def _open_same(there: int, path: str, reg: regfile_pb2.reg_file_entry, restoration: Restoration, also: int) -> int:
    """Open a file by its name, which has to lead to what it has led to before."""
    fd = open_at_root(path, reg.flags, restoration, also, reg.mnt_id)
    if os.path.sameopenfile(fd, there):
        return fd
    os.close(fd)
    raise RebuildError(f"{path} became another file while it was opened")


def _look(path: str, reg: regfile_pb2.reg_file_entry, restoration: Restoration) -> int:
    """A file as a place in the file system: nothing is done to it yet."""
    flags = reg.flags if reg.flags & os.O_PATH else os.O_PATH | reg.flags & os.O_NOFOLLOW
    return open_at_root(path, flags, restoration, 0, reg.mnt_id)


def open_at_root(path: str, flags: int, restoration: Restoration, also: int = 0, mount: int = mounted.NOWHERE) -> int:
    """Open a path of the image with the flags of the image, without those that act only once, and `also` these. It
    starts from the root of the mount namespace that `mount` is in."""
    if not path.startswith("/") or "\0" in path:
        raise ImageError(f"the image names a file {path!r}, which is no absolute path")
    flags = _lasting_flags(flags)
    carried = memfd.named(path, restoration)
    if carried is not None:
        return open_again(carried, flags | also)
    root = mounted.names_start(mount, restoration)
    try:
        if mounted.is_own(mount, restoration):
            return calls.open_in_root(root, path, flags | also)
        return confinement.opened(restoration, path, lambda: calls.open_in_root(root, path, flags | also))
    except OSError as error:
        raise RebuildError(
            f"cannot open {path}: {error.strerror}", advice="the file has to be there as it was at the source"
        ) from error
    finally:
        os.close(root)


def _lasting_flags(flags: int) -> int:
    """The flags of an image without those that act only once."""
    if flags & os.O_PATH:
        flags &= _WITH_PATH
    flags &= ~_ONCE
    return flags & ~os.O_TMPFILE if flags & os.O_TMPFILE == os.O_TMPFILE else flags


def _may_grow(entry: fdinfo_pb2.file_entry, restoration: Restoration) -> bool:
    """Whether the running source may still write the file, on storage that we see too: what is so far compares to
    nothing then."""
    if entry.reg.flags & os.O_PATH:
        return False
    if entry.reg.flags & os.O_ACCMODE != os.O_RDONLY:
        return True
    return entry.reg.HasField("size") and os.fstat(restoration.made[entry.id]).st_size != entry.reg.size


def _check_type(reg: regfile_pb2.reg_file_entry, fd: int, fits: Callable[[os.stat_result], bool] | None) -> None:
    status = os.fstat(fd)
    other = reg.HasField("mode") and stat.S_IFMT(status.st_mode) != stat.S_IFMT(reg.mode)
    if other or (fits is not None and not fits(status)):
        raise RebuildError(f"{os.fsdecode(reg.name)} is a file of another type here")


def _check_content(reg: regfile_pb2.reg_file_entry, fd: int, restoration: Restoration) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not reg.HasField("size"):
        return
    if status.st_size != reg.size:
        raise RebuildError(
            f"{os.fsdecode(reg.name)} has {status.st_size} bytes here and had {reg.size} at the source",
            advice="keep it on storage that both hosts see, or have it sent",
        )
    if reg.HasField("mode") and stat.S_IMODE(status.st_mode) != stat.S_IMODE(reg.mode):
        raise RebuildError(
            f"{os.fsdecode(reg.name)} has mode {stat.S_IMODE(status.st_mode):o} and had {stat.S_IMODE(reg.mode):o}",
            advice="give it the same permissions",
        )
