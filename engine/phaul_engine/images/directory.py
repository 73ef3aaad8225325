"""A directory of image files, opened so that nothing in it leads elsewhere.

Images may come from a stranger. Files are opened below the directory's descriptor, and no symbolic link is followed
(openat2(2), RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS). The one exception is CRIU's link `parent`
to the images of the round before: its text is read, must be relative, and is opened without following another link.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from phaul_engine.errors import ImageError
from phaul_engine.images.kinds import Ident, kind_of
from phaul_engine.syscalls import NR

Location: TypeAlias = "str | os.PathLike[str] | int | ImageDirectory"

MAX_PARENTS = 256  # rounds; a migration that has not converged by then never does
MAX_FILE = 1 << 30  # bytes of one file that is read as a whole; page contents never are
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_NO_LINKS = _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class ImageDirectory:
    """An open directory of images; a context manager. `label` is how messages to people call it."""

    def __init__(self, location: str | os.PathLike[str] | int) -> None:
        """Open a path, or a duplicate of a directory descriptor. `ImageError` if there is no such directory."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self.label = f"descriptor {location}" if isinstance(location, int) else os.fspath(location)
        try:
            if isinstance(location, int):
                self.fd = os.open(".", flags, dir_fd=location)
            else:
                self.fd = os.open(location, flags)
        except OSError as error:
            raise ImageError(f"images in {self.label}: {error.strerror}") from error

    @classmethod
    def _adopt(cls, fd: int, label: str) -> ImageDirectory:
        directory = cls.__new__(cls)
        directory.fd, directory.label = fd, label
        return directory

    def close(self) -> None:
        """Close the directory. More than once does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def names(self) -> list[str]:
        """The names in it, sorted."""
        return sorted(os.listdir(self.fd))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, of whatever type."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def open(self, name: str) -> int:
        """Open an image for reading, close-on-exec; the caller closes it.

        `ImageError` if it is missing, or is not an ordinary file right here.
        """
        try:
            fd = _openat2(self.fd, name, os.O_RDONLY | os.O_NONBLOCK, 0, _NO_LINKS | _RESOLVE_BENEATH)
        except OSError as error:
            raise self._explain(error, name) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageError(f"{self.label}/{name} is not an ordinary file")
        return fd

    def size(self, name: str) -> int:
        """The length of an image in bytes."""
        fd = self.open(name)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def read(self, name: str) -> bytes:
        """A whole image; `ImageError` if it is larger than `MAX_FILE`."""
        fd = self.open(name)
        with os.fdopen(fd, "rb", buffering=0) as file:
            size = os.fstat(fd).st_size
            if size > MAX_FILE:
                raise ImageError(f"{self.label}/{name} has {size} bytes; at most {MAX_FILE} are read")
            try:
                data = file.read(size)
            except OSError as error:
                raise self._explain(error, name) from error
        if len(data) != size:
            raise ImageError(f"{self.label}/{name} was cut while it was read")
        return data

    def write(self, name: str, *contents: bytes | memoryview) -> None:
        """Write a whole image. It appears under its name when it is complete, in place of what was there."""
        draft = f".{name}.new"
        with os.fdopen(self.create(draft), "wb", buffering=0) as file:
            try:
                for content in contents:
                    view = memoryview(content)
                    while view:
                        view = view[file.write(view) :]
                os.rename(draft, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            except OSError as error:
                os.unlink(draft, dir_fd=self.fd)
                raise self._explain(error, name) from error

    def create(self, name: str) -> int:
        """Create a file in place of what has this name, to read and write, close-on-exec; the caller closes it."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            return _openat2(self.fd, name, flags, 0o600, _NO_LINKS | _RESOLVE_BENEATH)
        except OSError as error:
            raise self._explain(error, name) from error

    def parent(self) -> ImageDirectory | None:
        """The directory of the round before; None if this is the first. The caller closes it."""
        try:
            target = os.readlink("parent", dir_fd=self.fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ImageError(f"{self.label}/parent is not a symbolic link") from error
        if os.path.isabs(target):
            raise ImageError(
                f"{self.label}/parent leads to {target}: it must be a relative link",
                advice="link it with a relative path, so that the images can be moved together",
            )
        try:
            fd = _openat2(self.fd, target, os.O_RDONLY | os.O_DIRECTORY, 0, _NO_LINKS)
        except OSError as error:
            raise self._explain(error, "parent") from error
        return self._adopt(fd, str(Path(self.label, target)))

    def set_parent(self, target: str) -> None:
        """Link to the round before by a path relative to this directory."""
        if os.path.isabs(target):
            raise ImageError(f"the parent of {self.label} must be given relative to it, not as {target}")
        try:
            os.symlink(target, "parent", dir_fd=self.fd)
        except OSError as error:
            raise self._explain(error, "parent") from error

    def _explain(self, error: OSError, name: str) -> ImageError:
        if error.errno in (errno.ELOOP, errno.EXDEV):
            return ImageError(f"{self.label}/{name} leads elsewhere; links are not followed in images")
        return ImageError(f"{self.label}/{name}: {error.strerror}")


@contextlib.contextmanager
def opened(location: Location) -> Iterator[ImageDirectory]:
    """The directory at a location; one that was open already stays open."""
    if isinstance(location, ImageDirectory):
        yield location
        return
    with ImageDirectory(location) as directory:
        yield directory


def chain(directory: ImageDirectory) -> Iterator[ImageDirectory]:
    """A directory, its parent, and so on to the first round; each but the given one is for the caller to close.

    `ImageError` when the links form a ring or are more than `MAX_PARENTS`.
    """
    seen: set[tuple[int, int]] = set()
    current: ImageDirectory | None = directory
    while current is not None:
        status = os.fstat(current.fd)
        if (status.st_dev, status.st_ino) in seen:
            raise ImageError(f"the parents of {directory.label} lead back to {current.label}")
        if len(seen) > MAX_PARENTS:
            raise ImageError(f"{directory.label} has more than {MAX_PARENTS} parents")
        seen.add((status.st_dev, status.st_ino))
        yield current
        current = current.parent()


def file_name(stem: str, ident: Ident) -> str:
    """The name of the file of a kind and ident."""
    return kind_of(stem).name(ident)


def _openat2(directory: int, name: str, flags: int, mode: int, resolve: int) -> int:
    how = struct.pack("<3Q", flags | os.O_CLOEXEC, mode, resolve)
    fd: int = _libc.syscall(
        ctypes.c_long(NR.openat2), ctypes.c_long(directory), os.fsencode(name), how, ctypes.c_size_t(len(how))
    )
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return fd
