"""Services of systemd (`--unit NAME`), docs/systemd.md.

At the destination systemd itself starts the unit: its cgroup with all limits, its directories, what it requires. In
place of its program a front end waits (`_STAGE`), beside which the tree is born, in the unit's cgroup. When the tree
runs, the front end ends as the parent of a daemon does that has gone into the background, and systemd takes the tree's
first process for the main process of the unit. Then the unit's own settings hold again.

At the source the unit is held from before the freeze (`_HOLD`): whatever systemd sees of the frozen copy, and of its
death, it neither starts another one nor runs commands for a program that lives elsewhere. Both are drop-ins in /run.

A unit file decides what runs with which rights, so it is never taken from the other host.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from phaul_engine.cgroup import Hierarchy, path_of
from phaul_engine.errors import EngineError
from phaul_engine.proc.tree import read_tree

from phaul.errors import PhaulError, UsageError
from phaul.events import Finding
from phaul.haul.places import NOWHERE, Places

from . import systemd
from .base import Found, Note, Place, Workload
from .systemd import DropIn, show

if TYPE_CHECKING:
    from phaul_engine.target import Tracer

_RUN = Path("/run/phaul")
_START = 30.0  # seconds for systemd to come to our front end, with all that the unit requires
_TURN = 20.0  # seconds for systemd to see what happened to a unit's processes

_HOLD = """# phaul is moving this service to another host. If no migration is under way: phaul resolve
[Unit]
ConditionPathExists=!/
RefuseManualStart=yes
RefuseManualStop=yes
StopWhenUnneeded=no
FailureAction=none
SuccessAction=none
[Service]
Restart=no
RestartForceExitStatus=
SuccessExitStatus=SIGKILL
RemainAfterExit=no
RuntimeMaxSec=infinity
ExecReload=
ExecStop=
ExecStopPost=
"""

_HELD = {"Restart": "no", "RemainAfterExit": "no", "ExecStop": "", "ExecStopPost": ""}
"""What systemd has to say of a unit then."""

_STAGE = """# phaul is moving this service to this host. If no migration is under way: phaul resolve
[Unit]
FailureAction=none
SuccessAction=none
[Service]
Type=forking
PIDFile={pidfile}
GuessMainPID=no
ExecCondition=
ExecStartPre=
ExecStart=
ExecStart=+/bin/sh -c 'read verdict < {fifo} && [ "$$verdict" = run ]'
ExecStartPost=
ExecReload=
ExecStop=
ExecStopPost=
TimeoutStartSec=infinity
Restart=no
RestartForceExitStatus=
RemainAfterExit=no
"""

_COMMANDS = ("ExecStartPre", "ExecStartPost", "ExecStop", "ExecStopPost")
_SAME = ("Type", "ExecStart", "User", "Group", "RootDirectory", "DynamicUser")
"""What makes another program of a unit, where it differs."""

_RESTARTS: dict[str, Callable[[str], bool]] = {
    "always": lambda result: True,
    "on-success": lambda result: result == "success",
    "on-failure": lambda result: result != "success",
    "on-abnormal": lambda result: result in ("signal", "core-dump", "timeout", "watchdog"),
    "on-abort": lambda result: result in ("signal", "core-dump"),
    "on-watchdog": lambda result: result == "watchdog",
}
"""After which ends of its program a unit is started again: Restart= in systemd.service(5)."""


class Unit(Workload):
    """Named by the unit's name, with or without `.service`."""

    kind: ClassVar = "unit"

    def find(self, name: str) -> Found:
        unit = name if "." in name and not name.endswith(".") else f"{name}.service"
        systemd.check_name(unit)
        if not os.path.isdir(systemd.BOOTED):
            raise UsageError("systemd does not run on this host", advice="move the program by its PID")
        state = show(unit, "Id", "LoadState", "ActiveState", "SubState", "MainPID", "Type")
        if state["LoadState"] != "loaded":
            raise UsageError(f"this host has no service {unit}", advice="systemctl list-units --type=service")
        unit = state["Id"]  # what an alias stands for
        systemd.check_name(unit)
        if (state["ActiveState"], state["SubState"]) != ("active", "running"):
            what = f"{state['ActiveState']}, {state['SubState']}"
            raise UsageError(f"{unit} does not run ({what})", advice=f"systemctl status {unit}")
        pid = int(state["MainPID"] or 0)
        if pid <= 1:
            raise UsageError(f"{unit} has no main process", advice="give it a PIDFile=, or move it by its PID")
        facts = {"name": unit, "pid": pid, **_definition(unit), **_state(unit)}
        return Found(pid, f"{unit} (systemd)", facts, tuple(_against(unit, pid)))

    def examine(self, facts: dict[str, Any], hauled: Collection[str] = ()) -> list[Finding]:
        unit = _named(facts)
        if not os.path.isdir(systemd.BOOTED):
            return [Finding("blocker", "unit-systemd", "systemd does not run there", "move the program by its PID")]
        state = show(unit, "LoadState", "ActiveState", "SubState")
        if state["LoadState"] != "loaded":
            text = f"there is no service {unit} there ({state['LoadState']})"
            return [Finding("blocker", "unit-missing", text, "install the same package there, or copy the unit file")]
        if state["ActiveState"] not in ("inactive", "failed"):
            text = f"{unit} is {state['ActiveState']} ({state['SubState']}) there"
            return [Finding("blocker", "unit-active", text, f"stop it there: systemctl stop {unit}")]
        return [*_other_definition(unit, facts), *_sockets(unit), *_conflicts(unit)]

    def prepare(self, facts: dict[str, Any], note: Note, tracer: Tracer, places: Places = NOWHERE) -> Place:
        unit = _named(facts)
        for finding in self.examine(facts):
            if finding.severity == "blocker":
                raise PhaulError(finding.text, advice=finding.advice)
        token = secrets.token_hex(8)
        stage = {"fifo": str(_RUN / f"unit-{token}.fifo"), "pidfile": str(_RUN / f"unit-{token}.pid")}
        own = show(unit, "PIDFile")["PIDFile"]
        carried = {key: facts.get(key) for key in ("watchdog", "status")}
        note({"name": unit, "own_pidfile": own, **carried, **stage})
        _RUN.mkdir(mode=0o700, exist_ok=True)
        os.mkfifo(stage["fifo"], 0o600)
        DropIn(unit).put(_STAGE.format(**stage))
        systemd.start(unit)
        return Place(_await_front_end(unit))

    def take_over(self, notes: dict[str, Any], root: int, pids: Iterable[int]) -> None:
        unit = _named(notes)
        if _staged(unit, notes):
            _write_pidfile(Path(notes["pidfile"]), root)
            _say(Path(notes["fifo"]), "run\n")
            if not systemd.wait(lambda: _is_main(unit, root), _TURN):
                state = show(unit, "ActiveState", "SubState", "MainPID")
                words = f"{state['ActiveState']}, {state['SubState']}, main process {state['MainPID']}"
                raise PhaulError(f"systemd has not taken process {root} for the main one of {unit}: {words}")
            if notes.get("own_pidfile"):
                _write_pidfile(Path(notes["own_pidfile"]), root)
        _leave_stage(unit, notes)
        _tell(root, notes)

    def withdraw(self, notes: dict[str, Any]) -> None:
        if not notes:  # it never came to that
            return
        unit = _named(notes)
        if _staged(unit, notes):
            systemd.stop(unit)
        _leave_stage(unit, notes)

    def hold(self, facts: dict[str, Any]) -> None:
        unit = _named(facts)
        DropIn(unit).put(_HOLD)
        state = show(unit, *_HELD, "MainPID")
        if any(state[name] != value for name, value in _HELD.items()):
            advice = f"no drop-in of the unit may come after it: systemctl cat {unit}"
            raise PhaulError(f"{DropIn(unit).path} does not hold: {state}", advice=advice)
        if int(state["MainPID"]) != facts["pid"]:
            raise PhaulError(f"{unit} was started again meanwhile: its main process is {state['MainPID']}")
        if facts.get("watchdog"):
            systemd.notify(facts["pid"], f"WATCHDOG_USEC={systemd.FOREVER}")

    def let_go(self, facts: dict[str, Any]) -> None:
        unit = _named(facts)
        if DropIn(unit).read() not in ("", _HOLD):  # that of a migration to this host
            return
        DropIn(unit).take_away()
        state = show(unit, "ActiveState", "Result", "MainPID")
        if int(state["MainPID"] or 0) == facts["pid"]:
            _tell(facts["pid"], facts)
        elif state["ActiveState"] in ("inactive", "failed") and _restarts(str(facts.get("restart")), state["Result"]):
            systemd.start(unit)  # it has ended by itself, when nobody would have started it again

    def give_up(self, facts: dict[str, Any]) -> None:
        unit = _named(facts)
        if DropIn(unit).read() not in ("", _HOLD):
            return
        if not systemd.wait(lambda: _is_over(unit, facts["pid"]), _TURN):
            state = show(unit, "ActiveState", "SubState")
            words = f"{state['ActiveState']}, {state['SubState']}"
            raise PhaulError(f"{unit} has moved, but is not inactive here: {words}", advice=f"see {DropIn(unit).path}")
        systemd.forget_failure(unit)
        DropIn(unit).take_away()


