"""Where in a program's own code an injection begins.

It takes a `syscall; ret`, and a signal restorer that leads home should we die: every C library has both. A program
without a library may have neither; then they are put where code is never run and never will be: into the rest of the
last page of its vDSO, or between functions.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from .errors import TargetError
from .native import failure, ffi, lib, new_error
from .proc.maps import Area

_PROT_EXEC = 4
_PLANT = b"\x0f\x05\xc3\xb8\x0f\0\0\0\x0f\x05"  # syscall; ret; mov $15, %eax; syscall
_RESTORER_AT = 3
_ROOM = 16  # bytes that a plant takes
_TRAPS = b"\xcc" * (_ROOM + 8)  # int3, which compilers put between functions
_ZEROS = bytes(64)  # the end of what was loaded from a file
_CHUNK = 1 << 20


class Gadgets(NamedTuple):
    """See `struct ph_gadgets`. `planted` is what was there before they were put there, empty if they were."""

    syscall_ret: int
    sigreturn: int
    planted: bytes = b""


def find_gadgets(pid: int, areas: Sequence[Area]) -> Gadgets:
    """Search a program's code for the way in, or make one. Worth keeping: code does not move."""
    return search_gadgets(pid, areas) or _plant(pid, areas)


def search_gadgets(pid: int, areas: Sequence[Area]) -> Gadgets | None:
    """Search only: nothing is changed, so the program may run meanwhile."""
    bounds = [bound for area in _code_areas(areas) for bound in (area.start, area.end)]
    found = ffi.new("struct ph_gadgets *")
    err = new_error()
    if lib.ph_find_gadgets(pid, ffi.new("uint64_t[]", bounds), len(bounds) // 2, found, err) == 0:
        return Gadgets(found.syscall_ret, found.sigreturn)
    if err.code != errno.ENOENT:
        raise failure(err)
    return None


def find_syscall(pid: int, areas: Sequence[Area]) -> int:
    """The address of a `syscall` instruction in a program's code, made if there is none."""
    bounds = [bound for area in _code_areas(areas) for bound in (area.start, area.end)]
    found = ffi.new("uint64_t *")
    err = new_error()
    if lib.ph_find_syscall(pid, ffi.new("uint64_t[]", bounds), len(bounds) // 2, found, err) == 0:
        return int(found[0])
    if err.code != errno.ENOENT:
        raise failure(err)
    return _plant(pid, areas).syscall_ret


def remove(mem: int, gadgets: Gadgets) -> None:
    """Put back what was there before; `mem` is a descriptor of /proc/PID/mem. Nothing is done in a program that is
    gone."""
    if not gadgets.planted:
        return
    with contextlib.suppress(OSError):
        writable = os.open(f"/proc/self/fd/{mem}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.pread(writable, len(_PLANT), gadgets.syscall_ret) == _PLANT:
                os.pwrite(writable, gadgets.planted, gadgets.syscall_ret)
        finally:
            os.close(writable)


def _code_areas(areas: Sequence[Area]) -> list[Area]:
    """Executable areas, the C library first: it has both gadgets, and searching others costs time."""
    code = [area for area in areas if area.prot & _PROT_EXEC and area.path != "[vsyscall]"]
    return sorted(code, key=lambda area: (0 if "libc" in area.path else 1, area.start))


def _plant(pid: int, areas: Sequence[Area]) -> Gadgets:
    """Put both where nothing runs. If we die they stay, and are found next time."""
    private = [area for area in _code_areas(areas) if (area.is_file or area.path == "[vdso]") and not area.shared]
    mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        for area in sorted(private, key=lambda area: area.path != "[vdso]"):
            at = _find_room(mem, area)
            if at:
                before = os.pread(mem, len(_PLANT), at)
                os.pwrite(mem, _PLANT, at)
                return Gadgets(at, at + _RESTORER_AT, before)
    finally:
        os.close(mem)
    problem = TargetError(
        f"process {pid} has no code to begin an injection with, and no room for any",
        advice="it has no vDSO, and no unused end of a page of code",
    )
    problem.errno = errno.ENOENT
    raise problem


def _find_room(mem: int, area: Area) -> int:
    """The address of unused bytes in an area of code, 0 if there are none."""
    with contextlib.suppress(OSError):
        if os.pread(mem, len(_ZEROS), area.end - len(_ZEROS)) == _ZEROS:
            return area.end - _ROOM
        for start in range(area.start, area.end, _CHUNK):
            at = os.pread(mem, min(_CHUNK, area.end - start), start).find(_TRAPS)
            if at >= 0:
                return start + at + 4
    return 0
