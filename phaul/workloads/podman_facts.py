"""What `podman inspect` says of a container, and what in it speaks against moving it (podman-inspect(1))."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from phaul.errors import PhaulError
from phaul.events import Finding

from . import commands

Facts: TypeAlias = dict[str, Any]
"""One container, as podman tells of it in JSON."""

PATIENCE = 30.0  # seconds for a command
_SYSTEMD = "/run/systemd/system"  # is there if it is the host's init
_UNKNOWN = "no such container"  # in what podman says where it knows none
_NEVER = "0001-01-01T00:00:00Z"  # when one was started that never was
_RESTARTS = ("", "no", "never")
_NETWORKS = ("none", "host", "bridge")
_ORDERED = ("Config.Cmd", "Config.Entrypoint")  # other lists come in any order
_LOCAL = frozenset(
    {
        "Config.Annotations",
        "Config.CreateCommand",
        "Config.Hostname",
        "Config.Image",
        "HostConfig.CgroupManager",
        "HostConfig.CgroupParent",
        "HostConfig.ContainerIDFile",
        "HostConfig.LogConfig",
    }
)
"""What may be another on each host, or says again what is compared."""


def run(*words: str) -> str:
    """What a command of podman says. PhaulError, with that, if it fails."""
    return commands.run(("podman", *words), PATIENCE, advice="install the package podman")


def inspect(name: str) -> Facts | None:
    """What podman knows of a container, by its name or the beginning of its id; None if it knows none."""
    try:
        found = json.loads(run("inspect", "--type", "container", name))
    except PhaulError as error:
        if _UNKNOWN in str(error):
            return None
        raise
    return dict(found[0])


def state(facts: Facts) -> tuple[str, int]:
    """In podman's words, and the container's first process."""
    told = facts["State"]
    return str(told["Status"]), int(told["Pid"])


def started(facts: Facts) -> str:
    """When it was started last; empty if that was never."""
    when = str(facts["State"]["StartedAt"])
    return "" if when == _NEVER else when


def layer(facts: Facts) -> str:
    """The directory of its root file system, where that is one of podman's own: an image with what it has written;
    empty if it writes to none, or podman does not have it mounted."""
    if facts.get("Rootfs") or facts["HostConfig"].get("ReadonlyRootfs"):
        return ""
    driver = facts["GraphDriver"]
    return str((driver.get("Data") or {}).get("MergedDir") or "")


def has_image(name: str) -> bool:
    """Whether podman mounts a container's root file system, as it does unless that is a directory (--rootfs)."""
    facts = inspect(name)
    return facts is not None and not facts.get("Rootfs")


def is_left(facts: Facts) -> bool:
    """Whether what is in a container is what a migration has left there."""
    try:
        return _mark(facts).read_text() == started(facts)
    except OSError:
        return False


def leave(name: str) -> None:
    """A migration has left what is in a container, or was called off and has brought a part of it: it may be replaced,
    unless it is started again. Podman removes the mark with the container."""
    facts = inspect(name)
    if facts is not None:
        commands.replace(_mark(facts), started(facts))


def _mark(facts: Facts) -> Path:
    return Path(facts["StaticDir"]) / "phaul-left"


def host_name(facts: Facts) -> str:
    """What its files say that its host is called."""
    try:
        return Path(facts["HostnamePath"]).read_text().strip()
    except OSError:
        return ""


def rename_host(facts: Facts, name: str) -> None:
    """Have them say another name. In place: they are mounted. Podman writes one of them anew at each start, the other
    says still what it was renamed to before."""
    before = {host_name(facts), str(facts["Config"].get("Hostname") or "")} - {"", name}
    if not before:
        return
    for key in ("HostnamePath", "HostsPath"):
        path = Path(facts.get(key) or "/")
        if path.is_file():
            names = "|".join(map(re.escape, sorted(before)))
            path.write_text(re.sub(rf"(?<!\S)({names})(?!\S)", name, path.read_text()))


def _is_split(facts: Facts) -> bool:
    """Whether the layers of the root file system are on several file systems: an overlay shows them then."""
    data = facts["GraphDriver"].get("Data") or {}
    places = [data.get("UpperDir"), *str(data.get("LowerDir") or "").split(":")]
    return bool(layer(facts)) and len({os.stat(one).st_dev for one in places if one}) > 1


def shared_memory(facts: Facts) -> str:
    """Where podman has mounted on the host what the container has at /dev/shm."""
    return f"{facts['StaticDir']}/shm"


def directories(facts: Facts) -> Iterator[str]:
    """Those of this host that it writes to: its root file system, if podman has been given one, and volumes."""
    if facts.get("Rootfs"):
        yield os.path.normpath(facts["Rootfs"])
    for mount in facts.get("Mounts") or ():
        source = os.path.normpath(mount.get("Source") or "/")
        if mount.get("RW") and os.path.isdir(source):
            yield source


