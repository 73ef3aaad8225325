"""A test host as a node of OpenVZ: the stand-in's commands, its directories, and a kernel that says it has VEs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import Host
from tests.hosts.host import virtual_environment
from tests.hosts.rootfs import REPOSITORY
from tests.openvz import files

HOME = "/srv/own/vz"
PRIVATE, ROOT = f"{HOME}/private", f"{HOME}/root"
_COMMANDS = "/usr/local/sbin"
_PROGRAMS = ("vzctl", "cgget", "cgset")
_MOUNTS = (str(files.ETC), _COMMANDS, "/proc/cgroups")
_VZ_CONF = f"""## Global parameters
VIRTUOZZO=yes
LOCKDIR=/vz/lock
DUMPDIR=/vz/dump
LOGGING=yes
LOGFILE=/var/log/vzctl.log
TRAFFIC_SHAPING=no
TEMPLATE=/vz/template
## Defaults for VEs
VE_ROOT={ROOT}/$VEID
VE_PRIVATE={PRIVATE}/$VEID
CONFIGFILE="basic"
VEFSTYPE="ext4"
"""


@dataclass
class Node:
    """One of the hosts."""

    host: Host

    def make(self, *, kernel: bool = True) -> None:
        """Be one. `kernel`: say that there are VEs."""
        files.ETC.mkdir(exist_ok=True)  # on the machine, for something to be mounted on
        for directory in (f"{HOME}/etc/conf", f"{HOME}/etc/names", f"{HOME}/bin", PRIVATE, ROOT, str(files.RUN)):
            self.host.path(directory).mkdir(parents=True, exist_ok=True)
        self.host.path(f"{HOME}/etc/vz.conf").write_text(_VZ_CONF)
        python = virtual_environment() / "bin" / "python"
        for program in _PROGRAMS:
            path = self.host.path(f"{HOME}/bin/{program}")
            path.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {python} -m tests.openvz {program} "$@"\n')
            path.chmod(0o755)
        known = Path("/proc/cgroups").read_text()
        self.host.path(f"{HOME}/cgroups").write_text(known + "ve\t0\t1\t1\n" * kernel)
        seen = self.host.path(
            f"{HOME}/proc"
        )  # who is not root of the machine mounts no proc but where a whole one is seen
        seen.mkdir()
        self.host.run(["mount", "-t", "proc", "-o", "nosuid,nodev,noexec", "proc", f"{HOME}/proc"])
        for source, target in zip((f"{HOME}/etc", f"{HOME}/bin", f"{HOME}/cgroups"), _MOUNTS, strict=True):
            self.host.run(["mount", "--bind", source, target])

    def unmake(self) -> None:
        """Be one no more."""
        for target in (*_MOUNTS, f"{HOME}/proc"):
            self.host.run(["umount", target])
        for directory in (HOME, str(files.RUN)):
            shutil.rmtree(self.host.path(directory))
        group = self.host.path(files.GROUPS)
        if group.is_dir():
            group.rmdir()

    def vzctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of it."""
        return self.host.run(["vzctl", *words], check=check)

    def status(self, ctid: str) -> str:
        """What vzctl says of a container: three words."""
        return " ".join(self.vzctl("status", ctid).stdout.split()[2:])

    def area(self, ctid: str) -> Path:
        """A private area, from outside."""
        return self.host.path(f"{PRIVATE}/{ctid}")

    def value(self, ctid: str, name: str) -> str:
        """What the kernel would know of a VE."""
        return self.host.path(files.ve(ctid) / name).read_text()