def _named(facts: dict[str, Any]) -> str:
    name = str(facts.get("name"))
    systemd.check_name(name)
    return name


def _restarts(policy: str, result: str) -> bool:
    return policy in _RESTARTS and _RESTARTS[policy](result)


def _is_over(unit: str, pid: int) -> bool:
    """Whether systemd has seen that a unit's process is gone; what was started since is no business of ours."""
    state = show(unit, "ActiveState", "MainPID")
    return state["ActiveState"] in ("inactive", "failed") or int(state["MainPID"] or 0) not in (0, pid)


# -- the stage at the destination --------------------------------------------------------------------------------------


def _await_front_end(unit: str) -> str:
    """Wait until our front end runs; its cgroup."""
    wanted = ("ActiveState", "SubState", "ControlPID", "ControlGroup", "Job", "ConditionResult", "Result")
    state: dict[str, str] = {}

    def settled() -> bool:
        state.update(show(unit, *wanted))
        return state["SubState"] == "start" or (state["ActiveState"] in ("inactive", "failed") and not state["Job"])

    if not systemd.wait(settled, _START) or state["SubState"] != "start" or int(state["ControlPID"] or 0) <= 1:
        why = f"{state['ActiveState']}, {state['SubState']}, result {state['Result']}"
        if state["ConditionResult"] == "no":
            why = "a condition of the unit does not hold on this host"
        elif state["Job"]:
            why = f"it waits for other units after {_START:.0f} s"
        raise PhaulError(f"systemd does not start {unit} here: {why}", advice=f"systemctl status {unit}")
    place = path_of(int(state["ControlPID"]))
    if place != state["ControlGroup"]:
        raise PhaulError(
            f"systemd does not keep {unit} in a cgroup of version 2 ({state['ControlGroup']}, {place})",
            advice="start this host with systemd.unified_cgroup_hierarchy=1",
        )
    return place


