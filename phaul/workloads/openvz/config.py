"""What is configured of a container and of its host: ve.conf(5) and vz(5), lines of PARAMETER="value".

What the other host says becomes a configuration here only so far as it describes the container itself: limits, names,
devices of its own. Parameters that give it something of this host (BINDMOUNT, DEVNODES, CAPABILITY, ...) are for the
operator of this host to set, so a container with such does not move.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from phaul.errors import PhaulError
from phaul.workloads import commands

LARGEST = 1 << 18  # bytes of a file
_LINE = re.compile(r"([A-Z][A-Z0-9_]{0,63})=(.*)")
_VALUE = re.compile(r"[^\x00-\x1f\x7f\"'`\\$]{0,4096}")
_DEVICE = re.compile(r"[A-Za-z0-9_.@-]{1,15}")

_CARRIED = """
    VERSION PLATFORM VE_TYPE ORIGIN_SAMPLE CONFIG_CUSTOMIZED OSTEMPLATE TEMPLATES DISTRIBUTION TECHNOLOGIES ARCH
    NAME DESCRIPTION HOSTNAME NAMESERVER SEARCHDOMAIN ONBOOT BOOTORDER STOP_TIMEOUT
    KMEMSIZE LOCKEDPAGES PRIVVMPAGES SHMPAGES NUMPROC PHYSPAGES SWAPPAGES VMGUARPAGES OOMGUARPAGES NUMTCPSOCK NUMFLOCK
    NUMPTY NUMSIGINFO TCPSNDBUF TCPRCVBUF OTHERSOCKBUF DGRAMRCVBUF NUMOTHERSOCK DCACHESIZE NUMFILE AVNUMPROC NUMIPTENT
    NUMMEMORYSUBGROUPS MEMGUARANTEE VM_OVERCOMMIT SLMMODE
    CPUUNITS CPULIMIT CPULIMIT_MHZ CPUS IOPRIO IOLIMIT IOPSLIMIT
    DISKSPACE DISKINODES QUOTATIME QUOTAUGIDLIMIT DISK_QUOTA NOATIME
    NETFILTER FEATURES NETIF RATE RATEBOUND
"""
CARRIED = frozenset(_CARRIED.split())
"""Parameters that say what the container is, and nothing of the host."""
OWN = frozenset({"VE_PRIVATE", "VE_ROOT", "VEID", "UUID", "VE_LAYOUT", "DISK", "IP_ADDRESS", "DISABLED"})
"""Parameters that are judged each by itself, and written anew."""
HOSTS = frozenset({"CPUMASK", "NODEMASK", "HA_ENABLE", "HA_PRIO"})
"""Parameters that mean something of one host only: they stay behind."""

Config = dict[str, str]
"""Parameters and their values."""


def parse(text: str) -> Config:
    """The parameters of a file. Lines of any other form are ignored, as vzctl does; of two lines, the last counts."""
    found: Config = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None:
            continue
        try:
            words = shlex.split(match[2])
        except ValueError:  # quotes that do not end
            continue
        found[match[1]] = " ".join(words)
    return found


def read(path: Path) -> Config:
    """The parameters of a file; PhaulError if it cannot be read."""
    return parse(commands.read(path, LARGEST).decode(errors="replace"))


def text(config: Mapping[str, str]) -> str:
    """A file of these parameters; PhaulError for a value that a shell, or vzctl, could take for something else."""
    for name, value in config.items():
        if not _LINE.fullmatch(f"{name}=") or not _VALUE.fullmatch(value.replace("$VEID", "")):
            raise PhaulError(f"{name} has a value that is none: {value[:80]!r}")
    return "".join(f'{name}="{value}"\n' for name, value in config.items())


def expand(value: str, ctid: str) -> str:
    """A path of a configuration, of this container."""
    return value.replace("${VEID}", ctid).replace("$VEID", ctid)


@dataclass(frozen=True)
class Interface:
    """A virtual Ethernet pair: its end inside, its end at the host, and the bridge that this is a port of."""

    inner: str
    outer: str
    bridge: str = ""
    mac: str = ""


def interfaces(value: str) -> Iterator[Interface]:
    """Of NETIF: `;` between pairs, `,` between their properties. PhaulError for names that are none."""
    for one in filter(None, value.split(";")):
        fields = dict(part.partition("=")[::2] for part in one.split(","))
        bridge = fields.get("bridge") or fields.get("network", "")
        found = Interface(fields.get("ifname", ""), fields.get("host_ifname", ""), bridge, fields.get("mac", ""))
        if not all(_DEVICE.fullmatch(name) for name in (found.inner, found.outer)):
            raise PhaulError(f"NETIF has names that are none: {one[:80]!r}")
        yield found


def addresses(value: str) -> list[str]:
    """Of IP_ADDRESS: what the container has on venet0. The samples have 0.0.0.0, which is none."""
    return [one for one in value.split() if one.partition("/")[0] != "0.0.0.0"]


def disks(value: str) -> list[dict[str, str]]:
    """Of DISK: `;` between disks, `,` between their properties."""
    return [dict(part.partition("=")[::2] for part in one.split(",")) for one in value.split(";") if one]


def carried(config: Mapping[str, str]) -> Config:
    """What goes to the other host."""
    return {name: value for name, value in config.items() if name in CARRIED}


def foreign(config: Mapping[str, str]) -> list[str]:
    """Parameters with which a container does not move."""
    return sorted(name for name, value in config.items() if value and name not in CARRIED | OWN | HOSTS)
