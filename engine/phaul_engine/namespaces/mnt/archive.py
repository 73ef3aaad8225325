"""The content of a file system as an archive: tar in gzip, as CRIU keeps it, without compression proper.

Owners are those of the tree's user namespace (`Ids`). Besides what tar knows, times are kept to the nanosecond,
extended attributes (with access lists and capabilities), holes, and sockets: CRIU's tar passes over what it does not
know. What hides parts of the file system (mounts on it) must not be in the way: it is packed and filled through a mount
of its own.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from phaul_engine.errors import ImageError

from .ids import Ids

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_XATTR = "SCHILY.xattr."
_SOCKETS = "PHAUL.sockets"
_BLOCK = 512
_END = 2 * _BLOCK  # zeros that end an archive
_MODE = 0o7777
_TYPES = {
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFREG: tarfile.REGTYPE,
}
_KINDS = {value: key for key, value in _TYPES.items()} | {tarfile.AREGTYPE: stat.S_IFREG}


@dataclass
class Item:
    """A file, by all that is kept of it. `link` is the text of a symbolic link, or the name of the file that this is
    another name of (`hard`). `pieces` are the parts of a regular file that are no holes: where, and what. Owners are
    those of the tree's user namespace, times in nanoseconds."""

    mode: int
    uid: int
    gid: int
    atime: int
    mtime: int
    device: int = 0
    link: str = ""
    hard: bool = False
    size: int = 0
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    attributes: dict[str, bytes] = field(default_factory=dict)


Content = dict[str, Item]
"""Files by their names from the root, which is "."; directories come before what is in them."""


# -- reading a file system -------------------------------------------------------------------------------------------


def signature(root: int) -> bytes:
    """What is another whenever a file was added, removed or changed, other than through a mapping."""
    parts: list[str] = []
    for name, _, _, status in _walk(root):
        changed = (*status[:3], status.st_nlink, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        parts.append(f"{name}\0{changed}")
    return "\n".join(parts).encode("utf-8", "surrogateescape")


def read(root: int, ids: Ids) -> Content:
    """All files below a directory, content and all."""
    content: Content = {}
    first: dict[int, str] = {}
    for name, directory, leaf, status in _walk(root):
        item = Item(
            mode=status.st_mode,
            uid=ids.user_inside(status.st_uid),
            gid=ids.group_inside(status.st_gid),
            atime=status.st_atime_ns,
            mtime=status.st_mtime_ns,
            device=status.st_rdev,
        )
        content[name] = item
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            item.link = first.setdefault(status.st_ino, name)
            item.hard = item.link != name
            if item.hard:
                continue
            item.link = ""
        path = f"/proc/self/fd/{directory}/{leaf}"
        for attribute in os.listxattr(path, follow_symlinks=False):
            value = os.getxattr(path, attribute, follow_symlinks=False)
            item.attributes[attribute] = ids.attribute(attribute, value, outwards=False)
        if stat.S_ISLNK(status.st_mode):
            item.link = os.readlink(leaf, dir_fd=directory)
        elif stat.S_ISREG(status.st_mode):
            _read_file(directory, leaf, item)
    return content


def put_below(whole: Content, directory: str, part: Content) -> None:
    """Put the content of a directory into that of the file system, of which not all is known."""
    above = directory.split("/")
    for depth in range(len(above)):
        name = "/".join(above[:depth]) or "."
        whole.setdefault(name, Item(stat.S_IFDIR | 0o755, 0, 0, 0, 0))
    for name, item in part.items():
        if item.hard:
            item = replace(item, link=f"{directory}/{item.link}")
        whole[directory if name == "." else f"{directory}/{name}"] = item


def _read_file(directory: int, leaf: str, item: Item) -> None:
    fd = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NOATIME | os.O_CLOEXEC, dir_fd=directory)
    try:
        item.size = os.fstat(fd).st_size
        for start, end in _extents(fd, item.size):
            item.pieces.append((start, _exactly(fd, start, end - start)))
    finally:
        os.close(fd)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at