def _staged(unit: str, notes: dict[str, Any]) -> bool:
    """Whether it is this migration's front end for which the unit was started."""
    return str(notes.get("fifo")) in DropIn(unit).read()


def _leave_stage(unit: str, notes: dict[str, Any]) -> None:
    """The unit is as its own files say."""
    if DropIn(unit).read() == "" or _staged(unit, notes):
        DropIn(unit).take_away()
    for key in ("fifo", "pidfile"):
        path = Path(str(notes.get(key)))
        if path.parent == _RUN and path.name.startswith("unit-"):
            path.unlink(missing_ok=True)


def _is_main(unit: str, pid: int) -> bool:
    state = show(unit, "ActiveState", "MainPID")
    return state["ActiveState"] == "active" and int(state["MainPID"] or 0) == pid


def _write_pidfile(path: Path, pid: int) -> None:
    draft = path.with_name(f".{path.name}.phaul")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "w") as file:
            file.write(f"{pid}\n")
        os.rename(draft, path)
    except OSError as error:
        raise PhaulError(f"cannot write the PID file {path}: {error.strerror}") from error


def _say(fifo: Path, word: str) -> None:
    """Tell the front end. If it is not there any more, it was told before, or systemd has stopped it."""
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return
        raise PhaulError(f"{fifo}: {error.strerror}") from error
    with open(fd, "w") as file:
        file.write(word)


def _tell(pid: int, told: dict[str, Any]) -> None:
    """What the program has told systemd itself, and the watchdog, from now on."""
    words = [f"STATUS={told['status']}"] if told.get("status") else []
    if told.get("watchdog"):
        words += ["WATCHDOG=1", f"WATCHDOG_USEC={int(told['watchdog'])}"]
    if words:
        systemd.notify(pid, *words)


# -- what the unit is --------------------------------------------------------------------------------------------------


def _definition(unit: str) -> dict[str, Any]:
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


