"""Containers of Podman (`--podman NAME`), by its own commands (podman-start(1), podman-inspect(1), podman-ps(1)).

At the destination podman itself starts a container of the same name, which was created there from the same image with
the same options: its monitor (conmon), cgroup, namespaces and mounts, by its own runtime. The first process is caught
before its program begins (`phaul_engine.catching`), and what arrives takes its place, so that podman has a container
that it has started. At the source the frozen copy is killed, and the monitor there does what it does when a container
has ended.

Options decide what root of a host runs, so they are never taken from the other host.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from phaul_engine.cgroup import path_of
from phaul_engine.errors import EngineError

from phaul.errors import PhaulError, UsageError
from phaul.events import Finding
from phaul.haul.places import NOWHERE, Places
from phaul.journal import Task

from . import commands, podman_facts, podman_networks
from .base import Found, Note, Place, Workload, refuse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phaul_engine.target import Tracer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}")
_HOSTNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
_STARTING = 60.0  # seconds for podman to have started a container that is followed
_ENDING = 20.0  # seconds for a monitor whose container has ended to have cleared it away
_RUNNING = "running"
_ENDED = ("", "created", "configured", "exited")  # and nothing is left of it but files; one that is gone has no state
# Options of the engine, which nobody who only asks has to load.
_CONSOLES = "consoles"  # phaul_engine.objects.console.OPTION
_MONITORED = "monitored pipes"  # phaul_engine.objects.pipe.MONITORED
_PLUGGED = "bridges of a runtime"  # phaul_engine.namespaces.net.needs.PLUGGED
_MOUNTED = "runtime mounts"  # phaul_engine.namespaces.mnt.externals.MOUNTED


class Podman(Workload):
    """Named by the container's name, or its id, on the source; by its name on the destination."""

    kind: ClassVar = "podman"
    supervised: ClassVar = True

    def find(self, name: str) -> Found:
        _check_name(name)
        told = podman_facts.inspect(name)
        if told is None:
            advice = "podman ps lists root's, and phaul moves no others"
            raise UsageError(f"this host has no container {name}", advice=advice)
        words = f"container {told['Name']} (podman)"
        state, pid = podman_facts.state(told)
        if state != _RUNNING:
            advice = (
                f"podman unpause {name}" if state == "paused" else f"start it on the other host: podman start {name}"
            )
            raise UsageError(f"{words} is {state}", advice=advice)
        networks = podman_networks.of(told)
        facts = {
            "name": told["Name"],
            "pid": pid,
            "options": podman_facts.options(told),
            "create": podman_networks.with_addresses(podman_facts.creation(told), networks),
            "networks": podman_networks.pack(networks),
            "layer": podman_facts.layer(told),
            "hostname": podman_facts.host_name(told),
        }
        options = {
            _MONITORED: podman_facts.pipes(int(told["State"]["ConmonPid"])),
            _MOUNTED: [podman_facts.shared_memory(told)],
            _CONSOLES: True,
            _PLUGGED: True,
        }
        rooms = (facts["layer"],) if facts["layer"] else ()
        trees = (*rooms, *dict.fromkeys(podman_facts.directories(told)))
        findings = (*podman_facts.cannot(told), *podman_networks.cannot(networks, told))
        return Found(pid, words, facts, findings, trees, options, rooms)

    def examine(self, facts: dict[str, Any], hauled: Collection[str] = ()) -> list[Finding]:
        name = _named(facts)
        try:
            there = podman_facts.inspect(name)
        except PhaulError as error:
            return [Finding("blocker", "podman", f"{error} (there)", "install the package podman there")]
        create = str(facts.get("create") or "podman create, with the options that it has here")
        if there is None or there["Name"] != name:
            text = f"there is no container {name} there"
            return [Finding("blocker", "podman-name", text, f"bring the image there, and create it: {create}")]
        state, _ = podman_facts.state(there)
        if state not in _ENDED:
            text, advice = f"the container {name} there is {state}", f"stop it there: podman stop {name}"
            return [Finding("blocker", "podman-name", text, advice)]
        found = [*_other(facts, there, create), *_used(facts, there, create), *podman_facts.cannot(there)]
        return [*found, *podman_networks.differs(facts, there)]

    def rooms(self, facts: dict[str, Any], note: Note) -> dict[str, str]:
        name, layer = _named(facts), str(facts.get("layer") or "")
        if not layer:
            return {}
        refuse(self.examine(facts, [layer]))
        note({"name": name, "mounted": True})
        return {layer: podman_facts.run("mount", name).strip()}

    def prepare(self, facts: dict[str, Any], note: Note, tracer: Tracer, places: Places = NOWHERE) -> Place:
        from phaul_engine import catching

        from . import podman_bridges

        name = _named(facts)
        refuse(self.examine(facts, [final for final, _ in places.staged]))
        notes: dict[str, Any] = {"name": name, "mounted": bool(facts.get("layer"))}
        if places and not notes["mounted"] and podman_facts.has_image(name):
            notes["mounted"] = True  # on the host, too: it starts where the trees that came are seen by their names
            note(notes)
            podman_facts.run("mount", name)
        note(notes)
        command = places.command("podman", "start", name)
        caught = catching.catch(tracer, command, _STARTING, privileged=True)
        notes["first"] = [caught.pid, Task.of(caught.pid).start]
        note(notes)
        try:
            podman_networks.pin(_started(name))
            podman_networks.check(facts, _started(name))  # asked anew: before, podman may not find its addresses
            podman_bridges.keep((port.bridge for port in caught.plugs.values()), note, notes)
        except (OSError, EngineError, PhaulError):
            catching.kill(tracer, caught)
            raise
        with contextlib.suppress(PhaulError):  # it is not worth failing for
            if notes["mounted"]:  # podman counts, and has mounted it for the start once more
                podman_facts.run("unmount", name)
                note(notes | {"mounted": False})
            _keep_name(name, str(facts.get("hostname") or ""))
        return Place(path_of(caught.pid), caught.options)

    def take_over(self, notes: dict[str, Any], root: int, pids: Iterable[int]) -> None:
        from . import podman_bridges

        podman_bridges.leave(notes)
        state, pid = _state(_named(notes))
        if (state, pid) != (_RUNNING, root):
            raise PhaulError(
                f"podman says that the container is {state or 'gone'}, its first process {pid}, not {root}"
            )

    def withdraw(self, notes: dict[str, Any]) -> None:
        if not notes:  # it never came to that
            return
        from . import podman_bridges

        name = _named(notes)
        podman_bridges.leave(notes)  # at once: where podman clears away by itself, it removes them, too
        if "first" in notes:
            _end(name, int(notes["first"][0]))
        state, _ = _state(name)
        if state == _RUNNING:  # somebody has started it since
            return
        with contextlib.suppress(PhaulError):  # done before
            if state not in _ENDED:  # its start was cut off
                podman_facts.run("stop", "--time", "0", name)
            if notes.get("mounted"):
                podman_facts.run("unmount", name)
        podman_facts.leave(name)

    def give_up(self, facts: dict[str, Any]) -> None:
        name = _named(facts)
        _end(name, int(facts["pid"]))
        podman_facts.leave(name)


