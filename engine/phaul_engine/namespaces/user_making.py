"""What makes user namespaces, and others that belong to them: to be called in a process of its own (`inside`)."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import NoReturn

from .inside import Descriptor

_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECUREBITS, _NO_SETUID_FIXUP = 1, 4, 28, 1 << 2

_libc = ctypes.CDLL(None, use_errno=True)


def make(owner: int, uid_map: bytes, gid_map: bytes, deny_groups: bool) -> Descriptor:
    """A user namespace below the one that we are in, made as user `owner`. OSError if that fails."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        _begin(owner, tell)
    try:
        os.close(tell)
        answer = os.read(ready, 4)
        if len(answer) != 4 or any(answer):
            error = int.from_bytes(answer, "little") or 0
            raise OSError(error, os.strerror(error))
        if deny_groups:
            _write(child, "setgroups", b"deny")
        for name, text in (("gid_map", gid_map), ("uid_map", uid_map)):
            if text:
                _write(child, name, text)
        return Descriptor(os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _begin(owner: int, tell: int) -> NoReturn:
    """The life of its first process."""
    try:
        _call("prctl", _PR_SET_SECUREBITS, _NO_SETUID_FIXUP, 0, 0, 0)
        os.setresuid(-1, owner, -1)
        _call("unshare", _NEWUSER)
        _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # else what is in its directory of /proc is not its maker's
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        told = 0
    except OSError as error:
        told = error.errno or 1
    os.write(tell, told.to_bytes(4, "little"))
    signal.pause()
    os._exit(0)


def make_belonging(name: str, flag: int) -> Descriptor:
    """A new namespace that belongs to the user namespace that we are in; we are in it from then on."""
    _call("unshare", flag)
    return Descriptor(os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))


def _write(pid: int, name: str, text: bytes) -> None:
    fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*map(ctypes.c_ulong, arguments)) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
