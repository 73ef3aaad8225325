"""The vDSO: code of the kernel's in every program, which is another on another kernel (vdso(7)).

Where this kernel's has the same functions at the same places, it is mapped where the program knows it. Where it is
another, the old code stays as ordinary memory, its functions begin with a jump to those of this kernel's, which lies
elsewhere, and in place of its data there are pages of zeros: code that is still in the middle of a function finds the
clock unusable in them, and makes a system call. What an earlier move left so bears a mark, and is led to the new place.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import RebuildError
from .images.checkpoint import Checkpoint
from .images.pages import PAGE_SIZE
from .images.pages import Extent as Stored
from .images.pb import vma_pb2
from .images.vma import Status
from .memory.extents import Extents, Kind
from .proc.maps import Area
from .syscalls import NR

MARK = b"phaul\1"  # in the padding of an ELF header (elf(5)): here functions are led to another vDSO
_MARK_AT = 9
LARGEST = 1 << 16
_SPECIAL = Status.VDSO | Status.VVAR
_REACH = 1 << 30  # of a jump, with room to spare
_MARGIN = 1 << 16
_LOWEST, _HIGHEST = 1 << 16, 0x7FFFFFFFE000
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_HASH, _DT_STRTAB, _DT_SYMTAB = 4, 5, 6
_STT_FUNC, _STT_NOTYPE = 2, 0
_JUMP, _LOAD_AX, _SYSCALL_RET = b"\xe9", b"\xb8", b"\x0f\x05\xc3"
_NO_FUNCTION = b"\x48\xc7\xc0\xda\xff\xff\xff\xc3"  # mov $-ENOSYS, %rax; ret: callers make the system call then
_CALLS = {
    "clock_gettime": NR.clock_gettime,
    "gettimeofday": NR.gettimeofday,
    "time": NR.time,
    "getcpu": NR.getcpu,
    "clock_getres": NR.clock_getres,
    "getrandom": NR.getrandom,  # its first three arguments are the system call's
}
_WITHOUT_DATA = frozenset({"sgx_enter_enclave"})  # works as it is, if anything does


class Function(NamedTuple):
    """Where a function is in the code, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Code:
    """A vDSO's code, and its functions by their names without a prefix."""

    data: bytes
    functions: Mapping[str, Function]

    @property
    def syscall(self) -> int:
        """The offset of a `syscall` instruction, -1 if it has none."""
        return self.data.find(_SYSCALL_RET[:2])


@dataclass(frozen=True)
class Local:
    """This kernel's: sizes of its areas of data, in order, and the code that follows them."""

    data: tuple[int, ...]
    code: Code

    @property
    def size(self) -> int:
        """Of everything."""
        return sum(self.data) + len(self.code.data)


@functools.cache
def local() -> Local | None:
    """The vDSO that this process has; None on a kernel without (vdso=0)."""
    with open("/proc/self/maps") as maps:
        found = [line.split() for line in maps if line.rstrip().endswith(("[vvar]", "[vvar_vclock]", "[vdso]"))]
    bounds = [(int(words[0].split("-")[0], 16), int(words[0].split("-")[1], 16), words[-1]) for words in found]
    code = [(start, end) for start, end, name in bounds if name == "[vdso]"]
    if not code:
        return None
    (start, end) = code[0]
    data = [(low, high) for low, high, name in bounds if name != "[vdso]"]
    return Local(tuple(high - low for low, high in data), parse(ctypes.string_at(start, end - start)))


@functools.cache
def parse(data: bytes) -> Code:
    """Read the dynamic symbols of a vDSO (elf(5)). RebuildError for anything else."""
    try:
        return Code(data, _functions(data))
    except (struct.error, ValueError, LookupError, OverflowError) as error:
        raise RebuildError(f"the source's vDSO cannot be read: {error}") from error


def _functions(data: bytes) -> dict[str, Function]:
    if data[:4] != b"\x7fELF":
        raise ValueError("it is no ELF object")
    (headers, entry_size, count) = (*struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54))
    dynamic, base = 0, 0
    for index in range(count):
        kind, _, offset, address, *_ = struct.unpack_from("<IIQQQQQQ", data, headers + index * entry_size)
        if kind == _PT_LOAD:
            base = address - offset
        elif kind == _PT_DYNAMIC:
            dynamic = offset
    tags: dict[int, int] = {}
    for at in itertools.count(dynamic, 16):
        tag, value = struct.unpack_from("<QQ", data, at)
        if tag == 0:
            break
        tags[tag] = value
    symbols, strings = tags[_DT_SYMTAB] - base, tags[_DT_STRTAB] - base
    if _DT_HASH in tags:
        (total,) = struct.unpack_from("<I", data, tags[_DT_HASH] - base + 4)
    else:  # the table of strings follows that of symbols, in every vDSO there is
        total = (strings - symbols) // 24
    functions: dict[str, Function] = {}
    for index in range(1, total):
        name_at, info, _, section, value, size = struct.unpack_from("<IBBHQQ", data, symbols + 24 * index)
        end = data.index(b"\0", strings + name_at)
        name = data[strings + name_at : end].decode("ascii").removeprefix("__vdso_")
        if section and size and info & 0xF in (_STT_FUNC, _STT_NOTYPE):
            if not 0 <= value - base <= len(data) - size:
                raise ValueError(f"the function {name} is not in it")
            functions[name] = Function(value - base, size)
    if not functions:
        raise ValueError("it has no functions")
    return functions


