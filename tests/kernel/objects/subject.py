"""A subject that sets up kernel objects, and its copy.

A subject is a function that sets up objects at descriptor numbers of its choice, and one that checks them. The check
runs twice: in the subject itself, after it has been collected, and in a new process with the rebuilt descriptors.
"""

from __future__ import annotations

import fcntl
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from phaul_engine.errors import Blocker
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2
from phaul_engine.objects import (  # noqa: F401  registers the kinds
    carried_file,
    char_device,
    epoll,
    eventfd,
    fifo,
    inotify,
    memfd,
    namespace_file,
    pidfd,
    pipe,
    regular_file,
    signalfd,
    timerfd,
)
from phaul_engine.objects.base import (
    Collection,
    Owner,
    Restoration,
    SkeletonTask,
    descriptor_kinds,
    kind_of_entry,
)
from phaul_engine.objects.files import FilesPass, OpenFiles, Table
from phaul_engine.proc import access
from phaul_engine.program import Program

Act = Callable[[], object]


def _run(act: Act) -> None:
    """End this process with 0 if `act` returns."""
    status = 1
    try:
        act()
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _stand_alone() -> None:
    """Keep nothing of the test's own descriptors but stderr."""
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.closerange(3, 1 << 16)


@dataclass
class Pass:
    """What one pass found."""

    checkpoint: Checkpoint
    blockers: list[Blocker]
    collection: Collection


@dataclass
class Subject:
    """A process that has set up its objects and stands still."""

    pid: int
    files: OpenFiles = field(default_factory=OpenFiles)
    others: list[int] = field(default_factory=list)

    def collect(
        self, survey: bool = False, also: Callable[[FilesPass, Owner], None] | None = None, **options: object
    ) -> Pass:
        """Collect its descriptors, and those of its descendants in `others`."""
        collection = Collection(Checkpoint(), survey=survey, options=options)
        pids = [self.pid, *self.others]
        collection.inner_pids = {pid: pid for pid in pids}
        with ExitStack() as stack:
            tables = [_table(stack, number + 1, pid) for number, pid in enumerate(pids)]
            with self.files.begin(collection) as files:
                files.tables(tables)
                if also:
                    also(files, tables[0].owner)
                files.finish()
        return Pass(collection.checkpoint, collection.blockers, collection)

    def go_on(self) -> None:
        """Let it run its check; it must succeed."""
        os.kill(self.pid, signal.SIGCONT)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        assert status == 0, "the subject's own check failed"

    def step(self) -> None:
        """Let it run until it stops again."""
        os.kill(self.pid, signal.SIGCONT)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)


def _table(stack: ExitStack, files_id: int, pid: int) -> Table:
    def keep(fd: int) -> int:
        stack.callback(os.close, fd)
        return fd

    proc = keep(access.open_process(pid))
    root = keep(access.open_at(proc, "root", os.O_PATH | os.O_DIRECTORY))
    net = keep(access.open_at(proc, "ns/net"))
    owner = Owner(pid, pid, "subject", proc, root, net)
    return Table(files_id, owner, keep(os.pidfd_open(pid)))


def stop() -> None:
    """Stand still, in a subject, until the test goes on."""
    os.kill(os.getpid(), signal.SIGSTOP)


@contextmanager
def started(setup: Act, check: Act = lambda: None) -> Iterator[Subject]:
    """Start a subject; it is killed in the end if it still runs."""

    def act() -> None:
        _stand_alone()
        setup()
        stop()
        check()

    pid = os.fork()
    if pid == 0:
        _run(act)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "the subject could not be set up"
    subject = Subject(pid)
    try:
        yield subject
    finally:
        subject.files.close()
        if subject.pid:
            os.kill(subject.pid, signal.SIGKILL)
            os.waitpid(subject.pid, 0)


