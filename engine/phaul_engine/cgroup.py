"""The hold: the cgroup v2 in which a tree is frozen as one, and killed as one (kernel doc admin-guide/cgroup-v2.rst).

A moving tree lives in a child of its own cgroup, made for it, without controllers, so that its limits stay what they
are. Freezing it holds every task, whatever signals arrive (SIGCONT would start a stopped one), and thawing it is a
single write: the whole tree goes on at one instant. Tasks stopped by ptrace can be frozen, but what is injected into
a frozen task does not run.

Moving a task takes about 6 ms (a grace period of the whole system), so it is done long before the freeze.

Everything is reached through descriptors relative to the hierarchy's root. Where no usable cgroup2 is mounted (a
host with v1 only), a mount is made that has no place in the file system: nobody else sees it, and it goes away with
the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from .errors import Blocker, EngineError, GoneError
from .objects import places
from .proc.access import list_numbers, open_process, open_thread, read_text
from .syscalls import NR

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FSOPEN_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOUNT_ATTR_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8
_FIRST_PAUSE = 20e-6  # seconds between two looks at cgroup.events; doubles up to the last
_LAST_PAUSE = 2e-3
_FREEZER = ("do_freezer_trap", "get_signal")  # the kernel function a frozen task sleeps in, inlined or not
PREFIX = "phaul-"
"""The names of cgroups that hold a moving tree begin so."""
_ROUNDS = 100  # of looking for tasks forked while their parents were moved


class CgroupError(EngineError):
    """A cgroup could not be made, entered, frozen, killed or removed."""


class NoHierarchyError(CgroupError):
    """This host offers no cgroup v2."""


class HoldGoneError(CgroupError):
    """The cgroup is not there (any more)."""


class FreezeTimeoutError(CgroupError):
    """Not every task stopped in time; the cgroup has been thawed again. `tasks` names those that ran on."""

    def __init__(self, path: str, seconds: float, tasks: tuple[str, ...]) -> None:
        who = ", ".join(tasks) or "tasks that have gone since"
        super().__init__(
            f"{path} did not freeze within {seconds * 1000:.0f} ms: {who}",
            advice="a task in an uninterruptible wait (a disk or NFS) or waiting for its vfork child cannot be "
            "frozen: try again when it is done",
        )
        self.tasks = tasks


class OccupiedError(CgroupError):
    """Tasks remain in a cgroup after its deadline."""


@dataclass
class Hierarchy:
    """The cgroup v2 tree, rooted at this process's cgroup namespace root. Paths in it begin with `/`."""

    root: int  # O_PATH descriptor

    @classmethod
    def find(cls) -> Hierarchy:
        """The mounted hierarchy, or one mounted for this process alone.

        NoHierarchyError where the kernel gives none.
        """
        for place in _mounts():
            with contextlib.suppress(OSError):
                return cls(os.open(place, _DIRECTORY))
        return cls(_private_mount())

    def close(self) -> None:
        """Give the hierarchy back."""
        os.close(self.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, path: str) -> int:
        """An O_PATH descriptor of a cgroup's directory; the caller closes it."""
        try:
            return os.open(path.lstrip("/") or ".", _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.root)
        except FileNotFoundError as error:
            raise HoldGoneError(f"there is no cgroup {path}") from error
        except OSError as error:
            raise CgroupError(f"cannot open cgroup {path}: {error.strerror}") from error

    def put(self, pid: int, path: str) -> None:
        """Move a process into a cgroup."""
        directory = self.open(path)
        try:
            procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            raise CgroupError(f"cannot move tasks to {path}: {error.strerror}") from error
        finally:
            os.close(directory)
        try:
            _move(pid, procs, path)
        finally:
            os.close(procs)

    def make(self, path: str) -> None:
        """Make a cgroup, and those above it where they are missing."""
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            try:
                os.mkdir("/".join(parts[:depth]), 0o755, dir_fd=self.root)
            except FileExistsError:
                continue
            except OSError as error:
                raise CgroupError(
                    f"cannot make cgroup /{'/'.join(parts[:depth])}: {error.strerror}",
                    advice="see cgroup.max.descendants and cgroup.max.depth of the cgroups above it"
                    if error.errno == errno.EAGAIN
                    else "",
                ) from error


