"""The destination's side of one tree: a skeleton, and the sink that fills it.

`build` from the survey's images; for every round `allow` it (after `update`, if images came before it); `finish` with
the final images when the last round is in: READY. Then `detach` and `wake`, or `close`, which leaves nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any, Self

from .clocks import Clocks
from .images.checkpoint import Checkpoint
from .memory import objects
from .memory.extents import Place
from .memory.fingerprint import Print, differences
from .memory.sink import PageSink
from .objects import memfd
from .skeleton import Skeleton
from .target import Tracer

_PAGE = 4096
_BLOCK = 512  # of st_blocks


class Landing:
    """One tree arriving through `sink`."""

    def __init__(
        self,
        tracer: Tracer,
        checkpoint: Checkpoint,
        sink: PageSink,
        *,
        cgroup: int = -1,
        clocks: Clocks | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.skeleton = Skeleton(tracer, checkpoint, cgroup=cgroup, clocks=clocks, options=options)
        self._sink = sink
        self._cleanup = contextlib.ExitStack()
        self._cleanup.callback(self.skeleton.close)
        self._known: dict[int, Place] = {}

    def build(self) -> None:
        """Make the tree, and tell the sink where pages belong."""
        self.skeleton.build()
        self._sink.guard(*self.skeleton.bounds)
        self._connect()
        for inner_pid, uffd in self.skeleton.filling.descriptors.items():
            self._sink.fill(objects.address_space(inner_pid), uffd)

    def allow(self, number: int) -> None:
        """Pages of round `number` may come in."""
        self._sink.allow(number)

    def protect(self) -> None:
        """Round 0 is in: areas get their final protection."""
        for inner_pid in self.skeleton.filling.descriptors:
            self._sink.fill(objects.address_space(inner_pid), -1)
        self.skeleton.protect()

    def update(self, checkpoint: Checkpoint) -> None:
        """Follow what changed at the source; before the round is allowed whose pages belong there."""
        before = set(self.skeleton.pids())
        unfilled = self.skeleton.update(checkpoint)
        for inner_pid in unfilled | (before - set(self.skeleton.pids())):
            number = objects.address_space(inner_pid)
            if number in self._known:
                self._known.pop(number)
                self._sink.remove(number)
        self._connect()

    def prepare_finish(self, checkpoint: Checkpoint) -> None:
        """The final images are here, the last pages perhaps not: they may come in where areas are the same."""
        self.update(checkpoint)

    def finish(self, checkpoint: Checkpoint) -> None:
        """Everything is in: give the tree its final state and park it."""
        self.skeleton.finish(checkpoint)

    def detach(self) -> None:
        """Let go of the parked tree, which a frozen cgroup holds."""
        self.skeleton.detach()

    def memory(self) -> int:
        """Bytes of memory that the tree has so far: private pages of each process, and each shared object once."""
        private = 0
        for pid in list(self.skeleton.pids().values()):
            with open(f"/proc/{pid}/statm") as file:
                _, resident, shared, *_ = map(int, file.read().split())
            private += resident - shared
        blocks = 0
        for place in list(self._known.values()):
            with contextlib.suppress(OSError):
                blocks += 0 if place.pid else os.fstat(place.fd).st_blocks
        return private * _PAGE + blocks * _BLOCK

    @property
    def late(self) -> bool:
        """Whether `speak` is to be called before `detach`, with the cgroup thawed."""
        return bool(self.skeleton.last_words.late)

    def speak(self) -> None:
        """Tell the kernel what it must not know while the copy may yet be discarded."""
        self.skeleton.speak()

    def wake(self) -> None:
        """The commit has been written: let its objects be heard of. Then it may be thawed."""
        self.skeleton.wake()

    def sync(self) -> None:
        """It runs: bring files that came along to the disk. OSError if that fails."""
        self.skeleton.sync()

    def close(self) -> None:
        """Close what is ours; a tree that was not released dies."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _connect(self) -> None:
        for inner_pid, pid in self.skeleton.pids().items():
            number = objects.address_space(inner_pid)
            if number not in self._known:
                mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
                self._add(number, Place(pid, mem))
                os.close(mem)
        for shmid, fd in self.skeleton.shared.descriptors().items():
            self._add(objects.shared(shmid), Place(0, fd))
        restoration = self.skeleton.restoration
        for record in restoration.checkpoint.records("memfd"):
            file = record.message
            self._add(objects.shared(file.shmid), Place(0, memfd.inode(file.inode_id, restoration)))

    def differences(self, prints: Iterable[Print]) -> list[str]:
        """Where the memory of the tree, all pages being in, is not what the source's fingerprints say."""
        with contextlib.ExitStack() as stack:
            places = dict(self._known)
            for inner_pid, pid in self.skeleton.pids().items():
                mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, mem)
                places[objects.address_space(inner_pid)] = Place(pid, mem)
            return differences(prints, places)

    def _add(self, number: int, place: Place) -> None:
        if number not in self._known:
            self._known[number] = place
            self._sink.add(number, place)
