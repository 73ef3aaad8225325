"""The namespaces of a tree under construction: which task is born into which, and what is made in them.

The root is born into all that the images give it, or was caught in namespaces that a container's runtime has made
(`catching`): then it makes what is missing, and what is there is filled. Another task that is in one which its parent
is not in makes it itself (unshare(2)), or joins it (setns(2)) if a task before it has made it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

from phaul_engine import catching
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.numbering import TREE, Name
from phaul_engine.objects import credentials, places
from phaul_engine.objects.base import Restoration, SkeletonTask
from phaul_engine.proc.access import open_process
from phaul_engine.proc.id_map import read_id_map
from phaul_engine.proc.status import read_status
from phaul_engine.program import Program
from phaul_engine.syscalls import NR
from phaul_engine.transfer import Runner, Table
from phaul_engine.user_ids import UserIds, has_own

from . import census, control_groups, user
from . import pid as pid_namespace
from .base import NamespaceKind, NewNamespace, kind_named, kinds
from .below import Below
from .net import clearing
from .net.device import Outer

_DESCRIPTORS = os.O_RDONLY | os.O_CLOEXEC


class Namespaces:
    """Those of one skeleton."""

    def __init__(self, restoration: Restoration) -> None:
        self._restoration = restoration
        self._where: dict[int, dict[str, int]] = {}  # by pid in the images
        self._descriptors: list[int] = []
        self._host = census.read(restoration.checkpoint.one("inventory").root_ids)
        self._places = restoration.namespaces
        self._users: dict[int, int] = {}  # of tasks below the tree's user namespace: which one each is in
        self._below = Below(lambda: restoration.checkpoint, self._user_of_tree)

    def close(self) -> None:
        """Close what is ours."""
        self._below.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    @property
    def numbered(self) -> bool:
        """Whether the tree has a pid namespace of its own that we are not in."""
        return ("pid", self.of_task(self.root).get("pid", 0)) in self._places

    @property
    def hidden(self) -> bool:
        """Whether tasks are in pid namespaces that we are not in."""
        return any(name == "pid" for name, _ in self._places)

    def has_numbers(self, space: int) -> bool:
        """Whether a pid namespace below the tree's is there, by its name in `numbering`."""
        return ("pid", space) in self._places

    def numbers_of(self, space: int) -> int:
        """A descriptor of it."""
        descriptor: int = self._places["pid", space].descriptor
        return descriptor

    @property
    def root(self) -> int:
        """The number of the tree's first process."""
        return int(self._restoration.checkpoint.records("pstree")[0].message.pid)

    def of_task(self, pid: int) -> dict[str, int]:
        """The namespaces of the tree's own that a task is born into: numbers by kind. Clocks are seen to elsewhere,
        and a task goes into a user namespace below the tree's when it stands (`descend`)."""
        numbers = census.read(self._restoration.checkpoint.one("ids", pid))
        found = {
            name: number
            for name, number in numbers.items()
            if name != "time" and number != self._host.get(name, number)
        }
        if self._below.contains(found.get("user", 0)):
            del found["user"]
            if pid != self.root:
                found |= {name: number for name, number in self.of_task(self.root).items() if name == "user"}
            elif has_own(self._restoration.checkpoint):
                raise ImageError("the first process of the images is in a user namespace below its own")
        return found

    def flags(self, pid: int) -> int:
        """CLONE_NEW* for the birth of the root."""
        return _flags(name for name, number in self.of_task(pid).items() if not self._below.owner(number))

    def ids(self, pid: int) -> user.Ids:
        """What the root has to be given, which is born into a user namespace."""
        return user.ids(self._restoration.checkpoint, self.of_task(pid)["user"])

    def settle_root(self, task: SkeletonTask, table: Table, run: Runner) -> None:
        """The root was born, into new namespaces: make what belongs into them."""
        new = self.of_task(task.inner_pid)
        self._make(task, new, root=True, owners=self._join_belonging(task.inner_pid, new, table, run))

    def settle_caught(self, task: SkeletonTask, run: Runner) -> None:
        """The root was caught, in namespaces that were made for it: make what is missing, and what belongs into all."""
        wanted = self.of_task(task.inner_pid)
        with contextlib.ExitStack() as stack:
            there = {}
            for name in census.NAMES:
                there[name] = os.open(f"ns/{name}", _DESCRIPTORS, dir_fd=task.proc)
                stack.callback(os.close, there[name])
            apart = {name for name, fd in there.items() if not places.same_namespace(fd, name)}
            for name in sorted(apart - wanted.keys() - {"time", "cgroup"}):
                raise RebuildError(f"the runtime has given the container a {name} namespace, and it had none")
            missing = [name for name in wanted if name not in apart]
            for name in sorted({"pid", "user"} & set(missing)):
                raise RebuildError(f"the runtime has given the container no {name} namespace, and it had one")
            if "user" in wanted:
                _same_ids(self.ids(task.inner_pid), task.proc)
            if flags := _flags(missing):
                program = Program()
                program.order(NR.unshare, flags, label="make namespaces")
                run(program)
            if "net" in wanted and "net" not in missing:
                self._take_outer_ends(clearing.clear(there["net"], self._restoration.options.get(catching.PLUGS, {})))
        self._make(task, wanted, root=True)

    def lodge(self, task: SkeletonTask) -> None:
        """The root has gone into a mount namespace that was there (`lodging`): names lead to what is in that."""
        self._refresh(task)
        self._restoration.root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=task.proc)
        self._descriptors.append(self._restoration.root)

    def inherit(self, pid: int, parent: int) -> None:
        """A task was born that is wherever its parent is."""
        self._where[pid] = self._where.get(parent, {})

    def descends(self, pid: int) -> bool:
        """Whether a task is still to go into a user namespace below the tree's."""
        wanted = self._user_of(pid)
        if self._users.get(pid, 0) and not wanted:
            raise ImageError(f"process {pid} is above the user namespace of its parent, which it was born in")
        return wanted != self._users.get(pid, 0)

    def descend(self, task: SkeletonTask, table: Table, run: Runner) -> None:
        """Have a task that `descends`, and has everything but threads, do it."""
        checkpoint = self._restoration.checkpoint
        now, wanted = self._users.get(task.inner_pid, 0), self._user_of(task.inner_pid)
        (theirs,) = table.receive(run, [self._below.descriptor(wanted)])
        ids = self._restoration.ids
        here = UserIds(checkpoint, now) if now else ids
        program = Program()
        creds = checkpoint.one("core", task.inner_pid).thread_core.creds
        credentials.descend(creds, read_status(task.proc), here, ids, program)
        program.order(NR.setns, theirs, _kind("user").flag, label="join a user namespace")
        credentials.keep_capabilities(program)
        table.close(program, [theirs])
        run(program)
        self._users[task.inner_pid] = wanted

    def _user_of(self, pid: int) -> int:
        """The number of the user namespace below the tree's that a task is to be in, 0 if it is in the tree's."""
        number = self._restoration.checkpoint.one("ids", pid).user_ns_id
        return number if self._below.contains(number) else 0

    def choosable(self, pid: int, name: Name) -> int:
        """How many of the numbers of a thread or child a task may choose, the innermost first: not those of pid
        namespaces that belong to a user namespace above its own."""
        user, count = self._users.get(pid, 0), 0
        for space in reversed(name.way):
            if space == TREE:
                above = user or (not self.numbered and self._where.get(pid, {}).get("user"))
            else:
                above = user and user not in self._below.way(self._below.owner(space))
            if above:
                break
            count += 1
        return count

    def user_of_birth(self, parent: int, way: tuple[int, ...]) -> int:
        """In which user namespace a child has to be born that is process 1 of a pid namespace: 0 for its parent's."""
        owner = 0 if self.has_numbers(way[-1]) else self._below.owner(way[-1])
        return 0 if owner == self._users.get(parent, 0) else owner

    def go_lower(self, here: int, task: int, pid: int, user: int, table: Table, run: Runner) -> None:
        """Have `task`, our number of which is `here`, go into user namespace `user`, as one that process `pid` of the
        images can be born by."""
        (theirs,) = table.receive(run, [self._below.descriptor(user)])
        program, proc = Program(), open_process(here)
        try:
            creds = self._restoration.checkpoint.one("core", pid).thread_core.creds
            credentials.descend(creds, read_status(proc), self._restoration.ids, self._restoration.ids, program)
        finally:
            os.close(proc)
        program.order(NR.setns, theirs, _kind("user").flag, label="join a user namespace")
        credentials.keep_capabilities(program)
        table.close(program, [theirs])
        run(program)
        self._users[task] = user

    def _user_of_tree(self) -> int | None:
        place = self._places.get(("user", self.of_task(self.root).get("user", 0)))
        return place.descriptor if place else None

    def enter(self, task: SkeletonTask, parent: int, table: Table, run: Runner) -> None:
        """A task was born, into the namespaces of its parent: have it go where it belongs."""
        self.arrive(task, self.go(task.inner_pid, parent, table, run), self._users.get(parent, 0))

    def share(self, init: int) -> None:
        """The tree gets a pid namespace of its own with this process 1 (`pid`), which has mounts of its own too."""
        fd = os.open(f"/proc/{init}/ns/mnt", _DESCRIPTORS)
        self._descriptors.append(fd)
        self._restoration.scratch[pid_namespace.NAME] = fd

    def go(self, pid: int, parent: int, table: Table, run: Runner) -> dict[str, int]:
        """Have a task go where process `pid` of the images belongs. Returned are the namespaces that are new."""
        before, wanted = self._where.get(parent, {}), self.of_task(pid)
        changed = {name: wanted.get(name, 0) for name in before | wanted if before.get(name) != wanted.get(name)}
        pids = changed.pop("pid", 0)  # that it was born into
        new = {name: number for name, number in changed.items() if number and (name, number) not in self._places}
        for name, number in changed.items():
            if name not in new:
                self._join(name, number, table, run)
        owners = self._join_belonging(pid, new, table, run)
        if flags := _flags(name for name in new if not owners[name]):
            program = Program()
            program.order(NR.unshare, flags, label="make namespaces")
            run(program)
        return new | ({"pid": pids} if pids and not self.has_numbers(pids) else {})

    def arrive(self, task: SkeletonTask, new: Mapping[str, int], user: int) -> None:
        """A task is where it belongs, but for a user namespace below the tree's: it is in number `user`, 0 for the
        tree's. In the namespaces `new` it is the first."""
        wanted = self.of_task(task.inner_pid)
        self._where[task.inner_pid], self._users[task.inner_pid] = wanted, user
        if "user" in new:
            _write_maps(task.proc, self.ids(task.inner_pid))
        owners = {name: self._below.owner(number) for name, number in new.items()}
        self._make(task, new, root=task.inner_pid == self.root, owners=owners)
        if "pid" in new:
            for kind in kinds():
                for place in self._of_kind(kind):
                    kind.complete(place, self._restoration)
        self._welcome(task, {name: number for name, number in wanted.items() if name not in new})

    def _join_belonging(self, pid: int, new: Mapping[str, int], table: Table, run: Runner) -> dict[str, int]:
        """Have a task join those that belong to user namespaces below the tree's, made by others: whose each is."""
        owners = {name: self._below.owner(number) for name, number in new.items()}
        for name in (name for name, owner in owners.items() if owner):
            cgroup = control_groups.root_for(pid, self._restoration) if name == "cgroup" else ""
            self._give(self._below.make(name, _kind(name).flag, owners[name], cgroup), name, table, run)
        return owners

    def _welcome(self, task: SkeletonTask, numbers: Mapping[str, int]) -> None:
        for name, number in numbers.items():
            place = self._places.get((name, number))
            if place is not None:
                _kind(name).welcome(place, task, self._restoration)

    def update(self) -> None:
        """Later images: what tasks need that follow them."""
        self._below.follow()
        for kind in kinds():
            for place in self._of_kind(kind):
                kind.update(place, self._restoration)

    def settle(self) -> None:
        """In the freeze: the last state of everything."""
        for kind in kinds():
            for place in self._of_kind(kind):
                kind.settle(place, self._restoration)

    def release(self) -> None:
        """After the commit, before the tasks run."""
        for kind in kinds():
            for place in self._of_kind(kind):
                kind.release(place, self._restoration)

    def let_go(self) -> None:
        """Last, before the tasks run."""
        for kind in kinds():
            for place in self._of_kind(kind):
                kind.let_go(place, self._restoration)

    def discard(self) -> None:
        """The tree will not run here."""
        for kind in kinds():
            for place in self._of_kind(kind):
                kind.discard(place, self._restoration)

    def _take_outer_ends(self, outers: Mapping[str, Outer]) -> None:
        """What was plugged in there before the tree's own devices came; what the user says of one stands."""
        said = list(self._restoration.options.get("external", ()))
        found = [
            f"veth[{inner}]:{outer.name}" + f"@{outer.bridge}" * bool(outer.bridge) for inner, outer in outers.items()
        ]
        new = [text for text in found if not any(one.startswith(text.partition(":")[0] + ":") for one in said)]
        self._restoration.options["external"] = [*said, *new]
        self._restoration.options[catching.PORTS] = {outer.name: outer.settings for outer in outers.values()}

    def _of_kind(self, kind: NamespaceKind) -> list[NewNamespace]:
        return [place for (name, _), place in self._places.items() if name == kind.name]

    def _join(self, name: str, number: int, table: Table, run: Runner) -> None:
        """Have a task go into a namespace that is there: with number 0 the engine's."""
        place = self._places.get((name, number))
        fd = os.dup(place.descriptor) if place else os.open(f"/proc/self/ns/{name}", _DESCRIPTORS)
        try:
            self._give(fd, name, table, run)
        finally:
            os.close(fd)

    def _give(self, fd: int, name: str, table: Table, run: Runner) -> None:
        (theirs,) = table.receive(run, [fd])
        program = Program()
        program.order(NR.setns, theirs, _kind(name).flag, label=f"join a {name} namespace")
        table.close(program, [theirs])
        run(program)

    def _make(
        self, task: SkeletonTask, new: Mapping[str, int], *, root: bool = False, owners: Mapping[str, int] | None = None
    ) -> None:
        """`task` is where it belongs, and the first there in the namespaces `new`. `owners` are the user namespaces
        below the tree's that they belong to, 0 for its own."""
        self._where[task.inner_pid] = self.of_task(task.inner_pid)
        self._refresh(task)
        if not new:
            return
        descriptors = {name: self._open(task, name) for name in census.NAMES}
        for name, number in new.items():
            owner = (owners or {}).get(name, 0)
            made = descriptors | {"user": self._below.descriptor(owner)} if owner else descriptors
            self._places[name, number] = NewNamespace(name, number, task, root, made, owner)
        for kind in kinds():
            if kind.name in new:
                kind.rebuild(self._places[kind.name, new[kind.name]], self._restoration)
                if not kind.at_birth:
                    descriptors[kind.name] = self._open(task, kind.name)
                self._refresh(task)
        if root and "mnt" in new:
            self._restoration.root = task.root

    def _open(self, task: SkeletonTask, name: str) -> int:
        fd = os.open(f"ns/{name}", _DESCRIPTORS, dir_fd=task.proc)
        self._descriptors.append(fd)
        return fd

    def _refresh(self, task: SkeletonTask) -> None:
        """Its root directory and network namespace may be others now."""
        for fd in (task.root, task.net):
            os.close(fd)
        task.root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=task.proc)
        task.net = os.open("ns/net", _DESCRIPTORS, dir_fd=task.proc)


