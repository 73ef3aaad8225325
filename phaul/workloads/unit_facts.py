"""What a service of systemd is, and what speaks against moving it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phaul_engine.cgroup import Hierarchy, path_of
from phaul_engine.errors import EngineError
from phaul_engine.proc.tree import read_tree

from phaul.errors import PhaulError
from phaul.events import Finding

from . import systemd
from .systemd import DropIn, show

_COMMANDS = ("ExecStartPre", "ExecStartPost", "ExecStop", "ExecStopPost")
_SAME = ("Type", "ExecStart", "User", "Group", "RootDirectory", "DynamicUser")
"""What makes another program of a unit, where it differs."""


def definition(unit: str) -> dict[str, Any]:
    """What has to be the same on both hosts, and a digest of all that its files say."""
    found = show(unit, *_SAME, "FragmentPath", "DropInPaths")
    found["ExecStart"] = _words(found["ExecStart"])
    digest = hashlib.sha256()
    for path in (found.pop("FragmentPath"), *found.pop("DropInPaths").split()):
        if path and path != str(DropIn(unit).path):
            with contextlib.suppress(OSError):
                digest.update(Path(path).read_bytes() + b"\0")
    return {"definition": found, "digest": digest.hexdigest()}


def _words(commands: str) -> str:
    """The commands of an Exec setting without what became of them: `{ path=/bin/x ; argv[]=/bin/x -y ; ... }`."""
    return "\n".join(line.partition("argv[]=")[2].partition(" ; ")[0] for line in commands.splitlines())


def state(unit: str) -> dict[str, Any]:
    """What the running unit has beside its definition. `watchdog` in microseconds, 0 without one."""
    found = show(unit, "Restart", "WatchdogUSec", "StatusText")
    watchdog = systemd.span(found["WatchdogUSec"])
    return {
        "restart": found["Restart"],
        "watchdog": 0 if watchdog == systemd.FOREVER else watchdog,
        "status": found["StatusText"].partition("\n")[0],
    }


def differences(unit: str, facts: dict[str, Any]) -> Iterator[Finding]:
    """At the destination: where the unit here is not what the facts say of the source's."""
    here, there = definition(unit), facts.get("definition")
    if not isinstance(there, dict):
        raise PhaulError(f"the other host does not say what {unit} is")
    differing = [name for name in _SAME if str(there.get(name)) != here["definition"][name]]
    if differing:
        name = differing[0]
        text = f"{unit} is something else there: {name}={here['definition'][name] or '(empty)'}"
        yield Finding("blocker", "unit-definition", text, f"make {', '.join(differing)} the same on both hosts")
    elif facts.get("digest") != here["digest"]:
        text = f"the files of {unit} differ: what they say there of limits, restarts and stopping holds from now on"
        yield Finding("warning", "unit-definition", text, f"compare what systemctl cat {unit} says on both hosts")


def conflicts(unit: str) -> Iterator[Finding]:
    """To start a unit stops those that it conflicts with."""
    found = show(unit, "Conflicts", "ConflictedBy")
    for other in sorted({*found["Conflicts"].split(), *found["ConflictedBy"].split()}):
        if show(other, "ActiveState")["ActiveState"] == "active":
            text = f"{unit} conflicts with {other}, which is active there"
            yield Finding("blocker", "unit-conflict", text, f"stop it there: systemctl stop {other}")


def sockets(unit: str) -> Iterator[Finding]:
    """Sockets that systemd listens on in place of the program, and passes to it."""
    for other in show(unit, "TriggeredBy")["TriggeredBy"].split():
        if other.endswith(".socket") and show(other, "ActiveState")["ActiveState"] == "active":
            text = f"{other} passes its sockets to {unit}, which systemd has too, and does not give away"
            advice = "have the program open its sockets itself, and stop the socket unit on both hosts"
            yield Finding("blocker", "unit-sockets", text, advice)


