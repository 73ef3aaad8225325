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
import os
import secrets
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from phaul_engine.cgroup import path_of
from phaul_engine.namespaces import lodging
from phaul_engine.namespaces.mnt import api
from phaul_engine.objects.places import in_root
from phaul_engine.proc.mountinfo import parse_mounts

from phaul.errors import PhaulError, UsageError
from phaul.events import Finding
from phaul.haul.places import NOWHERE, Places

from . import commands, systemd, unit_facts
from .base import Found, Note, Place, Workload, refuse
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
ExecStart={prefix}{shell} -c 'until read verdict < {fifo} && [ "$$verdict" = run ]; do sleep 1; done'
ExecStartPost=
ExecReload=
ExecStop=
ExecStopPost=
TimeoutStartSec=infinity
Restart=no
RestartForceExitStatus=
RemainAfterExit=no
"""

_SHELL = "/bin/sh"
"""What our front end is executed by. If the unit may not (NoExecPaths=), that is lifted for it, as long as it runs."""

_AS_ROOT, _AS_ROOT_INSIDE = "+", "!"
"""Before a command: systemd runs it with all rights, outside of what the unit is shut in, or inside of it."""

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
    supervised: ClassVar = True

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
        sandboxed = unit_facts.sandboxed(pid)
        facts = {
            "name": unit,
            "pid": pid,
            "sandboxed": sandboxed,
            **unit_facts.definition(unit),
            **unit_facts.state(unit),
        }
        findings = tuple(unit_facts.against(unit, pid))
        return Found(pid, f"{unit} (systemd)", facts, findings, options={lodging.LENT: sandboxed})

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
        return [*unit_facts.differences(unit, facts), *unit_facts.sockets(unit), *unit_facts.conflicts(unit)]

    def prepare(self, facts: dict[str, Any], note: Note, tracer: Tracer, places: Places = NOWHERE) -> Place:
        unit, sandboxed = _named(facts), bool(facts.get("sandboxed"))
        refuse(self.examine(facts))
        token = secrets.token_hex(8)
        stage = {"fifo": str(_RUN / f"unit-{token}.fifo"), "pidfile": str(_RUN / f"unit-{token}.pid")}
        own = show(unit, "PIDFile")["PIDFile"]
        carried = {key: facts.get(key) for key in ("watchdog", "status")}
        shell = os.path.realpath(_SHELL)
        opened = shell if sandboxed and unit_facts.shut_in(unit, shell) else ""
        note({"name": unit, "own_pidfile": own, **carried, **stage, "opened": opened})
        _RUN.mkdir(mode=0o700, exist_ok=True)
        os.mkfifo(stage["fifo"], 0o600)
        text = _STAGE.format(**stage, shell=_SHELL, prefix=_AS_ROOT_INSIDE if sandboxed else _AS_ROOT)
        DropIn(unit).put(text + (f"ExecPaths={opened}\n" if opened else ""))
        systemd.start(unit)
        place, pid = _await_front_end(unit)
        if unit_facts.sandboxed(pid) != sandboxed:
            text = f"the {unit} of one host has a mount namespace of its own, and that of the other has not"
            raise PhaulError(text, advice="have PrivateTmp=, ProtectSystem= and the like the same on both hosts")
        return Place(place, {lodging.LODGING: pid} if sandboxed else {})

    def take_over(self, notes: dict[str, Any], root: int, pids: Iterable[int]) -> None:
        unit = _named(notes)
        if _staged(unit, notes):
            _write_pidfile(Path(notes["pidfile"]), root)
            _say(Path(notes["fifo"]), "run\n")
            if not commands.wait(lambda: _is_main(unit, root), _TURN):
                state = show(unit, "ActiveState", "SubState", "MainPID")
                words = f"{state['ActiveState']}, {state['SubState']}, main process {state['MainPID']}"
                raise PhaulError(f"systemd has not taken process {root} for the main one of {unit}: {words}")
            if notes.get("own_pidfile"):
                _write_pidfile(Path(notes["own_pidfile"]), root)
        if notes.get("opened"):
            _shut_again(root, str(notes["opened"]))
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
        held = DropIn(unit).read()
        if held not in ("", _HOLD):  # that of a migration to this host
            return
        DropIn(unit).take_away()
        state = show(unit, "ActiveState", "Result", "MainPID")
        if int(state["MainPID"] or 0) == facts["pid"]:
            _tell(facts["pid"], facts)
            return
        ended = state["ActiveState"] in ("inactive", "failed")
        if held and ended and restarts(str(facts["restart"]), state["Result"]):
            systemd.start(unit)  # it has ended by itself, when nobody would have started it again

    def give_up(self, facts: dict[str, Any]) -> None:
        unit = _named(facts)
        if DropIn(unit).read() not in ("", _HOLD):
            return
        if not commands.wait(lambda: _is_over(unit, facts["pid"]), _TURN):
            state = show(unit, "ActiveState", "SubState")
            words = f"{state['ActiveState']}, {state['SubState']}"
            raise PhaulError(f"{unit} has moved, but is not inactive here: {words}", advice=f"see {DropIn(unit).path}")
        systemd.forget_failure(unit)
        DropIn(unit).take_away()


def _named(facts: dict[str, Any]) -> str:
    name = str(facts.get("name"))
    systemd.check_name(name)
    return name


def restarts(policy: str, result: str) -> bool:
    """Whether systemd starts a unit again whose program has ended, by its Restart= and how it ended."""
    return policy in _RESTARTS and _RESTARTS[policy](result)


def _is_over(unit: str, pid: int) -> bool:
    """Whether systemd has seen that a unit's process is gone; what was started since is no business of ours."""
    state = show(unit, "ActiveState", "MainPID")
    return state["ActiveState"] in ("inactive", "failed") or int(state["MainPID"] or 0) not in (0, pid)


