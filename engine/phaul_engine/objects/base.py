"""What a module of kernel objects offers, and what it is given.

A module of this package is one kind of kernel object, with both directions side by side: *collect* turns the
object at the source into an image message, *rebuild* turns the message into the object at the destination.
Modules register an instance of one of the two classes below with `descriptor_kind` or `task_kind`.

Descriptors. An open file description is collected through a duplicate (`pidfd_getfd`) that the engine holds: what
is asked of it or changed in it is the very same description. At the destination the engine itself makes the
description (`rebuild`, early, while the source runs), passes it to the skeleton tasks that have it, and keeps a
duplicate, through which `settle` gives it its final state inside the freeze: there only what changed since is
touched, and no call may block.

Tasks. What only the task itself can tell or do is written as instructions into a `Program` that runs inside it.
"""

from __future__ import annotations

import enum
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from phaul_engine import calls
from phaul_engine.errors import IMPOSSIBLE, Blocker, ImageError, cannot_make
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import core_pb2, fdinfo_pb2
from phaul_engine.numbering import TREE, Name, Numbering
from phaul_engine.proc.fdinfo import FdInfo
from phaul_engine.program import Program, Results
from phaul_engine.user_ids import UserIds

Made = TypeVar("Made")


@dataclass(frozen=True)
class Owner:
    """A process as descriptor kinds see it.

    `pid` is the number in the engine's own pid namespace, `inner_pid` the one the process knows itself by (images
    hold inner numbers). `proc` is an O_PATH descriptor of its /proc directory, `root` one of its root directory
    (open through it with RESOLVE_IN_ROOT: paths are the task's, not ours), `net` one of its network namespace. `top` is
    one of the root of its mount namespace, which the kernel's names for its files start from; -1 if it is hidden.
    `start` is its start time, as `Stat` has it.
    """

    pid: int
    inner_pid: int
    comm: str
    proc: int
    root: int
    net: int
    top: int = -1
    start: int = -1

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.comm})"


@dataclass(frozen=True)
class Descriptor:
    """One descriptor of one process at the source. `own` is our duplicate; it must not be closed by a kind.

    It lives as long as the pass: a duplicate kept while the tree runs would keep pipes, connections and locks alive
    that the program closes. What is no number of a descriptor table (a working directory, a mapped file, a descriptor
    in flight) has `fd` -1 and says in `where` what it is; `own` may then be an O_PATH descriptor.
    """

    owner: Owner
    fd: int
    own: int
    link: str
    info: FdInfo
    status: os.stat_result
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where or f'fd {self.fd}'} of {self.owner}"


def _no_pass(*_: object) -> Any:
    raise LookupError("this is done only during a pass over descriptor tables")


@dataclass
class Collection:
    """One pass over a stopped tree. Kinds put what they find into `checkpoint` and complain into `blockers`.

    `descriptors` maps the image id of each open file description to one descriptor that refers to it; it is
    complete when `finish` is called. `numbers` maps a descriptor's number to the ids it has in any table. `survey` is
    true when the tree will run on after this pass: then nothing may be changed in it, and large contents (queues,
    pipe data) may be left out. `options` are the user's choices
    (`tcp`: established, close or refuse; `shell_job`; ...). `inner_pids` translates pids of the tree to its own
    numbers; a pid outside maps to 0. `nested` are the numbers of processes in pid namespaces below the tree's, each
    with the number of its own (`numbering`).

    `register` gives an image id to a description that stands in no table: (our descriptor of it, an owner, what it
    is: "a descriptor in the queue of fd 4"). The pass closes the descriptor. To be called from `collect` only.

    `keep` keeps a descriptor of ours from pass to pass, as long as each pass asks for it: (a key, how to open it). It
    must be one that the program does not notice. `undo` notes what has to be undone when the engine is through with
    the tree, wherever that runs then. What `passing` holds is closed when the pass has looked at everything.
    """

    checkpoint: Checkpoint
    survey: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    blockers: list[Blocker] = field(default_factory=list)
    descriptors: dict[int, Descriptor] = field(default_factory=dict)
    numbers: dict[int, set[int]] = field(default_factory=dict)
    inner_pids: dict[int, int] = field(default_factory=dict)
    nested: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    scratch: dict[str, Any] = field(default_factory=dict)  # a kind's own notes, under its name
    memory: dict[str, Any] = field(default_factory=dict)  # the same, kept from pass to pass of one migration
    passing: ExitStack = field(default_factory=ExitStack)
    register: Callable[[int, Owner, str], int] = field(default=_no_pass)
    keep: Callable[[object, Callable[[], int]], int] = field(default=_no_pass)
    undo: Callable[[Callable[[], None]], None] = field(default=_no_pass)

    @functools.cached_property
    def ids(self) -> UserIds:
        """How the tree's user namespace numbers users and groups, as images do: what the kernel tells the engine is
        translated. To be used when files are collected, not before."""
        return UserIds(self.checkpoint)

    def numbers_in(self, space: int) -> set[int]:
        """What processes of the tree are called in a pid namespace (`numbering`)."""
        if space == TREE:
            return set(self.inner_pids.values())
        numbering = Numbering(self.checkpoint)
        return {Name(numbers, numbering.way(one)).seen(space) for numbers, one in self.nested}

    def block(self, where: object, kind: str, why: str, advice: str = "", *, passing: bool = False) -> None:
        """Note a blocker and go on: the operator wants all of them at once. `passing` in the final pass: the tree runs
        a moment longer then, and is stopped again."""
        self.blockers.append(Blocker(str(where), kind, why, advice, passing))


