"""A container of OpenVZ on the move: found, made ready for, handed over, given up."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from phaul_engine.cgroup import path_of

from phaul.errors import PhaulError, UsageError
from phaul.events import Finding
from phaul.haul.places import NOWHERE, Places
from phaul.journal import Task
from phaul.workloads.base import Found, Note, Place, Workload, refuse
from phaul.workloads.commands import wait

from . import area, commands, config, disks, identity
from .area import Area

if TYPE_CHECKING:
    from phaul_engine.target import Tracer

_ENDING = 5.0  # seconds for vzctl to notice that a container has ended
_LATER = ("NETIF", "ONBOOT")
_DIRECTORY, _IMAGES = 4, 5  # layouts


class OpenVz(Workload):
    """Named by the container's id or name."""

    kind: ClassVar = "vz"

    def find(self, name: str) -> Found:
        try:
            wanted = area.check_name(name)
        except PhaulError as error:
            raise UsageError(str(error)) from error
        if not commands.installed():
            raise UsageError("vzctl is not installed here", advice="--vz is for hosts of OpenVZ; see docs/openvz.md")
        status = commands.status(wanted)
        words = f"container {name} (OpenVZ)"
        if not status.exists:
            raise UsageError(f"this host has no container {name}", advice="vzlist -a tells which it has")
        if status.state != "running":
            advice = f"vzctl {'resume' if status.state in ('paused', 'suspended') else 'start'} {name}"
            raise UsageError(f"{words} is {status.state}", advice=advice)
        ctid = area.check_ctid(status.ctid)
        pid = area.first_process(ctid)
        parameters = config.read(area.conf_path(ctid))
        place = area.of(ctid, parameters)
        if not identity.in_kernel():
            return Found(pid, words, {}, (_no_kernel("this host"),))
        facts = {
            "ctid": ctid,
            "pid": pid,
            "private": place.private,
            "root": place.root,
            "layout": area.layout(place.private),
            "owner": area.owner(place.private),
            "uuid": parameters.get("UUID", ""),
            "disabled": parameters.get("DISABLED", ""),
            "config": config.carried(parameters),
            "identity": identity.read(ctid, pid),
        }
        trees = (place.fs,) if facts["layout"] == _DIRECTORY else ()
        return Found(pid, words, facts, tuple(_cannot(place, parameters)), trees)

    def examine(self, facts: dict[str, Any], hauled: Collection[str] = ()) -> list[Finding]:
        if not commands.installed():
            return [
                Finding("blocker", "vz-commands", "vzctl is not installed there", "the other host must be of OpenVZ")
            ]
        if not identity.in_kernel():
            return [_no_kernel("the other host")]
        try:
            return list(_in_the_way(_placed(facts), facts, hauled))
        except PhaulError as error:
            return [Finding("blocker", "vz-config", f"{error} (there)", error.advice)]

    def prepare(self, facts: dict[str, Any], note: Note, tracer: Tracer, places: Places = NOWHERE) -> Place:
        from phaul_engine import catching

        refuse(self.examine(facts))
        place = _placed(facts)
        if not os.path.isdir(places.now(place.fs)):
            raise PhaulError(f"the container's files are not here ({place.fs})")
        first, later = _configs(facts)
        notes = {"ctid": place.ctid, "private": place.private, "root": place.root, "later": later}
        note(notes)
        area.make(place, config.text(first), _DIRECTORY)
        commands.run(*places.command("vzctl", "register", place.private, place.ctid))
        caught = catching.catch(tracer, places.command("vzctl", "start", place.ctid), commands.PATIENCE)
        pid = caught.pid
        note(notes | {"first": [pid, Task.of(pid).start]})
        here = identity.read(place.ctid, pid)
        for difference in identity.differences(facts["identity"], here):
            raise PhaulError(difference, advice="have the same kernel and vzctl on both hosts")
        identity.put(place.ctid, pid, facts["identity"], here)
        return Place(path_of(pid), caught.options)

    def take_over(self, notes: dict[str, Any], root: int, pids: Iterable[int]) -> None:
        place = _noted(notes)
        area.configure(place, config.text(config.read(Path(place.private, area.CONF)) | notes["later"]))
        status = commands.status(place.ctid)
        first = area.first_process(place.ctid)
        if (status.running, first) != (True, root):
            raise PhaulError(
                f"vzctl says that {place.ctid} is {status.state}, and its first process {first}, not {root}"
            )

    def withdraw(self, notes: dict[str, Any]) -> None:
        if notes:  # else it never came to that
            place = _noted(notes)
            if _end(place, int(notes.get("first", [0])[0])):
                area.unmake(place)

    def hold(self, facts: dict[str, Any]) -> None:
        if facts.get("disabled") != "yes":
            commands.run("vzctl", "set", area.check_ctid(str(facts["ctid"])), "--disabled", "yes", "--save")

    def let_go(self, facts: dict[str, Any]) -> None:
        if facts.get("disabled") != "yes":
            commands.run("vzctl", "set", area.check_ctid(str(facts["ctid"])), "--disabled", "no", "--save")

    def give_up(self, facts: dict[str, Any]) -> None:
        place = _noted(facts)
        if _end(place, int(facts["pid"])) and os.path.lexists(f"{place.private}/{area.CONF}"):
            os.rename(place.private, _aside(place.private))


