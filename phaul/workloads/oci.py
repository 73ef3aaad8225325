"""Containers of runc and crun (`--runc ID`), by the commands and the state files of these (runc(8), crun(1)).

At the destination the runtime itself makes the container, from the same bundle: `create` makes its cgroup, with limits
and device rules, and a process that waits to become the program. The tree that arrives is born in that cgroup; when it
runs, its first process takes the place of the waiting one in the state file, and the runtime knows it as its own. At
the source, `delete` does what it does with a container that has ended.

A bundle is what decides about a container: it has to be at the destination, the same, and in the hands of root. On
storage that only one host sees it is sent (phaul.haul), where the destination's policy lets the source decide what
runs there as root.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from phaul_engine.cgroup import path_of
from phaul_engine.errors import GoneError
from phaul_engine.proc.access import open_process
from phaul_engine.proc.cgroup import read_cgroups
from phaul_engine.proc.mountinfo import own_mounts

from phaul.errors import PhaulError, UsageError
from phaul.events import Finding
from phaul.haul import layers
from phaul.haul.places import NOWHERE, Places
from phaul.journal import Task

from . import commands
from .base import Found, Note, Place, Workload, refuse

if TYPE_CHECKING:
    from phaul_engine.target import Tracer

_NAME = re.compile(r"[A-Za-z0-9_+.-]{1,1024}")
_CONFIG_MAX = 1 << 22  # bytes
_PATIENCE = 30.0  # seconds for a command of the runtime
_DYING = 5.0  # seconds for the waiting process to be gone
_WAITING = "exec.fifo"  # what a container that was created and not started has in its state directory


@dataclass(frozen=True)
class Runtime:
    """A runtime: its program, where it keeps a container's state, and what stands there for its first process."""

    program: str
    directory: Path
    file: str
    pid: str
    start: str

    def state(self, name: str) -> dict[str, Any] | None:
        """What it has written down of a container; None if it knows none of that name."""
        try:
            content = json.loads((self.directory / name / self.file).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise PhaulError(f"{self.directory / name / self.file} cannot be read: {error}") from error
        return content if isinstance(content, dict) else None

    def bundle(self, state: dict[str, Any]) -> str:
        """The bundle of a container."""
        if "bundle" in state:
            return str(state["bundle"])
        labels = state.get("config", {}).get("labels") or []
        return next((str(one)[7:] for one in labels if str(one).startswith("bundle=")), "")

    def run(self, *words: str, places: Places = NOWHERE) -> None:
        """Run a command of it. PhaulError, with what it said, if it fails."""
        commands.run((self.program, *words), _PATIENCE, places=places)

    def note(self, name: str, pid: int) -> None:
        """Have it know another process as the first one of a container, which runs."""
        state = self.state(name)
        if state is None:
            raise PhaulError(f"{self.program} has forgotten container {name}")
        namespaces = state.get("namespace_paths")
        if isinstance(namespaces, dict):
            old = f"/proc/{state[self.pid]}/"
            state["namespace_paths"] = {
                kind: str(path).replace(old, f"/proc/{pid}/") for kind, path in namespaces.items()
            }
        state[self.pid], state[self.start] = pid, Task.of(pid).start
        directory = self.directory / name
        commands.replace(directory / self.file, json.dumps(state))
        (directory / _WAITING).unlink(missing_ok=True)


RUNTIMES = {
    "runc": Runtime("runc", Path("/run/runc"), "state.json", "init_process_pid", "init_process_start"),
    "crun": Runtime("crun", Path("/run/crun"), "status", "pid", "process-start-time"),
}


class Oci(Workload):
    """Named by the container's id."""

    kind: ClassVar = "oci"

    def find(self, name: str) -> Found:
        _check_name(name)
        for runtime in RUNTIMES.values():
            state = runtime.state(name)
            if state is not None:
                return _found(runtime, name, state)
        where = " and ".join(str(runtime.directory) for runtime in RUNTIMES.values())
        raise UsageError(f"this host has no container {name}", advice=f"runc and crun keep theirs in {where}")

    def examine(self, facts: dict[str, Any], hauled: Collection[str] = ()) -> list[Finding]:
        runtime, name = _named(facts)
        comes = str(facts.get("bundle")) in hauled
        return [*_cannot(runtime), *_taken(runtime, name), *(() if comes else _other_bundle(facts, NOWHERE, hauled))]

    def prepare(self, facts: dict[str, Any], note: Note, tracer: Tracer, places: Places = NOWHERE) -> Place:
        runtime, name = _named(facts)
        refuse((*_cannot(runtime), *_taken(runtime, name), *_other_bundle(facts, places)))
        notes = {"runtime": runtime.program, "name": name, "since": time.time()}
        note(notes)
        runtime.run("create", "--bundle", str(facts["bundle"]), name, places=places)
        state = runtime.state(name)
        if state is None:
            raise PhaulError(f"{runtime.program} has created {name} and does not know it")
        waiting = Task.of(int(state[runtime.pid]))
        note(notes | {"waiting": [waiting.pid, waiting.start]})
        return Place(path_of(waiting.pid))

    def take_over(self, notes: dict[str, Any], root: int, pids: Iterable[int]) -> None:
        runtime, name = _named(notes)
        waiting = Task(pid=int(notes["waiting"][0]), start=int(notes["waiting"][1]))
        if waiting.alive:
            _join_old_cgroups(waiting.pid, pids)
        runtime.note(name, root)
        _end(waiting)

    def withdraw(self, notes: dict[str, Any]) -> None:
        if not notes:  # it never came to that
            return
        runtime, name = _named(notes)
        state = runtime.state(name)
        if state is not None and _ours(runtime, name, state, notes):
            runtime.run("delete", "--force", name)

    def give_up(self, facts: dict[str, Any]) -> None:
        runtime, name = _named(facts)
        state = runtime.state(name)
        if state is not None and state[runtime.pid] == facts.get("pid"):
            runtime.run("delete", "--force", name)


def _ours(runtime: Runtime, name: str, state: dict[str, Any], notes: dict[str, Any]) -> bool:
    """Whether a container is the one that was created here for what was to arrive."""
    if "waiting" in notes:
        return bool([state.get(runtime.pid), state.get(runtime.start)] == notes["waiting"])
    place = runtime.directory / name
    return (place / _WAITING).exists() and place.stat().st_ctime >= float(notes["since"])


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise UsageError(f"{name!r} is no id of a container")


def _named(facts: dict[str, Any]) -> tuple[Runtime, str]:
    """The runtime and the id; PhaulError for what no phaul writes."""
    runtime, name = RUNTIMES.get(str(facts.get("runtime"))), str(facts.get("name"))
    if runtime is None:
        raise PhaulError(f"no such runtime: {facts.get('runtime')!r}")
    _check_name(name)
    return runtime, name


def _found(runtime: Runtime, name: str, state: dict[str, Any]) -> Found:
    pid, bundle = int(state.get(runtime.pid) or 0), runtime.bundle(state)
    words = f"container {name} ({runtime.program})"
    if (runtime.directory / name / _WAITING).exists():
        raise UsageError(f"{words} has not been started", advice="create it on the other host")
    try:
        alive = pid > 0 and Task.of(pid).start == state.get(runtime.start)
    except GoneError:
        alive = False
    if not alive:
        raise UsageError(f"{words} does not run", advice=f"start it on the other host: {runtime.program} run")
    content = _content(bundle)
    digest = hashlib.sha256(content).hexdigest()
    facts = {"runtime": runtime.program, "name": name, "pid": pid, "bundle": bundle, "config": digest}
    config = _config(bundle, content)
    return Found(pid, words, facts, tuple(_hooked(bundle, config)), tuple(_trees(bundle, config)))


def _root(bundle: str, config: dict[str, Any]) -> Path:
    """The directory of the container's root file system."""
    return Path(bundle) / str((config.get("root") or {}).get("path") or "rootfs")


def _trees(bundle: str, config: dict[str, Any]) -> Iterable[str]:
    """The bundle, and the root file system if it is not in there, or one of layers."""
    place, root = os.path.normpath(bundle), os.path.normpath(_root(bundle, config))
    if not f"{place}/".startswith(f"{root}/"):
        yield place
    if not f"{root}/".startswith(f"{place}/") or layers.of(root, own_mounts()) is not None:
        yield root


def _hooked(bundle: str, config: dict[str, Any]) -> Iterable[Finding]:
    """Hooks set something up that lies outside of the container, usually its network: nobody knows how to move it."""
    hooks = config.get("hooks") or {}
    names = ", ".join(sorted(str(name) for name, some in hooks.items() if some))
    if names:
        text = f"{bundle}/config.json has hooks ({names}), which make what phaul knows nothing of"
        yield Finding("blocker", "oci-hooks", text, "run it without, or move it as a plain PID: phaul migrate PID HOST")


def _cannot(runtime: Runtime) -> Iterable[Finding]:
    if shutil.which(runtime.program) is None:
        yield Finding("blocker", "oci-runtime", f"{runtime.program} is not installed there", "install it there")


def _taken(runtime: Runtime, name: str) -> Iterable[Finding]:
    if os.path.lexists(runtime.directory / name):
        advice = f"remove it there: {runtime.program} delete {name}"
        yield Finding("blocker", "oci-name", f"there is a container {name} there already", advice)


def _other_bundle(facts: dict[str, Any], places: Places, hauled: Collection[str] = ()) -> Iterable[Finding]:
    """Whether a bundle is here, is the same, and cannot be changed by anybody but root. Its root may be `hauled`."""
    final = str(facts.get("bundle"))
    place = Path(final)
    advice = "keep bundles on storage that both hosts mount at the same place, or copy it there"
    if not place.is_absolute() or ".." in place.parts:
        yield Finding("blocker", "oci-bundle", f"{final!r} is no path of a bundle")
        return
    bundle = places.now(final)
    place = Path(bundle)
    try:
        content = _content(bundle)
        config = _config(bundle, content)
        for path in (place, place / "config.json"):
            status = path.lstat()
            if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o022 or stat.S_ISLNK(status.st_mode):
                text = f"{path} there can be changed by others than root: whoever does decides what runs"
                yield Finding("blocker", "oci-bundle", text, "give it to root, and let nobody else write it")
        if hashlib.sha256(content).hexdigest() != facts.get("config"):
            yield Finding("blocker", "oci-bundle", f"{place / 'config.json'} there is another one", advice)
        root = Path(places.now(str(_root(final, config))))
        if not root.is_dir() and os.path.normpath(root) not in hauled:
            yield Finding("blocker", "oci-bundle", f"there is no root file system {root} there", advice)
        yield from _hooked(bundle, config)
    except PhaulError as error:
        yield Finding("blocker", "oci-bundle", f"{error} (there)", advice)


def _content(bundle: str) -> bytes:
    return commands.read(Path(bundle) / "config.json", _CONFIG_MAX)


def _config(bundle: str, content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise PhaulError(f"{bundle}/config.json is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise PhaulError(f"{bundle}/config.json is no configuration of a container")
    return config


def _join_old_cgroups(waiting: int, pids: Iterable[int]) -> None:
    """Put processes into the cgroups of version 1 that the waiting one is in; that of version 2 is theirs already."""
    proc = open_process(waiting)
    try:
        places = [one for one in read_cgroups(proc) if not one.unified and one.path != "/"]
    finally:
        os.close(proc)
    if not places:
        return
    mounts = [mount for mount in own_mounts() if mount.fstype == "cgroup"]
    for place in places:
        wanted = set(place.controllers)
        mount = next((one for one in mounts if wanted <= set(one.super_options)), None)
        if mount is None:
            continue
        for pid in pids:
            with contextlib.suppress(ProcessLookupError), open(f"{mount.point}{place.path}/cgroup.procs", "w") as file:
                file.write(str(pid))


def _end(task: Task) -> None:
    """Kill the process that waited, and wait until it is gone: the cgroup is the container's alone then."""
    with contextlib.suppress(ProcessLookupError):
        if task.alive:
            os.kill(task.pid, signal.SIGKILL)
    commands.wait(lambda: not task.alive, _DYING)
