"""Files that the destination lacks: read at the source, made at the destination, same path, owner, mode and times.

Nothing is ever overwritten: a file appears under its name only when all of it is there and its hash is the source's,
and only if there still is none (link(2) fails otherwise). Both functions run as root, at the desks of the two hosts.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from phaul_engine import calls

from phaul.errors import PhaulError

CHUNK = 1 << 20  # bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shipped:
    """A file that is sent. `mtime` in nanoseconds."""

    path: str
    size: int
    sha256: str
    uid: int
    gid: int
    mode: int
    mtime: int


@dataclass(frozen=True)
class Made:
    """What came of it: a file that was not there before, and directories for it, the topmost first."""

    path: str
    inode: int
    directories: tuple[str, ...] = ()
    seal: str = ""  # by which this host knows that it was made here


def sealed(made: Made, run_directory: Path) -> Made:
    """With a seal that only this host can make: what has none was not made here, and is not removed for anybody."""
    return replace(made, seal=_seal(made, run_directory))


def _seal(made: Made, run_directory: Path) -> str:
    content = json.dumps([made.path, made.inode, made.directories]).encode()
    return hmac.new(private_key(run_directory / "seal"), content, "sha256").hexdigest()


def private_key(path: Path) -> bytes:
    """The content of a file that only root reads, made on first use."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    if not path.exists():
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()


def remove(made: Made, run_directory: Path) -> None:
    """Take it back: the file if it is still the one that was made, the directories if nothing else is in them."""
    if not hmac.compare_digest(made.seal, _seal(made, run_directory)):
        raise PhaulError(f"{made.path} was not made here for a program")
    with contextlib.suppress(OSError):
        if os.lstat(made.path).st_ino == made.inode:
            os.unlink(made.path)
    for directory in reversed(made.directories):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def describe(path: str, sha256: str) -> Shipped:
    """A file as it is here; `sha256` is what it had when it was looked at."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise PhaulError(f"{path} is no regular file any more", advice="try again")
    mode = stat.S_IMODE(found.st_mode)
    return Shipped(path, found.st_size, sha256, found.st_uid, found.st_gid, mode, found.st_mtime_ns)


def read(path: str, offset: int) -> bytes:
    """A part of it."""
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), CHUNK, offset)


class Arrival:
    """A file that is coming in, under a name of its own beside its place."""

    def __init__(self, file: Shipped) -> None:
        self.file = file
        place = Path(file.path)
        if not place.is_absolute() or ".." in place.parts or "\0" in file.path or not _DIGEST.fullmatch(file.sha256):
            raise PhaulError(f"{file.path!r} is not the path of a file")
        self._name, self._draft = place.name, f".phaul-{os.getpid()}-{file.sha256[:16]}"
        self._left = file.size
        with contextlib.ExitStack() as failed:
            self._parent, self._directories = _make_parents(place.parent)
            failed.callback(os.close, self._parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._draft, flags, 0o600, dir_fd=self._parent)
            failed.pop_all()
        self._digest = hashlib.sha256()
        self._finished = False

    def write(self, content: bytes) -> None:
        """The next part. PhaulError if more comes than was told."""
        self._left -= len(content)
        if self._left < 0:
            raise PhaulError(f"{self.file.path} grew while it was sent", advice="try again")
        self._digest.update(content)
        view = memoryview(content)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> Made:
        """All of it is here: give it its name. PhaulError if it is not what was to come, or the name is taken."""
        file = self.file
        if self._digest.hexdigest() != file.sha256:
            raise PhaulError(f"{file.path} changed while it was sent", advice="try again")
        os.fchown(self._fd, file.uid, file.gid)
        os.fchmod(self._fd, stat.S_IMODE(file.mode))  # after the owner: chown(2) clears set-user-ID
        os.utime(self._fd, ns=(file.mtime, file.mtime))
        os.fsync(self._fd)
        try:
            os.link(self._draft, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except FileExistsError as error:
            raise PhaulError(f"{file.path} has appeared meanwhile", advice="try again") from error
        self._finished = True
        return Made(file.path, os.fstat(self._fd).st_ino, self._directories)

    def close(self) -> None:
        """Remove the draft, and the directories that were made for it; the file itself stays if it was finished."""
        os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._draft, dir_fd=self._parent)
        os.close(self._parent)
        with contextlib.suppress(OSError):
            for directory in reversed(self._directories if not self._finished else ()):
                os.rmdir(directory)


def _make_parents(directory: Path) -> tuple[int, tuple[str, ...]]:
    """A descriptor of a directory, and which of it and those above had to be made, the topmost first.

    Links in it are followed, as in the path of any file, but none of /proc: those lead out of the file system.
    """
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    made: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, root)
        above = root
        for part in (*reversed(directory.parents[:-1]), directory) if directory != Path("/") else ():
            try:
                below = calls.open_in_root(root, str(part), os.O_PATH | os.O_DIRECTORY)
            except FileNotFoundError:
                os.mkdir(part.name, 0o755, dir_fd=above)
                made.append(str(part))
                below = calls.open_in_root(root, str(part), os.O_PATH | os.O_DIRECTORY)
            stack.callback(os.close, below)
            above = below
        return os.dup(above), tuple(made)
