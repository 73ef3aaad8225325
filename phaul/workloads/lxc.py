"""Containers of LXC (`--lxc NAME`), by its own commands (lxc-start(1), lxc-info(1), lxc-stop(1)).

At the destination LXC itself starts the container, from the configuration that is there: monitor, cgroups, namespaces,
devices, veth pairs. Its first process is caught before its program begins (`phaul_engine.catching`), and what arrives
takes its place, so that LXC has a container that it has started. At the source the frozen copy is killed, and the
monitor there does what it does when a container has ended.

A configuration is what decides about a container, so one that is there is never replaced. Where there is none, the
source's comes along with the container's root file system, without hooks, which are programs of the other host.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from phaul_engine.cgroup import path_of

from phaul.errors import PhaulError, UsageError
from phaul.events import Finding
from phaul.haul.places import NOWHERE, Places
from phaul.journal import Task

from . import commands, lxc_config
from .base import Found, Note, Place, Workload, refuse

if TYPE_CHECKING:
    from phaul_engine.target import Tracer

_NAME = re.compile(r"[A-Za-z0-9_.:+-]{1,200}")
_PATIENCE = 30.0  # seconds for a command of LXC
_ENDING = 20.0  # seconds for a monitor whose container has ended to be gone
_CONSOLES = "consoles"  # phaul_engine.objects.console.OPTION, which nobody who only asks has to load
_STOPPED, _RUNNING = "STOPPED", "RUNNING"
_CARRIED = ("veth", "empty", "none", "macvlan")  # kinds of network devices
_HOOK = re.compile(r"lxc\.hook\..*|lxc\.net\.\d+\.script\..*")
_PORTABLE = 1 << 16  # bytes of a configuration that comes along
_LOCAL = ("lxc.rootfs.", "lxc.log.", "lxc.start.", "lxc.group", "lxc.monitor.", "lxc.hook.", "lxc.console.")
"""Keys that may say something else on each host. So may the bridge of a veth."""


class Lxc(Workload):
    """Named by the container's name."""

    kind: ClassVar = "lxc"
    supervised: ClassVar = True

    def find(self, name: str) -> Found:
        _check_name(name)
        home = _home()
        words = f"container {name} (LXC)"
        state, pid = _state(home, name)
        if not state:
            raise UsageError(f"this host has no container {name}", advice=f"LXC keeps its containers in {home}: lxc-ls")
        if state != _RUNNING:
            advice = f"lxc-unfreeze {name}" if state == "FROZEN" else f"start it on the other host: lxc-start {name}"
            raise UsageError(f"{words} is {state.lower()}", advice=advice)
        file = Path(home) / name / "config"
        config = lxc_config.read(file)
        facts = {"name": name, "pid": pid, "config": [list(entry) for entry in config], "text": _portable(file)}
        root = lxc_config.root(dict(config).get("lxc.rootfs.path", ""))
        trees = () if root is None else (root,)
        return Found(pid, words, facts, tuple(_cannot(config)), trees, {_CONSOLES: True})

    def examine(self, facts: dict[str, Any], hauled: Collection[str] = ()) -> list[Finding]:
        name = _named(facts)
        try:
            home = _home()
            state, _ = _state(home, name)
        except PhaulError as error:
            return [Finding("blocker", "lxc", f"{error} (there)", "install the package lxc there")]
        path = Path(home) / name / "config"
        if not path.exists():
            return list(_coming(facts, path, hauled))
        if state != _STOPPED:
            text, advice = f"the container {name} there is {state.lower()}", f"stop it there: lxc-stop {name}"
            return [Finding("blocker", "lxc-name", text, advice)]
        try:
            config = lxc_config.read(path)
        except PhaulError as error:
            return [Finding("blocker", "lxc-config", f"{error} (there)")]
        return [*_unsafe(path), *_other(facts, config), *_missing(config, hauled), *_cannot(config)]

    def prepare(self, facts: dict[str, Any], note: Note, tracer: Tracer, places: Places = NOWHERE) -> Place:
        from phaul_engine import catching

        name = _named(facts)
        refuse(self.examine(facts, [final for final, _ in places.staged]))
        path = Path(_home()) / name / "config"
        notes = {"name": name, "made": [] if path.exists() else [str(path)]}
        note(notes)
        if notes["made"]:
            path.parent.mkdir(0o755, parents=True, exist_ok=True)
            commands.replace(path, _text(facts))
        caught = catching.catch(tracer, places.command("lxc-start", "-n", name, "-P", _home()), _PATIENCE)
        note(notes | {"first": [caught.pid, Task.of(caught.pid).start]})
        return Place(path_of(caught.pid), caught.options)

    def take_over(self, notes: dict[str, Any], root: int, pids: Iterable[int]) -> None:
        state, pid = _state(_home(), _named(notes))
        if (state, pid) != (_RUNNING, root):
            raise PhaulError(f"LXC says that the container is {state.lower()}, and its first process {pid}, not {root}")

    def withdraw(self, notes: dict[str, Any]) -> None:
        if "first" in notes:  # else it has died with whoever had caught it, and its monitor ends by itself
            _end(_named(notes), int(notes["first"][0]))
        for path in map(Path, notes.get("made", ())):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it
                path.parent.rmdir()

    def give_up(self, facts: dict[str, Any]) -> None:
        _end(_named(facts), int(facts["pid"]))


def _end(name: str, pid: int) -> None:
    """The first process of a container is dead: wait until its monitor has cleared everything away."""
    home = _home()

    def over() -> bool:
        state, now = _state(home, name)
        return now != pid and state in (_STOPPED, "")

    if commands.wait(over, _ENDING):
        return
    state, now = _state(home, name)
    if state == _RUNNING and now != pid:  # another one was started meanwhile
        return
    _run("lxc-stop", "-k", "-n", name, "-P", home)


