"""File systems of their own, in files (losetup(8))."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.hosts.host import Host

_SIZE = 500 << 20


def lacks_btrfs() -> str:
    """Why there can be none of btrfs here; empty if there can."""
    if "\tbtrfs\n" not in Path("/proc/filesystems").read_text():
        return "this kernel has no btrfs"
    lacking = [name for name in ("btrfs", "mkfs.btrfs", "losetup") if shutil.which(name) is None]
    return f"{lacking[0]} is not installed" if lacking else ""


@contextlib.contextmanager
def loop(image: Path, kind: str = "btrfs") -> Iterator[str]:
    """A block device with an empty file system."""
    with image.open("w") as file:
        file.truncate(_SIZE)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
    done = subprocess.run(["losetup", "--show", "-f", image], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
        image.unlink()


@contextlib.contextmanager
def btrfs(image: Path, place: Path) -> Iterator[None]:
    """A btrfs that is mounted at a place of the machine."""
    with loop(image) as device:
        subprocess.run(["mount", device, place], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def mounted_on(host: Host, image: Path, place: str, *, kind: str = "btrfs", subvolume: str = "") -> Iterator[None]:
    """The same of a host. With `subvolume` that is mounted, and not the top of the file system."""
    with loop(image, kind) as device:
        node = host.path(device)
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
        host.run(["mount", device, place])
        if subvolume:
            host.run(["btrfs", "subvolume", "create", f"{place}/{subvolume}"])
            host.run(["sh", "-c", f"umount {place} && mount -o subvol={subvolume} {device} {place}"])
        try:
            yield
        finally:
            host.run(["umount", place], check=False)
            node.unlink()