@dataclass
class SkeletonTask:
    """A task being built at the destination. `pid` is ours, `inner_pid` the one it had and will have; `written` is
    where it maps files that others may map too (start and end of each area)."""

    pid: int
    inner_pid: int
    proc: int
    root: int
    net: int
    written: tuple[tuple[int, int], ...] = ()


@dataclass
class Restoration:
    """One tree being rebuilt.

    `root` is a descriptor of the root of the tree's mount namespace, beneath which names in images are resolved; None
    is the engine's own root. `inside` is there as long as tasks interpret programs. `made` are the descriptions so
    far, by image id, as descriptors of the engine.
    """

    checkpoint: Checkpoint
    tasks: dict[int, SkeletonTask] = field(default_factory=dict)  # by inner pid
    options: dict[str, Any] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)
    root: int | None = None
    namespaces: dict[tuple[str, int], Any] = field(default_factory=dict)  # NewNamespace, by kind and number in images
    inside: Callable[[int, Program], Results] | None = None  # run a program in the leader of a task, by inner pid

    generations: dict[int, int] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)  # descriptions that are being made
    cache: dict[str, Any] = field(default_factory=dict)  # what was read from the images, until they are replaced
    later: ExitStack = field(default_factory=ExitStack)  # closed when the tree runs: closing may take milliseconds

    @functools.cached_property
    def ids(self) -> UserIds:
        """How the tree's user namespace numbers users and groups, as images do."""
        return UserIds(self.checkpoint)

    @property
    def numbering(self) -> Numbering:
        """What tasks are called in pid namespaces below the tree's."""
        if "numbering" not in self.cache:
            self.cache["numbering"] = Numbering(self.checkpoint)
        numbering: Numbering = self.cache["numbering"]
        return numbering

    def filing(self, act: Callable[[], Made], maker: tuple[int, int] | None = None) -> Made:
        """Run `act`, which makes files, as root of the tree's user namespace: file systems that were mounted in it know
        nobody else (EOVERFLOW). `maker` is whom another one knows (`mounted.maker`)."""
        root = maker or self.ids.root
        return act() if root == (0, 0) else calls.filing(*root, act)

    def discard(self, file_id: int) -> None:
        """Close a description that was made too early; `description` makes it anew."""
        os.close(self.made.pop(file_id))
        self.generations[file_id] = self.generations.get(file_id, 0) + 1

    def renew(self) -> None:
        """The images have been replaced by later ones: forget what was read from the early ones."""
        self.cache.clear()

    def forget_task(self, inner_pid: int) -> None:
        """A task was ended to be made anew, or for good."""
        task = self.tasks.pop(inner_pid)
        for fd in (task.proc, task.root, task.net):
            os.close(fd)

    def pid(self, inner_pid: int) -> int:
        """The engine's number of a task of the tree, 0 if it has none."""
        task = self.tasks.get(inner_pid)
        return task.pid if task else 0

    def entry(self, file_id: int) -> fdinfo_pb2.file_entry:
        """The image entry of a description; ImageError if there is none."""
        entries: dict[int, fdinfo_pb2.file_entry] | None = self.cache.get("entries")
        if entries is None:
            entries = {record.message.id: record.message for record in self.checkpoint.records("files")}
            self.cache["entries"] = entries
        entry = entries.get(file_id)
        if entry is None:
            raise ImageError(f"files.img has no file {file_id}, which something refers to")
        return entry

    def description(self, file_id: int) -> int:
        """The description with this image id, made now if it was not yet. ImageError if it needs itself to be made."""
        fd = self.made.get(file_id)
        if fd is not None:
            return fd
        entry = self.entry(file_id)
        kind = kind_of_entry(entry)
        if file_id in self.begun:
            raise ImageError(f"{kind.name} {file_id} needs another file that needs it")
        self.begun.add(file_id)
        try:
            fd = self.made[file_id] = kind.rebuild(entry, self)
        except IMPOSSIBLE as error:
            raise cannot_make(f"{kind.name} {file_id}", error) from error
        finally:
            self.begun.discard(file_id)
        return fd