def _placed(facts: dict[str, Any]) -> Area:
    """Where this host has a container of that id; PhaulError for facts that no phaul sends."""
    ctid = area.check_ctid(str(facts.get("ctid")))
    carried = facts.get("config")
    if not isinstance(carried, dict) or not isinstance(facts.get("identity"), dict):
        raise PhaulError("the other host tells nothing of its container")
    return area.of(ctid, {})


def _noted(notes: dict[str, Any]) -> Area:
    return Area(area.check_ctid(str(notes["ctid"])), str(notes["private"]), str(notes["root"]))


def _configs(facts: dict[str, Any]) -> tuple[config.Config, config.Config]:
    """The configuration of a container that arrives, and what is added when it runs. PhaulError for one that is none.

    Until then it has no network: the devices are the engine's to make, which plugs them in when nothing is heard of the
    source's any more. Nor does a host that restarts start it."""
    given = config.carried({str(name): str(value) for name, value in facts["config"].items()})
    own = {"VEID": str(facts["ctid"]), "UUID": str(facts.get("uuid", ""))}
    first = {name: value for name, value in (given | own).items() if value and name not in _LATER}
    later = {name: given[name] for name in _LATER if given.get(name)}
    config.text(first | later)
    return first | {"ONBOOT": "no"}, later


# -- what is in the way ----------------------------------------------------------------------------------------------


def _no_kernel(host: str) -> Finding:
    text = f"the kernel of {host} has no VEs (no controller `ve` in /proc/cgroups)"
    return Finding(
        "blocker", "vz-kernel", text, "boot the kernel of OpenVZ; without it nothing says what a container is"
    )


def _cannot(place: Area, parameters: config.Config) -> Iterator[Finding]:
    """What keeps a container of this host from moving at all."""
    for path in area.scripts(place.private, place.ctid):
        text = f"{path} is run by vzctl as root of the host, and makes what phaul knows nothing of"
        yield Finding("blocker", "vz-scripts", text, "move it away while the container moves")
    for name in config.foreign(parameters):
        text = f"{name} in its configuration is for the operator of a host to give, not for another host"
        yield Finding("blocker", "vz-config", text, f"take {name} out, and set it there afterwards: vzctl set --save")
    for name in sorted(name for name in config.HOSTS if parameters.get(name)):
        yield Finding("warning", "vz-config", f"{name} means something of this host only, and stays behind")
    if found := config.addresses(parameters.get("IP_ADDRESS", "")):
        text = f"{', '.join(found)} are on venet0, a device that only the kernel of OpenVZ can make"
        yield Finding("blocker", "vz-venet", text, "give the container a veth pair: vzctl set --netif_add")
    try:
        list(config.interfaces(parameters.get("NETIF", "")))
        yield from _unmovable(place, parameters)
    except PhaulError as error:
        yield Finding("blocker", "vz-config", str(error), error.advice)


