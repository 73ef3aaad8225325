"""Small Debians with systemd, made once from packages of the machine's mirror and kept in .state.

`python -m tests.debian` makes the tests' own: they have a network of their own, where there is no mirror.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

STATE = Path(__file__).parents[1] / ".state" / "debian"
PACKAGES = (
    "systemd-sysv",
    "dbus",
    "libpam-systemd",
    "openssh-server",
    "cron",
    "nginx-light",
    "iproute2",
    "redis-server",
)
SUITE = "bookworm"
_WASTE = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man")


def missing() -> str:
    """Why there is none; empty if there is one."""
    return "" if _place().exists() else "make it first: python -m tests.debian"


def _place() -> Path:
    return STATE / hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]


def tree() -> Path:
    """The directory of one, which nobody may change. One builder at a time makes it; it gets its name when it is
    whole."""
    place = _place()
    STATE.mkdir(parents=True, exist_ok=True)
    with open(STATE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            draft = place.with_suffix(".new")
            shutil.rmtree(draft, ignore_errors=True)
            alone = ("unshare", "--mount", "--propagation", "private")  # what debootstrap mounts there goes with it
            words = ("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(draft))
            subprocess.run([*alone, *words], check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=1200)
            for waste in _WASTE:
                shutil.rmtree(draft / waste, ignore_errors=True)
            draft.rename(place)
    return place


def copy(destination: Path, shift: int = 0) -> None:
    """A copy of one that is there, whose owners are `shift` higher, as a user namespace maps them."""
    subprocess.run(["cp", "-a", "--one-file-system", _place(), destination], check=True)
    if not shift:
        return
    for directory, below, files in os.walk(destination):
        for path in (Path(directory), *(Path(directory, name) for name in (*below, *files))):
            status = path.lstat()
            if status.st_uid < shift:
                os.lchown(path, status.st_uid + shift, status.st_gid + shift)
                if not path.is_symlink():
                    path.chmod(status.st_mode & 0o7777)  # set-user-id has gone with the owner


if __name__ == "__main__":
    tree()
