"""System V objects: semaphores and queues that a tree uses, and shared memory that must not outlive a copy."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import ipc_desc_pb2, ipc_shm_pb2
from phaul_engine.objects import sysv_ipc, sysv_shm
from phaul_engine.objects.base import Collection, Owner

_libc = ctypes.CDLL(None, use_errno=True)
_IPC_CREAT, _IPC_RMID = 0o1600, 0


def _owner(pid: int) -> dict[int, Owner]:
    return {pid: Owner(pid, pid, "subject", -1, -1, -1)}


def _blockers(pid: int) -> list[str]:
    collection = Collection(Checkpoint(), survey=True)
    sysv_ipc.judge(_owner(pid), collection)
    return [str(blocker) for blocker in collection.blockers]


def test_a_semaphore_set_that_the_tree_was_last_to_use() -> None:
    ident = _libc.semget(0, 3, _IPC_CREAT)
    try:
        assert _blockers(os.getpid()) == []
        operation = (ctypes.c_short * 3)(2, 1, 0)  # number, operation, flags
        assert _libc.semop(ident, operation, 1) == 0
        (found,) = _blockers(os.getpid())
        assert f"semaphore set {ident} (key 0x0)" in found
        assert f"pid {os.getpid()} " in found
        assert _blockers(1) == []
    finally:
        _libc.semctl(ident, 0, _IPC_RMID)


def test_a_message_queue_that_the_tree_was_last_to_send_to() -> None:
    key = 0x70680000 | os.getpid() & 0xFFFF
    ident = _libc.msgget(key, _IPC_CREAT)
    try:
        assert _blockers(os.getpid()) == []
        assert _libc.msgsnd(ident, b"\1\0\0\0\0\0\0\0word", 4, 0) == 0
        (found,) = _blockers(os.getpid())
        assert f"message queue {ident} (key {key:#x})" in found
    finally:
        _libc.msgctl(ident, _IPC_RMID, None)


@pytest.fixture
def made() -> Iterator[Checkpoint]:
    """A checkpoint with a segment that has just been made here, as for a tree on its way."""
    ident = _libc.shmget(0, 8192, _IPC_CREAT)  # an id that is free afterwards
    _libc.shmctl(ident, _IPC_RMID, None)
    key = 0x70690000 | os.getpid() & 0xFFFF
    desc = ipc_desc_pb2.ipc_desc_entry(key=key, uid=12, gid=34, cuid=0, cgid=0, mode=0o640, id=ident)
    checkpoint = Checkpoint()
    entry = ipc_shm_pb2.ipc_shm_entry(desc=desc, size=8192, in_pagemaps=True)
    checkpoint.put(sysv_shm.IMAGE, sysv_shm.NAMESPACE, entry)
    sysv_shm.create(entry)
    yield checkpoint
    _libc.shmctl(ident, _IPC_RMID, None)


def _there(checkpoint: Checkpoint) -> bool:
    (record,) = checkpoint.records(sysv_shm.IMAGE, sysv_shm.NAMESPACE)
    rows = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return record.message.desc.id in {int(row.split()[1]) for row in rows}


def test_a_segment_goes_with_the_copy_that_it_was_made_for(made: Checkpoint) -> None:
    task = subprocess.Popen(["sleep", "60"])
    (entry,) = sysv_shm.undo_entries(made, [task.pid])
    sysv_shm.remove(entry["data"])
    assert _there(made), "its copy lives"
    task.kill()
    task.wait()
    sysv_shm.remove(entry["data"])
    assert not _there(made)
    sysv_shm.remove(entry["data"])


def test_a_segment_that_others_have_attached_or_that_is_another_stays(made: Checkpoint) -> None:
    (entry,) = sysv_shm.undo_entries(made, [])
    ((ident, key),) = entry["data"]["segments"]
    script = f"import ctypes; ctypes.CDLL(None).shmat({ident}, None, 0); print(flush=True); input()"
    user = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert user.stdout
    user.stdout.readline()
    sysv_shm.remove(entry["data"])
    assert _there(made), "somebody has it attached"
    user.communicate(b"\n")
    sysv_shm.remove({"segments": [[ident, key + 1]], "tasks": []})
    assert _there(made), "the number was given to another segment"
    sysv_shm.remove(entry["data"])
    assert not _there(made)


def test_a_key_or_an_id_that_is_taken(made: Checkpoint) -> None:
    (record,) = made.records(sysv_shm.IMAGE, sysv_shm.NAMESPACE)
    with pytest.raises(RebuildError, match="the key is taken"):
        sysv_shm.create(record.message)
    record.message.desc.key += 1
    with pytest.raises(RebuildError, match="the id is taken"):
        sysv_shm.create(record.message)
    record.message.desc.key -= 1
