"""How a task is born with the numbers that it is to have, in each of the pid namespaces that it is in.

A parent says which, if it may (clone3(2), set_tid): that is up to the user namespaces that the pid namespaces belong
to. Often it may say those of inner ones only; for the others somebody says what the last number was (`aiming`), and a
task that gets another one ends, and it is tried again. A parent whose child is in another pid namespace than itself
makes it, or goes there for that moment (setns(2)): its children alone are in it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import aiming
from .arena import Seat
from .errors import GoneError, RebuildError
from .namespaces import last_pid
from .namespaces import pid as pid_namespace
from .namespaces.inside import Worker
from .numbering import TREE, Name
from .program import Program
from .syscalls import NR

if TYPE_CHECKING:
    from .births import Births, Task

CLONE_PARENT = 0x8000
CLONE_THREAD = 0x10000
CLONE_NEWPID = 0x20000000
_TRIES = 20  # to have a task born with the number that it is to have
_FREE_PATIENCE = 0.5  # seconds that somebody else may have that number meanwhile


class Bearing:
    """Bears the tasks of one skeleton."""

    def __init__(self, births: Births) -> None:
        self._births = births
        self._workers: dict[int, Worker] = {}

    def close(self) -> None:
        """End processes of ours in pid namespaces of the tree, which have numbers there."""
        while self._workers:
            self._workers.popitem()[1].close()

    def bear(self, parent: Task, name: Name, *, flags: int, exit_signal: int, beside: Task | None = None) -> Seat:
        """A child or thread of `parent`; with `beside`, which is its parent, a sibling of it."""
        spaces = self._births.namespaces
        chosen = spaces.choosable(parent.node.pid, name)
        if name.space != parent.node.space and not spaces.has_numbers(name.space):
            flags |= CLONE_NEWPID
        for _ in range(_TRIES):
            with self._visit(parent, name.space):
                aim = self._aim(parent, name, chosen)
                seat, numbers, seen = self._once(parent, name, chosen, (flags, exit_signal), aim, beside)
            if numbers == name.numbers or len(name.numbers) == chosen:
                return seat
            self._undo(beside or parent, seat, 0 if flags & CLONE_THREAD else seen)
            self.close()
            if aim is not None:
                aiming.wait_until_free(name.numbers[0], _FREE_PATIENCE)
        raise RebuildError(
            f"number {name.numbers[0]} could not be had for a task: another process here has it, or took it each time",
            advice="try again, or give the program a pid namespace",
        )

    @contextlib.contextmanager
    def _visit(self, parent: Task, space: int) -> Iterator[None]:
        """Have a parent's children be born in another pid namespace, if it is there."""
        spaces = self._births.namespaces
        if space == parent.node.space or not spaces.has_numbers(space):
            yield
            return
        self.go(parent, spaces.numbers_of(space))
        try:
            yield
        finally:
            fd = os.open("ns/pid", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._births.view(parent).proc)
            try:
                self.go(parent, fd)
            finally:
                os.close(fd)

    def go(self, task: Task, namespace: int) -> None:
        """From now on the children of a task are born in another pid namespace."""
        (theirs,) = task.table.receive(lambda program: self._births.run(task, program), [namespace])
        program = Program()
        program.order(NR.setns, theirs, CLONE_NEWPID, label="have children in a pid namespace")
        task.table.close(program, [theirs])
        self._births.run(task, program)

    def _once(
        self, parent: Task, name: Name, chosen: int, how: tuple[int, int], aim: aiming.Aim | None, beside: Task | None
    ) -> tuple[Seat, tuple[int, ...], int]:
        """One try: the seat of whoever was born, its numbers, and what its parent calls it."""
        flags, exit_signal = how
        arena, slot = self._births.arena, self._births.take_slot()
        program = Program()
        wanted = program.data(struct.pack(f"<{len(name.numbers)}i", *reversed(name.numbers)))
        # struct clone_args (clone(2)): flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
        # set_tid, set_tid_size, cgroup
        args = program.data(struct.pack("<11Q", flags, 0, 0, 0, exit_signal, 0, 0, 0, 0, chosen, 0))
        if chosen:
            program.store(args.at(64), wanted)
        if aim is not None:
            aim.stand(program)
        born = program.fork(args, slot, label=f"start task {name.numbers[0]}")
        seat = parent.seats[parent.node.pid]
        arena.order(self._births.tracer.handle, {seat: [program]}, meanwhile=aim.shoot if aim else None)
        seen = number = arena.results(seat.slot, program).value(born)
        spaces, thread = self._births.namespaces, bool(flags & CLONE_THREAD)
        if self._births.init is not None or spaces.numbered or parent.node.space != TREE:
            number = pid_namespace.number_here(parent.pid, seen, thread=thread, bearer=(beside or parent).pid)
        numbers = name.numbers
        if chosen < len(numbers):
            numbers = pid_namespace.numbers_of((beside or parent).pid, number, thread=thread)[-len(name.numbers) :]
        return Seat(slot, number), numbers, seen

    def _aim(self, parent: Task, name: Name, chosen: int) -> aiming.Aim | None:
        """Have the next task that `parent` bears get its numbers where it may not choose, if they are free. In a pid
        namespace of the tree's own its first process says so: nobody else takes any there."""
        outer = list(zip(name.way, name.numbers, strict=True))[: len(name.way) - chosen]
        for space, number in reversed(outer):
            if space != TREE:
                self._say_inside(space, number)
            elif self._births.init is None and not self._births.namespaces.numbered:
                return aiming.Aim(self._births.arena, parent.seats[parent.node.pid].slot, number)
            else:
                self._say(self._births.init or self._births.tasks[self._births.namespaces.root], number)
        return None

    def _say(self, task: Task, number: int) -> None:
        fd = last_pid.open_last()
        try:
            (theirs,) = task.table.receive(lambda program: self._births.run(task, program), [fd])
        finally:
            os.close(fd)
        program, text = Program(), last_pid.before(number)
        program.order(NR.pwrite64, theirs, program.data(text), len(text), 0, label="say which number comes next")
        task.table.close(program, [theirs])
        self._births.run(task, program)

    def _say_inside(self, space: int, number: int) -> None:
        """In a pid namespace below the tree's whose own tasks may not: a process of ours does, which has a number there
        itself meanwhile."""
        if space not in self._workers:
            namespace = {"pid": self._births.namespaces.numbers_of(space)}
            self._workers[space] = Worker(namespace, modules=(last_pid.__name__,))
        self._workers[space].call(last_pid.say, number)

    def _undo(self, parent: Task, seat: Seat, number: int) -> None:
        """End a task that got another number than it was to have. `number` is what its parent calls it, 0 for a
        thread."""
        program = Program()
        program.order(NR.exit, 0)
        with contextlib.suppress(GoneError):
            self._births.arena.run(self._births.tracer.handle, {seat: program})
        self._births.give_slot(seat.slot)
        if number:
            self._births.reap(number, parent)