def _exactly(fd: int, at: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = os.pread(fd, size, at)
        if not part:  # it became shorter meanwhile
            return b"".join([*parts, bytes(size)])
        parts.append(part)
        at, size = at + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _walk(root: int) -> Iterator[tuple[str, int, str, os.stat_result]]:
    """Name from the root, directory, name in it and status of every file, directories before what is in them."""
    yield ".", root, ".", os.fstat(root)
    yield from _walk_below(os.open(".", _DIRECTORY, dir_fd=root), "")


def _walk_below(directory: int, prefix: str) -> Iterator[tuple[str, int, str, os.stat_result]]:
    try:
        for leaf in sorted(os.listdir(directory)):
            status = os.stat(leaf, dir_fd=directory, follow_symlinks=False)
            name = prefix + leaf
            yield name, directory, leaf, status
            if stat.S_ISDIR(status.st_mode):
                yield from _walk_below(os.open(leaf, _DIRECTORY, dir_fd=directory), f"{name}/")
    finally:
        os.close(directory)


# -- the archive -----------------------------------------------------------------------------------------------------


Members = dict[str, tuple[Item, bytes]]
"""Files by their names, with what each is in an archive."""


def pack(content: Content, members: Members | None = None) -> bytes:
    """The archive of a content. `members` are those of the last one of the same file system, and become those of this
    one: in a freeze hardly any is another, and Python's tar takes 0.1 ms for each."""
    known, made = members or {}, Members()
    sockets = [
        [name, item.mode & _MODE, item.uid, item.gid, item.mtime]
        for name, item in content.items()
        if stat.S_ISSOCK(item.mode)
    ]
    for name, item in content.items():
        if not stat.S_ISSOCK(item.mode) or item.hard:
            extra = {_SOCKETS: json.dumps(sockets)} if name == "." and sockets else {}
            before = known.get(name)
            same = before is not None and before[0] == item and name != "."
            made[name] = before if before is not None and same else (item, _member(name, item, extra))
    if members is not None:
        members.clear()
        members.update(made)
    plain = b"".join(data for _, data in made.values())
    end = bytes(_END + -(len(plain) + _END) % tarfile.RECORDSIZE)
    return gzip.compress(plain + end, compresslevel=0, mtime=0)


def _member(name: str, item: Item, extra: dict[str, str]) -> bytes:
    """A file in an archive: its headers, and what it holds."""
    info = tarfile.TarInfo("." if name == "." else f"./{name}")
    info.mode, info.uid, info.gid = item.mode & _MODE, item.uid, item.gid
    info.type = tarfile.LNKTYPE if item.hard else _TYPES[stat.S_IFMT(item.mode)]
    info.linkname = f"./{item.link}" if item.hard else item.link
    info.devmajor, info.devminor = os.major(item.device), os.minor(item.device)
    info.mtime = item.mtime // 1_000_000_000
    headers = {"mtime": _seconds(item.mtime), "atime": _seconds(item.atime), **extra}
    for attribute, value in item.attributes.items():
        headers[_XATTR + attribute] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = headers
    parts: list[bytes] = []
    if not item.hard and stat.S_ISREG(item.mode):
        parts = [data for _, data in item.pieces]
        if sum(map(len, parts)) != item.size:
            parts.insert(0, _sparse(info, name, item))
        info.size = sum(map(len, parts))
    head = info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
    return b"".join([head, *parts, bytes(-info.size % _BLOCK)])


def _sparse(info: tarfile.TarInfo, name: str, item: Item) -> bytes:
    """Mark a member as one with holes (GNU tar's format 1.0); the map that its data begins with."""
    info.pax_headers = {
        **info.pax_headers,
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": f"./{name}",
        "GNU.sparse.realsize": str(item.size),
    }
    directory, _, leaf = name.rpartition("/")
    info.name = "/".join(part for part in (".", directory, "GNUSparseFile.0", leaf) if part)
    pieces = [(start, len(data)) for start, data in item.pieces]
    if not pieces or sum(pieces[-1]) != item.size:
        pieces.append((item.size, 0))
    text = "\n".join(map(str, [len(pieces), *(number for piece in pieces for number in piece)])).encode() + b"\n"
    return text + bytes(-len(text) % _BLOCK)


def _seconds(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{seconds}.{rest:09d}" if rest else str(seconds)


def unpack(data: bytes) -> Content:
    """The content of an archive, of ours or CRIU's; ImageError for anything that is malformed."""
    try:
        return _unpack(gzip.decompress(data))
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError) as error:
        raise ImageError(f"the image of the content of a file system is damaged: {error}") from error


def _unpack(data: bytes) -> Content:
    content: Content = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", errors="surrogateescape") as tar:
        for info in tar:
            name = _name(info.name)
            item = content[name] = Item(
                mode=_KINDS.get(info.type, stat.S_IFREG) | info.mode & _MODE,
                uid=info.uid,
                gid=info.gid,
                atime=_nanoseconds(info.pax_headers.get("atime", ""), info.mtime),
                mtime=_nanoseconds(info.pax_headers.get("mtime", ""), info.mtime),
                hard=info.islnk(),
                link=_name(info.linkname) if info.islnk() else info.linkname,
                device=os.makedev(info.devmajor, info.devminor) if info.isdev() and not info.isfifo() else 0,
            )
            for key, value in info.pax_headers.items():
                if key.startswith(_XATTR):
                    item.attributes[key.removeprefix(_XATTR)] = value.encode("utf-8", "surrogateescape")
            if info.type == tarfile.GNUTYPE_SPARSE or info.isreg():
                _unpack_file(tar, info, item)
            elif not info.islnk() and info.type not in _KINDS:
                raise ValueError(f"{name} is of unknown type {info.type!r}")
            for path, mode, uid, gid, mtime in json.loads(info.pax_headers.get(_SOCKETS, "[]")):
                content[_name(path)] = Item(stat.S_IFSOCK | mode & _MODE, uid, gid, mtime, mtime)
    return dict(sorted(content.items(), key=lambda item: item[0].split("/") if item[0] != "." else []))


def _unpack_file(tar: tarfile.TarFile, info: tarfile.TarInfo, item: Item) -> None:
    file = tar.extractfile(info)
    assert file is not None
    item.size = info.size
    pieces: Any = info.sparse if info.sparse is not None else [(0, info.size)]
    for start, size in pieces:
        if size:
            file.seek(start)
            item.pieces.append((start, file.read(size)))


def _name(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/"):
        raise ValueError(f"{name!r} leads out of the file system")
    return "/".join(parts) or "."


def _nanoseconds(text: str, otherwise: Any) -> int:
    if not text:
        return int(otherwise) * 1_000_000_000
    seconds, _, fraction = text.partition(".")
    return int(seconds) * 1_000_000_000 + int(fraction[:9].ljust(9, "0") or 0)


# -- filling a file system -------------------------------------------------------------------------------------------


def fill(root: int, content: Content, ids: Ids, before: Content | None = None) -> None:
    """Make the files below directory `root` what `content` says; it holds `before`, nothing by default. Files that are
    there stay the same files: what has them open sees what changes."""
    before = before or {}
    for name in reversed([name for name in before if not _follows(name, before, content)]):
        _remove(root, name)
    for name, item in sorted(content.items(), key=lambda one: one[1].hard):  # other names of a file come last
        known = before.get(name) if _follows(name, before, content) else None
        if known != item:
            _make(root, name, item, ids, known)
    for name, item in reversed(content.items()):  # what is made in a directory changes its time
        if stat.S_ISDIR(item.mode):
            directory, leaf = _parent(root, name)
            try:
                os.utime(leaf, ns=(item.atime, item.mtime), dir_fd=directory, follow_symlinks=False)
            finally:
                os.close(directory)


def _follows(name: str, before: Content, content: Content) -> bool:
    """Whether a file that is there can become what it is to be."""
    old, new = before.get(name), content.get(name)
    if old is None or new is None or stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode) or old.hard != new.hard:
        return False
    keeps = stat.S_ISREG(old.mode) or stat.S_ISDIR(old.mode)
    if new.hard:  # another name of the same file still, if that follows too
        return old.link == new.link and _follows(new.link, before, content)
    return keeps or (old.link, old.device) == (new.link, new.device)


def _remove(root: int, name: str) -> None:
    directory, leaf = _parent(root, name)
    try:
        if stat.S_ISDIR(os.stat(leaf, dir_fd=directory, follow_symlinks=False).st_mode):
            os.rmdir(leaf, dir_fd=directory)
        else:
            os.unlink(leaf, dir_fd=directory)
    except FileNotFoundError:
        pass
    finally:
        os.close(directory)


def _make(root: int, name: str, item: Item, ids: Ids, known: Item | None) -> None:
    directory, leaf = _parent(root, name)
    try:
        if known is None:
            _create(root, directory, leaf, item)
        if item.hard:
            return
        if stat.S_ISREG(item.mode) and (known is None or (known.size, known.pieces) != (item.size, item.pieces)):
            _write_file(directory, leaf, item)
        uid, gid = ids.user_outside(item.uid), ids.group_outside(item.gid)
        os.chown(leaf, uid, gid, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISLNK(item.mode):
            os.chmod(leaf, item.mode & _MODE, dir_fd=directory)
        _set_attributes(directory, leaf, item, ids)
        os.utime(leaf, ns=(item.atime, item.mtime), dir_fd=directory, follow_symlinks=False)
    finally:
        os.close(directory)


def _create(root: int, directory: int, leaf: str, item: Item) -> None:
    if leaf == ".":
        return
    if item.hard:
        old, other = _parent(root, item.link)
        try:
            os.link(other, leaf, src_dir_fd=old, dst_dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(old)
    elif stat.S_ISDIR(item.mode):
        os.mkdir(leaf, 0o700, dir_fd=directory)
    elif stat.S_ISLNK(item.mode):
        os.symlink(item.link, leaf, dir_fd=directory)
    else:
        os.mknod(leaf, stat.S_IFMT(item.mode) | 0o600, item.device, dir_fd=directory)


def _write_file(directory: int, leaf: str, item: Item) -> None:
    fd = os.open(leaf, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, item.size)
        for start, data in item.pieces:
            view = memoryview(data)
            while view:
                written = os.pwrite(fd, view, start)
                view, start = view[written:], start + written
    finally:
        os.close(fd)


def _set_attributes(directory: int, leaf: str, item: Item, ids: Ids) -> None:
    path = f"/proc/self/fd/{directory}/{leaf}"
    for name in os.listxattr(path, follow_symlinks=False):
        if name not in item.attributes:
            os.removexattr(path, name, follow_symlinks=False)
    for name, value in item.attributes.items():
        os.setxattr(path, name, ids.attribute(name, value, outwards=True), follow_symlinks=False)


def _parent(root: int, name: str) -> tuple[int, str]:
    """The directory that a name is in, to be closed by the caller, and the name in it; no link is followed."""
    *above, leaf = name.split("/")
    directory = os.open(".", _DIRECTORY, dir_fd=root)
    for part in above:
        try:
            below = os.open(part, _DIRECTORY, dir_fd=directory)
        finally:
            os.close(directory)
        directory = below
    return directory, leaf
