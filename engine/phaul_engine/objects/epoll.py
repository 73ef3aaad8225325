"""Epoll instances and their exact registrations (epoll(7)).

A registration belongs to a pair: an open file description, and the number under which it was added. The number may be
closed since, or stand for something else, while the description lives on under another number or in another process:
then the registration is still there. So a target is found by kcmp(2), not by its number.

A registration does not know who made it. The engine makes them, in a thread whose descriptor table is its own, where
it can put any description at any number.
"""

from __future__ import annotations

import os
import select
import struct
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from phaul_engine import calls
from phaul_engine.errors import ImageError
from phaul_engine.images.pb import eventpoll_pb2, fdinfo_pb2
from phaul_engine.proc import fdinfo
from phaul_engine.proc.fdinfo import EpollTarget
from phaul_engine.program import Program
from phaul_engine.syscalls import NR

from .base import Collection, Descriptor, DescriptorKind, Restoration, SkeletonTask, descriptor_kind
from .description import settle_status, signal_owner, status_flags

_ONESHOT = 1 << 30
_ALWAYS = 0x8 | 0x10  # EPOLLERR, EPOLLHUP: every registration asks for them, but a one-shot that has fired
_ANY = 0x1 | 0x4  # EPOLLIN, EPOLLOUT
_MAX_NUMBER = 1 << 24
_CTL_ADD, _CTL_DEL = 1, 2
_event = struct.Struct("<IQ")  # struct epoll_event, which is packed here


@dataclass(frozen=True)
class _Key:
    """What the kernel tells registrations apart by; `generation` grows when a description is made anew."""

    tfd: int
    target: int
    generation: int


@descriptor_kind
class Epoll(DescriptorKind):
    """Registrations are made when all descriptions stand (`attach`), and brought up to date at the end."""

    name = "epoll"
    types: ClassVar = (fdinfo_pb2.EVENTPOLL,)
    settled: ClassVar = ("fown", "tfd")

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[eventpoll]"

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        entry = eventpoll_pb2.eventpoll_file_entry(
            id=file_id, flags=status_flags(descriptor), fown=signal_owner(descriptor, collection)
        )
        result = fdinfo_pb2.file_entry(type=fdinfo_pb2.EVENTPOLL, id=file_id, epfd=entry)
        collection.scratch.setdefault(self.name, []).append((descriptor, result))
        return result

    def finish(self, collection: Collection) -> None:
        by_inode: dict[int, list[int]] = {}
        for file_id, other in collection.descriptors.items():
            by_inode.setdefault(other.info.ino, []).append(file_id)
        for descriptor, entry in collection.scratch.pop(self.name, ()):
            seen: dict[int, int] = {}
            for registration in descriptor.info.epoll:
                index = seen.get(registration.tfd, 0)
                seen[registration.tfd] = index + 1
                target = _target(descriptor, registration, index, by_inode, collection)
                if target is None:
                    collection.block(
                        descriptor,
                        "an epoll instance that watches something outside of the tree",
                        f"what it watches as fd {registration.tfd} is open only in other programs",
                        "remove it from the epoll instance before it is closed (EPOLL_CTL_DEL)",
                        passing=True,
                    )
                    continue
                entry.epfd.tfd.add(
                    id=entry.id,
                    tfd=registration.tfd,
                    events=registration.events,
                    data=registration.data,
                    dev=registration.sdev & 0xFFFFFFFF,
                    inode=registration.ino,
                    pos=registration.pos,
                    phaul_target_id=target,
                )

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        _wanted(entry, restoration)
        return _create()

    def attach(
        self, entry: fdinfo_pb2.file_entry, fd: int, task: SkeletonTask, program: Program, restoration: Restoration
    ) -> None:
        _register(entry, restoration.made[entry.id], restoration)
        _watch_own_signals(entry, fd, task, program, restoration)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        _register(entry, fd, restoration)
        settle_status(fd, entry.epfd.flags, entry.epfd.fown, restoration)


def _create() -> int:
    epoll = select.epoll()
    try:
        return os.dup(epoll.fileno())
    finally:
        epoll.close()


def _target(
    descriptor: Descriptor,
    registration: EpollTarget,
    index: int,
    by_inode: dict[int, list[int]],
    collection: Collection,
) -> int | None:
    """The image id of what a registration watches. Descriptions with its number are the likely ones."""
    for file_id in chain(sorted(collection.numbers.get(registration.tfd, ())), by_inode.get(registration.ino, ())):
        candidate = collection.descriptors[file_id]
        if candidate.info.ino == registration.ino and calls.is_epoll_target(
            candidate.own, descriptor.own, registration.tfd, index
        ):
            return file_id
    return None


def _wanted(entry: fdinfo_pb2.file_entry, restoration: Restoration) -> dict[_Key, tuple[int, int]]:
    """Events and data of each registration. Images without target ids (CRIU's) name a number in a table."""
    wanted: dict[_Key, tuple[int, int]] = {}
    for registration in entry.epfd.tfd:
        if registration.tfd >= _MAX_NUMBER:
            raise ImageError(f"epoll instance {entry.id} watches an impossible number {registration.tfd}")
        if registration.HasField("phaul_target_id"):
            target = registration.phaul_target_id
        else:
            target = _by_number(entry.id, registration.tfd, restoration)
        key = _Key(registration.tfd, target, restoration.generations.get(target, 0))
        if key in wanted:
            raise ImageError(f"epoll instance {entry.id} watches {registration.tfd} twice")
        wanted[key] = (registration.events, registration.data)
    return wanted


