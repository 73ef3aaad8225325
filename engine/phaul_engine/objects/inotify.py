"""Inotify instances with their watches, under the numbers that the program knows (inotify(7)).

The kernel tells an inode's handle for each watch; the path it has now goes into the image beside it. Watch numbers are
dealt in ascending order, so lower ones that are free are taken and given back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import termios
from collections.abc import Iterable
from typing import ClassVar

from phaul_engine import calls
from phaul_engine.errors import EngineError, ImageError, RebuildError
from phaul_engine.images.pb import fdinfo_pb2, fsnotify_pb2
from phaul_engine.proc import mountinfo
from phaul_engine.proc.fdinfo import InotifyWatch

from .base import Collection, Descriptor, DescriptorKind, Owner, Restoration, descriptor_kind
from .description import settle_status, signal_owner, status_flags
from .regular_file import names_root, open_at_root

_MAX_NUMBER = 1 << 20
_HANDLE_WORDS = 16  # CRIU's images hold at least so many
_IN_MASK_CREATE = 0x10000000
_IN_MODIFY = 2


@descriptor_kind
class Inotify(DescriptorKind):
    """Watches are added when the instance is made; those that came or went since make it be made anew."""

    name = "inotify instance"
    types: ClassVar = (fdinfo_pb2.INOTIFY,)
    settled: ClassVar = ("fown",)

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:inotify"

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        entry = fsnotify_pb2.inotify_file_entry(
            id=file_id, flags=status_flags(descriptor), fown=signal_owner(descriptor, collection)
        )
        unread = struct.unpack("i", fcntl.ioctl(descriptor.own, termios.FIONREAD, bytes(4)))[0]
        if unread and not collection.survey:
            collection.block(
                descriptor,
                "an inotify instance with unread events",
                f"the {unread} bytes in its queue cannot be read without taking them from the program",
                "try again when it has read them",
                passing=True,
            )
        watches = sorted(descriptor.info.inotify, key=lambda watch: watch.wd)
        mounts = mountinfo.read_mounts(descriptor.owner.proc) if watches else ()
        for watch in watches:
            entry.wd.append(_watch(watch, file_id, descriptor, mounts, collection))
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.INOTIFY, id=file_id, ify=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        fd = calls.inotify_init(entry.ify.flags & os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            last = 0
            for watch in sorted(entry.ify.wd, key=lambda watch: watch.wd):
                if not last < watch.wd <= _MAX_NUMBER:
                    raise ImageError(f"inotify instance {entry.id} has an impossible watch number {watch.wd}")
                _skip(fd, last + 1, watch.wd)
                _add(fd, watch, restoration)
                last = watch.wd
            _drain(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        _drain(fd)  # what happened here while the source was still running, the program has seen there
        settle_status(fd, entry.ify.flags, entry.ify.fown, restoration)


def _watch(
    watch: InotifyWatch,
    file_id: int,
    descriptor: Descriptor,
    mounts: Iterable[mountinfo.Mount],
    collection: Collection,
) -> fsnotify_pb2.inotify_wd_entry:
    entry = fsnotify_pb2.inotify_wd_entry(
        id=file_id, i_ino=watch.ino, mask=watch.mask, ignored_mask=0, s_dev=watch.sdev & 0xFFFFFFFF, wd=watch.wd
    )
    handle = watch.handle.handle if watch.handle else b""
    entry.f_handle.bytes = len(handle)
    entry.f_handle.type = watch.handle.type if watch.handle else 0
    padded = handle.ljust(-(-len(handle) // 8) * 8, b"\0")
    words = list(struct.unpack(f"<{len(padded) // 8}Q", padded))
    entry.f_handle.handle.extend(words + [0] * (_HANDLE_WORDS - len(words)))
    path = _path(watch, descriptor.owner, mounts)
    if path is None:
        collection.block(
            descriptor,
            "an inotify instance",
            f"what its watch {watch.wd} watches (inode {watch.ino}) has no path that can be found",
            "remove the watch, or have it watch a file on a file system with handles",
        )
    else:
        entry.f_handle.path = os.fsencode(path)
    return entry


def _path(watch: InotifyWatch, owner: Owner, mounts: Iterable[mountinfo.Mount]) -> str | None:
    """The path of a watched inode: opened by its handle, on a mount of its file system that shows it."""
    if watch.handle is None:
        return None
    dev = os.makedev(watch.sdev >> 20, watch.sdev & 0xFFFFF)
    root = names_root(owner)
    if root is None:
        return None
    try:
        for mount in mounts:
            if mount.dev != dev:
                continue
            path = _through(root, mount.point, watch)
            if path is not None:
                return path
    finally:
        os.close(root)
    return None


def _through(root: int, point: str, watch: InotifyWatch) -> str | None:
    if watch.handle is None:
        return None
    try:
        mount = calls.open_in_root(root, point, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)
    except OSError:  # not a directory, or hidden by another mount
        return None
    try:
        fd = calls.open_by_handle(mount, watch.handle.type, watch.handle.handle, os.O_PATH)
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.EOPNOTSUPP, errno.ENOENT):
            return None
        raise EngineError(f"cannot open inode {watch.ino} by its handle: {error.strerror}") from error
    finally:
        os.close(mount)
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
        again = calls.open_in_root(root, path, os.O_PATH | os.O_NOFOLLOW)
        try:
            same = os.path.sameopenfile(fd, again)
        finally:
            os.close(again)
    except OSError:  # deleted, or outside of what this mount shows
        return None
    finally:
        os.close(fd)
    return path if same else None


def _skip(fd: int, first: int, wanted: int) -> None:
    """Take and give back the numbers from `first` up to `wanted`."""
    for number in range(first, wanted):
        got = calls.inotify_add_watch(fd, "/", _IN_MODIFY)
        calls.inotify_rm_watch(fd, got)
        if got != number:
            raise RebuildError(f"the kernel deals watch number {got} where {number} was due")
        if not number & 0xFFF:
            _drain(fd)


def _add(fd: int, watch: fsnotify_pb2.inotify_wd_entry, restoration: Restoration) -> None:
    if not watch.f_handle.HasField("path"):
        raise RebuildError(f"the image tells no path for inotify watch {watch.wd}")
    path = "/" + os.fsdecode(watch.f_handle.path).lstrip("/")
    target = open_at_root(path, os.O_PATH | os.O_NOFOLLOW, restoration)
    try:
        got = calls.inotify_add_watch(fd, f"/proc/self/fd/{target}", watch.mask & ~_IN_MASK_CREATE)
    finally:
        os.close(target)
    if got != watch.wd:
        raise RebuildError(f"inotify watch {watch.wd} of {path} came to be {got}: two watches lead to one file here")


def _drain(fd: int) -> None:
    """Forget what is queued."""
    size = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    if size:
        os.read(fd, size)
