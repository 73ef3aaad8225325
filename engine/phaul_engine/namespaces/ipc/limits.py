"""The limits of an IPC namespace: sysctls of the caller's own (/proc/sys/kernel, /proc/sys/fs/mqueue)."""

from __future__ import annotations

from pathlib import Path

from phaul_engine.images.pb import ipc_var_pb2

_SYS = Path("/proc/sys")
_NAMES = {
    "msg_ctlmax": "kernel/msgmax",
    "msg_ctlmnb": "kernel/msgmnb",
    "msg_ctlmni": "kernel/msgmni",
    "auto_msgmni": "kernel/auto_msgmni",
    "shm_ctlmax": "kernel/shmmax",
    "shm_ctlall": "kernel/shmall",
    "shm_ctlmni": "kernel/shmmni",
    "shm_rmid_forced": "kernel/shm_rmid_forced",
    "mq_queues_max": "fs/mqueue/queues_max",
    "mq_msg_max": "fs/mqueue/msg_max",
    "mq_msgsize_max": "fs/mqueue/msgsize_max",
    "mq_msg_default": "fs/mqueue/msg_default",
    "mq_msgsize_default": "fs/mqueue/msgsize_default",
}
_NEXT = {"msg_next_id": "kernel/msg_next_id", "sem_next_id": "kernel/sem_next_id", "shm_next_id": "kernel/shm_next_id"}
"""-1 where nobody has asked for an id."""
_SEMAPHORES = "kernel/sem"  # four numbers


def read() -> ipc_var_pb2.ipc_var_entry:
    """As they are."""
    entry = ipc_var_pb2.ipc_var_entry()
    entry.sem_ctls.extend(map(int, (_SYS / _SEMAPHORES).read_text().split()))
    for field, name in _NAMES.items():
        setattr(entry, field, int(_text(name) or 0))
    for field, name in _NEXT.items():
        value = int(_text(name) or -1)
        if value >= 0:
            setattr(entry, field, value)
    return entry


def write(entry: ipc_var_pb2.ipc_var_entry) -> None:
    """Make them so; what is so already is not touched."""
    if (wanted := list(entry.sem_ctls)) and wanted != list(map(int, (_SYS / _SEMAPHORES).read_text().split())):
        (_SYS / _SEMAPHORES).write_text("\t".join(map(str, wanted)))
    for field, name in _NAMES.items():
        value, now = str(getattr(entry, field)), _text(name)
        if entry.HasField(field) and now is not None and now != value:
            (_SYS / name).write_text(value)


def write_next(entry: ipc_var_pb2.ipc_var_entry) -> None:
    """Which ids are asked for next: after all objects have been made."""
    for field, name in _NEXT.items():
        if entry.HasField(field):
            (_SYS / name).write_text(str(getattr(entry, field)))


def _text(name: str) -> str | None:
    try:
        return (_SYS / name).read_text().strip()
    except FileNotFoundError:  # this kernel has no such queues
        return None
