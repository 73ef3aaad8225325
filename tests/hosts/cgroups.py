"""cgroup v2 directories as this machine shows them: where they are, who is in them, how they go away."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path


def unified_mount() -> Path:
    """The mount point of cgroup2, /sys/fs/cgroup on Debian, /sys/fs/cgroup/unified beside version 1."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] == "cgroup2":
            return Path(before.split(" ")[4])
    raise FileNotFoundError("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")


def own_cgroup() -> Path:
    """The directory of the calling process's cgroup2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return unified_mount() / line[3:].lstrip("/")
    raise FileNotFoundError("/proc/self/cgroup has no line of cgroup2")


def below(top: Path) -> Iterator[Path]:
    """`top` and every cgroup in it, children before their parents."""
    for directory, _, _ in os.walk(top, topdown=False):
        yield Path(directory)


def members(top: Path) -> list[int]:
    """The processes in `top` and below, as PIDs of the caller's namespace (0: outside of it)."""
    found: list[int] = []
    for directory in below(top):
        try:
            found += [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]
        except (FileNotFoundError, OSError):  # gone, or a threaded cgroup (EOPNOTSUPP), whose root lists them
            continue
    return found


def enter(cgroup: Path) -> None:
    """Move the calling process there (about 6 ms: the kernel waits for a grace period)."""
    (cgroup / "cgroup.procs").write_text("0")


def remove(top: Path, timeout: float = 5.0) -> None:
    """Kill what is in `top`, frozen or not, wait until it is empty, and remove it with all below.

    Raises TimeoutError when a process does not end within `timeout` seconds.
    """
    if not top.is_dir():
        return
    (top / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + timeout
    while "populated 1" in (top / "cgroup.events").read_text():
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {members(top)} in {top} do not end")
        time.sleep(0.005)
    for directory in below(top):
        directory.rmdir()
