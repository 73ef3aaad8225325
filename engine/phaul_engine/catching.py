"""A container's first process, caught when its runtime has made it and before its program begins.

The runtime starts the container as ever, with all that it makes for one: its monitor, cgroups, namespaces, consoles,
devices. The process that is about to become the container's init becomes the root of the skeleton in place of that
(`Births`, option `ROOT`). So what arrives is the child of the runtime's own monitor.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import RebuildError
from .native import failure, ffi, lib, new_error
from .target import Tracer

ROOT, PLUGS = "caught", "caught plugs"
"""The options of a `Restoration` that give the pid of a process that was caught, and its `Caught.plugs`."""
NOTHING: dict[str, Any] = {ROOT: 0, PLUGS: {}}
"""The same where nothing was caught, whatever others say."""

_SAID = 300  # characters of what a failed command has said


@dataclass(frozen=True)
class Caught:
    """The first process of a container, which is stopped, and dies with the tracer. `plugs` are the bridges that
    network devices, by their indexes, were to be plugged into. None was: the container's addresses would be heard."""

    pid: int
    plugs: dict[int, str]

    @property
    def options(self) -> dict[str, Any]:
        """What a `Restoration` has to know."""
        return {ROOT: self.pid, PLUGS: self.plugs}


def catch(tracer: Tracer, command: Sequence[str], timeout: float) -> Caught:
    """Run a command that starts a container and ends. RebuildError if it fails, or takes longer than `timeout`
    seconds."""
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
        err = new_error()
        pid = int(lib.ph_catch(tracer.handle, wanted, err))
        if pid < 0:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()[-_SAID:]
            raise RebuildError(f"{' '.join(command)} failed: {failure(err)}{': ' if text else ''}{text}")
        plugs = [wanted.plugs[index] for index in range(wanted.plug_count)]
        return Caught(pid, {one.port: os.fsdecode(ffi.string(one.bridge)) for one in plugs})