def _unmovable(place: Area, parameters: config.Config) -> Iterator[Finding]:
    """What of its disks cannot be had at another host."""
    number = area.layout(place.private)
    if number == _DIRECTORY:
        if not os.path.isdir(place.fs):
            yield Finding("blocker", "vz-layout", f"the container's files are not in {place.fs}")
        return
    if number != _IMAGES:
        text = f"{place.private} is of a layout that is not known"
        yield Finding("blocker", "vz-layout", text, "vzctl convert")
        return
    for disk in disks.of(place.private, parameters | {"VEID": place.ctid}):
        words = f"{disk.path} ({disk.format}, {disk.size >> 20} MiB)"
        text = f"{words} is an image, which one kernel alone can have mounted: only files move while they are used"
        yield Finding("blocker", "vz-disk", text, "vzmigrate --online moves it, with a longer downtime")


def _in_the_way(place: Area, facts: dict[str, Any], hauled: Collection[str]) -> Iterator[Finding]:
    """What keeps this host from taking over a container."""
    for name, here, there in (
        ("private areas", place.private, facts.get("private")),
        ("mount points", place.root, facts.get("root")),
    ):
        if here != there:
            text = f"{name} are elsewhere there: {here}, not {there}"
            yield Finding("blocker", "vz-places", text, "have VE_PRIVATE and VE_ROOT the same in /etc/vz/vz.conf")
            return
    yield from area.taken(place)
    if place.fs in hauled:
        text = f"the container's files would have to be sent ({place.fs}), which is not done yet for OpenVZ"
        yield Finding("blocker", "vz-files", text, "have them on storage that both nodes mount there")
    name = str(facts["config"].get("NAME", ""))
    if name and os.path.lexists(area.ETC / "names" / name):
        yield Finding("blocker", "vz-name", f"a container of the name {name} is there already", "vzctl set --name")
    for path in area.scripts(place.private, place.ctid):
        yield Finding("blocker", "vz-scripts", f"{path} there is run by vzctl as root of the host", "move it away")
    given = {str(key): str(value) for key, value in facts["config"].items()}
    for key in config.foreign(given):
        yield Finding("blocker", "vz-config", f"the other host wants to set {key} there")
    list(config.interfaces(given.get("NETIF", "")))
    _configs(facts)


# -- the end of one ----------------------------------------------------------------------------------------------------


def _end(place: Area, pid: int) -> bool:
    """The processes of a container are dead: have vzctl know nothing of it any more. False if by now there is another
    one of its id, or it was started again."""
    conf = area.conf_path(place.ctid)
    if not os.path.lexists(conf):  # done before, or never registered
        return True
    if os.path.realpath(conf) != os.path.realpath(f"{place.private}/{area.CONF}"):
        return False
    wait(lambda: not commands.status(place.ctid).running, _ENDING)
    status = commands.status(place.ctid)
    if status.running:
        if pid and area.first_process(place.ctid) != pid:
            return False
        commands.run("vzctl", "stop", place.ctid, "--fast")
        status = commands.status(place.ctid)
    if status.mounted:
        commands.run("vzctl", "umount", place.ctid)
    commands.run("vzctl", "unregister", place.ctid)
    return True


def _aside(private: str) -> str:
    """A name for a private area that was left; one of an earlier migration stays."""
    name = f"{private}{area.MIGRATED}"
    number = 1
    while os.path.lexists(name):
        number += 1
        name = f"{private}{area.MIGRATED}.{number}"
    return name