def _end(name: str, pid: int) -> None:
    """The first process of a container is dead: wait until its monitor has cleared everything away."""

    def over() -> bool:
        state, now = _state(name)
        return state in _ENDED or (state == _RUNNING and now != pid)

    if commands.wait(over, _ENDING):
        return
    podman_facts.run("stop", "--time", "0", name)


def _keep_name(name: str, hostname: str) -> None:
    """The files in which podman tells the container its host name: where it has made one up, that is another one
    here."""
    told = podman_facts.inspect(name)
    if told is None or not _HOSTNAME.fullmatch(hostname):
        return
    podman_facts.rename_host(told, hostname)


def _state(name: str) -> tuple[str, int]:
    """In podman's words, with the first process; an empty one if podman knows none of that name."""
    told = podman_facts.inspect(name)
    return podman_facts.state(told) if told is not None else ("", 0)


def _started(name: str) -> podman_facts.Facts:
    told = podman_facts.inspect(name)
    if told is None:
        raise PhaulError(f"podman has started the container {name}, and knows none of that name now")
    return told


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a container")


def _named(facts: dict[str, Any]) -> str:
    name = str(facts.get("name"))
    _check_name(name)
    return name


def _used(facts: dict[str, Any], there: podman_facts.Facts, create: str) -> Iterator[Finding]:
    """What the container there has written would be replaced."""
    if facts.get("layer") and podman_facts.started(there) and not podman_facts.is_left(there):
        text = "the container there has run before, and has files of its own"
        advice = f"remove it there (podman rm {there['Name']}), and create it anew: {create}"
        yield Finding("blocker", "podman-used", text, advice)


def _other(facts: dict[str, Any], there: podman_facts.Facts, create: str) -> Iterator[Finding]:
    """Where the container there was created with other options."""
    source, own = dict(facts.get("options") or {}), podman_facts.options(there)
    if source.get("Image") != own["Image"]:
        text = f"the container there is of another image: {own['Image']}, and {source.get('Image')} here"
        advice = "bring the image there (podman save here, podman load there), and create the container of it"
        yield Finding("blocker", "podman-image", text, advice)
        return
    for key in sorted(source.keys() | own.keys()):
        if source.get(key) != own.get(key):
            text = (
                f"the container there was created with other options: {key} is {own.get(key)}, here {source.get(key)}"
            )
            yield Finding("blocker", "podman-options", text, f"create it there anew: {create}")
            return