def _state(unit: str) -> dict[str, Any]:
    """What the running unit has beside its definition. `watchdog` in microseconds, 0 without one."""
    found = show(unit, "Restart", "WatchdogUSec", "StatusText")
    watchdog = systemd.span(found["WatchdogUSec"])
    return {
        "restart": found["Restart"],
        "watchdog": 0 if watchdog == systemd.FOREVER else watchdog,
        "status": found["StatusText"].partition("\n")[0],
    }


def _other_definition(unit: str, facts: dict[str, Any]) -> Iterator[Finding]:
    here, there = _definition(unit), facts.get("definition")
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


def _conflicts(unit: str) -> Iterator[Finding]:
    """To start a unit stops those that it conflicts with."""
    for other in show(unit, "Conflicts", "ConflictedBy")["Conflicts"].split():
        if show(other, "ActiveState")["ActiveState"] == "active":
            text = f"{unit} conflicts with {other}, which is active there"
            yield Finding("blocker", "unit-conflict", text, f"stop it there: systemctl stop {other}")


def _sockets(unit: str) -> Iterator[Finding]:
    """Sockets that systemd listens on in place of the program, and passes to it."""
    for other in show(unit, "TriggeredBy")["TriggeredBy"].split():
        if other.endswith(".socket") and show(other, "ActiveState")["ActiveState"] == "active":
            text = f"{other} passes its sockets to {unit}, which systemd has too, and does not give away"
            advice = "have the program open its sockets itself, and stop the socket unit on both hosts"
            yield Finding("blocker", "unit-sockets", text, advice)


def _against(unit: str, pid: int) -> Iterator[Finding]:
    """At the source: what speaks against moving it."""
    wanted = ("Type", "DynamicUser", "NFileDescriptorStore", "TriggeredBy", "UnitFileState", "ControlGroup", "Delegate")
    state = show(unit, *wanted, *_COMMANDS, "RequiredBy", "BoundBy", "WantedBy")
    if state["Type"] in ("oneshot", "dbus"):
        text = f"{unit} is of Type={state['Type']}"
        why = "systemd takes no process for its own in such a unit, other than one that it has started"
        yield Finding("blocker", "unit-type", f"{text}: {why}")
    if state["DynamicUser"] == "yes":
        text = f"{unit} has DynamicUser=yes: its user id is another one on each host"
        yield Finding("blocker", "unit-user", text, "give it a User=")
    if int(state["NFileDescriptorStore"] or 0):
        text = f"systemd keeps {state['NFileDescriptorStore']} descriptors for {unit}, and does not give them away"
        yield Finding("blocker", "unit-descriptors", text, "FileDescriptorStoreMax=0")
    yield from _sockets(unit)
    yield from _sandbox(unit, pid)
    yield from _outsiders(unit, pid, state["ControlGroup"])
    left = [name for name in _COMMANDS if state[name]]
    if left:
        text = f"{' and '.join(f'{name}=' for name in left)} of {unit} will not be run for the move"
        yield Finding("warning", "unit-commands", text, f"see systemctl cat {unit}: do by hand what is missing")
    triggers = [one for one in state["TriggeredBy"].split() if not one.endswith(".socket") and _active(one)]
    if state["UnitFileState"] == "enabled":
        triggers.append("the next boot")
    if triggers:
        text = f"{', '.join(triggers)} will start {unit} here again, beside the one that has moved"
        yield Finding("warning", "unit-triggers", text, f"systemctl disable --now them, and {unit}, when it has moved")
    needing = {*state["RequiredBy"].split(), *state["BoundBy"].split()}
    left = sorted(one for one in needing if _active(one))
    if left:
        text = f"{', '.join(left)} {'need' if len(left) > 1 else 'needs'} {unit} and will stay here without it"
        yield Finding("warning", "unit-needed", text, "stop them, or move them too")


def _active(unit: str) -> bool:
    return show(unit, "ActiveState")["ActiveState"] == "active"


def _sandbox(unit: str, pid: int) -> Iterator[Finding]:
    """A mount namespace that systemd has made (PrivateTmp=, ProtectSystem=, ...)."""
    if os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt"):
        return
    text = f"{unit} has a mount namespace of its own (PrivateTmp=, ProtectSystem=, ReadWritePaths= and others)"
    advice = "start it without these settings (systemctl edit), or not at all"
    yield Finding("blocker", "unit-sandbox", text, advice)


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
        names = ", ".join(f"pid {one} ({_comm(one)})" for one in outside[:3])
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


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"
