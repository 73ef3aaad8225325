"""System calls on System V objects (sysvipc(7)) of the calling thread's IPC namespace, with the layouts of x86-64."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from phaul_engine.syscalls import NR

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

CREATE = 0o1000 | 0o2000  # IPC_CREAT, IPC_EXCL
_RMID, _SET, _STAT = 0, 1, 2
_MSG_STAT, _MSG_INFO, _SHM_STAT, _SHM_INFO, _SEM_STAT, _SEM_INFO = 11, 12, 13, 14, 18, 19
_GETALL, _SETALL = 13, 17
_NOWAIT, _COPY = 0o4000, 0o40000  # IPC_NOWAIT, MSG_COPY
_TYPE = struct.Struct("<q")
_SHORTS = 2  # bytes of a semaphore's value
_perm = struct.Struct("<i5IHH4x2Q")  # struct ipc64_perm: key, uid, gid, cuid, cgid, mode, seq
_NEXT_ID = "/proc/sys/kernel/%s_next_id"


@dataclass(frozen=True)
class Object:
    """What all of them have (struct ipc64_perm), ids in our user namespace."""

    id: int
    key: int
    uid: int
    gid: int
    cuid: int
    cgid: int
    mode: int


@dataclass(frozen=True)
class Segment(Object):
    """Shared memory: its size in bytes, and by how many mappings it is attached."""

    size: int
    attached: int


@dataclass(frozen=True)
class Queue(Object):
    """A message queue: messages in it, and how many bytes of them fit."""

    messages: int
    capacity: int


@dataclass(frozen=True)
class Semaphores(Object):
    """A set of so many semaphores."""

    count: int


def segments() -> Iterator[Segment]:
    """All of this namespace."""
    for ident, room in _all(NR.shmctl, _SHM_INFO, _SHM_STAT):
        size, _, _, _, _, _, attached = struct.unpack_from("<QqqqiiQ", room, _perm.size)
        yield Segment(*_object(ident, room), size, attached)


def queues() -> Iterator[Queue]:
    """All of this namespace."""
    for ident, room in _all(NR.msgctl, _MSG_INFO, _MSG_STAT):
        _, _, _, _, messages, capacity = struct.unpack_from("<qqqQQQ", room, _perm.size)
        yield Queue(*_object(ident, room), messages, capacity)


def semaphores() -> Iterator[Semaphores]:
    """All of this namespace."""
    for ident, room in _all(NR.semctl, _SEM_INFO, _SEM_STAT):
        yield Semaphores(*_object(ident, room), struct.unpack_from("<qQqQQ", room, _perm.size)[4])


def values(ident: int, count: int) -> bytes:
    """The values of a set of semaphores, 16 bits each."""
    room = ctypes.create_string_buffer(_SHORTS * count or 1)
    _call(NR.semctl, ident, 0, _GETALL, room)
    return room.raw[: _SHORTS * count]


def set_values(ident: int, content: bytes) -> None:
    """The opposite."""
    _call(NR.semctl, ident, 0, _SETALL, ctypes.create_string_buffer(content, len(content)))


def peek(ident: int, index: int, room: int) -> tuple[int, bytes] | None:
    """Type and text of a message of a queue, which stays in it (MSG_COPY); None if there are not so many."""
    buffer = ctypes.create_string_buffer(_TYPE.size + room)
    try:
        size = _call(NR.msgrcv, ident, buffer, room, index, _NOWAIT | _COPY)
    except OSError as error:
        if error.errno == errno.ENOMSG:
            return None
        raise
    return _TYPE.unpack_from(buffer)[0], buffer.raw[_TYPE.size : _TYPE.size + size]


def take(ident: int, room: int) -> bool:
    """Remove the first message of a queue; whether there was one."""
    try:
        _call(NR.msgrcv, ident, ctypes.create_string_buffer(_TYPE.size + room), room, 0, _NOWAIT)
    except OSError as error:
        if error.errno == errno.ENOMSG:
            return False
        raise
    return True


def send(ident: int, kind: int, text: bytes) -> None:
    """Put a message into a queue."""
    message = _TYPE.pack(kind) + text
    _call(NR.msgsnd, ident, ctypes.create_string_buffer(message, len(message)), len(text), _NOWAIT)


def create(number: NR, wanted: Object, size: int) -> None:
    """Make an object (shmget, msgget or semget) with key, id, owner and mode. OSError EEXIST if id or key is taken."""
    word, control = {
        NR.shmget: ("shm", NR.shmctl),
        NR.msgget: ("msg", NR.msgctl),
        NR.semget: ("sem", NR.semctl),
    }[number]
    with open(_NEXT_ID % word, "w") as wish:
        wish.write(str(wanted.id))
    flags = CREATE | wanted.mode & 0o777
    made = _call(number, wanted.key, flags) if number is NR.msgget else _call(number, wanted.key, size, flags)
    if made != wanted.id:
        remove(control, made)
        raise OSError(errno.EEXIST, f"id {wanted.id} is taken")
    if control is NR.msgctl:
        own(control, wanted, struct.pack("<qqqQQQ", 0, 0, 0, 0, 0, size))
    else:
        own(control, wanted)


def own(control: NR, wanted: Object, rest: bytes = b"") -> None:
    """Give an object its owner, mode, and what else IPC_SET sets."""
    perm = _perm.pack(0, wanted.uid, wanted.gid, 0, 0, wanted.mode & 0o777, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(perm + rest, 256)
    _control(control, wanted.id, _SET, buffer)


def remove(control: NR, ident: int) -> None:
    """IPC_RMID."""
    _control(control, ident, _RMID, None)


def _all(control: NR, info: int, stat: int) -> Iterator[tuple[int, bytes]]:
    """Id and IPC_STAT structure of every object."""
    highest = _control(control, 0, info, ctypes.create_string_buffer(256))
    for index in range(highest + 1):
        buffer = ctypes.create_string_buffer(256)
        try:
            ident = _control(control, index, stat, buffer)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EIDRM):
                continue
            raise
        yield ident, buffer.raw


def _object(ident: int, room: bytes) -> tuple[int, int, int, int, int, int, int]:
    key, uid, gid, cuid, cgid, mode, *_ = _perm.unpack_from(room)
    return ident, key, uid, gid, cuid, cgid, mode


def _control(control: NR, ident: int, command: int, buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    if control is NR.semctl:
        return _call(control, ident, 0, command, buffer)
    return _call(control, ident, command, buffer)


def _call(number: NR, *args: int | ctypes.Array[ctypes.c_char] | None) -> int:
    values = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _libc.syscall(ctypes.c_long(number), *values)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), number.name)
    return result
