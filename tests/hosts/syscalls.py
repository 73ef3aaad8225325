"""The system calls that Python 3.11 has no name for: namespaces and mounts.

Each raises OSError with the path or flag concerned. unshare(2), setns(2), mount(2), sethostname(2).
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

_LIBC = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones; a new PID or time namespace holds the children to come."""
    _check(_LIBC.unshare(flags), f"unshare {flags:#x}")


def setns(fd: int, kind: int) -> None:
    """Enter the namespace behind `fd`, which is of `kind` (0: whatever it is)."""
    _check(_LIBC.setns(fd, kind), f"setns {kind:#x}")


def mount(source: str, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [text.encode() if text is not None else None for text in (source, target, fstype)]
    packed = data.encode() if data is not None else None
    result = _LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), packed)
    _check(result, f"mount {fstype or 'bind'} {source} on {target}")


def detach(target: str) -> None:
    """Unmount `target` with all below it, at once: umount2(2) with MNT_DETACH."""
    _check(_LIBC.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def sethostname(name: str) -> None:
    """sethostname(2)."""
    raw = name.encode()
    _check(_LIBC.sethostname(raw, len(raw)), f"sethostname {name}")


def prctl(option: int, value: int | bytes) -> None:
    """prctl(2) with one argument."""
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    _check(_LIBC.prctl(option, argument, 0, 0, 0), f"prctl {option}")