def path_of(pid: int) -> str:
    """The cgroup of a process, as seen from this process's cgroup namespace (proc_pid_cgroup, cgroup-v2.rst).

    A path that begins with `/..` lies outside of the namespace and cannot be reached. GoneError for a process that
    is not there, or is a zombie whose cgroup has been removed.
    """
    proc = open_process(pid)
    try:
        text = read_text(proc, "cgroup")
    finally:
        os.close(proc)
    for line in text.splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            if path.endswith(" (deleted)"):
                raise GoneError(f"pid {pid} has exited")
            return path
    raise NoHierarchyError(f"pid {pid} is in no cgroup v2: this kernel has none", advice=_NO_HIERARCHY_ADVICE)


def path_of_hold(parent: str, migration: str) -> str:
    """The cgroup that holds a migration's tree, in that which it lives in."""
    return f"{parent.rstrip('/')}/{PREFIX}{migration}"


def examine(pids: Iterable[int]) -> list[Blocker]:
    """What forbids to hold these processes, before anything is touched."""
    try:
        hierarchy = Hierarchy.find()
    except NoHierarchyError as error:
        return [Blocker("this host", "without cgroup v2", str(error), error.advice)]
    with hierarchy:
        homes: dict[str, int] = {}
        for pid in pids:
            with contextlib.suppress(GoneError):
                homes.setdefault(path_of(pid), pid)
        return [*_examine_spread(homes), *(blocker for path in homes for blocker in _examine_home(hierarchy, path))]


