"""Where a container is on a host: its configuration, private area and mount point (vz(5), ve.conf(5)).

A private area of layout 4 has the container's files in `fs`; layout 5 has images of disks. `ve.conf` in it is the
configuration, to which /etc/vz/conf/CTID.conf is a link; `scripts` has what vzctl runs as the host's root.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phaul_engine.proc.mountinfo import own_mounts

from phaul.errors import PhaulError
from phaul.events import Finding
from phaul.workloads import commands

from . import config
from .config import Config

ETC = Path("/etc/vz")
RUN = Path("/run/ve")
LAYOUT, CONF, OWNER, FS, SCRIPTS, DUMP = ".ve.layout", "ve.conf", ".owner", "fs", "scripts", "dump"
MIGRATED = ".migrated"
"""What vzmigrate(8), too, puts behind the name of a private area that was left."""
_CTID = re.compile(r"[1-9][0-9]{2,9}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME = re.compile(r"[A-Za-z0-9 _.{}-]{1,64}")
_ACTIONS = ("start", "stop", "mount", "umount", "premount", "postumount", "prestart", "poststop", "netup")


@dataclass(frozen=True)
class Area:
    """A container's place on this host."""

    ctid: str
    private: str
    root: str

    @property
    def fs(self) -> str:
        """The container's files, in layout 4."""
        return f"{self.private}/{FS}"


def check_ctid(text: str) -> str:
    """The id of a container: a number, or a UUID since OpenVZ 7. PhaulError for anything else."""
    if not _CTID.fullmatch(text):
        raise PhaulError(f"{text!r} is no id of a container")
    return text


def check_name(text: str) -> str:
    """What an operator may call a container; PhaulError for anything else."""
    if not _NAME.fullmatch(text) or text.startswith("-"):
        raise PhaulError(f"{text!r} is no name or id of a container")
    return text.strip("{}")


def of(ctid: str, parameters: Config) -> Area:
    """Where a configuration says that a container is, or the host's does for all. PhaulError if neither does."""
    both = config.read(ETC / "vz.conf") | {name: value for name, value in parameters.items() if value}
    paths = [config.expand(both.get(name, ""), ctid) for name in ("VE_PRIVATE", "VE_ROOT")]
    for path in paths:
        if not path.startswith("/") or os.path.normpath(path) != path or "$" in path:
            raise PhaulError(f"{ETC / 'vz.conf'} says that containers are in {path!r}")
    return Area(ctid, *paths)


def conf_path(ctid: str) -> Path:
    """Where vzctl looks for a container's configuration."""
    return ETC / "conf" / f"{ctid}.conf"


def layout(private: str) -> int:
    """The layout of a private area, 0 if it is none that is known."""
    try:
        return int(os.readlink(f"{private}/{LAYOUT}"))
    except (OSError, ValueError):
        return 0


def first_process(ctid: str) -> int:
    """What vzctl has noted as a container's first process, as the host counts."""
    path = RUN / f"{ctid}.init.pid"
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise PhaulError(f"{path} does not say which process is the container's first: {error}") from error


def owner(private: str) -> str:
    """The host that a private area is registered for; empty if it does not say."""
    with contextlib.suppress(OSError):
        return Path(private, OWNER).read_text(errors="replace").strip()[:256]
    return ""


def scripts(private: str, ctid: str) -> Iterator[str]:
    """What vzctl would run, as the host's root, for this container alone."""
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(f"{private}/{SCRIPTS}/{name}" for name in os.listdir(f"{private}/{SCRIPTS}"))
    yield from (str(path) for path in (ETC / "conf" / f"{ctid}.{name}" for name in _ACTIONS) if path.exists())


def mounted_at(path: str) -> bool:
    """Whether something is mounted there; a directory of the same file system, too (layout 4)."""
    return any(str(mount.point) == path for mount in own_mounts())


def taken(area: Area) -> Iterator[Finding]:
    """Whether the places of a container are free here. Its files may be there already."""
    if os.path.lexists(conf_path(area.ctid)):
        text = f"a container {area.ctid} is registered there already"
        yield Finding("blocker", "vz-ctid", text, f"remove it there: vzctl destroy {area.ctid}, or vzctl unregister")
    if mounted_at(area.root):
        yield Finding("blocker", "vz-root", f"something is mounted at {area.root} there", f"umount {area.root}")
    names = os.listdir(area.private) if os.path.isdir(area.private) else []
    others = [name for name in names if name != FS and not name.startswith(f"{FS}.phaul-")]  # where files come in
    if os.path.lexists(area.private) and (others or os.path.islink(area.private)):
        text = f"there is a private area {area.private} there already"
        yield Finding("blocker", "vz-private", text, f"move it away there: mv {area.private} {area.private}.old")


def make(area: Area, text: str, number: int) -> None:
    """A private area around the container's files, with nothing that vzctl runs."""
    for path in (area.private, *(f"{area.private}/{name}" for name in (SCRIPTS, DUMP))):
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    os.symlink(str(number), f"{area.private}/{LAYOUT}")
    configure(area, text)


def configure(area: Area, text: str) -> None:
    """Give a private area its configuration."""
    commands.replace(Path(area.private, CONF), text)


def unmake(area: Area) -> None:
    """Take away what `make` has made; the container's files are whoever's who brought them."""
    for name in (CONF, commands.draft_of(Path(CONF)), LAYOUT, OWNER, ".lck", ".running"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{area.private}/{name}")
    for name in (SCRIPTS, DUMP):
        shutil.rmtree(f"{area.private}/{name}", ignore_errors=True)
    for path in (area.private, area.root):
        with contextlib.suppress(OSError):  # not empty: the files are there
            os.rmdir(path)