# -- LXC's commands ------------------------------------------------------------------------------------------------


def _run(*words: str) -> str:
    """What a command says. PhaulError, with that, if it fails."""
    return commands.run(words, _PATIENCE, advice="install the package lxc")


def _home() -> str:
    """The directory that root's containers are in."""
    return _run("lxc-config", "lxc.lxcpath").strip()


def _state(home: str, name: str) -> tuple[str, int]:
    """The state of a container, in LXC's words, and its first process; an empty one if LXC knows none of that name."""
    if not (Path(home) / name / "config").is_file():
        return "", 0
    lines = _run("lxc-info", "-n", name, "-P", home, "-s", "-p", "-H").split()
    numbers = [int(word) for word in lines if word.isdecimal()]
    return next((word for word in lines if word.isupper()), ""), numbers[0] if numbers else 0


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise UsageError(f"{name!r} is no name of a container")


def _named(facts: dict[str, Any]) -> str:
    name = str(facts.get("name"))
    _check_name(name)
    return name


# -- what its configuration says -----------------------------------------------------------------------------------


def _cannot(config: lxc_config.Config) -> Iterator[Finding]:
    """What in it makes a container that does not move."""
    for key, value in config:
        if re.fullmatch(r"lxc\.net\.\d+\.type", key) and value not in _CARRIED:
            text = f"{key} = {value}: such a device belongs to one host"
            yield Finding("blocker", "lxc-network", text, "give the container a veth pair")
        elif key.startswith("lxc.namespace.share."):
            text = f"{key} = {value}: it is in a namespace of another container"
            yield Finding("blocker", "lxc-namespace", text, "start it without")
        elif key == "lxc.ephemeral" and value == "1":
            text = "lxc.ephemeral = 1: LXC removes the container where it stops"
            yield Finding("blocker", "lxc-ephemeral", text, "start it without")


def _coming(facts: dict[str, Any], path: Path, hauled: Collection[str]) -> Iterator[Finding]:
    """What keeps the source's configuration from becoming that of a container which this host does not have yet."""
    name, text = _named(facts), _text(facts)
    config = lxc_config.parse(text)
    root = lxc_config.root(dict(config).get("lxc.rootfs.path", ""))
    if root is None or root not in hauled:
        what = f"there is no container {name} there ({path})"
        advice = f"--ship missing brings it along; or copy {path}, and adapt lxc.rootfs.path"
        yield Finding("blocker", "lxc-config", what, advice)
        return
    for key, value in lxc_config.own(text):
        if _HOOK.fullmatch(key):
            what = f"{key} = {value}: a program of the other host, which root would run here"
            yield Finding("blocker", "lxc-hooks", what, f"copy {path} there yourself, with what its hooks need")
    yield from (*_other(facts, config), *_missing(config, hauled), *_cannot(config))


def _portable(file: Path) -> str:
    """A configuration file as it can come along; nothing if it is too large or no text."""
    content = commands.read(file, lxc_config.LARGEST)
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode() if len(content) <= _PORTABLE else ""
    return ""


def _text(facts: dict[str, Any]) -> str:
    """The configuration file of the source; nothing if it cannot come along."""
    text = str(facts.get("text", ""))
    return text if len(text) <= _PORTABLE else ""


def _unsafe(path: Path) -> Iterator[Finding]:
    """Whoever can write a configuration decides what root of that host does."""
    for one in (path.parent, path):
        status = one.lstat()
        if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o022 or stat.S_ISLNK(status.st_mode):
            text = f"{one} there can be changed by others than root"
            yield Finding("blocker", "lxc-config", text, "give it to root, and let nobody else write it")


def _other(facts: dict[str, Any], config: lxc_config.Config) -> Iterator[Finding]:
    """Where the configuration here is not that of the source."""
    there = [(str(key), str(value)) for key, value in facts.get("config", ())]
    source, own = _same_part(there), _same_part(config)
    if source == own:
        return
    lacking = [f"{key} = {value}" for key, value in source if (key, value) not in own]
    added = [f"{key} = {value}" for key, value in own if (key, value) not in source]
    differs = lacking or added or ["the order of its lines"]
    where = "here" if lacking else "there"
    text = f"the container's configuration there is another one: {differs[0]} (only {where})"
    yield Finding("blocker", "lxc-config", text, "copy the configuration; rootfs, bridges, hooks and logs may differ")


def _same_part(config: lxc_config.Config) -> lxc_config.Config:
    return [
        (key, value)
        for key, value in config
        if not key.startswith(_LOCAL) and not re.fullmatch(r"lxc\.net\.\d+\.(link|script\..*)", key)
    ]


def _missing(config: lxc_config.Config, hauled: Collection[str]) -> Iterator[Finding]:
    """What it needs of this host, and is not here, nor will come."""
    values = dict(config)
    root = lxc_config.root(values.get("lxc.rootfs.path", ""))
    if root is not None and root not in hauled and not os.path.isdir(root):
        text = f"there is no root file system {root} there"
        yield Finding("blocker", "lxc-rootfs", text, "have it on storage that both hosts mount, or copy it there")
    for key, value in config:
        if re.fullmatch(r"lxc\.net\.\d+\.link", key) and not os.path.isdir(f"/sys/class/net/{value}/bridge"):
            text = f"there is no bridge {value} there ({key})"
            yield Finding("blocker", "lxc-bridge", text, f"make it there, or name another in {key} there")
