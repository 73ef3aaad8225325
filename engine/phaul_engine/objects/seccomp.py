"""Seccomp modes and filters (seccomp(2)).

The image seccomp.img holds the filters of all tasks, each with the index of the one below it: threads that inherited
a filter share its entry. They are installed before the credentials go, which frees them from no_new_privs; that they
do not bite the interpreter is the tracer's doing (PTRACE_O_SUSPEND_SECCOMP must be on at both sides).
"""

from __future__ import annotations

import functools
import struct
from typing import Any, ClassVar

from phaul_engine.errors import ImageError
from phaul_engine.images.pb import core_pb2, seccomp_pb2
from phaul_engine.program import Buf, Program, Results
from phaul_engine.syscalls import NR

from .base import Collection, Phase, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_PR_GET_SECCOMP = 21
_SECCOMP_SET_MODE_STRICT, _SECCOMP_SET_MODE_FILTER = 0, 1
_TSYNC = 1  # SECCOMP_FILTER_FLAG_TSYNC
_MODE_STRICT, _MODE_FILTER = 1, 2

_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter: code, jump if true, jump if false, constant
_BPF_RETURN_CONSTANT = 0x06
_RET_ACTION = 0xFFFF0000
_RET_USER_NOTIF = 0x7FC00000

BASE = "seccomp filters of the runtime"
"""In `Restoration.scratch`: the filters, and their flags, that the first process was caught with (`catching`)."""


@task_kind
class Seccomp(TaskKind):
    """A thread's seccomp mode and filters."""

    name: ClassVar[str] = "seccomp filters"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        return program.ask(NR.prctl, _PR_GET_SECCOMP, 0, 0, 0, 0)

    def repeats(self, asked: Any, results: Results) -> bool:
        return results.answer(asked) not in (_MODE_STRICT, _MODE_FILTER)

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        mode = results.answer(asked)
        if mode not in (_MODE_STRICT, _MODE_FILTER):
            return
        if mode == _MODE_FILTER and not thread.filters:
            where = f"thread {thread.tid} of {thread.owner}"
            collection.block(where, "confined by seccomp", "its filters could not be read", "run phaul as root")
            return
        core.thread_core.seccomp_mode = core_pb2.filter if mode == _MODE_FILTER else core_pb2.strict
        index: int | None = None
        for program_text, flags in thread.filters:
            if _asks_a_supervisor(program_text):
                collection.block(
                    f"thread {thread.tid} of {thread.owner}",
                    "confined by a seccomp filter that asks a supervisor",
                    "the listener of SECCOMP_RET_USER_NOTIF cannot be carried",
                    "start it without",
                )
            index = _index(collection, index, program_text, flags)
        if index is not None:
            core.thread_core.seccomp_filter = index

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is not Phase.CREDENTIALS:
            return
        mode = core.thread_core.seccomp_mode
        if mode == core_pb2.filter:
            filters = chain(core.thread_core.seccomp_filter, restoration)
            for entry in filters[_inherited(filters, restoration) :]:
                program.make_room(len(entry.filter) + 256)
                text = program.data(entry.filter)
                head = program.data(struct.pack("<HxxxxxxQ", len(entry.filter) // _INSTRUCTION.size, 0))
                program.store(head.at(8), text)
                flags = entry.flags & ~_TSYNC  # each thread has filters of its own here
                program.order(NR.seccomp, _SECCOMP_SET_MODE_FILTER, flags, head)
        elif mode == core_pb2.strict:
            program.order(NR.seccomp, _SECCOMP_SET_MODE_STRICT, 0, 0)


def _inherited(filters: list[seccomp_pb2.seccomp_filter], restoration: Restoration) -> int:
    """How many of a thread's filters it has from the first process, which a runtime has given them. If these are others
    than it had, all of its own come on top."""
    base = [text for text, _ in restoration.scratch.get(BASE, ())]
    return len(base) if [entry.filter for entry in filters[: len(base)]] == base else 0


def chain(newest: int, restoration: Restoration) -> list[seccomp_pb2.seccomp_filter]:
    """A filter and those below it, oldest first."""
    filters = restoration.checkpoint.one("seccomp").seccomp_filters
    found: list[seccomp_pb2.seccomp_filter] = []
    index: int | None = newest
    while index is not None:
        if index >= len(filters) or len(found) > len(filters):
            raise ImageError(f"seccomp.img has no filter {index} that leads to an end")
        entry = filters[index]
        found.append(entry)
        index = entry.prev if entry.HasField("prev") else None
    return found[::-1]


@functools.lru_cache(maxsize=64)  # services of systemd have the same filters many times
def _asks_a_supervisor(text: bytes) -> bool:
    return any(
        code == _BPF_RETURN_CONSTANT and constant & _RET_ACTION == _RET_USER_NOTIF
        for code, _, _, constant in _INSTRUCTION.iter_unpack(text)
    )


def _index(collection: Collection, below: int | None, text: bytes, flags: int) -> int:
    """The index of a filter above `below` in the image, where it is entered if it is not there."""
    if not collection.checkpoint.has("seccomp"):
        collection.checkpoint.put("seccomp", None, seccomp_pb2.seccomp_entry())
    filters = collection.checkpoint.one("seccomp").seccomp_filters
    known = collection.scratch.setdefault(Seccomp.name, {})
    index: int | None = known.get((below, text, flags))
    if index is None:
        index = known[below, text, flags] = len(filters)
        entry = filters.add(filter=text, flags=flags)
        if below is not None:
            entry.prev = below
    return index
