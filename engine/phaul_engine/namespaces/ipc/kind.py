"""An IPC namespace as a whole: its limits, and every System V object in it, under the same keys and ids.

Memory that tasks have attached travels as shared memory does (`sysv_shm`); the content of any other segment stands in
its record, as do messages and values of semaphores. What nobody is told and nobody can set: which process was the last
to use an object, and when; and what is to be undone when a process ends (SEM_UNDO).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from phaul_engine import calls
from phaul_engine.errors import RebuildError
from phaul_engine.images.framing import pack_ipc_messages, unpack_ipc_messages
from phaul_engine.images.pb import ipc_desc_pb2, ipc_msg_pb2, ipc_sem_pb2, ipc_shm_pb2
from phaul_engine.namespaces.base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind
from phaul_engine.objects import places, sysv_shm
from phaul_engine.objects.base import Collection, Restoration
from phaul_engine.proc import access
from phaul_engine.syscalls import NR

from . import limits, system_v

_LIMITS, _SEGMENTS, _QUEUES, _SEMAPHORES = "ipcns-var", "ipcns-shm", "ipcns-msg", "ipcns-sem"
_LARGEST = 64 << 20  # bytes of a segment that stand in its record: they are read and sent while the program stands
_DEST = 0o1000  # SHM_DEST
Result = TypeVar("Result")


@namespace_kind
class Ipc(NamespaceKind):
    """Objects are made early, and get their content in the freeze."""

    name: ClassVar = "ipc"
    flag: ClassVar = 0x08000000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        namespace = access.open_at(view.owner.proc, "ns/ipc")
        try:
            places.inside({"ipc": namespace}, lambda: _Reader(view, collection).read())
        finally:
            os.close(namespace)

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        checkpoint, ident = restoration.checkpoint, place.number

        def act() -> None:
            if checkpoint.has(_LIMITS, ident):
                limits.write(checkpoint.one(_LIMITS, ident))
            _Writer(place, restoration).make_objects()

        inside(place, act)

    def update(self, place: NewNamespace, restoration: Restoration) -> None:
        inside(place, lambda: _Writer(place, restoration).make_objects())

    def settle(self, place: NewNamespace, restoration: Restoration) -> None:
        """Objects may have come and gone."""
        checkpoint, ident = restoration.checkpoint, place.number

        def act() -> None:
            writer = _Writer(place, restoration)
            if checkpoint.has(_LIMITS, ident):
                limits.write(checkpoint.one(_LIMITS, ident))
            writer.make_objects()
            writer.fill()
            if checkpoint.has(_LIMITS, ident):
                limits.write_next(checkpoint.one(_LIMITS, ident))

        inside(place, act)


def inside(place: NewNamespace, act: Callable[[], Result]) -> Result:
    """Run `act` in a new IPC namespace."""
    return places.inside({"ipc": place.descriptors["ipc"]}, act)


class _Reader:
    """Reads the namespace that its thread is in."""

    def __init__(self, view: NamespaceView, collection: Collection) -> None:
        self._view, self._collection = view, collection
        self._ids = collection.ids

    def read(self) -> None:
        entry = limits.read()
        self._put(_LIMITS, entry)
        attached = sysv_shm.attachments(self._collection, self._view.number)
        for segment in list(system_v.segments()):
            self._read_segment(segment, attached)
        for queue in list(system_v.queues()):
            self._read_queue(queue, entry.msg_ctlmax)
        for one in list(system_v.semaphores()):
            message = ipc_sem_pb2.ipc_sem_entry(desc=self._describe(one), nsems=one.count)
            self._put(_SEMAPHORES, message, system_v.values(one.id, one.count))

    def _read_segment(self, one: system_v.Segment, attached: sysv_shm.Attachments) -> None:
        message = ipc_shm_pb2.ipc_shm_entry(desc=self._describe(one), size=one.size, in_pagemaps=True)
        content = b""
        seen = sysv_shm.Segment(one.id, one.key, one.uid, one.gid, one.cuid, one.cgid, one.mode, one.size, one.attached)
        if attached.judge(seen, self._collection) or one.attached or not one.size:
            pass  # its pages are in a pagemap; or somebody else holds it, which is a blocker
        elif one.size > _LARGEST:
            why = f"nothing has it attached, and more than {_LARGEST >> 20} MiB cannot be kept aside"
            self._block(f"System V shared memory {one.id} of {one.size >> 20} MiB", why, "remove it, or attach it")
        elif not self._view.survey:
            message.ClearField("in_pagemaps")
            content = _content(one)
        self._put(_SEGMENTS, message, content)

    def _read_queue(self, one: system_v.Queue, room: int) -> None:
        messages: list[tuple[ipc_msg_pb2.ipc_msg, bytes]] = []
        while not self._view.survey and (found := system_v.peek(one.id, len(messages), room)) is not None:
            kind, text = found
            messages.append((ipc_msg_pb2.ipc_msg(mtype=kind, msize=len(text)), text))
        message = ipc_msg_pb2.ipc_msg_entry(desc=self._describe(one), qbytes=one.capacity, qnum=len(messages))
        self._put(_QUEUES, message, pack_ipc_messages(messages))

    def _describe(self, one: system_v.Object) -> ipc_desc_pb2.ipc_desc_entry:
        return ipc_desc_pb2.ipc_desc_entry(
            key=one.key & 0xFFFFFFFF,
            uid=self._ids.uid_inside(one.uid),
            gid=self._ids.gid_inside(one.gid),
            cuid=self._ids.uid_inside(one.cuid),
            cgid=self._ids.gid_inside(one.cgid),
            mode=one.mode,
            id=one.id,
        )

    def _put(self, kind: str, message: Any, payload: bytes = b"") -> None:
        self._collection.checkpoint.put(kind, self._view.number, message, payload)

    def _block(self, kind: str, why: str, advice: str) -> None:
        self._collection.block(self._view, kind, why, advice)


def _content(segment: system_v.Segment) -> bytes:
    address = calls.shm_attach(segment.id)
    try:
        return ctypes.string_at(address, segment.size)
    finally:
        calls.shm_detach(address)


class _Writer:
    """Makes the namespace that its thread is in what the images say."""

    def __init__(self, place: NewNamespace, restoration: Restoration) -> None:
        self._checkpoint, self._ident = restoration.checkpoint, place.number
        self._ids = restoration.ids

    def make_objects(self) -> None:
        """Those that are not there; and no others."""
        self._make(_SEGMENTS, NR.shmget, NR.shmctl, system_v.segments(), lambda message: int(message.size))
        self._make(_QUEUES, NR.msgget, NR.msgctl, system_v.queues(), lambda message: int(message.qbytes))
        self._make(_SEMAPHORES, NR.semget, NR.semctl, system_v.semaphores(), lambda message: int(message.nsems))

    def fill(self) -> None:
        """Content; and what was to be removed after its last use is so again."""
        for record in self._checkpoint.records(_SEGMENTS, self._ident):
            message = record.message
            if record.payload:
                address = calls.shm_attach(message.desc.id)
                ctypes.memmove(address, record.payload, len(record.payload))
                calls.shm_detach(address)
            if message.desc.mode & _DEST:
                system_v.remove(NR.shmctl, message.desc.id)
        for record in self._checkpoint.records(_QUEUES, self._ident):
            for sent, text in unpack_ipc_messages(record.message, record.payload):
                system_v.send(record.message.desc.id, sent.mtype, text)
        for record in self._checkpoint.records(_SEMAPHORES, self._ident):
            system_v.set_values(record.message.desc.id, record.payload[: 2 * record.message.nsems])

    def _make(
        self, kind: str, get: NR, control: NR, present: Iterable[system_v.Object], size: Callable[[Any], int]
    ) -> None:
        wanted = {record.message.desc.id: record.message for record in self._checkpoint.records(kind, self._ident)}
        there = {one.id for one in list(present)}
        for ident in there - wanted.keys():
            system_v.remove(control, ident)
        for ident, message in wanted.items():
            one = self._object(message.desc)
            if ident in there:
                rest = struct.pack("<qqqQQQ", 0, 0, 0, 0, 0, size(message)) if get is NR.msgget else b""
                system_v.own(control, one, rest)
                continue
            try:
                calls.acting(one.cuid, one.cgid, lambda: system_v.create(get, one, size(message)))  # noqa: B023
            except OSError as error:
                name = {NR.shmget: "shared memory", NR.msgget: "message queue", NR.semget: "semaphore set"}[get]
                text = f"cannot make the System V {name} {ident} (key {one.key & 0xFFFFFFFF:#x}): {error.strerror}"
                raise RebuildError(text) from error

    def _object(self, desc: ipc_desc_pb2.ipc_desc_entry) -> system_v.Object:
        key = struct.unpack("<i", struct.pack("<I", desc.key))[0]
        one = system_v.Object(desc.id, key, desc.uid, desc.gid, desc.cuid, desc.cgid, desc.mode)
        return replace(
            one,
            key=0 if desc.mode & _DEST else key,
            uid=self._ids.uid_here(one.uid),
            gid=self._ids.gid_here(one.gid),
            cuid=self._ids.uid_here(one.cuid),
            cgid=self._ids.gid_here(one.cgid),
        )
