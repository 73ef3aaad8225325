"""What skeleton tasks hold: their descriptor tables, root and working directories, and the state of descriptions."""

from __future__ import annotations

import os

from .births import Births, Task
from .errors import IMPOSSIBLE, cannot_make
from .images.checkpoint import Checkpoint
from .images.pb import fdinfo_pb2
from .objects.base import Restoration, kind_of_entry
from .program import Program
from .syscalls import NR


class Equipment:
    """Gives the tasks of one skeleton their descriptors."""

    def __init__(self, births: Births, restoration: Restoration) -> None:
        self._births = births
        self._restoration = restoration
        self._attached: set[tuple[int, int]] = set()
        self._settled: dict[int, tuple[fdinfo_pb2.file_entry, int]] = {}

    def wanted(self, task: Task) -> dict[int, tuple[int, bool]]:
        """The descriptor table that a process is to have: number -> (image id, close-on-exec)."""
        checkpoint = self._restoration.checkpoint
        records = checkpoint.records("fdinfo", checkpoint.one("ids", task.node.pid).files_id)
        return {one.message.fd: (one.message.id, bool(one.message.flags & 1)) for one in records}

    def install(self, task: Task) -> None:
        """Make the task's table what the images say."""
        wanted = self.wanted(task)
        generations = {
            file_id: self._restoration.generations.get(file_id, 0) for file_id in {one for one, _ in wanted.values()}
        }
        changed = []
        for number, (file_id, cloexec) in wanted.items():
            ours = self._restoration.description(file_id)
            if (
                task.table.numbers.get(number) != (file_id, cloexec)
                or task.table.generations.get(file_id) != generations[file_id]
            ):
                changed.append((number, ours, cloexec))
        gone = [number for number in task.table.numbers if number not in wanted]
        if gone:
            program = Program()
            task.table.close(program, gone)
            self._births.run(task, program)
        task.table.install(lambda program: self._births.run(task, program), changed)
        task.table.numbers, task.table.generations = wanted, generations

    def place(self, task: Task) -> None:
        """Give a task its root and working directory."""
        fs = self._restoration.checkpoint.one("fs", task.node.pid)
        ours = [self._restoration.description(fs.root_id), self._restoration.description(fs.cwd_id)]
        root, cwd = task.table.receive(lambda program: self._births.run(task, program), ours)
        program = Program()
        if not os.path.samestat(os.fstat(ours[0]), os.fstat(self._restoration.tasks[task.node.pid].root)):
            program.order(NR.fchdir, root, label="enter the root directory")
            program.order(NR.chroot, program.data(b".\0"), label="change the root directory")
        program.order(NR.fchdir, cwd, label="enter the working directory")
        task.table.close(program, [root, cwd])
        self._births.run(task, program)

    def move(self, task: Task, before: Checkpoint) -> None:
        """Give a task other directories, if it had others in the images so far."""
        now, then = self._restoration.checkpoint.one("fs", task.node.pid), before.one("fs", task.node.pid)
        if (now.root_id, now.cwd_id) != (then.root_id, then.cwd_id):
            self.place(task)

    def attach(self) -> None:
        """Do once for each description what is done inside a task that has it."""
        for task in self._births.living:
            program = Program()
            for number, (file_id, _) in sorted(task.table.numbers.items()):
                made = (file_id, self._restoration.generations.get(file_id, 0))
                if made not in self._attached:
                    self._attached.add(made)
                    entry = self._restoration.entry(file_id)
                    view = self._restoration.tasks[task.node.pid]
                    kind = kind_of_entry(entry)
                    try:
                        kind.attach(entry, number, view, program, self._restoration)
                    except IMPOSSIBLE as error:
                        raise cannot_make(f"{kind.name} {entry.id}", error) from error
            if program.steps:
                self._births.run(task, program)

    def replace_images(self, checkpoint: Checkpoint) -> bool:
        """From now on the images are these: descriptions that cannot follow are made anew when next needed. Whether
        there are such."""
        discarded = False
        early = {record.message.id: record.message for record in self._restoration.checkpoint.records("files")}
        self._restoration.checkpoint = checkpoint
        self._restoration.renew()
        for record in checkpoint.records("files"):
            entry = record.message
            before = early.get(entry.id)
            if before is entry or before is None or before == entry or entry.id not in self._restoration.made:
                continue
            if not kind_of_entry(entry).settles(before, entry):
                self._restoration.discard(entry.id)
                discarded = True
        return discarded

    def settle(self, *, early: bool = False) -> None:
        """Give descriptions their state. `early`, before the freeze, only those that will keep it."""
        for record in self._restoration.checkpoint.records("files"):
            entry = record.message
            fd = self._restoration.made.get(entry.id)
            if fd is None:
                continue
            kind = kind_of_entry(entry)
            lasting = kind.lasting(entry, self._restoration)
            if early and not lasting:
                continue
            settled = (entry, self._restoration.generations.get(entry.id, 0))
            if not lasting or self._settled.get(entry.id) != settled:
                try:
                    kind.settle(entry, fd, self._restoration)
                except IMPOSSIBLE as error:
                    raise cannot_make(f"{kind.name} {entry.id}", error) from error
                self._settled[entry.id] = settled
