"""What is known of types of file systems: what of one is in images, and whether it can be made anew."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from phaul_engine.images.pb import mnt_pb2
from phaul_engine.proc.mountinfo import Mount

from . import api
from .ids import Ids


class Way(enum.Enum):
    """How a file system gets to the other host."""

    NEW = enum.auto()  # made anew, and shows what there is: processes, network, groups
    CONTENT = enum.auto()  # made anew, and filled
    LAYERED = enum.auto()  # made anew over directories of other mounts
    OUTSIDE = enum.auto()  # found there


_NAMED = {
    "proc": mnt_pb2.PROC,
    "sysfs": mnt_pb2.SYSFS,
    "devtmpfs": mnt_pb2.DEVTMPFS,
    "binfmt_misc": mnt_pb2.BINFMT_MISC,
    "tmpfs": mnt_pb2.TMPFS,
    "devpts": mnt_pb2.DEVPTS,
    "simfs": mnt_pb2.SIMFS,
    "pstore": mnt_pb2.PSTORE,
    "securityfs": mnt_pb2.SECURITYFS,
    "fusectl": mnt_pb2.FUSECTL,
    "debugfs": mnt_pb2.DEBUGFS,
    "cgroup": mnt_pb2.CGROUP,
    "aufs": mnt_pb2.AUFS,
    "mqueue": mnt_pb2.MQUEUE,
    "fuse": mnt_pb2.FUSE,
    "overlay": mnt_pb2.OVERLAYFS,
    "autofs": mnt_pb2.AUTOFS,
    "tracefs": mnt_pb2.TRACEFS,
    "cgroup2": mnt_pb2.CGROUP2,
}
_TYPES: dict[int, str] = {code: name for name, code in _NAMED.items()}
_SINGLE = {
    *("sysfs", "devtmpfs", "binfmt_misc", "pstore", "securityfs", "fusectl", "debugfs", "cgroup", "cgroup2", "mqueue"),
    *("tracefs", "configfs", "selinuxfs", "efivarfs"),
}
"""Of these there is one, for the kernel or a namespace of another kind: another mount shows the same."""
_FREE = {"cgroup", "cgroup2"}
"""Those that the tree's own root may mount wherever he is, in a user namespace too."""
_BY_NAME = {"ramfs", "hugetlbfs", "configfs", "selinuxfs", "efivarfs"}
"""CRIU knows them by name only (`AUTO`)."""
_CONTENT = {"tmpfs", "ramfs", "hugetlbfs"}
_NEW = _SINGLE | {"proc", "devpts"}
_FLAGS = {
    "ro": api.MS_RDONLY,
    "sync": api.MS_SYNCHRONOUS,
    "dirsync": api.MS_DIRSYNC,
    "mand": api.MS_MANDLOCK,
    "lazytime": api.MS_LAZYTIME,
}
_MOUNT_FLAGS = {
    "ro": api.MS_RDONLY,
    "nosuid": api.MS_NOSUID,
    "nodev": api.MS_NODEV,
    "noexec": api.MS_NOEXEC,
    "noatime": api.MS_NOATIME,
    "nodiratime": api.MS_NODIRATIME,
    "relatime": api.MS_RELATIME,
    "nosymfollow": api.MS_NOSYMFOLLOW,
}
_NOT_GIVEN = {"rw", "seclabel"}  # shown among the options of a file system, not to be given to a new one


def code(kind: str) -> tuple[int, str]:
    """Type and name of a type of file system in images; the name is empty where the type says it."""
    if kind in _NAMED:
        return _NAMED[kind], ""
    return (mnt_pb2.AUTO, kind) if kind in _BY_NAME else (mnt_pb2.UNSUPPORTED, "")


def kind_of(entry: mnt_pb2.mnt_entry) -> str:
    """The type of file system of an image entry; empty if the image does not tell."""
    return entry.fsname if entry.fstype == mnt_pb2.AUTO else _TYPES.get(entry.fstype, "")


def way(kind: str) -> Way:
    """How a file system of this type moves."""
    if kind in _CONTENT:
        return Way.CONTENT
    if kind == "overlay":
        return Way.LAYERED
    return Way.NEW if kind in _NEW else Way.OUTSIDE


def same_anywhere(kind: str, ids: Ids, *, own_groups: bool) -> bool:
    """Whether all mounts of this type show the same, as long as namespaces of other kinds are the same; and root of a
    user namespace may make one. `own_groups` says that the tree has a cgroup namespace of its own."""
    return kind in _SINGLE and (ids.same or (kind in _FREE and own_groups))


def may_make(kind: str, ids: Ids, *, own_groups: bool) -> bool:
    """Whether root of a user namespace may mount this type, if any."""
    return kind not in _FREE or ids.same or own_groups


def mount_flags(options: Iterable[str]) -> int:
    """MS_* of the options of a mount."""
    return sum(_MOUNT_FLAGS.get(option, 0) for option in options)


def propagation_flags(mount: Mount) -> int:
    """MS_* of how a mount passes on what is mounted."""
    shared = api.MS_SHARED if mount.propagates("shared") else 0
    slave = api.MS_SLAVE if mount.propagates("master") else 0
    return shared | slave | (api.MS_UNBINDABLE if "unbindable" in mount.propagation else 0)


def super_flags(options: Iterable[str]) -> int:
    """MS_* of the options of a file system."""
    return sum(_FLAGS.get(option, 0) for option in options)


def super_flag_names(flags: int) -> list[str]:
    """The opposite."""
    return [name for name, flag in _FLAGS.items() if flags & flag]


def pack_options(kind: str, options: Iterable[str]) -> bytes:
    """A file system's options as images hold them."""
    kept = [option for option in options if option not in _FLAGS and option not in _NOT_GIVEN]
    if kind == "devpts":
        kept.append("newinstance")  # CRIU asks for it
    return ",".join(option.replace(",", "\\,") for option in kept).encode("utf-8", "surrogateescape")


def unpack_options(entry: mnt_pb2.mnt_entry) -> list[str]:
    """The opposite, for fsconfig(2)."""
    text = entry.options.decode("utf-8", "surrogateescape").replace("\\,", "\0")
    options = [option.replace("\0", ",") for option in text.split(",") if option]
    return [option for option in options if option != "newinstance"]
