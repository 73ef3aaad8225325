"""Where the stand-in keeps what, and how it reads a configuration (vz(5), ve.conf(5))."""

from __future__ import annotations

import re
from pathlib import Path

ETC = Path("/etc/vz")
RUN = Path("/run/ve")
NETNS = Path("/run/netns")
GROUPS = Path("/sys/fs/cgroup/machine.slice")
DEFAULTS = {
    "ve.features": "0",
    "ve.iptables_mask": "1",
    "ve.os_release": "",
    "ve.aio_max_nr": "65536",
    "ve.pid_max": "32768",
}
"""What the kernel has of a VE that nobody has set anything of."""


def conf(ctid: str) -> Path:
    """A container's configuration."""
    return ETC / "conf" / f"{ctid}.conf"


def read(path: Path) -> dict[str, str]:
    """PARAMETER="value", a line each."""
    return dict(re.findall(r'^([A-Z_0-9]+)="?([^"\n]*)"?$', path.read_text(), re.MULTILINE))


def write(path: Path, parameters: dict[str, str]) -> None:
    """The same, written."""
    path.write_text("".join(f'{name}="{value}"\n' for name, value in parameters.items()))


def parameters(ctid: str) -> dict[str, str]:
    """A container's, with the host's for what it does not say, and its own id in paths."""
    both = read(ETC / "vz.conf") | read(conf(ctid))
    return {name: value.replace("$VEID", ctid) for name, value in both.items()}


def ve(ctid: str) -> Path:
    """The values of a VE, which a kernel of OpenVZ would have."""
    return RUN / f"{ctid}.ve"


def init_pid(ctid: str) -> Path:
    """Where vzctl notes the first process."""
    return RUN / f"{ctid}.init.pid"


def mounted(path: str) -> bool:
    """Whether something is mounted there."""
    return any(line.split(" ")[4] == path for line in Path("/proc/self/mountinfo").read_text().splitlines())
