"""A container's first process, caught when its runtime has made it and before its program begins.

The runtime starts the container as ever, with all that it makes for one: its monitor, cgroups, namespaces, consoles,
devices. The process that is about to become the container's init becomes the root of the skeleton in place of that
(`Births`, option `ROOT`). So what arrives is the child of the runtime's own monitor.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import calls
from .errors import RebuildError
from .native import failure, ffi, lib, new_error
from .target import Tracer, reap

ROOT, PLUGS, PIPES = "caught", "caught plugs", "caught pipes"
"""The options of a `Restoration` that give the pid of a process that was caught, its `Caught.plugs` and `.pipes`."""
PORTS = "caught ports"
"""The option for what is to be set of outer ends of veth pairs as ports of their bridges, by name (`Port.settings`)."""
NOTHING: dict[str, Any] = {ROOT: 0, PLUGS: {}, PIPES: {}, PORTS: {}}
"""The same where nothing was caught, whatever others say."""

_SAID = 300  # characters of what a failed command has said


@dataclass(frozen=True)
class Port:
    """The bridge that a network device was to be a port of, and what was to be set of it as one (IFLA_BRPORT_*)."""

    bridge: str
    settings: bytes = b""


@dataclass(frozen=True)
class Caught:
    """The first process of a container, which is stopped, and dies with the tracer. `plugs` say which bridges network
    devices, by their indexes, were to be plugged into. None was: the container's addresses would be heard.
    `pipes` are duplicates of those of its standard descriptors that are pipes, by number."""

    pid: int
    plugs: dict[int, Port]
    pipes: dict[int, int]

    @property
    def options(self) -> dict[str, Any]:
        """What a `Restoration` has to know."""
        return {ROOT: self.pid, PLUGS: self.plugs, PIPES: self.pipes}


def catch(tracer: Tracer, command: Sequence[str], timeout: float, *, privileged: bool = False) -> Caught:
    """Run a command that starts a container and ends. RebuildError if it fails, or takes longer than `timeout`
    seconds. `privileged`: the process keeps the capabilities and ids that its runtime would take from it before it
    executes the program; what the tree had of them is set in the end."""
    path = shutil.which(command[0])
    if path is None:
        raise RebuildError(f"{command[0]} is not installed here")
    with tempfile.TemporaryFile() as said, open(os.devnull, "rb") as nothing:  # no pipe: what stays would hold it
        wanted = ffi.new("struct ph_catch *")
        words = [ffi.new("char[]", os.fsencode(word)) for word in command]
        variables = [ffi.new("char[]", os.fsencode(f"{key}={value}")) for key, value in os.environ.items()]
        argv, environment = ffi.new("char *[]", [*words, ffi.NULL]), ffi.new("char *[]", [*variables, ffi.NULL])
        name = ffi.new("char[]", os.fsencode(path))
        wanted.path, wanted.argv, wanted.environment = name, argv, environment
        wanted.input, wanted.output, wanted.timeout_ms = nothing.fileno(), said.fileno(), int(timeout * 1000)
        wanted.privileged = privileged
        err = new_error()
        pid = int(lib.ph_catch(tracer.handle, wanted, err))
        if pid < 0:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()[-_SAID:]
            raise RebuildError(f"{' '.join(command)} failed: {failure(err)}{': ' if text else ''}{text}")
        plugs = [wanted.plugs[index] for index in range(wanted.plug_count)]
        return Caught(pid, {one.port: _port(one) for one in plugs}, _pipes(pid))


def _port(plug: Any) -> Port:
    return Port(os.fsdecode(ffi.string(plug.bridge)), bytes(ffi.buffer(plug.set)[: plug.set_size]))


def kill(tracer: Tracer, caught: Caught) -> None:
    """It is not to be the root of anything. It may be dead already, of a try to make it one."""
    for fd in caught.pipes.values():
        os.close(fd)
    with contextlib.suppress(ProcessLookupError):
        os.kill(caught.pid, signal.SIGKILL)
    reap(tracer, [caught.pid])


def _pipes(pid: int) -> dict[int, int]:
    pidfd, found = os.pidfd_open(pid), {}
    try:
        for number in range(3):
            with contextlib.suppress(OSError):  # it was started without
                fd = calls.pidfd_getfd(pidfd, number)
                if stat.S_ISFIFO(os.fstat(fd).st_mode):
                    found[number] = fd
                else:
                    os.close(fd)
    finally:
        os.close(pidfd)
    return found
