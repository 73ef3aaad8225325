"""Files with all that files can have, and what can be seen of them."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any


def make_something_of_everything(top: Path) -> None:
    """Files of all types, with all that files can have."""
    top.mkdir()
    top.chmod(0o2775)
    (top / "file").write_text("content")
    os.chown(top / "file", 12345, 54321)
    (top / "file").chmod(0o4755)
    os.link(top / "file", top / "other name")
    os.setxattr(top / "file", "user.colour", b"red\0green")
    os.setxattr(top / "file", "trusted.secret", b"\xff")
    os.setxattr(top / "file", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.symlink("../nowhere/at all", top / "link")
    os.lchown(top / "link", 77, 78)
    os.mkfifo(top / "fifo", 0o620)
    os.mknod(top / "device", stat.S_IFCHR | 0o640, os.makedev(1, 3))
    subprocess.run(["truncate", "-s", "20M", top / "holes"], check=True)
    with (top / "holes").open("r+b") as file:
        file.seek(10 << 20)
        file.write(b"in the middle")
    (top / "na\udcffme\n[x]*").write_bytes(b"no text")
    (top / "directory").mkdir()
    default = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000000ffffffff")
    os.setxattr(top / "directory", "system.posix_acl_default", default)
    for number in range(60):
        (top / "directory" / f"{number}").write_text(f"{number}\n" * number)
    for path in (top / "file", top / "directory", top):
        os.utime(path, ns=(1, 1_234_567_890_123_456_789))


def describe(top: Path) -> dict[str, Any]:
    """All that can be seen of files, but inode numbers, times of access and change, and names that are one file's."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for directory, directories, files in os.walk(top):
        for path in (Path(directory, name) for name in sorted((*directories, *files))):
            status = path.lstat()
            name = str(path.relative_to(top))
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in _attributes(path)}
            content: Any = None
            if stat.S_ISREG(status.st_mode):
                content = status.st_size, status.st_blocks if status.st_size > 1 << 20 else 0, path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            same = first.setdefault(status.st_ino, name) if not path.is_dir() else name
            owner = (status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_nlink)
            found[name] = (*owner, status.st_mtime_ns, attributes, content, same)
    return found


def _attributes(path: Path) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))