def redirected(code: Code, at: int, target: Code | None, target_at: int, data_pages: int | None = None) -> bytes:
    """`code`, which is at the address `at`, with functions that go on in `target` at `target_at`.

    What `target` has not got is a system call, or said not to be there. `data_pages` is how many pages of zeros lie in
    front of it; by default that is not changed.
    """
    text = bytearray(code.data)
    text[_MARK_AT : _MARK_AT + len(MARK)] = MARK
    if data_pages is not None:
        text[_MARK_AT + len(MARK)] = data_pages
    for name, (offset, size) in code.functions.items():
        if target is not None and name in target.functions:
            away = target_at + target.functions[name].offset - (at + offset + 5)
            entry = _JUMP + struct.pack("<i", away)
        elif name in _WITHOUT_DATA:
            continue
        elif name in _CALLS:
            entry = _LOAD_AX + struct.pack("<I", _CALLS[name]) + _SYSCALL_RET
        else:
            entry = _NO_FUNCTION
        if len(entry) > size:
            raise RebuildError(f"the function {name} of the source's vDSO is too short ({size} bytes)")
        text[offset : offset + len(entry)] = entry
    return bytes(text)


def is_redirected(head: bytes) -> bool:
    """Whether an area that begins with these bytes is what a move left of a vDSO."""
    return head[:4] == b"\x7fELF" and head[_MARK_AT : _MARK_AT + len(MARK)] == MARK


def data_pages(head: bytes) -> int:
    """How many pages of zeros lie in front of it."""
    return head[_MARK_AT + len(MARK)]


# -- images ------------------------------------------------------------------------------------------------------------


def special(vmas: Iterable[vma_pb2.vma_entry]) -> list[vma_pb2.vma_entry]:
    """The areas that the kernel made for its vDSO."""
    return [vma for vma in vmas if vma.status & _SPECIAL]


def pages(areas: Iterable[Area]) -> Extents:
    """The pages of the code; those of its data are the kernel's, and cannot be read."""
    extents = Extents()
    for area in areas:
        if area.path == "[vdso]":
            extents.add(area.start, area.size // PAGE_SIZE, Kind.PRIVATE)
    return extents


def leave_out(vmas: Iterable[vma_pb2.vma_entry], stored: Iterable[Stored]) -> list[Stored]:
    """`stored` without the pages of the vDSO, which `Spaces` puts there."""
    ours = special(vmas)
    kept = []
    for extent in stored:
        at = extent.vaddr
        end = extent.vaddr + extent.pages * PAGE_SIZE
        for vma in ours:
            if vma.start < end and at < vma.end:
                if at < vma.start:
                    kept.append(_part(extent, at, vma.start))
                at = min(end, vma.end)
        if at < end:
            kept.append(_part(extent, at, end))
    return kept


def _part(extent: Stored, start: int, end: int) -> Stored:
    return Stored(start, (end - start) // PAGE_SIZE, extent.fd, extent.offset + start - extent.vaddr)


def stored_code(vmas: Iterable[vma_pb2.vma_entry], stored: Sequence[Stored]) -> bytes:
    """The bytes of the vDSO among stored pages; empty if there are none, or not all."""
    for vma in vmas:
        if vma.status & Status.VDSO:
            text = bytearray()
            for extent in stored:
                start, end = (
                    max(vma.start, extent.vaddr),
                    min(vma.end, extent.vaddr + extent.pages * PAGE_SIZE),
                )
                if start < end:
                    text += os.pread(extent.fd, end - start, extent.offset + start - extent.vaddr)
            return bytes(text) if len(text) == vma.end - vma.start else b""
    return b""


def source_code(checkpoint: Checkpoint) -> Code | None:
    """The vDSO that programs had where the images were made, if the images say."""
    data = checkpoint.one("inventory").phaul_vdso if checkpoint.has("inventory") else b""
    return parse(data) if data else None


# -- where things go ---------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """A part of the local vDSO: where it is in it, its size, and the address it is to have."""

    offset: int
    size: int
    to: int


def plain(here: Local, theirs: Code | None, areas: Sequence[vma_pb2.vma_entry]) -> list[Move] | None:
    """Which parts of the local vDSO go where the program has its `areas` of it; None if they do not fit.

    Images without the code are of this kernel, if sizes are the same.
    """
    if theirs is not None and theirs.functions != here.code.functions:
        return None
    starts = [sum(here.data[:index]) for index in range(len(here.data) + 1)]
    size_of_data = starts[-1]
    moves = []
    for vma in areas:
        size = vma.end - vma.start
        if vma.status & Status.VDSO:
            fitting = [Move(size_of_data, size, vma.start)] if size == len(here.code.data) else []
        elif size == size_of_data:
            parts = zip(starts, here.data, strict=False)
            fitting = [Move(start, length, vma.start + start) for start, length in parts]
        elif here.data.count(size) == 1:
            fitting = [Move(starts[here.data.index(size)], size, vma.start)]
        else:
            fitting = []
        if not fitting:
            return None
        moves += fitting
    return moves


def find_place(size: int, near: int, taken: Iterable[tuple[int, int]]) -> int:
    """An address for `size` bytes that jumps from `near` reach.

    The kernel gives out addresses downwards from below the stack, so where nothing is, above what is mapped, nothing
    will be; a gap between areas is the second choice.
    """
    gaps = []
    at = _LOWEST
    for start, end in sorted((*taken, (_HIGHEST, _HIGHEST))):
        low, high = max(at + _MARGIN, near - _REACH), min(start - _MARGIN, near + _REACH)
        low = (low + PAGE_SIZE - 1) & -PAGE_SIZE
        if high - low >= size:
            gaps.append((low, high))
        at = max(at, end)
    above = [low for low, _ in gaps if low > near]
    if above:
        return above[0]
    if gaps:
        low, high = max(gaps, key=lambda gap: gap[1] - gap[0])
        return (low + (high - low - size) // 2) & -PAGE_SIZE
    raise RebuildError("there is no room for this kernel's vDSO near the one that the program has")
