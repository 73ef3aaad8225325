"""A file system of layers at the destination: mounted over an upper directory that is empty at first, and filled
through the mount.

Until the commit the upper and the work directory lie beside their place: in the tree that they come with, or in a
directory HOME.phaul-MIGRATION. The kernel shows by which names a file system was mounted, and the next migration goes
by these; so it is mounted in a mount namespace of its own, where all have their final names, and taken out of there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from phaul_engine.calls import system_call
from phaul_engine.errors import EngineError
from phaul_engine.namespaces.mnt import api, filesystems
from phaul_engine.objects import places as namespaces
from phaul_engine.proc.mountinfo import own_mounts
from phaul_engine.syscalls import NR

from . import beside
from .layers import Layers, below
from .places import Places

KIND = "haul-overlay"
"""Of a journal entry."""
_HERE = -100  # AT_FDCWD
_SCRATCH = "/proc"  # a directory that there always is, and that nobody needs in that namespace


def entry(point: str, layers: Layers, staged: Places, migration: str, trees: Iterable[str]) -> dict[str, Any]:
    """What the journal must hold before anything of it is made. `trees` come along too."""
    kept = [path for path in (layers.home, point) if not any(below(path, tree) or path == tree for tree in trees)]
    made = [one for path in kept for one in (*beside.missing_above(path), path) if not os.path.isdir(one)]
    own = layers.home in kept
    if own:
        made += [path for path in (layers.upper, layers.work) if not os.path.isdir(path)]
    data = {
        "at": staged.now(point),
        "beside": beside.staged_name(layers.home, migration) if own else "",
        "names": [os.path.basename(layers.upper), os.path.basename(layers.work)],
        "home": layers.home,
        "made": list(dict.fromkeys(made)),
    }
    return {"kind": KIND, "data": data}


def make(data: Mapping[str, Any], layers: Layers, staged: Places) -> None:
    """Make the directories, and mount it. OSError or EngineError where that cannot be."""
    for directory in data["made"]:
        with contextlib.suppress(FileExistsError):  # another tree needs it too
            os.mkdir(directory, 0o700 if directory == layers.home else 0o755)  # an upper directory is for nobody else
    home = str(data["beside"]) or staged.now(layers.home)
    if data["beside"]:
        os.mkdir(home, 0o700)
    for name in data["names"]:
        os.mkdir(f"{home}/{name}", 0o755)
    with contextlib.suppress(FileExistsError):
        os.mkdir(data["at"], 0o755)
    own = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        mount = namespaces.inside({"mnt": own}, lambda: _mount(layers, staged, str(data["beside"])))
    except OSError as error:
        raise EngineError(f"{error.filename} cannot be mounted as {data['at']}: {error.strerror}") from error
    finally:
        os.close(own)
    try:
        api.attach(mount, _HERE, str(data["at"]))
    finally:
        os.close(mount)


def _mount(layers: Layers, staged: Places, home: str) -> int:
    """A mount that is attached nowhere. The calling thread is good for nothing else afterwards."""
    api.own_namespace()
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    api.set_propagation(root, api.MS_PRIVATE, recursive=True)
    os.close(root)
    for final, now in staged.staged:
        _bind(api.clone(now), final)
    made = []
    if home:
        hidden = {path[len(layers.home) + 1 :].partition("/")[0] for path in layers.lower if below(path, layers.home)}
        shown = {name: api.clone(f"{layers.home}/{name}", recursive=True) for name in hidden}
        for name, mount in shown.items():  # what lies beside the upper directory, and would be hidden
            made.append(f"{home}/{name}")
            os.mkdir(made[-1])
            _bind(mount, made[-1])
        _bind(api.clone(home, recursive=True), layers.home)
    try:
        flags = filesystems.mount_flags(layers.flags)
        text = os.fsencode(layers.text)
        system_call(NR.mount, b"overlay", os.fsencode(_SCRATCH), b"overlay", flags, text, what=layers.text)
        return api.clone(_SCRATCH)
    finally:
        for directory in made:
            api.detach(directory)
            os.rmdir(directory)


def _bind(mount: int, place: str) -> None:
    try:
        api.attach(mount, _HERE, place)
    finally:
        os.close(mount)


def discard(data: dict[str, Any]) -> None:
    """It never runs here: nothing of it is left. OSError if something cannot be removed."""
    for mount in own_mounts():
        if mount.point == data["at"]:
            api.detach(data["at"])
    if data["beside"]:
        beside.remove(str(data["beside"]))
    for directory in reversed(data["made"]):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def publish(data: dict[str, Any]) -> None:
    """It runs here: the directories get their names. OSError if something has come to be there."""
    if not data["beside"]:
        return
    for name in data["names"]:
        with contextlib.suppress(FileNotFoundError):  # done before
            os.rename(f"{data['beside']}/{name}", f"{data['home']}/{name}")
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(data["beside"])