def _write_maps(proc: int, ids: user.Ids) -> None:
    """Of a user namespace that a task has just made."""
    texts = {"setgroups": b"deny" * ids.deny_groups, "gid_map": ids.gid_map, "uid_map": ids.uid_map}
    for name, text in texts.items():
        if text:
            fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
            try:
                os.write(fd, text)
            except OSError as error:
                raise RebuildError(f"cannot write the {name} of a user namespace: {error.strerror}") from error
            finally:
                os.close(fd)


def _same_ids(wanted: user.Ids, proc: int) -> None:
    """Whether the maps of a user namespace are those of the images: its files belong to others if not."""
    for text, name in ((wanted.uid_map, "uid_map"), (wanted.gid_map, "gid_map")):
        extents = sorted(tuple(map(int, line.split())) for line in text.decode().splitlines())
        if extents != sorted(read_id_map(proc, name)):
            raise RebuildError(
                f"the runtime has given the container another {name} than it had",
                advice="have the same in its configuration on both hosts",
            )


def _flags(names: Iterable[str]) -> int:
    """CLONE_NEW* of namespaces that are made before `rebuild`."""
    return sum(_kind(name).flag for name in names if _kind(name).at_birth)


def _kind(name: str) -> NamespaceKind:
    kind = kind_named(name)
    if kind is None:
        raise RebuildError(f"the images tell of a {name} namespace, which is not carried")
    return kind