class Copy:
    """The destination's side: descriptions rebuilt from images in this process."""

    def __init__(self, checkpoint: Checkpoint, tasks: dict[int, int] | None = None) -> None:
        self.restoration = Restoration(checkpoint)
        for inner, pid in (tasks or {}).items():
            self.restoration.tasks[inner] = SkeletonTask(pid, inner, -1, -1, -1)

    def build(self) -> None:
        """Make all descriptions of the tables and attach what belongs to tasks."""
        for entry in self._entries():
            self.restoration.description(entry.id)
        for entry in self._entries():
            task = SkeletonTask(0, 0, -1, -1, -1)
            kind_of_entry(entry).attach(entry, -1, task, Program(), self.restoration)

    def replace(self, checkpoint: Checkpoint) -> None:
        """Take the final images: what cannot be settled is made anew."""
        early = {entry.id: entry for entry in self._entries()}
        self.restoration.checkpoint = checkpoint
        self.restoration.renew()
        for entry in self._entries():
            if entry.id in early and not kind_of_entry(entry).settles(early[entry.id], entry):
                self.restoration.discard(entry.id)
        for entry in self._entries():
            self.restoration.description(entry.id)

    def settle(self) -> None:
        """Give all descriptions their final state."""
        for entry in self._entries():
            kind_of_entry(entry).settle(entry, self.restoration.made[entry.id], self.restoration)

    def check(self, check: Act) -> None:
        """Run a check in a process with the descriptors of the first table at their numbers."""
        self.check_tables({1: check})

    def check_tables(self, checks: dict[int, Act]) -> None:
        """Run checks, each in a process with the descriptors of a table. Our own are closed first, as they are before
        a tree runs."""
        gate, mine = os.pipe()
        pids = [self._fork(check, table, gate, mine) for table, check in checks.items()]
        os.close(gate)
        self.close()
        os.close(mine)
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        assert not any(statuses), "the check failed in the copy"

    def _fork(self, check: Act, table: int, gate: int, mine: int) -> int:
        records = [record.message for record in self.restoration.checkpoint.records("fdinfo", table)]

        def act() -> None:
            os.close(mine)
            made = self.restoration.made.items()
            high = {file_id: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 5000) for file_id, fd in made}
            error = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 6000)
            wait = fcntl.fcntl(gate, fcntl.F_DUPFD_CLOEXEC, 6000)
            os.closerange(3, 5000)
            for record in records:
                os.dup2(high[record.id], record.fd, inheritable=not record.flags & 1)
            os.dup2(error, 2)
            os.closerange(5000, wait)
            os.read(wait, 1)
            os.close(wait)
            check()

        pid = os.fork()
        if pid == 0:
            _run(act)
        return pid

    def close(self) -> None:
        """Close all descriptions."""
        for kind in descriptor_kinds():
            kind.release(self.restoration)
        carried_file.forget(self.restoration)
        for fd in self.restoration.made.values():
            os.close(fd)
        self.restoration.made.clear()

    def _entries(self) -> list[fdinfo_pb2.file_entry]:
        ids = {
            record.message.id
            for ident in self.restoration.checkpoint.idents("fdinfo")
            for record in self.restoration.checkpoint.records("fdinfo", ident)
        }
        return [self.restoration.entry(file_id) for file_id in sorted(ids)]


@contextmanager
def copied(checkpoint: Checkpoint, tasks: dict[int, int] | None = None) -> Iterator[Copy]:
    """Build and settle what is in a checkpoint."""
    copy = Copy(checkpoint, tasks)
    try:
        copy.build()
        copy.settle()
        yield copy
    finally:
        copy.close()


def through_bytes(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as it arrives at another host."""
    return Checkpoint.from_bytes(checkpoint.to_bytes())


def moves(setup: Act, check: Act) -> None:
    """Set up, survey, collect, check at the source; the copy is built from the survey's images, brought up to date with
    the final ones, and checked."""
    with started(setup, check) as subject:
        early = subject.collect(survey=True)
        assert not early.blockers, early.blockers
        final = subject.collect()
        assert not final.blockers, final.blockers
        copy = Copy(through_bytes(early.checkpoint), {subject.pid: subject.pid})
        try:
            copy.build()
            copy.replace(through_bytes(final.checkpoint))
            copy.settle()
            copy.check(check)
            subject.go_on()
        finally:
            copy.close()


def moves_in_turn(setup: Act, check: Act) -> None:
    """As `moves`, where both would see what the other does: the source ends before the copy is made."""
    with started(setup, check) as subject:
        found = subject.collect()
        assert not found.blockers, found.blockers
        subject.go_on()
    with copied(through_bytes(found.checkpoint)) as copy:
        copy.check(check)


def at(fd: int, number: int) -> int:
    """Move a descriptor to a number of the subject's choice."""
    os.dup2(fd, number, inheritable=False)
    os.close(fd)
    return number
