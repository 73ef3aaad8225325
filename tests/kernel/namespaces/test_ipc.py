"""IPC namespaces: limits, System V objects with ids, keys, owners and content."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel.namespaces.containers import container

_TEXT = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
CREATE, NOWAIT, RMID = 0o1000, 0o4000, 0

def must(result):
    assert result != -1, os.strerror(ctypes.get_errno())
    return result

def setup():
    global kept, aside, queue, semaphores, address
    must(libc.shmget(0x100, 4096, CREATE | 0o600))
    must(libc.shmctl(0, RMID, None))  # so that numbers do not begin with 0
    kept = must(libc.shmget(0x1234, 3 * 4096, CREATE | 0o640))
    address = must(libc.shmat(kept, None, 0))
    ctypes.memmove(address, b"attached", 8)
    aside = must(libc.shmget(0x5678, 5000, CREATE | 0o604))
    there = must(libc.shmat(aside, None, 0))
    ctypes.memmove(there + 4990, b"aside", 5)
    must(libc.shmdt(ctypes.c_void_p(there)))
    queue = must(libc.msgget(0x77, CREATE | 0o620))
    for number in (1, 5, 3):
        text = b"message %d" % number * number
        must(libc.msgsnd(queue, number.to_bytes(8, "little") + text, len(text), NOWAIT))
    semaphores = must(libc.semget(0x99, 3, CREATE | 0o600))
    must(libc.semctl(semaphores, 0, 17, (ctypes.c_ushort * 3)(7, 0, 300)))
    for name, value in (("shmmni", "1000"), ("msgmax", "9000"), ("sem", "100 3000 40 50")):
        open("/proc/sys/kernel/" + name, "w").write(value)

def check():
    assert must(libc.shmget(0x1234, 0, 0)) == kept and must(libc.shmget(0x5678, 0, 0)) == aside
    assert ctypes.string_at(address, 8) == b"attached"
    again = must(libc.shmat(kept, None, 0))
    assert ctypes.string_at(again, 8) == b"attached"
    must(libc.shmdt(ctypes.c_void_p(again)))
    there = must(libc.shmat(aside, None, 0))
    assert ctypes.string_at(there + 4990, 5) == b"aside"
    must(libc.shmdt(ctypes.c_void_p(there)))
    assert must(libc.msgget(0x77, 0)) == queue
    room = ctypes.create_string_buffer(9000)
    for number in (1, 5, 3):
        size = must(libc.msgrcv(queue, room, 8000, 0, NOWAIT))
        assert room.raw[:8 + size] == number.to_bytes(8, "little") + b"message %d" % number * number
        text = room.raw[8:8 + size]
        must(libc.msgsnd(queue, room, size, NOWAIT))
    assert must(libc.semget(0x99, 0, 0)) == semaphores
    assert [must(libc.semctl(semaphores, index, 12)) for index in range(3)] == [7, 0, 300]
    for name, value in (("shmmni", "1000"), ("msgmax", "9000"), ("sem", "100 3000 40 50")):
        assert open("/proc/sys/kernel/" + name).read().split() == value.split(), name
    modes = [line.split()[2] for line in open("/proc/sysvipc/shm").read().splitlines()[1:]]
    assert modes == ["640", "604"], modes
"""


@pytest.mark.parametrize("flags", [(), ("--pid",), ("--pid", "--user", "--map-root-user")], ids=["host", "pid", "user"])
def test_objects_of_a_container(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with container(tmp_path, _TEXT, "--ipc", *flags) as subject:
        subject.check()
        subject.carry()
        subject.check()
        subject.carry()
        subject.check()
