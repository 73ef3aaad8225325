"""Process 1 of a container: it counts in a status file ("COUNT ok"), and looks each time at its names and numbers, at
a message queue, at a set of semaphores, and at its child.

Arguments: the status file. The container is whatever namespaces it was started in.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

_CREATE, _NOWAIT = 0o1000, 0o4000
_GETVAL, _SETVAL = 12, 16
_libc = ctypes.CDLL(None, use_errno=True)


def _names() -> tuple[object, ...]:
    names = [Path(f"/proc/sys/kernel/{name}").read_text() for name in ("hostname", "domainname")]
    maps = [Path(f"/proc/self/{name}").read_text() for name in ("uid_map", "gid_map")]
    return names, maps, os.getpid(), os.getsid(0), os.getuid(), os.getgid(), os.getgroups()


def _objects(count: int) -> str:
    """Take the number of the step before, leave this one."""
    queue, semaphores = _libc.msgget(0x70, 0), _libc.semget(0x71, 0, 0)
    room = ctypes.create_string_buffer(64)
    size = _libc.msgrcv(queue, room, 32, 0, _NOWAIT)
    before, held = room.raw[8 : 8 + max(size, 0)], _libc.semctl(semaphores, 1, _GETVAL)
    _libc.semctl(semaphores, 1, _SETVAL, ctypes.c_int(count % 1000))
    text = str(count).encode()
    _libc.msgsnd(queue, (1).to_bytes(8, "little") + text, len(text), _NOWAIT)
    if before != str(count - 1).encode() or held != (count - 1) % 1000:
        return f"a message {before!r} and a semaphore of {held} after step {count - 1}"
    return ""


def main(status: str) -> None:
    """Count."""
    _libc.msgsnd(_libc.msgget(0x70, _CREATE | 0o600), (1).to_bytes(8, "little") + b"0", 1, _NOWAIT)
    _libc.semget(0x71, 2, _CREATE | 0o600)
    os.setsid()
    Path("/proc/sys/kernel/hostname").write_text("contained")
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    names, count = _names(), 0
    while True:
        count += 1
        wrong = _objects(count) or ("" if _names() == names else f"{_names()} after {names}")
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            wrong = "its child has ended"
        with open(status + ".new", "w") as out:
            out.write(f"{count} {wrong or 'ok'}\n")
        os.rename(status + ".new", status)
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
