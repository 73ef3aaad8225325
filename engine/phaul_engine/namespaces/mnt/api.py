"""The kernel's mount interface: mounts as descriptors (open_tree(2), move_mount(2), fsopen(2), mount_setattr(2)).

A mount that was made and is attached nowhere is known by a descriptor alone. Every function raises `OSError` when its
call fails; descriptors that come out are close-on-exec. All of it acts for the calling thread: in its mount namespace,
with its rights.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from contextlib import suppress

from phaul_engine.calls import system_call
from phaul_engine.syscalls import NR

# Flags of mount(2), which are those of images too.
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_MANDLOCK, MS_DIRSYNC = 1, 2, 4, 8, 16, 64, 128
MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME, MS_RELATIME = 1 << 8, 1 << 10, 1 << 11, 1 << 21
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_LAZYTIME = 1 << 25

_ATTR_NOATIME, _ATTR_STRICTATIME, _ATTR_ATIME = 0x10, 0x20, 0x70
_ATTRIBUTES = {
    MS_RDONLY: 0x1,
    MS_NOSUID: 0x2,
    MS_NODEV: 0x4,
    MS_NOEXEC: 0x8,
    MS_NODIRATIME: 0x80,
    MS_NOSYMFOLLOW: 0x200000,
}
"""MOUNT_ATTR_* by MS_* (mount_setattr(2))."""
_ALL = sum(_ATTRIBUTES.values()) | _ATTR_ATIME

_AT_EMPTY_PATH, _AT_RECURSIVE, _AT_NO_AUTOMOUNT = 0x1000, 0x8000, 0x800
_OPEN_TREE_CLONE, _CLOEXEC = 1, os.O_CLOEXEC
_F_EMPTY_PATH, _T_EMPTY_PATH, _SET_GROUP = 0x4, 0x40, 0x100
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _FSPICK_CLOEXEC, _FSPICK_EMPTY_PATH = 1, 1, 1, 8
_SET_FLAG, _SET_STRING, _CMD_CREATE, _CMD_RECONFIGURE = 0, 1, 6, 7
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_CLONE_NEWNS = 0x20000
_HERE = -100  # AT_FDCWD


def clone(path: str, at: int = _HERE, *, recursive: bool = False) -> int:
    """A new mount of the directory or file at `path`, attached nowhere; an empty path is that of the descriptor `at`.
    It is in the peer group of the mount that it is of. What is mounted below is left out, unless `recursive`."""
    flags = _OPEN_TREE_CLONE | _CLOEXEC | _AT_NO_AUTOMOUNT
    flags |= (0 if path else _AT_EMPTY_PATH) | (_AT_RECURSIVE if recursive else 0)
    return system_call(NR.open_tree, at, os.fsencode(path), flags, what=path)


def attach(mount: int, at: int, path: str) -> None:
    """Mount what descriptor `mount` is of at `path`, seen from directory `at` (empty: that itself)."""
    flags = _F_EMPTY_PATH | (0 if path else _T_EMPTY_PATH)
    system_call(NR.move_mount, mount, b"", at, os.fsencode(path), flags, what=path)


def share(source: int, target: int) -> None:
    """Put a private mount into the peer group, and below the master, that another one has (Linux 5.15)."""
    system_call(NR.move_mount, source, b"", target, b"", _SET_GROUP | _F_EMPTY_PATH | _T_EMPTY_PATH)


def set_flags(mount: int, flags: int) -> None:
    """Give a mount the flags MS_*, and no others."""
    wanted = sum(attribute for flag, attribute in _ATTRIBUTES.items() if flags & flag)
    if flags & MS_NOATIME:
        wanted |= _ATTR_NOATIME
    elif not flags & MS_RELATIME:
        wanted |= _ATTR_STRICTATIME
    _set_attributes(mount, wanted, _ALL & ~wanted | _ATTR_ATIME, 0)


def leave_no_trace(mount: int) -> None:
    """Have what is read through a mount keep its access times, unless that is locked (mount_namespaces(7))."""
    with suppress(PermissionError):
        _set_attributes(mount, _ATTR_NOATIME, _ATTR_ATIME, 0)


def set_propagation(mount: int, kind: int, *, recursive: bool = False) -> None:
    """Make a mount MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE; with `recursive` all below it too."""
    _set_attributes(mount, 0, 0, kind, _AT_RECURSIVE if recursive else 0)


def _set_attributes(mount: int, wanted: int, cleared: int, propagation: int, flags: int = 0) -> None:
    text = struct.pack("<4Q", wanted, cleared, propagation, 0)  # struct mount_attr
    buffer = ctypes.create_string_buffer(text, len(text))
    system_call(NR.mount_setattr, mount, b"", _AT_EMPTY_PATH | flags, buffer, len(text))


def new_file_system(kind: str, source: str, options: Iterable[str], super_flags: Iterable[str] = ()) -> int:
    """A file system of type `kind`, as a mount that is attached nowhere. Options are "name=value" or "name", one each;
    those of `super_flags` are "ro" and the like. The error's text is the kernel's own, where it gives one."""
    context = system_call(NR.fsopen, os.fsencode(kind), _FSOPEN_CLOEXEC, what=kind)
    try:
        if source:
            _configure(context, _SET_STRING, "source", source)
        for option in options:
            name, equals, value = option.partition("=")
            _configure(context, _SET_STRING if equals else _SET_FLAG, name, value if equals else None)
        for name in super_flags:
            _configure(context, _SET_FLAG, name, None)
        _configure(context, _CMD_CREATE, None, None)
        return system_call(NR.fsmount, context, _FSMOUNT_CLOEXEC, 0)
    except OSError as error:
        reason = _reason(context)
        raise OSError(error.errno, f"{error.strerror}{': ' if reason else ''}{reason}", kind) from error
    finally:
        os.close(context)


def reconfigure(mount: int, super_flags: Iterable[str]) -> None:
    """Give the file system that a mount is of flags ("ro", "rw")."""
    context = system_call(NR.fspick, mount, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH)
    try:
        for name in super_flags:
            _configure(context, _SET_FLAG, name, None)
        _configure(context, _CMD_RECONFIGURE, None, None)
    finally:
        os.close(context)


def _configure(context: int, command: int, name: str | None, value: str | None) -> None:
    key, text = (None if one is None else os.fsencode(one) for one in (name, value))
    system_call(NR.fsconfig, context, command, key, text, 0, what=name or "")


def _reason(context: int) -> str:
    """The last message of a file system context (fsopen(2)), such as "e tmpfs: Bad value for 'size'"."""
    lines = []
    while True:
        try:
            lines.append(os.read(context, 512).decode(errors="replace").strip().removeprefix("e "))
        except OSError:
            return "; ".join(lines)


def detach(path: str) -> None:
    """Unmount what is on top at `path`, with all that is mounted below it."""
    system_call(NR.umount2, os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW, what=path)


def pivot() -> None:
    """Make the mount whose root is the calling thread's working directory the root of its mount namespace, and unmount
    what was (pivot_root(2)). Tasks whose root directory was that root are taken along."""
    system_call(NR.pivot_root, b".", b".")
    system_call(NR.umount2, b".", _MNT_DETACH)  # the old root lies on top of the new one
    os.chdir("/")


def own_namespace() -> None:
    """Give the calling thread a copy of its mount namespace; it must share its directories with nobody."""
    system_call(NR.unshare, _CLONE_NEWNS)