def _by_number(epoll_id: int, tfd: int, restoration: Restoration) -> int:
    for ident in restoration.checkpoint.idents("fdinfo"):
        table = {record.message.fd: record.message.id for record in restoration.checkpoint.records("fdinfo", ident)}
        if tfd in table and epoll_id in table.values():
            return int(table[tfd])
    raise ImageError(f"epoll instance {epoll_id} watches fd {tfd}, which is open nowhere beside it")


def _register(entry: fdinfo_pb2.file_entry, epoll: int, restoration: Restoration) -> None:
    """Bring the registrations of an instance to what its entry says; free if they are so already."""
    wanted = _wanted(entry, restoration)
    known: dict[int, tuple[int, dict[_Key, tuple[int, int]]]] = restoration.scratch.setdefault(Epoll.name, {})
    generation = restoration.generations.get(entry.id, 0)
    made_in, have = known.get(entry.id, (generation, {}))
    if made_in != generation:
        have = {}
    if have == wanted:
        return
    targets = {key: restoration.description(key.target) for key in wanted if key not in have}
    alive = {
        key: restoration.made[key.target]
        for key in have
        if restoration.generations.get(key.target, 0) == key.generation and key.target in restoration.made
    }
    calls.apart(lambda: _apply(epoll, have, wanted, {**alive, **targets}))
    known[entry.id] = (generation, wanted)


def _watch_own_signals(
    entry: fdinfo_pb2.file_entry, epoll: int, task: SkeletonTask, program: Program, restoration: Restoration
) -> None:
    """A signalfd tells an epoll instance of the signals of the process that has registered it, whoever waits: so these
    are registered once more, inside the one that has both."""
    wanted = _wanted(entry, restoration)
    signals = {key for key in wanted if restoration.entry(key.target).type == fdinfo_pb2.SIGNALFD}
    if not signals:
        return
    checkpoint = restoration.checkpoint
    records = checkpoint.records("fdinfo", checkpoint.one("ids", task.inner_pid).files_id)
    table = {record.message.fd: record.message.id for record in records}
    for key in sorted(signals, key=lambda key: key.tfd):
        if table.get(key.tfd) == key.target:
            events, data = wanted[key]
            event = program.data(_event.pack(events, data))
            program.order(NR.epoll_ctl, epoll, _CTL_DEL, key.tfd, 0, label="watch no signals of the engine's")
            program.order(NR.epoll_ctl, epoll, _CTL_ADD, key.tfd, event, label="watch signals")


def _apply(
    epoll: int,
    have: dict[_Key, tuple[int, int]],
    wanted: dict[_Key, tuple[int, int]],
    descriptions: dict[_Key, int],
) -> None:
    """Runs with a descriptor table of its own, in which every number may be overwritten."""
    spare = 1 + max((epoll, *descriptions.values(), *(key.tfd for key in wanted), *(key.tfd for key in have)))
    os.dup2(epoll, spare)
    held = {fd: spare + 1 + place for place, fd in enumerate(sorted(set(descriptions.values())))}
    for fd, safe in held.items():
        os.dup2(fd, safe)
    for key in have.keys() - wanted.keys():
        if key in descriptions:
            os.dup2(held[descriptions[key]], key.tfd)
            calls.epoll_delete(spare, key.tfd)
    fresh = sorted(wanted.keys() - have.keys(), key=lambda key: key.tfd)
    if not have:
        _disarm(spare, {key: wanted[key] for key in fresh if not wanted[key][0] & _ALWAYS}, held, descriptions)
        fresh = [key for key in fresh if wanted[key][0] & _ALWAYS]
    for key in fresh:
        os.dup2(held[descriptions[key]], key.tfd)
        calls.epoll_add(spare, key.tfd, *wanted[key])
    for key in wanted.keys() & have.keys():
        if wanted[key] != have[key]:
            os.dup2(held[descriptions[key]], key.tfd)
            calls.epoll_modify(spare, key.tfd, *wanted[key])


def _disarm(
    epoll: int, fired: dict[_Key, tuple[int, int]], held: dict[int, int], descriptions: dict[_Key, int]
) -> None:
    """Registrations that have fired their one shot. Added as such, they would be armed for errors and hang-ups; so
    those whose target is ready for anything (most are, for writing) fire once here, where nobody hears it. For the
    others errors and hang-ups remain armed: the kernel has no way to add a registration that has fired."""
    for key, (events, data) in fired.items():
        os.dup2(held[descriptions[key]], key.tfd)
        calls.epoll_add(epoll, key.tfd, events | _ONESHOT | _ANY, data)
    if fired and calls.epoll_collect(epoll, len(fired)) < len(fired):
        proc = os.open("/proc/thread-self", os.O_PATH)
        for registration in fdinfo.read(proc, epoll).epoll:
            if registration.events & _ANY:
                for key in (key for key in fired if key.tfd == registration.tfd):
                    os.dup2(held[descriptions[key]], key.tfd)
                    calls.epoll_modify(epoll, key.tfd, *fired[key])