def root_of(pid: int) -> str:
    """The root of the cgroup namespace of a process, as seen from this process's."""
    outer, inner = path_of(pid), ""
    proc = open_process(pid)
    try:
        namespace = os.open("ns/cgroup", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            inner = places.inside({"cgroup": namespace}, lambda: path_of(pid))
        finally:
            os.close(namespace)
    finally:
        os.close(proc)
    return outer.removesuffix(inner) or "/"


def _examine_spread(homes: dict[str, int]) -> Iterator[Blocker]:
    if len(homes) > 1 and not _under_one_root(homes):
        where = ", ".join(f"pid {pid} in {path}" for path, pid in homes.items())
        yield Blocker(
            "the tree",
            "spread over several cgroups",
            f"{where}; one freeze holds one cgroup",
            "move its processes into one cgroup",
        )


def _under_one_root(homes: dict[str, int]) -> bool:
    """Whether all are below the root of the first one's cgroup namespace, which is not ours."""
    root = root_of(next(iter(homes.values())))
    return root != "/" and all(f"{home}/".startswith(f"{root}/") for home in homes)


def _examine_home(hierarchy: Hierarchy, path: str) -> Iterator[Blocker]:
    if path.startswith("/.."):
        yield Blocker(f"cgroup {path}", "outside of this cgroup namespace", "it cannot be reached from here")
        return
    directory = hierarchy.open(path)
    try:
        with contextlib.suppress(FileNotFoundError):  # the root has neither file
            if _read(directory, "cgroup.type").strip() != "domain":
                yield Blocker(f"cgroup {path}", "threaded", "a process cannot be moved as a whole in it")
            if _read(directory, "cgroup.freeze").strip() == "1" or "frozen 1" in _read(directory, "cgroup.events"):
                yield Blocker(f"cgroup {path}", "frozen", "its processes do not run", "thaw it (cgroup.freeze) first")
    finally:
        os.close(directory)


@dataclass
class Hold:
    """The cgroup of one moving tree: one that was made for it, or, for a container whose tasks are in several cgroups,
    the root of these, which is `borrowed`: there is nothing smaller to freeze, and it stays.

    `path` finds it again from another process of the same cgroup namespace. `directory` is a descriptor for
    CLONE_INTO_CGROUP. The control files stay open, so that inside the freeze each act is a single system call.
    """

    path: str
    directory: int
    _hierarchy: Hierarchy
    _files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, hierarchy: Hierarchy, path: str) -> Hold:
        """One that is made, if its name says so, or one that is borrowed."""
        parent, _, name = path.rpartition("/")
        return cls.create(hierarchy, parent or "/", name) if name.startswith(PREFIX) else cls.open(hierarchy, path)

    @classmethod
    def create(cls, hierarchy: Hierarchy, parent: str, name: str) -> Hold:
        """Make the cgroup `name` under `parent`, which is made where it is missing. An existing one is an error."""
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name) or name.startswith("."):
            raise ValueError(f"{name!r} cannot name a cgroup")
        path = f"{parent.rstrip('/')}/{name}"
        if parent.strip("/"):
            hierarchy.make(parent)
        try:
            os.mkdir(path.lstrip("/"), 0o755, dir_fd=hierarchy.root)
        except OSError as error:
            raise CgroupError(f"cannot make cgroup {path}: {error.strerror}") from error
        return cls.open(hierarchy, path)

    @classmethod
    def open(cls, hierarchy: Hierarchy, path: str) -> Hold:
        """An existing hold; HoldGoneError where there is none."""
        hold = cls(path, hierarchy.open(path), hierarchy)
        try:
            for name, flags in (
                ("cgroup.events", os.O_RDONLY),
                ("cgroup.freeze", os.O_WRONLY),
                ("cgroup.procs", os.O_RDWR),
                ("cgroup.kill", os.O_WRONLY),
            ):
                hold._files[name] = os.open(name, flags | os.O_CLOEXEC, dir_fd=hold.directory)
        except OSError as error:
            hold.close()
            raise CgroupError(f"cannot control cgroup {path}: {error.strerror}") from error
        return hold

    def close(self) -> None:
        """Close the descriptors; the cgroup itself stays. Closing twice is harmless."""
        for fd in (*self._files.values(), self.directory):
            if fd >= 0:
                os.close(fd)
        self._files.clear()
        self.directory = -1

    @property
    def borrowed(self) -> bool:
        """Whether it is none that was made to hold a tree."""
        return not self.path.rpartition("/")[2].startswith(PREFIX)

    @property
    def parent(self) -> str:
        """The cgroup above."""
        return self.path.rpartition("/")[0] or "/"

    def members(self) -> set[int]:
        """The processes inside, in numbers of this pid namespace; zombies are not among them."""
        if not self.borrowed:
            return _members(self._files["cgroup.procs"])
        found: set[int] = set()
        for directory, _, _ in os.walk(f"/proc/self/fd/{self.directory}/"):
            with contextlib.suppress(OSError, HoldGoneError):  # it has been removed meanwhile
                fd = os.open(f"{directory}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    found |= _members(fd)
                finally:
                    os.close(fd)
        return found

    @property
    def frozen(self) -> bool:
        """Whether every task inside has stopped."""
        return self._event("frozen")

    @property
    def populated(self) -> bool:
        """Whether anything lives inside."""
        return self._event("populated")

    def gather(self, tree: Callable[[], Iterable[int]]) -> None:
        """Move the processes of a tree inside. About 6 ms each; the processes run on.

        `tree` lists the processes that live now: children forked while their parents were moved are found by asking
        again until all are inside.
        """
        if self.borrowed:
            self._refuse_strangers(tree)
            return
        for _ in range(_ROUNDS):
            outside = {pid for pid in tree() if _alive(pid)} - self.members()
            if not outside:
                return
            for pid in sorted(outside):
                _move(pid, self._files["cgroup.procs"], self.path)
        raise CgroupError(f"the tree forks faster than it can be moved to {self.path}: {len(outside)} are left outside")

    def _refuse_strangers(self, tree: Callable[[], Iterable[int]]) -> None:
        """What others have put into a container's cgroups would be frozen, and killed, with it."""
        inside = self.members()
        strangers = sorted(inside - set(tree()))
        if strangers:
            names = ", ".join(_named(pid) for pid in strangers)
            raise CgroupError(
                f"{names}: in the container's cgroups, and no process of its tree",
                advice="end it first: it came in from outside (lxc-attach)",
            )

    def freeze(self, timeout: float, tree: Collection[int] = ()) -> float:
        """Stop every task; returns the seconds that it took. Tasks may be in ptrace stops.

        After `timeout` seconds all are let go again and FreezeTimeoutError names those that did not stop. CgroupError,
        with all let go, if a living process of `tree` is elsewhere: it would run on.
        """
        begin = time.monotonic()
        self._control("cgroup.freeze", b"1")
        if not self._wait(lambda: self.frozen, timeout):
            try:
                tasks = tuple(_unstopped(self.members()))
            finally:
                self.thaw()
            raise FreezeTimeoutError(self.path, timeout, tasks)
        outside = {pid for pid in set(tree) - self.members() if _alive(pid)} if tree else set()
        if outside:
            self.thaw()
            raise CgroupError(f"not in {self.path}, which is to hold it: {', '.join(map(_named, sorted(outside)))}")
        return time.monotonic() - begin

    def thaw(self) -> None:
        """Let all tasks go on, at once. Harmless when they already do."""
        self._control("cgroup.freeze", b"0")

    def kill(self, timeout: float) -> None:
        """SIGKILL for all inside, frozen or not, and children just being forked; returns when nothing lives.

        OccupiedError after `timeout` seconds.
        """
        self._control("cgroup.kill", b"1")
        if not self._wait(lambda: not self.populated, timeout):
            tasks = ", ".join(_unstopped(self.members())) or "unknown tasks"
            raise OccupiedError(
                f"killed, but not gone from {self.path} after {timeout:g} s: {tasks}",
                advice="a task in an uninterruptible wait dies when its wait is over",
            )

    def disband(self) -> None:
        """Move all that live inside to the cgroup above, and remove this one. They must not be frozen. What is borrowed
        stays as it is."""
        if self.borrowed:
            self.close()
            return
        if self.frozen and self.populated:
            raise CgroupError(f"{self.path} is frozen: moving its tasks would set them going one by one")
        procs = -1
        above = self._hierarchy.open(self.parent)
        try:
            procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=above)
            for _ in range(_ROUNDS):
                inside = self.members()
                if not inside:
                    break
                for pid in sorted(inside):
                    _move(pid, procs, self.parent)
        except OSError as error:
            raise CgroupError(f"cannot move tasks to {self.parent}: {error.strerror}") from error
        finally:
            os.close(above)
            if procs >= 0:
                os.close(procs)
        self.remove()

    def remove(self, timeout: float = 1.0) -> None:
        """Remove the cgroup, which nothing may live in, and close it. Tasks that are just exiting are waited for. What
        is borrowed belongs to whoever has made it."""
        if self.borrowed:
            self.close()
            return
        deadline = time.monotonic() + timeout
        while True:
            try:
                os.rmdir(self.path.lstrip("/"), dir_fd=self._hierarchy.root)
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno == errno.EBUSY and time.monotonic() < deadline:
                    time.sleep(_LAST_PAUSE)
                    continue
                raise OccupiedError(f"cannot remove cgroup {self.path}: {error.strerror}") from error
            break
        self.close()

    def _event(self, name: str) -> bool:
        try:
            text = os.pread(self._files["cgroup.events"], 4096, 0)
        except OSError as error:
            raise self._gone(error) from error
        return f"{name} 1".encode() in text.splitlines()

    def _control(self, name: str, value: bytes) -> None:
        try:
            os.write(self._files[name], value)
        except OSError as error:
            raise self._gone(error) from error

    def _gone(self, error: OSError) -> CgroupError:
        if error.errno == errno.ENODEV:
            return HoldGoneError(f"cgroup {self.path} has been removed")
        return CgroupError(f"cannot control cgroup {self.path}: {error.strerror}")

    @staticmethod
    def _wait(condition: Callable[[], bool], timeout: float) -> bool:
        """Looking again costs 2 us. poll() would be late: the kernel holds back a cgroup's second notification
        within 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV)."""
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE
        while not condition():
            if time.monotonic() >= deadline:
                return condition()
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
        return True


