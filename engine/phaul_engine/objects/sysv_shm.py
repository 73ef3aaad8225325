"""System V shared memory (shmget(2)): segments that tasks of the tree have attached, under the same keys and ids.

A segment belongs to an IPC namespace, not to a process: one that nobody in the tree has attached cannot be found, and
stays. Contents are shared memory like any other, known by the id, which is the segment's inode number. The id is asked
of the kernel with /proc/sys/kernel/shm_next_id; areas are attached, not mapped, so that shmdt(2) and the count of
attachments go on. What the kernel does not let anybody set: creator, and the pids and times of the last calls.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from phaul_engine import calls
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import ipc_desc_pb2, ipc_shm_pb2
from phaul_engine.proc import lives
from phaul_engine.proc.maps import Area

from .base import Collection, Owner

KIND = "sysv-shm"
"""Of journal entries."""
IMAGE = "ipcns-shm"
NAMESPACE = 3
"""The number of the tree's IPC namespace in images."""
_PATH = "/SYSV"
_DEST, _LOCKED = 0o1000, 0o2000  # SHM_DEST, SHM_LOCKED (shmctl(2))
_IPC_PRIVATE = 0
_NEXT_ID = "/proc/sys/kernel/shm_next_id"
_PAGE = 4096
_ds = struct.Struct("<i5IHH4x2QQqqqiiQQQ")  # struct shmid64_ds of x86-64 (include/uapi/asm-generic/shmbuf.h)


@dataclass(frozen=True)
class Segment:
    """What shmctl(2) says of one, IPC_STAT."""

    id: int
    key: int
    uid: int
    gid: int
    cuid: int
    cgid: int
    mode: int
    size: int
    attached: int

    @property
    def span(self) -> int:
        """Bytes that an attachment takes."""
        return -(-self.size // _PAGE) * _PAGE


def is_segment(area: Area) -> bool:
    """Whether an area is an attached segment."""
    return area.shared and area.path.startswith(_PATH)


def segment(ident: int) -> Segment:
    """A segment of our IPC namespace; OSError if there is none of that id."""
    key, uid, gid, cuid, cgid, mode, *rest = _ds.unpack(calls.shm_status(ident, _ds.size))
    return Segment(ident, key, uid, gid, cuid, cgid, mode, size=rest[4], attached=rest[10])


@dataclass
class Attachments:
    """Where tasks of one IPC namespace have segments attached, by id; and the numbers of other shared memory."""

    places: dict[int, list[tuple[Owner, Area]]] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)

    def judge(self, one: Segment, collection: Collection) -> bool:
        """Put into the blockers what of a segment cannot be made again; whether the tree has it attached."""
        places = self.places.get(one.id, [])
        if places or one.attached:
            _judge(one, places, one.id in self.taken, collection)
        return bool(places)


def collect(areas: Iterable[tuple[Owner, Area, int]], collection: Collection) -> None:
    """Images of the segments of our IPC namespace that `areas` show, each with the number of its process's IPC
    namespace; to be called while the whole tree stands. Those of other namespaces are noted (`attachments`)."""
    found: dict[int, Attachments] = {}
    taken: set[int] = set()
    for owner, area, number in areas:
        if is_segment(area):
            found.setdefault(number, Attachments(taken=taken)).places.setdefault(area.ino, []).append((owner, area))
        elif area.shared:
            taken.add(area.ino)
    collection.scratch[KIND] = found
    for ident in attachments(collection, NAMESPACE).places:
        one = segment(ident)
        found[NAMESPACE].judge(one, collection)
        desc = ipc_desc_pb2.ipc_desc_entry(
            key=one.key & 0xFFFFFFFF,
            uid=one.uid,
            gid=one.gid,
            cuid=one.cuid,
            cgid=one.cgid,
            mode=one.mode,
            id=ident,
        )
        collection.checkpoint.put(
            IMAGE, NAMESPACE, ipc_shm_pb2.ipc_shm_entry(desc=desc, size=one.size, in_pagemaps=True)
        )


