"""What a tree, by its images, would have on a host: how many tasks, as whom, and which files it makes or writes."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from .images.checkpoint import Checkpoint
from .images.pb import creds_pb2, fdinfo_pb2
from .proc.id_map import OVERFLOW, IdMap
from .user_ids import ALL, UserIds, below

_DEAD = 2  # of task_state in an image
_ROOT = creds_pb2.creds_entry(uid=0, gid=0, euid=0, egid=0, suid=0, sgid=0, fsuid=0, fsgid=0, secbits=0)


@dataclass(frozen=True)
class Account:
    """Ids that files are opened with."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Footprint:
    """`tasks` counts processes and threads; `uids` are all that any of them has or can go back to, as this host numbers
    them; `privileged` says which process runs as root or has capabilities, outside of a user namespace, empty if none
    does; `writes` are the files that it makes or has open for writing."""

    tasks: int
    uids: tuple[int, ...]
    privileged: str
    writes: tuple[str, ...]


def footprint(checkpoint: Checkpoint) -> Footprint:
    """Of a survey's images, or of the final ones."""
    spaces = _Spaces(checkpoint)
    tree = spaces.tree
    uids: set[int] = set()
    privileged = ""
    for pid, creds in _credentials(checkpoint):
        numbering = spaces.of(pid)
        has = {numbering.uid_here(uid) for uid in (creds.uid, creds.euid, creds.suid, creds.fsuid)}
        if numbering is not tree:
            has.discard(OVERFLOW)  # whoever has no number inside
        has |= {tree.uid_here(uid) for uid in creds.phaul_outer_uids}
        uids |= has
        if not privileged and 0 in has:
            privileged = f"process {pid} runs as root"
        if not privileged and numbering.maps == (ALL, ALL) and any((*creds.cap_prm, *creds.cap_inh, *creds.cap_amb)):
            privileged = f"process {pid} has capabilities"
    for users, _ in spaces.maps():
        for _, lower, count in users:
            uids |= {lower, lower + count - 1}  # root in there can become all of them
            if not lower:
                privileged = privileged or "root of its user namespace is root here"
    tasks = sum(max(1, len(record.message.threads)) for record in checkpoint.records("pstree"))
    return Footprint(tasks, tuple(sorted(uids)), privileged, tuple(sorted(set(_writes(checkpoint)))))


def accounts(checkpoint: Checkpoint) -> tuple[Account, ...]:
    """All accounts that threads of the tree act as, as this host numbers them, the first process's first."""
    spaces = _Spaces(checkpoint)
    found = [_account(creds, spaces.of(pid), spaces.tree) for pid, creds in _credentials(checkpoint)]
    return tuple(dict.fromkeys(found))


def _account(creds: creds_pb2.creds_entry, numbering: UserIds, tree: UserIds) -> Account:
    """Whom files are opened as. What a thread in a user namespace below the tree's is outside of it is told too."""
    if creds.phaul_outer_uids and creds.phaul_outer_gids:
        groups = tuple(map(tree.gid_here, creds.phaul_outer_groups))
        return Account(tree.uid_here(creds.phaul_outer_uids[-1]), tree.gid_here(creds.phaul_outer_gids[-1]), groups)
    groups = tuple(map(numbering.gid_here, creds.groups))
    return Account(numbering.uid_here(creds.fsuid), numbering.gid_here(creds.fsgid), groups)


class _Spaces:
    """How the user namespace of each process numbers users and groups."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tree = UserIds(checkpoint)
        self._checkpoint = checkpoint
        numbers = [ident for ident in checkpoint.idents("userns") if isinstance(ident, int)]
        self._all = {number: UserIds(checkpoint, number) for number in numbers}
        self._below = {number: self._all[number] for number in below(checkpoint)}

    def of(self, pid: int) -> UserIds:
        """Of one process."""
        if not self._below or not self._checkpoint.has("ids", pid):
            return self.tree
        return self._below.get(self._checkpoint.one("ids", pid).user_ns_id, self.tree)

    def maps(self) -> Iterator[tuple[IdMap, IdMap]]:
        """Of all user namespaces in the images."""
        return (one.maps for one in self._all.values())


def _credentials(checkpoint: Checkpoint) -> Iterator[tuple[int, creds_pb2.creds_entry]]:
    """Of every thread that lives. One that the images give none is made as root."""
    for record in checkpoint.records("pstree"):
        for tid in record.message.threads or [record.message.pid]:
            core = checkpoint.one("core", tid)
            if core.thread_core.HasField("creds"):
                yield record.message.pid, core.thread_core.creds
            elif not (core.HasField("tc") and core.tc.task_state == _DEAD):
                yield record.message.pid, _ROOT


def _writes(checkpoint: Checkpoint) -> Iterator[str]:
    ghosts = {record.message.orig_id for record in checkpoint.records("remap-fpath")}
    for record in checkpoint.records("files"):
        entry = record.message
        if entry.type == fdinfo_pb2.REG and (entry.id in ghosts or _writable(entry.reg.flags, entry.reg.mode)):
            yield os.fsdecode(entry.reg.name)
        elif entry.type == fdinfo_pb2.UNIXSK and entry.usk.name[:1] not in (b"", b"\0") and not entry.usk.deleted:
            name = bytes(entry.usk.name).rstrip(b"\0")
            yield os.fsdecode(bytes(entry.usk.phaul_path) or os.path.join(bytes(entry.usk.name_dir), name))
    for record in checkpoint.records("memfd"):
        if record.message.phaul_path:
            yield os.fsdecode(record.message.phaul_path)


def _writable(flags: int, mode: int) -> bool:
    return not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_RDONLY and not stat.S_ISCHR(mode)
