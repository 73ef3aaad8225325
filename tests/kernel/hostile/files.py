"""Hostile files, paths and directories."""

from __future__ import annotations

import os
import stat

from phaul_engine.images.pb import (
    fdinfo_pb2,
    ghost_file_pb2,
)

from tests.kernel.hostile.breaking import (
    CANNOT_OPEN,
    HUGE64,
    OTHER_TYPE,
    UNKNOWN,
    Break,
    add_file,
    add_named,
    carried,
    data,
    file,
    ghost,
    ids,
    linked,
    lock,
    memory,
    named,
    root,
)
from tests.unit.images.checkpoints import fill

FILES: dict[str, tuple[str, Break]] = {
    "type of another sort": ("is of type", lambda c: setattr(file(c, "pipe"), "type", fdinfo_pb2.EVENTFD)),
    "two sorts at once": ("is of type", lambda c: fill(file(c, "efd").pipe)),
    "no sort at all": ("is of type 6 and has nothing", lambda c: file(c, "efd").ClearField("efd")),
    "id that differs inside": ("holds the id 4000000", lambda c: setattr(file(c, "efd").efd, "id", UNKNOWN)),
    "sort that nobody can make": ("cannot be made again", lambda c: add_file(c, fdinfo_pb2.BPFMAP, "bpf")),
    "descriptor of nothing": (
        "refers to file 4000000",
        lambda c: c.put(
            "fdinfo", ids(c).files_id, fdinfo_pb2.fdinfo_entry(id=UNKNOWN, flags=0, type=fdinfo_pb2.REG, fd=99)
        ),
    ),
    "descriptor two billion": (
        "has descriptor 2147483647",
        lambda c: setattr(c.records("fdinfo", ids(c).files_id)[0].message, "fd", (1 << 31) - 1),
    ),
    "descriptor ten million": (
        "dup3|descriptor",
        lambda c: setattr(c.records("fdinfo", ids(c).files_id)[0].message, "fd", 10_000_000),
    ),
    "descriptor with strange flags": (
        "has flags 0x6",
        lambda c: setattr(c.records("fdinfo", ids(c).files_id)[0].message, "flags", 6),
    ),
    "directory that is not there": (
        "refers to file 4000000",
        lambda c: setattr(c.one("fs", root(c).pid), "cwd_id", UNKNOWN),
    ),
    "directory that is a file": (
        "working directory",
        lambda c: setattr(c.one("fs", root(c).pid), "cwd_id", data(c).id),
    ),
    "root that is a file": ("root directory", lambda c: setattr(c.one("fs", root(c).pid), "root_id", data(c).id)),
    "relative path": ("no absolute path", lambda c: setattr(data(c), "name", b"etc/passwd")),
    "empty path": ("no absolute path", lambda c: setattr(data(c), "name", b"")),
    "path with a zero byte": ("has a file named", lambda c: setattr(data(c), "name", b"/etc/passwd\0/x")),
    "path of five thousand bytes": ("has a file named", lambda c: setattr(data(c), "name", b"/" + b"a/" * 2500)),
    "path out of the root": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/../../../../no/such/file")),
    "path through a link of /proc": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/self/root/etc/passwd")),
    "path to a descriptor of ours": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/self/fd/0")),
    "path to our own executable": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/self/exe")),
    "path to another's directory": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/proc/1/cwd/etc/passwd")),
    "path with a ring of links": (
        CANNOT_OPEN,
        lambda c: setattr(data(c), "name", os.path.dirname(data(c).name) + b"/ring"),
    ),
    "path through a file": (CANNOT_OPEN, lambda c: setattr(data(c), "name", b"/etc/passwd/x")),
    "fifo that is said to be a file": (OTHER_TYPE, lambda c: setattr(data(c), "name", named(c, b"/fifo").name)),
    "fifo that says nothing": (
        OTHER_TYPE,
        lambda c: (
            data(c).ClearField("mode"),
            setattr(data(c), "flags", 0),
            setattr(data(c), "name", named(c, b"/fifo").name),
        ),
    ),
    "device that is said to be a file": (OTHER_TYPE, lambda c: setattr(data(c), "name", b"/dev/tty")),
    "device that says nothing": (
        OTHER_TYPE,
        lambda c: (data(c).ClearField("mode"), setattr(data(c), "name", b"/dev/tty")),
    ),
    "device with state": (OTHER_TYPE, lambda c: add_named(c, b"/dev/tty", stat.S_IFCHR | 0o666)),
    "socket that is said to be a file": (
        OTHER_TYPE,
        lambda c: setattr(data(c), "name", os.path.dirname(data(c).name) + b"/stale"),
    ),
    "file of another size": ("bytes here and had", lambda c: setattr(data(c), "size", 1 << 40)),
    "file of another mode": ("has mode", lambda c: setattr(data(c), "mode", stat.S_IFREG | 0o4777)),
    "offset of 16 exabytes": ("cannot be made again here", lambda c: setattr(data(c), "pos", HUGE64)),
    "signals for nobody": (
        "an owner of signals",
        lambda c: (setattr(data(c).fown, "pid", UNKNOWN), setattr(data(c).fown, "pid_type", 1)),
    ),
    "signals for a kind that there is not": (
        "of unknown kind 9",
        lambda c: (setattr(data(c).fown, "pid", root(c).pid), setattr(data(c).fown, "pid_type", 9)),
    ),
    "signal 1000": ("cannot be made again here", lambda c: setattr(data(c).fown, "signum", 1000)),
    "second name that is a precious file": (
        "for the time of the move",
        lambda c: linked(c, os.path.dirname(data(c).name) + b"/victim"),
    ),
    "second name through another directory": (
        "for the time of the move",
        lambda c: linked(c, b"/etc/link_remap.5/passwd"),
    ),
    "second name that is not there": (CANNOT_OPEN, lambda c: linked(c, b"/tmp/link_remap.77")),
    "two stand-ins for a file": (
        "more than once",
        lambda c: linked(c, b"/tmp/link_remap.77", 2),
    ),
    "deleted file without an image": (
        "ghost-file-63.img: is missing",
        lambda c: (ghost(c), c.remove("ghost-file", 99)),
    ),
    "deleted file with a relative path": ("no possible path", lambda c: ghost(c, path=b"tmp/x")),
    "deleted file above": ("no possible path", lambda c: ghost(c, path=b"/tmp/../etc/x")),
    "deleted file that is a directory's own entry": ("no possible path", lambda c: ghost(c, path=b"/tmp/..")),
    "deleted file below a file": ("cannot be made again here", lambda c: ghost(c, path=b"/etc/passwd/x")),
    "deleted disk": ("impossible type", lambda c: ghost(c, stat.S_IFBLK | 0o666, rdev=8 << 20)),
    "deleted physical memory": ("impossible type", lambda c: ghost(c, stat.S_IFCHR | 0o666, rdev=1 << 20 | 1)),
    "deleted socket": ("impossible type", lambda c: ghost(c, stat.S_IFSOCK | 0o666)),
    "deleted file of 16 exabytes": (
        "deleted file of 18446744073709551615 bytes",
        lambda c: ghost(c, size=HUGE64, chunks=True),
    ),
    "deleted file that the file system cannot hold": (
        "cannot be made again here",
        lambda c: ghost(c, size=(1 << 63) - 1, chunks=True),
    ),
    "piece of a deleted file that wraps": (
        "of a deleted file at",
        lambda c: (
            ghost(c, chunks=True, size=9),
            c.put("ghost-file", 99, ghost_file_pb2.ghost_chunk_entry(len=1, off=HUGE64), b"x"),
        ),
    ),
    "deleted file of the year 10^12": (
        "of the time",
        lambda c: (
            ghost(c),
            setattr(fill(c.one("ghost-file", 99).mtim), "tv_sec", HUGE64),
            fill(c.one("ghost-file", 99).atim),
        ),
    ),
    "deleted link without end": (
        "deleted file of",
        lambda c: ghost(c, stat.S_IFLNK | 0o777, symlnk_target=b"x" * 5000),
    ),
    "carried file on a disk": ("is no tmpfs here", lambda c: carried(c, b"/etc/phaul-hostile")),
    "carried file with a relative path": ("no absolute path", lambda c: carried(c, b"dev/shm/x")),
    "carried file above": ("no absolute path|cannot make|no tmpfs", lambda c: carried(c, b"/dev/shm/..")),
    "carried file where one is": ("exists here", lambda c: carried(c, b"/dev/shm/phaul-hostile-victim")),
    "memory file without an inode": (
        "refers to inode 4000000",
        lambda c: setattr(file(c, "memfd").memfd, "inode_id", UNKNOWN),
    ),
    "memory file of 16 exabytes": ("has memory file", lambda c: setattr(memory(c), "size", HUGE64)),
    "memory file with a long name": ("an impossible name", lambda c: setattr(memory(c), "name", b"n" * 300)),
    "memory file with seals that there are not": ("an impossible name", lambda c: setattr(memory(c), "seals", 0x1000)),
    "memory file with flags of others": ("with flags 0x7", lambda c: setattr(memory(c), "hugetlb_flag", 7)),
    "memory file with pages that there are not": (
        "cannot be made again here",
        lambda c: setattr(memory(c), "hugetlb_flag", 63 << 26),
    ),
    "lock of an unknown kind": ("unknown kind", lambda c: lock(c, flag=4096)),
    "lock of an impossible type": ("impossible file lock", lambda c: lock(c, type=9)),
    "lock before the beginning": ("impossible file lock", lambda c: lock(c, start=-5)),
    "lock of a descriptor that is not there": ("which is not there", lambda c: lock(c, fd=900)),
    "lock of a process that is not there": ("which is not there", lambda c: lock(c, pid=UNKNOWN)),
    "lock that wraps": ("lock fd", lambda c: lock(c, start=(1 << 63) - 1, len=(1 << 63) - 1)),
    "version of the future": ("version 9", lambda c: setattr(c.one("inventory"), "img_version", 9)),
    "layout of the past": ("out of use", lambda c: c.one("inventory").ClearField("fdinfo_per_id")),
}
