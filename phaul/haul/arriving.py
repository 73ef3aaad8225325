"""The destination's side of a haul: trees come in beside their places.

Nothing of them is under its final name before the commit; see beside.py. Below a tree no link is ever followed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from phaul_engine import calls
from phaul_engine.errors import EngineError

from phaul.errors import PhaulError

from . import attributes, beside, btrfs, overlay, rsync, wire
from .layers import Layers
from .places import Places
from .wire import Record, Tag

_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = frozenset({stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK})
_FEW = 256  # files that are brought to the disk one by one
_LONGEST = 1 << 62  # bytes of a file


class Arriving:
    """The trees of one migration. `reply` sends a letter to the source, from any thread. Letters are taken one at a
    time. `rooms` are places of trees that a runtime has made for them, and looks after; trees in `overlays` are file
    systems of layers, which are mounted here."""

    def __init__(
        self,
        trees: Iterable[str],
        migration: str,
        reply: Callable[[bytes], None],
        rooms: Mapping[str, str] | None = None,
        overlays: Mapping[str, Layers] | None = None,
    ) -> None:
        rooms, overlays, trees = rooms or {}, overlays or {}, tuple(trees)
        plain = [path for path in trees if path not in rooms and path not in overlays]
        staged = Places(tuple((check_place(path), beside.staged_name(path, migration)) for path in plain))

        def make(path: str) -> _Tree:
            if path in rooms:
                return _Room(rooms[path])
            if path in overlays:
                noted = overlay.entry(check_place(path), overlays[path], staged, migration, plain)
                return _Overlay(path, overlays[path], staged, noted)
            return _Tree(path, staged.now(path))

        self._trees = [make(path) for path in trees]
        self._reply = reply
        self._server: rsync.Server | btrfs.Receiver | None = None
        self.complete = False

    @property
    def places(self) -> Places:
        """Where they are until they have their names; what is in another one comes after that."""
        pairs = ((tree.final, tree.staged) for tree in self._trees if tree.final != tree.staged)
        return Places(tuple(sorted(pairs)))

    def entries(self) -> list[dict[str, Any]]:
        """For the journal, before `make`. They are undone from the last to the first."""
        mounted = [tree.entry for tree in self._trees if isinstance(tree, _Overlay)]
        return [*(tree.noted() for tree in self._trees if type(tree) is _Tree), *mounted]

    def make(self) -> None:
        """Make the directories. PhaulError where a place is taken."""
        for tree in self._trees:
            tree.make()

    def take(self, body: bytes) -> None:
        """A letter from the source. EngineError for what makes no sense, OSError for what does not work."""
        tag, content = wire.open_letter(body)
        match tag:
            case Tag.RECORDS:
                for record in wire.unpack(content):
                    self._apply(record)
            case Tag.COMPLETE:
                self.complete = True
            case Tag.RSYNC:
                said = wire.fields(content)
                self._end_server()
                self._tree(said).begin()
                self._server = self._tree(said).take_by(str(said.get("words")), self._reply)
            case Tag.BTRFS:
                said = wire.fields(content)
                self._end_server()
                self._server = self._tree(said).take_copy(str(said.get("name", "")), self._reply)
            case Tag.STREAM if self._server is not None:
                self._server.take(content)
                if not content:
                    self._end_server()
            case _:
                raise EngineError(f"the source sent files' {tag.name} where it makes no sense")

    def _tree(self, fields: dict[str, Any]) -> _Tree:
        number = fields.get("tree")
        if not isinstance(number, int) or not 0 <= number < len(self._trees):
            raise EngineError("the source sends a directory that was not asked for")
        return self._trees[number]

    def _apply(self, record: Record) -> None:
        if record.fields.get("op") == "end":
            self._reply(wire.letter(Tag.DONE, {"number": record.fields.get("number")}))
            return
        tree = self._tree(record.fields)
        try:
            tree.apply(record)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineError(f"a record of a file makes no sense: {error!r}") from error
        except OSError as error:
            name = os.path.join(tree.staged, str(record.fields.get("path", "")))
            raise EngineError(f"{name} cannot be made: {error.strerror}") from error

    def publish(self) -> None:
        """It runs here: the trees get their names. OSError where something is there."""
        for tree in self._trees:
            tree.publish()

    def sync(self) -> None:
        """Bring what has come to the disk; in any thread, and it may be closed meanwhile. OSError if that fails."""
        for tree in self._trees:
            tree.sync()

    def close(self) -> None:
        """Let go of the trees; they stay as they are."""
        self._end_server()
        for tree in self._trees:
            tree.close()

    def _end_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()


class _Tree:
    """One directory that comes in."""

    def __init__(self, final: str, staged: str) -> None:
        self.final = final
        self.staged = staged
        self._fd = -1
        self._inbox = btrfs.Inbox(staged)
        self._held: dict[str, int] = {}  # by name, file attributes that are set in the end
        self._fixed = False  # that has been done
        self._parent: tuple[str, int] = ("", -1)
        self._unsynced: set[str] | None = set()  # names; None if there are too many
        self._closing = threading.Lock()

    def noted(self) -> dict[str, Any]:
        """For the journal."""
        return beside.entry(self.final, self.staged, beside.missing_above(self.final))

    def make(self) -> None:
        for directory in beside.missing_above(self.final):
            os.mkdir(directory, 0o755)
        os.mkdir(self.staged, 0o700)
        self._fd = os.open(self.staged, _PLACE | os.O_CLOEXEC)
        with contextlib.suppress(FileExistsError):  # an empty one
            os.mkdir(self.final, 0o700)
        if os.listdir(self.final):
            raise PhaulError(f"{self.final} has appeared meanwhile", advice="try again")

    def begin(self) -> None:
        """Files are about to come."""

    def publish(self) -> None:
        """It gets its name. OSError where something is there."""
        beside.publish(self.noted()["data"])

    def close(self) -> None:
        self._leave_parent()
        with self._closing:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def sync(self) -> None:
        """Files that were written since the last time, one by one, or all of their file system."""
        names, self._unsynced = self._unsynced, set()
        with self._closing:  # not while it goes to the disk, which may take long
            if self._fd < 0:
                return
            top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            if names is None:  # by sync(1): a thread of ours in there would keep us from dying as long as it takes
                subprocess.run(["sync", "-f", f"/proc/self/fd/{top}"], pass_fds=(top,), check=False)
                return
            for name in names:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    fd = calls.open_beneath(top, name, os.O_RDONLY | os.O_NOFOLLOW)
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
            os.fsync(top)
            above = os.open(os.path.dirname(self.final), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(above)  # its name
            finally:
                os.close(above)
        finally:
            os.close(top)

    def take_by(self, words: str, reply: Callable[[bytes], None]) -> rsync.Server:
        """Have rsync take what comes."""
        self._unsynced = None
        return rsync.Server(words, self.staged, reply)

    def take_copy(self, name: str, reply: Callable[[bytes], None]) -> btrfs.Receiver | None:
        """Have btrfs take a snapshot that comes. Without a name: all have come."""
        if name:
            return self._inbox.receive(name, reply)
        with self._closing:
            os.close(self._fd)
            self._fd = -1
            self._inbox.settle()
            self._fd = os.open(self.staged, _PLACE | os.O_CLOEXEC)
        self._unsynced = None
        return None

    # -- records ---------------------------------------------------------------------------------------------------

    def apply(self, record: Record) -> None:
        fields, path = record.fields, str(record.fields["path"])
        if self._fd < 0:
            raise EngineError("files came before there was a place for them")
        if "\0" in path or (path and any(part in ("", ".", "..") for part in path.split("/"))):
            raise EngineError(f"{path!r} is not the name of a file in a directory")
        self._release()
        match fields["op"]:
            case "fix":
                self._fix()
            case "put":
                self._put(path, fields, record.data)
            case "data":
                self._write(path, [[int(fields["offset"]), len(record.data)]], record.data)
            case "hole":
                with self._opened(path) as fd:
                    calls.punch_hole(fd, _size(fields["offset"]), _size(fields["length"]))
            case "gone":
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # what it was in is gone
                    self._remove(path)
            case _:
                raise EngineError(f"a record of a file says {fields['op']!r}")

    def _put(self, path: str, fields: dict[str, Any], data: bytes | memoryview) -> None:
        if "make" in fields:
            self._make(path, fields)
        if "flags" in fields:
            self._flag(path, int(fields["flags"]))
        if "size" in fields:
            with self._opened(path) as fd:
                if "runs" in fields:
                    os.ftruncate(fd, 0)
                os.ftruncate(fd, _size(fields["size"]))
        if "runs" in fields:
            self._write(path, fields["runs"], data)
        if "meta" in fields:
            self._attribute(path, fields["meta"])

    def _make(self, path: str, fields: dict[str, Any]) -> None:
        parent, name = self._split(path)
        if fields["make"] == "hard":
            directory, _, leaf = str(fields["other"]).rpartition("/")
            other = calls.open_beneath(self._fd, directory or ".", _PLACE)
            try:
                self._remove(path)
                os.link(leaf, name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(other)
            return
        self._remove(path)
        kind = int(fields["kind"])
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=parent)
        elif kind == stat.S_IFLNK:
            os.symlink(str(fields["target"]), name, dir_fd=parent)
        elif kind == stat.S_IFREG:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o600, dir_fd=parent))
        elif kind in _KINDS:
            os.mknod(name, kind | 0o600, int(fields["device"]), dir_fd=parent)
        else:
            raise EngineError(f"a record of a file is of a type {kind:o}")

    def _remove(self, path: str) -> None:
        parent, name = self._split(path)
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=parent)

    def _flag(self, path: str, flags: int) -> None:
        """File attributes; whether those that are held back can be set is tried."""
        held, flags = flags & attributes.HELD, flags & attributes.KEPT
        with self._looked_at(path) as fd:
            if held:
                attributes.write(fd, flags)
            attributes.write(fd, flags & ~attributes.HELD)
        self._held.pop(path, None)
        if held:
            self._held[path] = flags

    def _fix(self) -> None:
        """Set what was held back."""
        for path, flags in self._held.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._looked_at(path) as fd:
                attributes.write(fd, flags)
        self._fixed = True

    def _release(self) -> None:
        """More comes: take that back."""
        if self._fixed:
            self._fixed = False
            for path, flags in self._held.items():
                with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._looked_at(path) as fd:
                    attributes.write(fd, flags & ~attributes.HELD)

    def _write(self, path: str, runs: list[list[int]], data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._opened(path) as fd:
            for offset, length in runs:
                part, offset = view[: _size(length)], _size(offset)
                if len(part) < length:
                    raise EngineError(f"the content of {path} ends too early")
                view = view[length:]
                while part:
                    written = os.pwrite(fd, part, offset)
                    part, offset = part[written:], offset + written

    def _attribute(self, path: str, meta: dict[str, Any]) -> None:
        """The owner before the mode, which chown(2) changes; attributes then: an access control list has more to say
        than the mode; the time last."""
        parent, name = self._split(path) if path else (self._fd, ".")
        place = f"/proc/self/fd/{parent}/{name}"
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        mode, mtime = int(meta["mode"]), int(meta["mtime"])
        wanted = wire.decode_attributes(meta.get("attributes", {}))
        if (status.st_uid, status.st_gid) != (meta["uid"], meta["gid"]):
            os.chown(name, int(meta["uid"]), int(meta["gid"]), dir_fd=parent, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, mode & 0o7777, dir_fd=parent)
        with contextlib.suppress(OSError):  # a file system that has none
            for key in os.listxattr(place, follow_symlinks=False):
                if key not in wanted:
                    os.removexattr(place, key, follow_symlinks=False)
        for key, value in wanted.items():
            os.setxattr(place, key, value, follow_symlinks=False)
        os.utime(name, ns=(status.st_atime_ns, mtime), dir_fd=parent, follow_symlinks=False)

    @contextlib.contextmanager
    def _looked_at(self, path: str) -> Iterator[int]:
        """A file or directory, for its attributes."""
        parent, name = self._split(path) if path else (self._fd, ".")
        fd = os.open(name, _LOOK, dir_fd=parent)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _opened(self, path: str) -> Any:
        """A regular file, to be written."""
        parent, name = self._split(path)
        fd = os.open(name, _WRITE, dir_fd=parent)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise EngineError(f"{path} is no regular file")
            yield fd
        finally:
            os.close(fd)
        if self._unsynced is not None:
            self._unsynced.add(path)
            if len(self._unsynced) > _FEW:
                self._unsynced = None

    def _split(self, path: str) -> tuple[int, str]:
        """The directory of a name, which is kept open for the next, and the name in it."""
        directory, _, name = path.rpartition("/")
        if not name:
            raise EngineError("the top of a directory cannot be made anew")
        if self._parent[1] < 0 or self._parent[0] != directory:
            self._leave_parent()
            self._parent = directory, calls.open_beneath(self._fd, directory or ".", _PLACE)
        return self._parent[1], name

    def _leave_parent(self) -> None:
        if self._parent[1] >= 0:
            os.close(self._parent[1])
        self._parent = "", -1


class _Room(_Tree):
    """A place that is there: what comes goes to where it stays."""

    def __init__(self, place: str) -> None:
        super().__init__(place, place)

    def make(self) -> None:
        self._fd = os.open(self.staged, _PLACE | os.O_CLOEXEC)

    def publish(self) -> None:
        pass


class _Overlay(_Room):
    """A file system that is mounted when what it is made of may have come: its layers may be in another tree."""

    def __init__(self, final: str, layers: Layers, staged: Places, noted: dict[str, Any]) -> None:
        super().__init__(noted["data"]["at"])
        self.final = final
        self.entry = noted
        self._layers = layers
        self._places = staged

    def make(self) -> None:
        pass

    def begin(self) -> None:
        if self._fd < 0:
            overlay.make(self.entry["data"], self._layers, self._places)
            super().make()

    def publish(self) -> None:
        overlay.publish(self.entry["data"])


def _size(value: Any) -> int:
    if not 0 <= int(value) <= _LONGEST:
        raise EngineError(f"a file is said to have {value} bytes")
    return int(value)


def check_place(path: str) -> str:
    """The final place of a tree; EngineError for what is none."""
    if not path.startswith("/") or "\0" in path or ".." in path.split("/") or os.path.normpath(path) != path:
        raise EngineError(f"{path!r} is not the path of a directory")
    if path == "/":
        raise EngineError("the root of a host cannot be hauled")
    return path
