"""Passing descriptors of the engine to skeleton tasks.

All tasks of a skeleton hold one end of one socket pair. The engine queues descriptors on it and has one task at a time
receive them, each at the lowest free number, which is known beforehand because nobody else opens anything there.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence

from .program import Program, Results
from .syscalls import NR

_BATCH = 64
_HEADER = 56  # struct msghdr
_CONTROL = 24  # CMSG_SPACE(sizeof(int))
_CLOEXEC_MESSAGES = 0x40000000  # MSG_CMSG_CLOEXEC
_FD_CLOEXEC = 1
_F_SETFD = 2

Runner = Callable[[Program], Results]


class Passage:
    """The socket pair. `theirs` is what the first task is born with."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def queue(self, fds: Sequence[int]) -> None:
        """Send descriptors, one a message."""
        for fd in fds:
            self._ours.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])

    def close(self) -> None:
        """Close both ends of ours."""
        self._ours.close()
        self.theirs.close()


class Table:
    """The descriptor table of a skeleton task, or of several that share it. `service` is where the passage is in it.

    `numbers` are the program's own descriptors: image id and close-on-exec by number; `generations` says which making
    of each description they refer to.
    """

    def __init__(self, passage: Passage, service: int) -> None:
        self._passage = passage
        self.service = service
        self.used = {service}
        self.numbers: dict[int, tuple[int, bool]] = {}
        self.generations: dict[int, int] = {}

    def copy(self) -> Table:
        """The table of a forked child."""
        other = Table(self._passage, self.service)
        other.used = set(self.used)
        other.numbers, other.generations = dict(self.numbers), dict(self.generations)
        return other

    def lowest(self) -> int:
        """The number that the next descriptor gets."""
        number = 0
        while number in self.used:
            number += 1
        return number

    def receive(self, run: Runner, fds: Sequence[int]) -> list[int]:
        """Have the task take our descriptors `fds` wherever they fall; returns their numbers there."""
        taken: list[int] = []
        for start in range(0, len(fds), _BATCH):
            batch = fds[start : start + _BATCH]
            program = Program()
            taken.extend(self._take(program) for _ in batch)
            self._passage.queue(batch)
            run(program)
        return taken

    def install(self, run: Runner, wanted: Sequence[tuple[int, int, bool]]) -> None:
        """Have the task take descriptors at given numbers: (number, our descriptor, close-on-exec), any number once.

        A number that is in use is replaced.
        """
        for start in range(0, len(wanted), _BATCH):
            batch = sorted(wanted)[start : start + _BATCH]
            program = Program()
            if any(number == self.service for number, _, _ in batch):
                self.move_service(program, max(number for number, _, _ in wanted) + 1)
            for number, _, cloexec in batch:
                self._put(program, self._take(program), number, cloexec)
            self._passage.queue([fd for _, fd, _ in batch])
            run(program)

    def close(self, program: Program, numbers: Sequence[int]) -> None:
        """Close descriptors of the task."""
        for number in numbers:
            program.order(NR.close, number, label=f"close {number}")
            self.used.discard(number)

    def close_service(self, program: Program) -> None:
        """Close the passage, unless another task with this table has done so."""
        if self.service in self.used:
            self.close(program, [self.service])

    def move_service(self, program: Program, number: int) -> None:
        """Put the passage at another number, which must be free."""
        while number in self.used:
            number += 1
        program.order(NR.dup3, self.service, number, os.O_CLOEXEC, label=f"move the passage to {number}")
        program.order(NR.close, self.service)
        self.used.discard(self.service)
        self.used.add(number)
        self.service = number

    def _take(self, program: Program) -> int:
        number = self.lowest()
        byte, control = program.space(8), program.space(_CONTROL)
        vector, header = program.space(16), program.space(_HEADER)
        program.store(vector, byte)
        program.store(vector.at(8), 1)
        program.store(header.at(16), vector)
        program.store(header.at(24), 1)
        program.store(header.at(32), control)
        program.store(header.at(40), _CONTROL)
        program.order(NR.recvmsg, self.service, header, _CLOEXEC_MESSAGES, label=f"receive descriptor {number}")
        self.used.add(number)
        return number

    def _put(self, program: Program, at: int, number: int, cloexec: bool) -> None:
        if at != number:
            label = f"put a descriptor at {number}"
            program.order(NR.dup3, at, number, os.O_CLOEXEC if cloexec else 0, label=label)
            program.order(NR.close, at)
            self.used.discard(at)
        elif not cloexec:
            program.order(NR.fcntl, number, _F_SETFD, 0, label=f"keep descriptor {number} over exec")
        self.used.add(number)
