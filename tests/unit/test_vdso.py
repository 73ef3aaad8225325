"""The vDSO's symbols, and the code of another one whose functions lead to this kernel's: run here, in this process."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import time
from pathlib import Path

import pytest
from phaul_engine import vdso
from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import vma_pb2
from phaul_engine.images.vma import Status

# Another kernel's vDSO: other offsets, and bodies that must never run.
_OTHER = r"""
#define NOT_HERE(name) __asm__ (".balign 64\n.globl __vdso_" name "\n.type __vdso_" name ",@function\n" \
	"__vdso_" name ":\nud2\n.fill 62, 1, 0x90\n.size __vdso_" name ", 64\n")
__asm__ (".text\n.fill 333, 1, 0xcc\n");
NOT_HERE ("time"); NOT_HERE ("getcpu"); NOT_HERE ("clock_gettime"); NOT_HERE ("gettimeofday");
NOT_HERE ("clock_getres"); NOT_HERE ("getrandom"); NOT_HERE ("from_the_future");
"""
# One segment, as the kernel's have it: addresses are offsets in the file.
_SCRIPT = """
SECTIONS {
	. = SIZEOF_HEADERS;
	.hash : { *(.hash) } :text
	.dynsym : { *(.dynsym) } :text
	.dynstr : { *(.dynstr) } :text
	.dynamic : { *(.dynamic) } :text :dynamic
	.text : { *(.text*) } :text
	/DISCARD/ : { *(.note*) *(.eh_frame*) *(.data*) *(.bss*) *(.comment) *(.gnu*) }
}
PHDRS { text PT_LOAD FILEHDR PHDRS FLAGS(5); dynamic PT_DYNAMIC FLAGS(4); }
"""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> vdso.Code:
    directory = tmp_path_factory.mktemp("vdso")
    (directory / "other.c").write_text(_OTHER)
    (directory / "script").write_text(_SCRIPT)
    flags = [
        "-shared",
        "-nostdlib",
        "-Wl,--hash-style=sysv",
        "-Wl,--build-id=none",
        "-Wl,-T",
        str(directory / "script"),
    ]
    subprocess.run(["cc", *flags, "-o", str(directory / "other.so"), str(directory / "other.c")], check=True)
    data = (directory / "other.so").read_bytes()
    return vdso.parse(data + bytes(-len(data) % 4096))


def _local() -> tuple[vdso.Local, int]:
    here = vdso.local()
    assert here is not None
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[vdso]"))
    return here, int(line.split("-")[0], 16)


def _place(code: vdso.Code, target: vdso.Code | None, target_at: int) -> tuple[ctypes.CDLL, int]:
    """The code where jumps reach, and its address."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [line.split()[0].split("-") for line in lines]
    taken = [(int(start, 16), int(end, 16)) for start, end in bounds]
    at = vdso.find_place(len(code.data), target_at, taken)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000
    assert libc.mmap(at, len(code.data), 7, flags, -1, 0) == at
    text = vdso.redirected(code, at, target, target_at, 3)
    ctypes.memmove(at, text, len(text))
    assert vdso.is_redirected(text)
    assert vdso.data_pages(text) == 3
    return libc, at


def _call(code: vdso.Code, at: int, name: str, *args: object) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_long)(at + code.functions[name].offset)(*args))


def test_this_kernels_functions_are_found() -> None:
    here, at = _local()
    assert {"clock_gettime", "gettimeofday", "time", "getcpu"} <= set(here.code.functions)
    now = _Timespec()
    assert _call(here.code, at, "clock_gettime", time.CLOCK_MONOTONIC, ctypes.byref(now)) == 0
    assert abs(now.tv_sec - time.monotonic()) < 60


@pytest.mark.parametrize("with_target", [True, False], ids=["jumps", "system calls"])
def test_functions_lead_to_the_other(other: vdso.Code, with_target: bool) -> None:
    here, here_at = _local()
    _, at = _place(other, here.code if with_target else None, here_at)
    now = _Timespec()
    for clock in (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME):
        before = time.clock_gettime_ns(clock)
        assert _call(other, at, "clock_gettime", clock, ctypes.byref(now)) == 0
        assert before <= now.tv_sec * 10**9 + now.tv_nsec <= time.clock_gettime_ns(clock)
    before = int(time.time()) - 1
    assert before <= _call(other, at, "time", None) <= time.time()
    cpu = ctypes.c_uint(1 << 20)
    assert _call(other, at, "getcpu", ctypes.byref(cpu), None, None) == 0
    assert cpu.value < 1 << 16
    assert _call(other, at, "clock_getres", time.CLOCK_MONOTONIC, ctypes.byref(now)) == 0
    room = ctypes.create_string_buffer(32)
    if not with_target or "getrandom" not in here.code.functions:
        assert _call(other, at, "getrandom", room, 32, 0, None, 0) == 32
        assert room.raw != bytes(32)
    assert _call(other, at, "from_the_future") == -38, "not there: the caller makes the system call"


def test_what_is_no_vdso_is_refused() -> None:
    for data in (b"", b"\x7fELF" + bytes(60), bytes(8192), b"\x7fELF" + b"\xff" * 8188):
        with pytest.raises(RebuildError):
            vdso.parse(data)


def _area(start: int, size: int, status: int) -> vma_pb2.vma_entry:
    return vma_pb2.vma_entry(start=start, end=start + size, pgoff=0, shmid=0, prot=5, flags=34, status=status, fd=-1)


def test_the_local_one_fits_where_the_same_was(other: vdso.Code) -> None:
    code = other
    here = vdso.Local((0x4000, 0x2000), code)
    vvar, text = _area(0x10000, 0x6000, Status.VVAR), _area(0x16000, len(code.data), Status.VDSO)
    assert vdso.plain(here, code, [vvar, text]) == [
        (0, 0x4000, 0x10000),
        (0x4000, 0x2000, 0x14000),
        (0x6000, len(code.data), 0x16000),
    ]
    apart = [_area(0x50000, 0x2000, Status.VVAR), _area(0x16000, len(code.data), Status.VDSO)]
    assert vdso.plain(here, code, apart) == [(0x4000, 0x2000, 0x50000), (0x6000, len(code.data), 0x16000)]
    assert vdso.plain(here, code, [_area(0x10000, 0x5000, Status.VVAR)]) is None
    renamed = vdso.Code(code.data, {**code.functions, "more": vdso.Function(5, 6)})
    assert vdso.plain(here, renamed, [vvar, text]) is None


def test_a_place_is_found_above_what_is_mapped() -> None:
    taken = [(0x7F0000000000, 0x7F0000010000), (0x7F0000100000, 0x7F0000200000), (0x7FF000000000, 0x7FF000100000)]
    at = vdso.find_place(0x8000, 0x7F0000100000, taken)
    assert 0x7F0000200000 < at < 0x7F0000200000 + (1 << 20)
    full = [(0x10000, 0x7F0000100000 - 0x50000), (0x7F0000100000, 0x7FFFFFFFE000)]
    assert 0x7F00000B0000 < vdso.find_place(0x1000, 0x7F0000100000, full) < 0x7F0000100000
    with pytest.raises(RebuildError):
        vdso.find_place(0x1000, 0x7F0000100000, [(0, 0x7FFFFFFFE000)])
