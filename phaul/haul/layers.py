"""What a file system of layers (overlayfs) is made of, where a directory that a workload lives on is one.

The lower directories are an image: they have to be at the destination, under the same names. The upper one is what was
written over it, and travels; the work directory is the kernel's own, and is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from phaul_engine.errors import EngineError
from phaul_engine.proc.mountinfo import Mount

_KEPT = ("redirect_dir", "index", "metacopy", "xino", "nfs_export", "volatile", "userxattr", "default_permissions")
_OF_THE_HOST = ("rw", "nouserxattr", "uuid")  # what follows from its kernel, or is another number there anyway
_UNWIELDY = frozenset(":,\\")  # in a name they would have to be escaped, for every kernel in its own way
_LONGEST = 4000  # bytes of options that mount(2) takes


@dataclass(frozen=True)
class Layers:
    """The directories, the topmost lower one first; `options` are the file system's, `flags` the mount's."""

    lower: tuple[str, ...]
    upper: str = ""
    work: str = ""
    options: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        """The directory that the upper and the work directory are in."""
        return os.path.dirname(self.upper)

    @property
    def directories(self) -> tuple[str, ...]:
        """All of them."""
        return (self.upper, self.work, *self.lower)

    @property
    def text(self) -> str:
        """What mount(2) is told."""
        places = (f"lowerdir={':'.join(self.lower)}", f"upperdir={self.upper}", f"workdir={self.work}")
        return ",".join((*places, *self.options))

    @property
    def problem(self) -> str:
        """Why it cannot be mounted elsewhere."""
        strange = next((one for one in self.directories if _unusable(one)), None)
        unknown = [one for one in self.options if one.partition("=")[0] not in _KEPT]
        if not self.upper or not self.work:
            return "nothing can be written to it"
        if strange is not None:
            return f"it was mounted with the directory {strange!r}, which is no name that another host could look for"
        if unknown:
            return f"it was mounted with the option {unknown[0]}, of which phaul knows nothing"
        if self.home == "/" or os.path.dirname(self.work) != self.home:
            return f"its directories {self.upper} and {self.work} are not in one directory of their own"
        if len(os.fsencode(self.text)) > _LONGEST:
            return "the names of its directories are too long for one mount(2)"
        return ""


def _unusable(path: str) -> bool:
    return not path.startswith("/") or os.path.normpath(path) != path or bool(_UNWIELDY & set(path)) or "\0" in path


def of(path: str, mounts: Iterable[Mount]) -> Layers | None:
    """Those of a directory that is such a file system; None for any other."""
    here = [mount for mount in mounts if mount.point == os.path.realpath(path)]
    if not here or here[-1].fstype != "overlay" or here[-1].root != "/":
        return None
    lower: list[str] = []
    places = {"upperdir": "", "workdir": ""}
    options: list[str] = []
    for option in here[-1].super_options:
        name, _, value = option.partition("=")
        if name in ("lowerdir", "lowerdir+"):
            lower += value.split(":") if name == "lowerdir" else [value]
        elif name in places:
            places[name] = value
        elif name not in _OF_THE_HOST:
            options.append(option)
    flags = tuple(one for one in here[-1].options if one not in ("ro", "rw"))
    return Layers(tuple(lower), places["upperdir"], places["workdir"], tuple(options), flags)


def among(paths: Iterable[str], mounts: Iterable[Mount]) -> dict[str, Layers]:
    """Which of these directories are such file systems."""
    mounts = tuple(mounts)
    found = ((path, of(path, mounts)) for path in paths)
    return {path: layers for path, layers in found if layers is not None}


def checked(said: Any) -> dict[str, Layers]:
    """Those that the other host speaks of; EngineError for what makes no sense."""
    try:
        known = {str(path): Layers(**{key: _words(value) for key, value in one.items()}) for path, one in said.items()}
    except (AttributeError, TypeError) as error:
        raise EngineError("the source speaks of a file system in a way that this phaul cannot read") from error
    for path, one in known.items():
        if one.problem:
            raise EngineError(f"{path} cannot be mounted as it is at the source: {one.problem}")
    return known


def _words(value: Any) -> Any:
    return str(value) if isinstance(value, str) else tuple(map(str, value))


def below(path: str, directory: str) -> bool:
    """Whether a path is in a directory."""
    return path.startswith(f"{directory.rstrip('/')}/")


def inside(root: str, overlays: Mapping[str, Layers]) -> tuple[str, ...]:
    """What of a directory is a layer that travels by itself, seen from its top."""
    found = (path for layers in overlays.values() for path in (layers.upper, layers.work))
    return tuple(path[len(root) + 1 :] for path in found if below(path, root))