_NO_HIERARCHY_ADVICE = "cgroup v2 has to be there to hold a program: Linux with CONFIG_CGROUPS, mounting allowed"


def _mounts() -> Iterator[str]:
    """Where the hierarchy is mounted, writable and from its root on (proc_pid_mountinfo(5))."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            _, _, _, root, place, options = before.split(" ", 6)[:6]
            kind = after.split(" ", 1)[0]
            if kind == "cgroup2" and root == "/" and "rw" in options.split(","):
                yield re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)


def _private_mount() -> int:
    """A cgroup2 mount without a place (fsopen(2)); rooted at this process's cgroup namespace root."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(nr: NR, *args: object) -> int:
        result: int = libc.syscall(int(nr), *args)
        if result < 0:
            reason = os.strerror(ctypes.get_errno())
            raise NoHierarchyError(f"cannot mount cgroup2: {nr.name}: {reason}", advice=_NO_HIERARCHY_ADVICE)
        return result

    context = call(NR.fsopen, b"cgroup2", _FSOPEN_CLOEXEC)
    try:
        call(NR.fsconfig, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return call(NR.fsmount, context, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_NOSUID_NODEV_NOEXEC)
    finally:
        os.close(context)


def _members(procs: int) -> set[int]:
    text = b""
    try:
        while part := os.pread(procs, 1 << 16, len(text)):
            text += part
        return set(map(int, text.split()))
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            raise HoldGoneError("the cgroup has been removed") from error
        raise CgroupError(f"cannot list a cgroup: {error.strerror}") from error


def _move(pid: int, procs: int, path: str) -> None:
    try:
        os.write(procs, str(pid).encode())
    except ProcessLookupError:
        return
    except OSError as error:
        raise CgroupError(f"cannot move pid {pid} to cgroup {path}: {error.strerror}") from error


def _read(directory: int, name: str) -> str:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    with open(fd, encoding="ascii") as file:
        return file.read()


def _state(proc: int) -> str:
    """The state letter of a process; its comm may hold anything, parentheses too (proc_pid_stat(5))."""
    return read_text(proc, "stat").rpartition(")")[2].split()[0]


def _named(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
        return f"pid {pid} ({file.read().strip()})"
    return f"pid {pid}"


def _alive(pid: int) -> bool:
    """Whether any thread of the process lives; its leader may have ended before the others."""
    try:
        proc = open_process(pid)
    except GoneError:
        return False
    try:
        return _state(proc) not in "ZX" or len(list_numbers(proc, "task")) > 1
    except GoneError:
        return False
    finally:
        os.close(proc)


def _unstopped(pids: Iterable[int]) -> Iterator[str]:
    """The threads that neither the freezer nor a tracer has stopped, with where they sleep, for a person."""
    for pid in sorted(pids):
        with contextlib.suppress(GoneError):
            proc = open_process(pid)
            try:
                for tid in list_numbers(proc, "task"):
                    yield from _unstopped_thread(proc, pid, tid)
            finally:
                os.close(proc)


def _unstopped_thread(proc: int, pid: int, tid: int) -> Iterator[str]:
    with contextlib.suppress(GoneError):
        thread = open_thread(proc, tid)
        try:
            state = _state(thread)
            where = read_text(thread, "wchan").strip("\0\n")
            if state in "tTZX" or (state == "S" and where in _FREEZER):
                return
            name = read_text(thread, "comm").rstrip("\n")
        finally:
            os.close(thread)
        number = f"pid {pid}" if tid == pid else f"thread {tid} of pid {pid}"
        yield f"{number} ({name}), state {state}" + (f" in {where}" if where not in ("", "0") else "")
