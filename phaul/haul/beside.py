"""What journals hold of a haul, and how it is finished or undone by whoever finds it there.

At the destination a tree comes in beside its final place (NAME.phaul-MIGRATION), whose name is held by an empty
directory; after the commit it takes that place by one rename(2). At the source the tree that the program has left is
put aside as NAME.migrated when its copy here is dead, so that nobody starts it a second time, and the name is free if
it comes back. One that an earlier migration has put aside is removed then: it is older.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phaul_engine.namespaces.mnt import api
from phaul_engine.proc import lives
from phaul_engine.proc.mountinfo import own_mounts

from . import attributes, btrfs

KIND, LEFT_KIND = "haul", "haul-left"
"""Of journal entries: what has come, and what is left."""
MARK = "trusted.phaul.migrated"
"""Of a directory that was put aside."""
ASIDE = ".migrated"
_ENDING = 3.0  # seconds


def staged_name(final: str, migration: str) -> str:
    """Where a tree comes in."""
    return f"{final}.phaul-{migration}"


def missing_above(path: str) -> list[str]:
    """Which of the directories above a place are not there, the topmost first."""
    return [str(one) for one in reversed(Path(path).parents) if not one.is_dir()]


def entry(final: str, staged: str, made: Iterable[str]) -> dict[str, Any]:
    """What the destination notes before it makes `staged`, `final` and the directories above, the topmost first."""
    return {"kind": KIND, "data": {"final": final, "staged": staged, "made": list(made)}}


def discard(data: dict[str, Any]) -> None:
    """It never runs here: nothing of it is left. OSError if something cannot be removed. An rsync that was started for
    an agent that is dead may still be ending."""
    remove(btrfs.inbox_name(str(data["staged"])))
    remove(str(data["staged"]))
    for directory in (str(data["final"]), *reversed(data["made"])):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def remove(staged: str) -> None:
    """Remove a directory. OSError if something of it stays."""
    deadline = time.monotonic() + _ENDING
    while os.path.lexists(staged):
        try:
            btrfs.remove(staged)
        except OSError:
            if time.monotonic() > deadline:
                raise
            attributes.release(staged)
            time.sleep(0.1)


def publish(data: dict[str, Any]) -> None:
    """It runs here: give the tree its name. OSError if something has come to be there."""
    final, staged = str(data["final"]), str(data["staged"])
    with contextlib.suppress(FileNotFoundError):  # done before
        os.rename(staged, final)


def left_entry(trees: Iterable[str], pids: Iterable[int], mounts: Iterable[str] = ()) -> dict[str, Any]:
    """What the source notes of directories that the program, tasks `pids`, leaves behind, and of file systems that
    nobody else needs."""
    data = {"trees": _known(trees), "mounts": _known(mounts), "tasks": lives.tasks(pids)}
    return {"kind": LEFT_KIND, "data": data}


def _known(paths: Iterable[str]) -> list[list[Any]]:
    found = ((path, os.lstat(path)) for path in paths)
    return [[path, status.st_dev, status.st_ino] for path, status in found]


def _same(path: str, device: int, inode: int) -> bool:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == (device, inode)


def put_aside(data: dict[str, Any]) -> None:
    """Put what the program has left aside, if it is dead here; else do nothing. What is a mount keeps its name. OSError
    if something cannot be put aside."""
    if lives.any_lives(data["tasks"]):
        return
    for path, device, inode in data.get("mounts", ()):
        if _same(path, device, inode):
            api.detach(path)
    for path, device, inode in data["trees"]:
        if not _same(path, device, inode) or any(mount.point == os.path.realpath(path) for mount in own_mounts()):
            continue
        aside = f"{path}{ASIDE}"
        if os.path.lexists(aside):
            if not _ours(aside):
                continue
            remove(aside)
        with contextlib.suppress(OSError):  # a file system without such attributes: nobody removes it later
            os.setxattr(path, MARK, b"")
        os.rename(path, aside)


def _ours(path: str) -> bool:
    try:
        os.getxattr(path, MARK, follow_symlinks=False)
    except OSError:
        return False
    return True