class DescriptorKind(ABC):
    """A kind of open file description."""

    name: ClassVar[str]  # the word for it in messages to people: "eventfd", "unix socket"
    types: ClassVar[tuple[int, ...]]  # the fd_types of the image entries it makes
    settled: ClassVar[tuple[str, ...]] = ("fown", "pos")  # fields of its image message that `settle` can change

    @abstractmethod
    def claims(self, descriptor: Descriptor) -> bool:
        """Whether this descriptor is of this kind. Exactly one kind claims a descriptor."""

    @abstractmethod
    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        """Describe it. Called once a description. What cannot be carried goes to `collection.block`."""

    def steady(self, descriptor: Descriptor, collection: Collection) -> bool:
        """Whether its entry, and all that `collect` did besides, stands as long as link, fdinfo, fstat and signal
        owner are the same. Then `collect` is not called again in the freeze."""
        return False

    def finish(self, collection: Collection) -> None:
        """Called once a pass, when every description has been collected: peers, queues, shared data."""

    def seal(self, collection: Collection) -> None:
        """Called once in the final pass, after `finish`, when the tree is frozen in its cgroup and what comes from the
        network is held: take what may only be taken then. Entries in the checkpoint may still be changed."""

    @abstractmethod
    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        """Make the description in the engine and return our descriptor of it (close-on-exec)."""

    def rebuilds(self, entry: fdinfo_pb2.file_entry) -> bool:
        """Whether an entry of one of our types is ours; for types that several kinds share."""
        return True

    def settles(self, early: fdinfo_pb2.file_entry, final: fdinfo_pb2.file_entry) -> bool:
        """Whether a description built from `early` can be given the state of `final`; if not, it is built anew.

        So it is, unless a kind knows more, where nothing but `settled` fields and settable status flags differ.
        """
        return _fixed_part(early, self.settled) == _fixed_part(final, self.settled)

    def attach(
        self, entry: fdinfo_pb2.file_entry, fd: int, task: SkeletonTask, program: Program, restoration: Restoration
    ) -> None:
        """Add to `program`, which runs once in one task that has the description at `fd`, when all descriptors
        stand at their numbers: epoll registrations and the like."""

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        """Give the description (our descriptor `fd`) its final state. Runs in the freeze, early entries having
        been replaced by final ones in `restoration.checkpoint`."""

    def lasting(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> bool:
        """Whether a description settled before the freeze needs no settling in it, if its entry is still the same."""
        return False

    def discard(self, restoration: Restoration) -> None:
        """Called when the tree will not run here: remove what was made besides descriptions."""

    def release(self, restoration: Restoration) -> None:
        """Called once after the commit, before the tasks run: what nothing may see before (leave repair mode)."""


REBUILDING = ("rebuild", "attach", "settle", "release")
"""What a kind of description does at the destination, in this order."""

# What F_SETFL can change (fcntl(2)).
SETTABLE_FLAGS = os.O_APPEND | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME | os.O_NONBLOCK


def _fixed_part(entry: fdinfo_pb2.file_entry, settled: tuple[str, ...]) -> bytes:
    part = fdinfo_pb2.file_entry()
    part.CopyFrom(entry)
    for descriptor, message in part.ListFields():
        if descriptor.message_type is not None:
            for name in settled:
                if name in descriptor.message_type.fields_by_name:
                    message.ClearField(name)
            if "flags" in descriptor.message_type.fields_by_name:
                message.flags &= ~SETTABLE_FLAGS
    return part.SerializePartialToString()


class Scope(enum.Enum):
    """Whether a task kind is asked once a process or once a thread."""

    PROCESS = "process"
    THREAD = "thread"


class Phase(enum.IntEnum):
    """When a part of a task's state is rebuilt, in this order. Everything to CREDENTIALS runs inside the task."""

    EARLY = 1  # while the source runs, right after the task is born; descriptors are not there yet
    FINAL = 2  # in the freeze, with the final images
    CREDENTIALS = 3  # last in the freeze: rlimits, groups, uids, capabilities, securebits, dumpable, pdeathsig,
    # no_new_privs, seccomp, robust list, in the order of registration


@dataclass(frozen=True)
class ThreadView:
    """A stopped thread at the source. `leader` is true for the thread that stands for its process.

    `filters` are its seccomp filters, oldest first (PTRACE_SECCOMP_GET_FILTER), each an array of struct sock_filter
    with the flags it was installed with.
    """

    owner: Owner
    tid: int
    inner_tid: int
    leader: bool
    filters: tuple[tuple[bytes, int], ...] = ()


class TaskKind(ABC):
    """A part of the state of processes or threads."""

    name: ClassVar[str]
    scope: ClassVar[Scope]
    varies: ClassVar[bool] = False  # whether what is asked depends on the process; if not, it is assembled once

    def prepare(self, proc: int) -> None:
        """Called before a survey stops a process, whose /proc directory `proc` is: for what takes long. It may end, and
        it may never be asked."""

    def inquire(self, program: Program, thread: ThreadView) -> Any:
        """Add the instructions that tell this state from inside; what it returns comes back to `collect`.

        Unless the kind `varies`, they may depend on nothing: one program is run in all threads of all processes, and
        `thread` is any of them. Those of a kind that varies run afterwards.
        """
        return None

    @abstractmethod
    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        """Put the state into the image, from `results` of the program, /proc and ptrace-free system calls.

        `core` has what the engine read by ptrace already: registers, signal masks and queues, rseq.
        """

    def repeats(self, asked: Any, results: Results) -> bool:
        """Whether `collect`, whenever it is given these answers, writes the same into the core, adding to what is
        there, and does nothing besides. Then it is not called again for a thread that answers as it did before."""
        return False

    def finish(self, collection: Collection) -> None:
        """Called once a pass when all images of all tasks (mm, fs, ...) are in the checkpoint, for what belongs into
        one of those."""

    def close(self) -> None:
        """Called after the last pass: let go of what is held for one, also where that broke off."""

    @abstractmethod
    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """Add the instructions of this phase, if it has any, that make the state inside `task`.

        `task` is the process, for threads too; the instructions run in the thread that `core` tells of, those of all
        threads at once.
        """


class RebuiltKind(TaskKind):
    """A part that nobody is asked for: something else puts it into the images."""

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        """It is there already."""


_descriptor_kinds: list[DescriptorKind] = []
_task_kinds: list[TaskKind] = []


def descriptor_kind(kind: type[DescriptorKind]) -> type[DescriptorKind]:
    """Class decorator: register a kind of description."""
    _descriptor_kinds.append(kind())
    return kind


def task_kind(kind: type[TaskKind]) -> type[TaskKind]:
    """Class decorator: register a part of task state."""
    _task_kinds.append(kind())
    return kind


def arrange_task_kinds(modules: Sequence[str]) -> None:
    """Have the parts of task state, all in these modules, be rebuilt in this order, whichever was imported first."""
    _task_kinds.sort(key=lambda kind: modules.index(type(kind).__module__))


def descriptor_kinds() -> Iterator[DescriptorKind]:
    """All kinds of description."""
    return iter(_descriptor_kinds)


def task_kinds() -> Iterator[TaskKind]:
    """All parts of task state, in their order."""
    return iter(_task_kinds)


def kind_of(descriptor: Descriptor) -> DescriptorKind | None:
    """The kind that claims a descriptor; None is a blocker."""
    return next((kind for kind in _descriptor_kinds if kind.claims(descriptor)), None)


def kind_of_entry(entry: fdinfo_pb2.file_entry) -> DescriptorKind:
    """The kind that an image entry belongs to; ImageError if there is none."""
    for kind in _descriptor_kinds:
        if entry.type in kind.types and kind.rebuilds(entry):
            return kind
    raise ImageError(f"files.img has file {entry.id} of type {entry.type}, which cannot be made again")
