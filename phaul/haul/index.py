"""One tree at the source: what the destination has of it, and records of what that lacks.

Names that are gone stay there for a while: what is being made there opens files by the names that they had a moment
ago. A name that is new and of an inode that has another one there becomes a link to that, so what was renamed is not
sent again, and who has it open there has the same file.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from phaul.errors import PhaulError

from . import attributes
from .attributes import NOCOW
from .beside import MARK
from .content import BLOCK, SMALL, Blocks, whole
from .watch import Watch, join
from .wire import Outbox, encode_attributes

_YOUNG = 50_000_000  # nanoseconds: times that are so young may stand for a later change too
_RECENT = 3600.0  # seconds: rsync leaves the times of links and devices that it makes in the same second
_GONE = (FileNotFoundError, NotADirectoryError)
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Sent(NamedTuple):
    """A name as it was sent: file system and inode, type, and what else shows that it was changed. `times` is None
    where they were so young that they show nothing."""

    inode: tuple[int, int]
    kind: int
    size: int
    times: tuple[int, int] | None

    @classmethod
    def of(cls, status: os.stat_result) -> Sent:
        """As it is now."""
        old = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _YOUNG
        times = (status.st_mtime_ns, status.st_ctime_ns) if old else None
        return cls(_identity(status), stat.S_IFMT(status.st_mode), status.st_size, times)


class Index:
    """A directory, by its number among those that are hauled. Work with it is one pass at a time. `without` are names
    from its top that are not sent. What is not a directory is `layered` from several file systems, perhaps.
    `flagged`: the destination knows file attributes."""

    def __init__(
        self, number: int, root: str, *, without: Iterable[str] = (), layered: bool = False, flagged: bool = False
    ) -> None:
        self.number = number
        self.root = root
        self.layered = layered
        self._device = os.lstat(root).st_dev
        self._devices = {self._device}  # of files that were seen
        self._without = frozenset(without)
        self.work = 0.0  # of the last pass: names that were looked at, and blocks that were read
        self._watch = Watch(root)
        self._sent: dict[str, dict[str, Sent]] = {}  # by directory and name
        self._names: dict[tuple[int, int], set[str]] = {}  # by file system and inode
        self._blocks: dict[tuple[int, int], Blocks] = {}  # of large files, by file system and inode
        self._touched: dict[str, bool] = {}
        self._missing: set[str] = set()  # names that are gone, as of the pass before
        self._directories: set[str] = set()  # whose times are to be set at the end of the pass
        self._moved: set[str] = set()  # names that came or went while another program sent them
        self._doubtful: set[str] = set()  # what it made of these is not known
        self._adopting = False
        self._lost = False
        self._flagged = flagged
        self._flags: dict[str, int] = {}  # file attributes that the destination has been told
        self._followed: set[str] = set()  # directories that were watched before a copy was taken
        self._copy = ""

    def close(self) -> None:
        """Stop watching."""
        self._watch.close()

    # -- what there is to do -------------------------------------------------------------------------------------

    def look(self) -> None:
        """Take up what has happened since the last look."""
        touched = self._watch.read()
        self._moved |= touched.moved if self._adopting else set()
        for path, content in touched.paths.items():
            self._touched[path] = self._touched.get(path, False) or content
        self._lost |= touched.lost

    def names_of(self, inode: int) -> set[str]:
        """The names under which the destination has files of an inode number."""
        return {path for device in self._devices for path in self._names.get((device, inode), ())}

    def touch(self, path: str) -> None:
        """What a file holds may be another."""
        self._touched[path] = True

    def pending(self) -> float:
        """How much work a pass would be now, as `work` tells it."""
        self.look()
        if self._lost:
            return sum(map(len, self._sent.values()))
        work = float(len(self._touched) + len(self._missing))
        for path, content in self._touched.items():
            if content:
                with contextlib.suppress(OSError):
                    work += os.lstat(self._place(path)).st_blocks * 512 / BLOCK
        return work

    def follow(self, go_on: Callable[[], None]) -> None:
        """Watch all directories. A copy of the tree that is taken afterwards can be adopted."""
        self._restart()
        self._followed = {""}
        waiting = [""]
        while waiting:
            go_on()
            directory = waiting.pop()
            with contextlib.suppress(*_GONE):
                self._watch.add(directory)
                self._followed.add(directory)
                waiting += [join(directory, name) for name, one in self._list(directory) if stat.S_ISDIR(one.st_mode)]

    def adopt_copy(self, copy: str, go_on: Callable[[], None]) -> None:
        """Note all that is in a copy of the tree, with the same inode numbers, as sent: it was taken after `follow`. A
        directory that came in between is not watched, and will be sent anew; so will a file that has to be given its
        attributes while it is empty. Until `leave_copy` large files are compared with those in there."""
        self._copy = copy
        self._note_flags(copy, "")
        waiting = [""]
        while waiting:
            go_on()
            directory = waiting.pop()
            with os.scandir(f"{copy}/{directory}") as entries:
                found = [(join(directory, entry.name), entry.stat(follow_symlinks=False)) for entry in entries]
            for path, status in found:
                flags, is_directory = self._note_flags(f"{copy}/{path}", path, status), stat.S_ISDIR(status.st_mode)
                if (is_directory and path not in self._followed) or (not is_directory and flags & NOCOW):
                    self._doubtful.add(path)
                    self._touched[path] = True
                    continue
                self._note(path, Sent.of(status)._replace(inode=(self._device, status.st_ino)))
                if is_directory:
                    waiting.append(path)

    def leave_copy(self) -> None:
        """The copy will not be there any more."""
        self._copy = ""

    def _restart(self) -> None:
        self.look()
        self._sent, self._names, self._touched, self._moved, self._lost = {}, {}, {}, set(), False

    def adopt(self, go_on: Callable[[], None]) -> list[str]:
        """Note everything as sent, and watch it: from now on whatever is touched is sent again. For the round that
        another program sends, all but what is returned: what is not sent, large files with holes, which it would
        fill, and files that have to be given their attributes while they are empty. `go_on` is called now and then,
        and may end it by raising."""
        holes = list(self._without)
        self._restart()
        self._adopting = True
        self._watch.add("")
        self._note_flags(self.root, "")
        waiting = [""]
        while waiting:
            go_on()
            directory = waiting.pop()
            for name, status in self._list(directory):
                path = join(directory, name)
                flags = self._note_flags(self._place(path), path, status)
                scattered = status.st_size > SMALL and status.st_blocks * 512 * 2 < status.st_size
                if scattered or (flags & NOCOW and not stat.S_ISDIR(status.st_mode)):
                    holes.append(path)
                    self._touched[path] = True
                    continue
                self._note(path, Sent.of(status))
                if not stat.S_ISREG(status.st_mode) and abs(time.time() - status.st_mtime) < _RECENT:
                    self._touched[path] = False
                if stat.S_ISDIR(status.st_mode):
                    with contextlib.suppress(*_GONE):
                        self._watch.add(path)
                        waiting.append(path)
        return holes

    def doubt(self, *, links: bool = False) -> bool:
        """What was adopted has been sent by now: names that came or went meanwhile may be there or not. So may, if some
        went away (`links`), other names of their files: rsync sends the files by any of their names. False if too much
        happened to know of which that is true."""
        self.look()
        self._adopting = False
        for path in list(self._maybe_linked()) if links else ():
            self._moved.add(path)
            self._touched[path] = True
        for path in self._moved:
            self._forget(path)
        self._doubtful, self._moved = self._moved, set()
        return not self._lost

    def _maybe_linked(self) -> Iterator[str]:
        """Files that have, or may have had since they were adopted, another name. That shows in the time of the last
        change; in a large file that is written all the time it does not, which would be sent once more for that."""
        for directory, names in self._sent.items():
            for name, sent in names.items():
                status = self._status(path := join(directory, name)) if sent.kind == stat.S_IFREG else None
                if status is None:
                    continue
                changed = sent.times is None or status.st_ctime_ns != sent.times[1]
                small = status.st_size <= SMALL or status.st_ctime_ns != status.st_mtime_ns
                if status.st_nlink > 1 or (changed and small):
                    yield path

    # -- a pass ----------------------------------------------------------------------------------------------------

    def everything(self, outbox: Outbox) -> Iterator[None]:
        """Send all of it. Yields now and then, for whoever wants to stop."""
        self._watch.add("")
        self.work = 0.0
        yield from self._below("", outbox)
        self._finish(outbox)

    def changes(self, outbox: Outbox, *, last: bool) -> Iterator[None]:
        """Send what was touched. `last`: nothing changes any more, and names that are gone go there too."""
        self.look()
        self._look_at_flags(last=last)
        self.work = 0.0
        touched, self._touched = self._touched, {}
        lost, self._lost = self._lost, False
        missing, self._missing = self._missing, set()
        doubtful, self._doubtful = self._doubtful, set()
        for path in sorted(touched):
            self._one(path, touched, outbox)
            yield
        if lost:
            yield from self._compare(touched, outbox)
        for path in sorted(missing | doubtful | (self._missing if last else set())):
            self._missing.discard(path)
            if (path in doubtful or self._lookup(path) is not None) and self._status(path) is None:
                self._forget(path)
                outbox.put(op="gone", tree=self.number, path=path)
                self._directories.add(os.path.dirname(path))
        self._finish(outbox)
        if last and any(flags & attributes.HELD for flags in self._flags.values()):
            outbox.put(op="fix", tree=self.number, path="")

    def _compare(self, touched: dict[str, bool], outbox: Outbox) -> Iterator[None]:
        """The kernel has forgotten what was touched: look at every name, here and there."""
        for directory in sorted(self._sent):
            for name in list(self._sent.get(directory, ())):
                path = join(directory, name)
                sent, status = self._lookup(path), self._status(path)
                if sent is None or status is None or sent.times is None or Sent.of(status) != sent:
                    self._one(path, {**touched, path: True}, outbox)
                yield
            for name, _ in self._list(directory):
                if self._lookup(join(directory, name)) is None:
                    self._one(join(directory, name), touched, outbox)
                    yield

    def _below(self, directory: str, outbox: Outbox, touched: dict[str, bool] | None = None) -> Iterator[None]:
        """All that is in a directory."""
        self._directories.add(directory)
        for name, status in self._list(directory):
            path = join(directory, name)
            self._one(path, touched or {}, outbox, below=False)
            yield
            if stat.S_ISDIR(status.st_mode):
                yield from self._below(path, outbox, touched)

    def _one(self, path: str, touched: dict[str, bool], outbox: Outbox, *, below: bool = True) -> None:
        """Send a name as it is now."""
        self.work += 1
        status, before = self._status(path), self._lookup(path)
        if status is None:
            if before is not None:
                self._missing.add(path)
            return
        if path == "":
            self._directories.add("")
            return
        if self._lookup_directory(os.path.dirname(path)) is None:  # it was made with a directory that is not there yet
            return
        now = Sent.of(status)
        fresh = before is None or (before.inode, before.kind) != (now.inode, now.kind)
        try:
            if now.kind == stat.S_IFDIR:
                self._directory(path, status, before, fresh, touched, outbox, below=below)
            elif now.kind == stat.S_IFREG:
                self._file(path, status, before, fresh, touched, outbox)
            else:
                self._other(path, status, fresh, outbox)
        except _GONE:
            if before is not None:
                self._missing.add(path)
            return
        self._missing.discard(path)
        self._directories.add(os.path.dirname(path))

    def _directory(
        self,
        path: str,
        status: os.stat_result,
        before: Sent | None,
        fresh: bool,
        touched: dict[str, bool],
        outbox: Outbox,
        *,
        below: bool,
    ) -> None:
        if fresh:
            self._watch.add(path)  # before it is looked into: what is made in it later is told of
            if before is not None:
                self._forget(path)
            flags = self._told_flags(self._place(path), path)
            outbox.put(op="put", tree=self.number, path=path, make="new", kind=stat.S_IFDIR, **flags)
        self._note(path, Sent.of(status))
        self._directories.add(path)
        if fresh and below:
            for _ in self._below(path, outbox, touched):
                pass

    def _file(
        self,
        path: str,
        status: os.stat_result,
        before: Sent | None,
        fresh: bool,
        touched: dict[str, bool],
        outbox: Outbox,
    ) -> None:
        """What it holds is sent if it was touched under any name, and may be another as far as its times tell."""
        fd = os.open(self._place(path), _READ)
        try:
            seen, status = _identity(status), os.fstat(fd)
            if (now := Sent.of(status)).inode != seen or not stat.S_ISREG(status.st_mode):
                return  # it was replaced: that is told next
            made: dict[str, Any] = {}
            names = sorted(self._names.get(_identity(status), set()) - {path})
            if fresh:
                if before is not None:
                    self._forget(path)
                made = {"make": "hard", "other": names[0]} if names else {"make": "new", "kind": stat.S_IFREG}
            known = before if not fresh else self._lookup(names[0]) if names else None
            same = _rests(known, now) and not any(touched.get(name, False) for name in (path, *names))
            if "kind" in made:
                self._blocks.pop(now.inode, None)
            flags = self._told_flags(fd, path)
            fields = {"op": "put", "tree": self.number, "path": path, **made, **flags}
            self.work += 0 if same else status.st_blocks * 512 / BLOCK
            if same:
                outbox.put(**fields, meta=self._meta(fd, status))
            elif status.st_size <= SMALL:
                found, data = whole(fd, status.st_size)
                self._blocks.pop(now.inode, None)
                outbox.put(data, **fields, size=status.st_size, runs=found, meta=self._meta(fd, status))
            else:
                if made:
                    outbox.put(**fields)
                blocks = self._known_blocks(now.inode, path, fresh="kind" in made)
                blocks.send(fd, path, status.st_size, outbox, fresh="kind" in made, tree=self.number)
                outbox.put(op="put", tree=self.number, path=path, meta=self._meta(fd, status), **flags)
            self._note(path, now)
        finally:
            os.close(fd)

    def _known_blocks(self, inode: tuple[int, int], path: str, *, fresh: bool) -> Blocks:
        """What the destination has of a large file."""
        if inode not in self._blocks:
            self._blocks[inode] = Blocks()
            if self._copy and not fresh:
                self._learn(self._blocks[inode], inode[1], path)
        return self._blocks[inode]

    def _learn(self, blocks: Blocks, inode: int, path: str) -> None:
        """From the copy that it has, where the file had that name then."""
        with contextlib.suppress(*_GONE, OSError):
            fd = os.open(f"{self._copy}/{path}", _READ)
            try:
                status = os.fstat(fd)
                if status.st_ino == inode and stat.S_ISREG(status.st_mode):
                    blocks.learn(fd, status.st_size)
            finally:
                os.close(fd)

    def _other(self, path: str, status: os.stat_result, fresh: bool, outbox: Outbox) -> None:
        """A link, a device, a fifo, the name of a socket. They cannot be changed, only replaced."""
        kind, place = stat.S_IFMT(status.st_mode), self._place(path)
        fields: dict[str, Any] = {}
        if fresh:
            names = sorted(self._names.get(_identity(status), set()) - {path})
            if self._lookup(path) is not None:
                self._forget(path)
            if names:
                fields = {"make": "hard", "other": names[0]}
            else:
                fields = {"make": "new", "kind": kind}
                fields |= {"target": os.readlink(place)} if kind == stat.S_IFLNK else {"device": status.st_rdev}
        meta = self._meta(place, status)
        outbox.put(op="put", tree=self.number, path=path, **fields, meta=meta)
        self._note(path, Sent.of(status))

    def _finish(self, outbox: Outbox) -> None:
        """Directories last: what is made in them changes their times."""
        directories, self._directories = self._directories, set()
        for path in sorted(directories):
            with contextlib.suppress(*_GONE):
                place = self._place(path)
                status = os.lstat(place)
                if stat.S_ISDIR(status.st_mode) and self._lookup_directory(path) is not None:
                    flags = self._told_flags(place, path)
                    outbox.put(op="put", tree=self.number, path=path, meta=self._meta(place, status), **flags)

    # -- here ------------------------------------------------------------------------------------------------------

    def _place(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _status(self, path: str) -> os.stat_result | None:
        """None for what is not there, or lies on another file system that is mounted here."""
        try:
            status = os.lstat(self._place(path))
        except _GONE:
            return None
        return status if self._belongs(path, status) else None

    def _belongs(self, path: str, status: os.stat_result) -> bool:
        if path in self._without:
            return False
        return status.st_dev == self._device or (self.layered and not stat.S_ISDIR(status.st_mode))

    def _list(self, directory: str) -> list[tuple[str, os.stat_result]]:
        found = []
        try:
            with os.scandir(self._place(directory)) as entries:
                for entry in entries:
                    with contextlib.suppress(*_GONE):
                        status = entry.stat(follow_symlinks=False)
                        if self._belongs(join(directory, entry.name), status):
                            found.append((entry.name, status))
        except _GONE:
            return []
        return found

    def _note_flags(self, place: str, path: str, status: os.stat_result | None = None) -> int:
        """File attributes of what another program sends without them: they follow."""
        kind = stat.S_IFMT(status.st_mode) if status is not None else stat.S_IFDIR
        if not self._flagged or kind not in (stat.S_IFREG, stat.S_IFDIR):
            return 0
        with contextlib.suppress(*_GONE):
            if flags := attributes.read(place):
                self._touched.setdefault(path, False)
                return flags
        return 0

    def _look_at_flags(self, *, last: bool) -> None:
        """Nobody tells when file attributes change: those that are known are read again, in a freeze those that
        matter."""
        for path, known in self._flags.items():
            if not last or known & attributes.HELD:
                with contextlib.suppress(*_GONE):
                    if attributes.read(self._place(path)) != known:
                        self._touched.setdefault(path, False)

    def _told_flags(self, place: str | int, path: str) -> dict[str, Any]:
        """File attributes for a record, if there are any, or were."""
        flags = attributes.read(place) if self._flagged else 0
        if not path:
            flags &= ~attributes.HELD  # it could not be put in its place
        if not flags and self._flags.pop(path, None) is None:
            return {}
        if flags:
            self._flags[path] = flags
        return {"flags": flags}

    @staticmethod
    def _meta(place: str | int, status: os.stat_result) -> dict[str, Any]:
        """Owner, mode, time, attributes; access control lists are attributes (acl(5), xattr(7))."""
        where: dict[str, Any] = {} if isinstance(place, int) else {"follow_symlinks": False}
        try:
            names = [name for name in os.listxattr(place, **where) if name != MARK]
            extended = {name: os.getxattr(place, name, **where) for name in names}
        except OSError as error:
            if isinstance(error, _GONE):
                raise
            extended = {}
        return {
            "uid": status.st_uid,
            "gid": status.st_gid,
            "mode": stat.S_IMODE(status.st_mode),
            "mtime": status.st_mtime_ns,
            **({"attributes": encode_attributes(extended)} if extended else {}),
        }

    # -- there -----------------------------------------------------------------------------------------------------

    def _lookup(self, path: str) -> Sent | None:
        directory, name = os.path.split(path)
        return self._sent.get(directory, {}).get(name)

    def _lookup_directory(self, path: str) -> Sent | str | None:
        """A directory that is there; the top always is."""
        if not path:
            return "top"
        found = self._lookup(path)
        return found if found is not None and found.kind == stat.S_IFDIR else None

    def _note(self, path: str, sent: Sent) -> None:
        directory, name = os.path.split(path)
        before = self._lookup(path)
        if before is not None and before.inode != sent.inode:
            self._drop(path, before)
        self._sent.setdefault(directory, {})[name] = sent
        if sent.kind != stat.S_IFDIR:
            self._names.setdefault(sent.inode, set()).add(path)
            self._devices.add(sent.inode[0])

    def _drop(self, path: str, sent: Sent) -> None:
        names = self._names.get(sent.inode, set())
        names.discard(path)
        if not names:
            self._names.pop(sent.inode, None)
            self._blocks.pop(sent.inode, None)

    def _forget(self, path: str) -> None:
        """It is not there any more, nor what was below it."""
        directory, name = os.path.split(path)
        sent = self._sent.get(directory, {}).pop(name, None)
        self._flags.pop(path, None)
        if sent is None:
            return
        self._drop(path, sent)
        if sent.kind == stat.S_IFDIR:
            for below in list(self._sent.get(path, ())):
                self._forget(join(path, below))
            self._sent.pop(path, None)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _rests(known: Sent | None, now: Sent) -> bool:
    """Whether a file is as it was, as far as its size and the time of the last change of its content tell."""
    if known is None or known.times is None or now.times is None:
        return False
    return (known.size, known.times[0]) == (now.size, now.times[0])


def count(root: str, without: Iterable[str] = ()) -> tuple[int, int, str]:
    """How many names are below a directory, but `without` some, and how many bytes they take on its disk; and a
    directory in it that is on another one, if there is one."""
    names, size, foreign = 0, 0, ""
    device = os.lstat(root).st_dev
    waiting: list[str] = [root]
    left_out = {f"{root}/{path}" for path in without}
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(*_GONE):
                        status = entry.stat(follow_symlinks=False)
                        if entry.path in left_out:
                            continue
                        names, size = names + 1, size + status.st_blocks * 512
                        if not stat.S_ISDIR(status.st_mode):
                            continue
                        if status.st_dev == device:
                            waiting.append(entry.path)
                        else:
                            foreign = entry.path
        except _GONE:
            continue
        except PermissionError as error:
            raise PhaulError(f"{error.filename} cannot be read") from error
    return names, size, foreign
