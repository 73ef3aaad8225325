"""/proc/PID/maps and smaps: the areas of an address space (proc_pid_maps(5), proc_pid_smaps(5), fs/proc/task_mmu.c).

`read_maps` is what a freeze can afford; `read_smaps` adds each area's VmFlags at about five times the price.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
from typing import NamedTuple

from phaul_engine.errors import EngineError

from .access import read_bytes

_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) ([0-9]+) *(.*)")
_HEAD = re.compile(rb"^[0-9a-f]+-.*", re.MULTILINE)  # in smaps, where every other line begins with a capital
_VM_FLAGS = re.compile(rb"^VmFlags:(.*)\n", re.MULTILINE)
_NO_FLAGS: frozenset[str] = frozenset()
_DELETED = " (deleted)"


class Area(NamedTuple):
    """One area (VMA).

    `prot` is a set of PROT_ bits, `offset` in bytes. `dev` and `ino` are the mapped file's as the kernel's mapping
    knows them (on overlay and btrfs not those of stat), 0 for anonymous memory. `path` is the kernel's text: a file's
    path seen from the reader's root, with " (deleted)" behind it when it was unlinked, or a name in brackets ([heap],
    [stack], [vdso], [anon:NAME]), or empty. `flags` are smaps' two-letter VmFlags, empty when read from maps.
    """

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    dev: int
    ino: int
    path: str
    flags: frozenset[str] = _NO_FLAGS

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start

    @property
    def is_file(self) -> bool:
        """Whether a file backs it, memfd and shared anonymous memory (which is a file of shmem) included."""
        return self.ino != 0 or self.path.startswith("/SYSV")  # the first segment of an IPC namespace has the number 0

    @property
    def special(self) -> bool:
        """Whether the kernel itself put it there and it has no bytes of the program's: vdso, vvar, vsyscall."""
        return self.path.startswith(("[vdso]", "[vvar", "[vsyscall]", "[uprobes]"))

    @property
    def deleted(self) -> bool:
        """Whether the path says that the file was unlinked (a file may also be called so)."""
        return self.path.endswith(_DELETED)


def read_maps(proc: int) -> list[Area]:
    """The areas of a process, ascending, without VmFlags."""
    return parse_maps(read_bytes(proc, "maps"))


def read_smaps(proc: int) -> list[Area]:
    """The areas of a process, ascending, with VmFlags."""
    return parse_smaps(read_bytes(proc, "smaps"))


def parse_maps(text: bytes) -> list[Area]:
    """Parse a maps text."""
    # the last line ends in a newline too
    return [_area(line) for line in text.split(b"\n")[:-1]]


def parse_smaps(text: bytes) -> list[Area]:
    """Parse a smaps text. Every area must have its VmFlags line (Linux >= 3.8)."""
    heads = _HEAD.findall(text)
    flags = _VM_FLAGS.findall(text)
    if len(heads) != len(flags) or (text and not heads):
        raise EngineError(f"smaps in an unknown form: {len(heads)} areas but {len(flags)} lines of VmFlags")
    return [_area(head)._replace(flags=_flag_set(words)) for head, words in zip(heads, flags, strict=True)]


@functools.lru_cache(maxsize=1 << 16)
def _area(line: bytes) -> Area:
    """One line. Cached, because what a freeze reads is nearly always what the survey has read before."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise EngineError(f"maps in an unknown form: {line!r}")
    start, end, mode, offset, dev, ino, path = match.groups()
    prot, shared = _MODES[mode]
    name = path.replace(b"\\012", b"\n").decode("utf-8", "surrogateescape")
    return Area(int(start, 16), int(end, 16), prot, shared, int(offset, 16), _device(dev), int(ino), name)


def _modes() -> dict[bytes, tuple[int, bool]]:
    table = {}
    for bits in range(16):
        text = "".join(char if bits >> at & 1 else "-" for at, char in enumerate("rwx"))
        prot = sum(prot for at, prot in enumerate((mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC)) if bits >> at & 1)
        table[(text + "ps"[bits >> 3]).encode()] = (prot, bool(bits >> 3))
    return table


_MODES = _modes()


@functools.lru_cache(maxsize=256)
def _device(text: bytes) -> int:
    major, minor = text.split(b":")
    return os.makedev(int(major, 16), int(minor, 16))


@functools.lru_cache(maxsize=256)
def _flag_set(text: bytes) -> frozenset[str]:
    return frozenset(text.decode("ascii").split())
