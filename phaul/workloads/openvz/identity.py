"""What a kernel of OpenVZ knows of a container: its VE, of the cgroup controller `ve`.

vzctl makes the VE when it starts the container, from the configuration, and the container's namespaces are born in it.
What the kernel has of it here is compared with what it had there. A kernel without that controller has no VEs, and
nothing here makes do without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from phaul.errors import PhaulError

from . import commands

CONTROLLER = "ve"
SAME = ("ve.veid", "ve.features", "ve.iptables_mask", "ve.os_release")
"""What vzctl sets from the configuration: programs see it, and it cannot be changed under them."""
SET = ("ve.aio_max_nr", "ve.pid_max")
"""Limits that the container's root may have changed; they are set again."""

Values = dict[str, str]


def in_kernel() -> bool:
    """Whether this kernel has VEs (cgroups(7), /proc/cgroups)."""
    lines = Path("/proc/cgroups").read_text().splitlines()
    return any(line.split()[:1] == [CONTROLLER] for line in lines)


def group(ctid: str, pid: int) -> str:
    """The cgroup of a container's VE, as cgget takes it: what the kernel says of its first process, or in a unified
    hierarchy all that it says."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    paths = {name: path for _, controllers, path in lines for name in controllers.split(",")}
    return paths.get(CONTROLLER, ctid)


def read(ctid: str, pid: int) -> Values:
    """Those of a running container. Which this kernel does not have are left out, but the number it must have."""
    where, found = group(ctid, pid), {}
    for name in (*SAME, *SET):
        try:
            found[name] = commands.run("cgget", "-n", "-v", "-r", name, where).strip()
        except PhaulError:
            if name == SAME[0]:
                raise
    return found


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> Iterator[str]:
    """What a container would find changed."""
    for name in SAME:
        if there.get(name, "") != here.get(name, ""):
            yield f"{name} is {here.get(name) or 'not known'} here, and was {there.get(name) or 'not known'} there"


def put(ctid: str, pid: int, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Set what the container had set. PhaulError if this kernel does not take it."""
    where = group(ctid, pid)
    for name in SET:
        if there.get(name, "") != here.get(name, ""):
            if name not in here or not there.get(name, "").isdecimal():
                raise PhaulError(f"{name} cannot be set to {there.get(name, 'nothing')!r} here")
            commands.run("cgset", "-r", f"{name}={there[name]}", where)