def against(unit: str, pid: int) -> Iterator[Finding]:
    """At the source: what speaks against moving it."""
    wanted = ("Type", "DynamicUser", "NFileDescriptorStore", "TriggeredBy", "UnitFileState", "ControlGroup")
    found = show(unit, *wanted, *_COMMANDS, "RequiredBy", "BoundBy")
    if found["Type"] in ("oneshot", "dbus"):
        text = f"{unit} is of Type={found['Type']}"
        why = "systemd takes no process for its own in such a unit, other than one that it has started"
        yield Finding("blocker", "unit-type", f"{text}: {why}")
    if found["DynamicUser"] == "yes":
        text = f"{unit} has DynamicUser=yes: its user id is another one on each host"
        yield Finding("blocker", "unit-user", text, "give it a User=")
    if int(found["NFileDescriptorStore"] or 0):
        text = f"systemd keeps {found['NFileDescriptorStore']} descriptors for {unit}, and does not give them away"
        yield Finding("blocker", "unit-descriptors", text, "FileDescriptorStoreMax=0")
    yield from sockets(unit)
    yield from _sandbox(unit, pid)
    yield from _outsiders(unit, pid, found["ControlGroup"])
    left = [name for name in _COMMANDS if found[name]]
    if left:
        text = f"{' and '.join(f'{name}=' for name in left)} of {unit} will not be run for the move"
        yield Finding("warning", "unit-commands", text, f"see systemctl cat {unit}: do by hand what is missing")
    triggers = [one for one in found["TriggeredBy"].split() if not one.endswith(".socket") and _active(one)]
    if found["UnitFileState"] == "enabled":
        triggers.append("the next boot")
    if triggers:
        text = f"{', '.join(triggers)} will start {unit} here again, beside the one that has moved"
        yield Finding("warning", "unit-triggers", text, f"systemctl disable --now them, and {unit}, when it has moved")
    needing = {*found["RequiredBy"].split(), *found["BoundBy"].split()}
    left = sorted(one for one in needing if _active(one))
    if left:
        text = f"{', '.join(left)} {'need' if len(left) > 1 else 'needs'} {unit} and will stay here without it"
        yield Finding("warning", "unit-needed", text, "stop them, or move them too")


def _active(unit: str) -> bool:
    return show(unit, "ActiveState")["ActiveState"] == "active"


def sandboxed(pid: int) -> bool:
    """Whether a process is in a mount namespace that systemd has made (PrivateTmp=, ProtectSystem=, ...)."""
    return not os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt")


def shut_in(unit: str, path: str) -> bool:
    """Whether a unit may not execute a file: NoExecPaths= and ExecPaths=, of which the longest path that leads there
    counts (systemd.exec(5))."""

    def longest(paths: str) -> int:
        names = [one.lstrip("-+") for one in paths.split()]
        return max((len(name) for name in names if f"{path}/".startswith(f"{name.rstrip('/')}/")), default=-1)

    said = show(unit, "NoExecPaths", "ExecPaths")
    return longest(said["NoExecPaths"]) > longest(said["ExecPaths"])


def _sandbox(unit: str, pid: int) -> Iterator[Finding]:
    """What is in such a namespace, and in no other one: systemd there makes an empty one."""
    if not sandboxed(pid):
        return
    own = show(unit, "RootDirectory", "RootImage")
    if any(own.values()):
        text = f"{unit} has a root directory of its own ({own['RootDirectory'] or own['RootImage']})"
        yield Finding("blocker", "unit-sandbox", text, "move it as a container")
    for process in read_tree(pid):
        for fd, path in _files(process.pid):
            if not _same_outside(process.pid, path):
                text = f"fd {fd} of pid {process.pid} ({process.comm}) is {path}, a file of its own mount namespace"
                yield Finding("blocker", "unit-sandbox", text, "systemd makes an empty one there: close the file")


def _files(pid: int) -> Iterator[tuple[str, str]]:
    """The descriptors of regular files that have a name, and that name."""
    with contextlib.suppress(OSError):
        for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink:
                    yield fd, os.readlink(f"/proc/{pid}/fd/{fd}")


def _same_outside(pid: int, path: str) -> bool:
    """Whether the file that a process finds under a name is the host's under that name, or comes by itself."""
    if path.startswith(("/proc/", "/sys/", "/memfd:")):
        return True
    try:
        return os.path.samefile(f"/proc/{pid}/root{path}", path)
    except OSError:
        return False


def _outsiders(unit: str, pid: int, group: str) -> Iterator[Finding]:
    """Processes of the unit that are not below its main one."""
    if path_of(pid) != group:
        text = f"the main process of {unit} is in cgroup {path_of(pid)}, and not in the unit's own ({group})"
        yield Finding("blocker", "unit-cgroup", text, "processes in cgroups below the unit's own do not move")
        return
    try:
        tree = {process.pid for process in read_tree(pid)}
        outside = sorted(set(_members(group)) - tree)
    except EngineError as error:
        yield Finding("blocker", "unit-processes", f"the processes of {unit} cannot be told: {error}")
        return
    if outside:
        names = ", ".join(f"pid {one} ({comm(one)})" for one in outside[:3])
        text = f"{names} of {unit} {'is' if len(outside) == 1 else 'are'} not below its main process {pid}"
        yield Finding("blocker", "unit-processes", text, "end what has left the main process, or move by PID")


def _members(group: str) -> Iterator[int]:
    """The processes in a cgroup and below."""
    with Hierarchy.find() as hierarchy:
        top = hierarchy.open(group)
        try:
            for _, _, _, directory in os.fwalk(".", dir_fd=top):
                with open(os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)) as file:
                    yield from map(int, file.read().split())
        finally:
            os.close(top)


def comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"