def pipes(monitor: int) -> list[list[int]]:
    """The pipes that a container's monitor (conmon(8)) has one end of, by inode: which of the container's standard
    descriptors each of them was. It makes those of the output before that of errors."""
    found: dict[int, set[int]] = {}
    for number in sorted(map(int, os.listdir(f"/proc/{monitor}/fd"))):
        link = os.readlink(f"/proc/{monitor}/fd/{number}")
        if link.startswith("pipe:["):
            words = Path(f"/proc/{monitor}/fdinfo/{number}").read_text().split()
            flags = int(words[words.index("flags:") + 1], 8)
            found.setdefault(int(link[6:-1]), set()).add(flags & os.O_ACCMODE)
    outputs = [inode for inode, ends in found.items() if ends == {os.O_RDONLY}]
    inputs = [inode for inode, ends in found.items() if ends == {os.O_WRONLY}]
    if len(outputs) > 2 or len(inputs) > 1:
        raise PhaulError(f"conmon (pid {monitor}) has more pipes than a container has standard descriptors")
    return [*([inode, 0] for inode in inputs), *([inode, number] for number, inode in enumerate(outputs, 1))]


def options(facts: Facts) -> dict[str, str]:
    """What it was created with, as far as it has to be the same on both hosts: JSON, by what podman calls it."""
    found = {"Image": json.dumps(facts["Image"]), "Rootfs": json.dumps(facts.get("Rootfs") or "")}
    for part in ("Config", "HostConfig"):
        for key, value in facts[part].items():
            name = f"{part}.{key}"
            if name == "Config.Env":
                value = [one for one in value or () if not one.startswith("HOSTNAME=")]
            if isinstance(value, list) and name not in _ORDERED:
                value = sorted(value, key=json.dumps)
            if name not in _LOCAL:
                found[name] = json.dumps(value, sort_keys=True)
    name, made_up = facts["Config"].get("Hostname"), str(facts["Id"])[:12]
    if name != made_up and facts["HostConfig"]["NetworkMode"] != "host":  # there it is the host's
        found["Config.Hostname"] = json.dumps(name)
    return found


def creation(facts: Facts) -> str:
    """The command that creates one like it; empty if podman does not tell."""
    words = [str(word) for word in facts["Config"].get("CreateCommand") or ()]
    if "run" not in words and "create" not in words:
        return ""
    index = next(index for index, word in enumerate(words) if word in ("run", "create"))
    rest = [word for word in words[index + 1 :] if word not in ("-d", "--detach")]
    return shlex.join(["podman", *words[1:index], "create", *rest])


def _is_checked(facts: Facts) -> bool:
    """Whether health checks are run in it by themselves: timers of systemd do that, where it is (sd_booted(3))."""
    check = facts["Config"].get("Healthcheck") or {}
    is_none = check.get("Test", ["NONE"])[:1] == ["NONE"]
    return not is_none and bool(check.get("Interval")) and os.path.isdir(_SYSTEMD)


def cannot(facts: Facts) -> Iterator[Finding]:
    """What makes a container that does not move."""
    host = facts["HostConfig"]
    if facts.get("Pod") or facts.get("IsInfra") or facts.get("Dependencies"):
        text = "it is in a pod, or in namespaces of another container"
        yield Finding("blocker", "podman-pod", text, "run it by itself: pods move as a whole, which phaul cannot yet")
    policy = str(host["RestartPolicy"]["Name"])
    if policy not in _RESTARTS:
        text = f"--restart={policy}: podman would start it here again when it has moved"
        yield Finding("blocker", "podman-restart", text, "create it without; a unit of systemd can start it instead")
    if _is_checked(facts):
        text = "systemd has podman run health checks in it, on the other host too while it is being moved there"
        yield Finding("blocker", "podman-health", text, "create it with --health-interval=disable or --no-healthcheck")
    if host["NetworkMode"] not in _NETWORKS:
        text = f"--network {host['NetworkMode']}: its network is none that podman there could set up by itself"
        yield Finding("blocker", "podman-network", text, "create it on a network of driver bridge, with none, or host")
    if host["PidMode"] != "private":
        text = f"--pid {host['PidMode']}: its first process is none that podman there could have started"
        yield Finding("blocker", "podman-namespaces", text, "create it without")
    for key, option in (("UsernsMode", "--userns"), ("IpcMode", "--ipc"), ("UTSMode", "--uts")):
        value = str(host.get(key) or "")
        if value.startswith(("container:", "ns:")) or (key == "UsernsMode" and value not in ("", "host")):
            text = f"{option} {value}: phaul cannot move it with that"
            yield Finding("blocker", "podman-namespaces", text, "create it without")
    if not facts.get("Rootfs") and not host.get("ReadonlyRootfs") and facts["GraphDriver"]["Name"] != "overlay":
        text = f"podman's storage driver is {facts['GraphDriver']['Name']}, and phaul knows where overlay keeps files"
        yield Finding("blocker", "podman-storage", text, "create it with --read-only, or from a directory (--rootfs)")
    if _is_split(facts):
        text = "what it writes is on another file system than its image, and phaul could not follow its files"
        yield Finding("blocker", "podman-storage", text, "have the image in the storage that containers are in")
    if os.path.basename(facts["OCIRuntime"]) != "runc":
        text = f"its runtime is {facts['OCIRuntime']}, and phaul knows how runc begins a container"
        yield Finding("blocker", "podman-runtime", text, "create it with --runtime runc")