def attachments(collection: Collection, namespace: int) -> Attachments:
    """What this pass has noted of the tasks in an IPC namespace, by its number in the images."""
    found: dict[int, Attachments] = collection.scratch.get(KIND, {})
    return found.get(namespace, Attachments())


def _judge(one: Segment, places: list[tuple[Owner, Area]], ambiguous: bool, collection: Collection) -> None:
    """Put into the blockers what cannot be made again."""
    kind = f"System V shared memory {one.id}"
    for owner, area in places:
        where = f"area {area.start:x}-{area.end:x} of {owner}"
        if area.offset or area.size != one.span:
            collection.block(
                where, f"a part of {kind}", "only whole attachments, with one protection, can be made again"
            )
        if "ht" in area.flags:
            collection.block(where, kind, "huge pages of such memory are not carried")
    where = f"area {places[0][1].start:x}-{places[0][1].end:x} of {places[0][0]}" if places else "the IPC namespace"
    if one.attached > len(places):
        why = f"it is attached {one.attached} times, {len(places)} of them in the tree: it cannot be in two places"
        collection.block(where, kind, why, "end the other programs that use it (ipcs -m -p), or move them along")
    if one.mode & _LOCKED:
        collection.block(where, kind, "it is locked in memory (SHM_LOCK), which is not carried")
    if ambiguous:
        collection.block(where, kind, "other memory of the tree has its number", "start the program again")


# -- at the destination ------------------------------------------------------------------------------------------


def entry_of(checkpoint: Checkpoint, ident: int) -> tuple[int, ipc_shm_pb2.ipc_shm_entry] | None:
    """The image of a segment that a task has attached, with the number of its IPC namespace; None for an id that is
    none."""
    for namespace in checkpoint.idents(IMAGE):
        assert isinstance(namespace, int)
        for record in checkpoint.records(IMAGE, namespace):
            if record.message.desc.id == ident and record.message.in_pagemaps:
                return namespace, record.message
    return None


def create(entry: ipc_shm_pb2.ipc_shm_entry) -> None:
    """Make a segment with the id, key, owner and mode it had; RebuildError if another has them here."""
    desc = entry.desc
    key = struct.unpack("<i", struct.pack("<I", desc.key))[0]
    what = f"System V shared memory with id {desc.id} and key {desc.key:#x}"
    if desc.mode & _DEST:
        key = _IPC_PRIVATE
    with open(_NEXT_ID, "w") as wish:
        wish.write(str(desc.id))
    try:
        made = calls.shm_create(key, entry.size, desc.mode & 0o777)
    except FileExistsError:
        raise RebuildError(f"{what} cannot be made: the key is taken", advice="see ipcs -m there") from None
    if made != desc.id:
        calls.shm_remove(made)
        raise RebuildError(f"{what} cannot be made: the id is taken", advice="see ipcs -m there")
    try:
        calls.shm_own(made, desc.uid, desc.gid, desc.mode & 0o777)
    except BaseException:
        calls.shm_remove(made)
        raise


def condemn(checkpoint: Checkpoint) -> None:
    """Mark again what was marked to be removed after its last use: when everything is attached."""
    for record in checkpoint.records(IMAGE, NAMESPACE):
        if record.message.desc.mode & _DEST:
            calls.shm_remove(record.message.desc.id)


# -- what outlives the tree --------------------------------------------------------------------------------------


def undo_entries(checkpoint: Checkpoint, pids: Iterable[int]) -> list[dict[str, Any]]:
    """What a journal must hold so that no segment outlives the copy of the tree, tasks `pids`, that is killed here."""
    segments = [[one.message.desc.id, one.message.desc.key] for one in checkpoint.records(IMAGE, NAMESPACE)]
    return [{"kind": KIND, "data": {"segments": segments, "tasks": lives.tasks(pids)}}] if segments else []


def remove(data: dict[str, Any]) -> None:
    """Remove the segments, if the tree that used them here is dead and nobody else does; else do nothing."""
    if lives.any_lives(data["tasks"]):
        return
    for ident, key in data["segments"]:
        try:
            one = segment(ident)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EIDRM):
                continue
            raise
        if not one.attached and one.key & 0xFFFFFFFF == key:
            calls.shm_remove(ident)