# -- the stage at the destination --------------------------------------------------------------------------------------


def _await_front_end(unit: str) -> tuple[str, int]:
    """Wait until our front end runs; its cgroup, and its process."""
    wanted = ("ActiveState", "SubState", "ControlPID", "ControlGroup", "Job", "ConditionResult", "Result")
    state: dict[str, str] = {}

    def settled() -> bool:
        state.update(show(unit, *wanted))
        return state["SubState"] == "start" or (state["ActiveState"] in ("inactive", "failed") and not state["Job"])

    if not commands.wait(settled, _START) or state["SubState"] != "start" or int(state["ControlPID"] or 0) <= 1:
        why = f"{state['ActiveState']}, {state['SubState']}, result {state['Result']}"
        if state["ConditionResult"] == "no":
            why = "a condition of the unit does not hold on this host"
        elif state["Job"]:
            why = f"it waits for other units after {_START:.0f} s"
        raise PhaulError(f"systemd does not start {unit} here: {why}", advice=f"systemctl status {unit}")
    pid = int(state["ControlPID"])
    place = path_of(pid)
    if place != state["ControlGroup"]:
        raise PhaulError(
            f"systemd does not keep {unit} in a cgroup of version 2 ({state['ControlGroup']}, {place})",
            advice="start this host with systemd.unified_cgroup_hierarchy=1",
        )
    if not commands.wait(lambda: _executes(pid, "sh"), _TURN):
        raise PhaulError(f"{unit} cannot run /bin/sh on this host", advice=f"journalctl -u {unit}")
    return place, pid


def _executes(pid: int, name: str) -> bool:
    """Whether a process that systemd has begun is through with its namespaces, and runs its program."""
    return unit_facts.comm(pid) == name


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


def _shut_again(pid: int, path: str) -> None:
    """Take away what let our front end execute a file: a mount of it on itself, where the program is now too."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError), open(f"/proc/{pid}/ns/mnt", "rb") as mounts:
        if any(one.point == path for one in parse_mounts(Path(f"/proc/{pid}/mountinfo").read_bytes())):
            in_root(None, mounts.fileno(), None, lambda: api.detach(path))


def _write_pidfile(path: Path, pid: int) -> None:
    try:
        commands.replace(path, f"{pid}\n", 0o644)
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
