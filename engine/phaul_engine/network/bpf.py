"""Small BPF programs, assembled here: no compiler is needed where phaul runs.

`Assembler` writes instructions with labels; the functions below are the commands of bpf(2) that the package uses.
Sources: bpf(2), linux/include/uapi/linux/bpf.h, Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from phaul_engine.errors import EngineError
from phaul_engine.syscalls import NR

MAP_HASH, MAP_ARRAY = 1, 2
TCX_INGRESS, TCX_EGRESS = 46, 47
NEXT = -1  # TCX_NEXT, and TC_ACT_UNSPEC of a filter: go on with what else is attached
F_INGRESS = 1
HELPER_LOOKUP, HELPER_REDIRECT, HELPER_LOAD_BYTES = 1, 23, 26
_PROG_TYPE_SCHED_CLS = 3
_CREATE_MAP, _LOOKUP, _UPDATE, _DELETE, _LOAD, _PIN, _GET, _QUERY, _LINK, _DETACH = 0, 1, 2, 3, 5, 6, 7, 16, 28, 34
_LOG_SIZE = 1 << 16
_PSEUDO_MAP_FD = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _bpf(command: int, attributes: bytes) -> int:
    room = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(ctypes.c_long(NR.bpf), ctypes.c_long(command), room, ctypes.c_long(len(attributes)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"bpf command {command}")
    return result


def _address(room: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(room)


@dataclass
class Map:
    """A BPF map. Keys and values are bytes of fixed size."""

    fd: int
    value_size: int

    @classmethod
    def create(cls, kind: int, key_size: int, value_size: int, entries: int, name: str) -> Map:
        """A new map."""
        attributes = struct.pack("<7I16s", kind, key_size, value_size, entries, 0, 0, 0, name.encode()[:15])
        return cls(_bpf(_CREATE_MAP, attributes), value_size)

    @classmethod
    def pinned(cls, path: str, value_size: int) -> Map:
        """A map that was pinned at `path`."""
        return cls(_get(path), value_size)

    def __setitem__(self, key: bytes, value: bytes) -> None:
        keys, values = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
        _bpf(_UPDATE, struct.pack("<IxxxxQQQ", self.fd, _address(keys), _address(values), 0))

    def __getitem__(self, key: bytes) -> bytes:
        keys, values = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(self.value_size)
        try:
            _bpf(_LOOKUP, struct.pack("<IxxxxQQQ", self.fd, _address(keys), _address(values), 0))
        except FileNotFoundError:
            raise KeyError(key) from None
        return values.raw

    def __delitem__(self, key: bytes) -> None:
        keys = ctypes.create_string_buffer(key, len(key))
        try:
            _bpf(_DELETE, struct.pack("<IxxxxQQQ", self.fd, _address(keys), 0, 0))
        except FileNotFoundError:
            raise KeyError(key) from None

    def close(self) -> None:
        """Close our descriptor; a pinned or used map lives on."""
        os.close(self.fd)


def load(code: bytes, name: str) -> int:
    """Load a traffic-control program; its descriptor. A program that the verifier refuses is an `EngineError`."""
    instructions = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"Apache-2.0")

    def attributes(log: int) -> bytes:
        level, size = (1, _LOG_SIZE) if log else (0, 0)
        return struct.pack(
            "<IIQQIIQII16sII",
            *(_PROG_TYPE_SCHED_CLS, len(code) // 8, _address(instructions), _address(licence), level, size, log),
            *(0, 0, name.encode()[:15], 0, 0),
        )

    try:
        return _bpf(_LOAD, attributes(0))
    except OSError as error:
        room = ctypes.create_string_buffer(_LOG_SIZE)
        try:
            return _bpf(_LOAD, attributes(_address(room)))
        except OSError:
            log = room.value.decode(errors="replace").strip().splitlines()
            raise EngineError(f"the kernel refused the program {name}: {error.strerror}; {log[-2:]}") from error


def attach(program: int, interface: int, where: int = TCX_INGRESS) -> int:
    """Run a program on what comes in at an interface, or goes out (TCX, Linux 6.6); the link's descriptor."""
    return _bpf(_LINK, struct.pack("<4IIxxxxQ", program, interface, where, 0, 0, 0))


def has_tcx() -> bool:
    """Whether the kernel has TCX: what is attached at lo there is asked for. One without does not know the attach type.
    Raises `OSError` for other reasons."""
    loopback = 1
    try:
        _bpf(_QUERY, struct.pack("<4IQII", loopback, TCX_INGRESS, 0, 0, 0, 0, 0).ljust(64, b"\0"))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def pin(fd: int, path: str) -> None:
    """Give a map, program or link a name in a bpf file system: it lives until that is unlinked."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_PIN, struct.pack("<QII", _address(name), fd, 0))


def detach(path: str) -> None:
    """Undo `attach` of the link that is pinned there. When this returns no packet meets the program any more, whereas
    the last reference to a link may be given up long before (bpf_link_put in linux/kernel/bpf/syscall.c).
    Raises `OSError`: ENOLINK if its interface is gone."""
    link = _get(path)
    try:
        _bpf(_DETACH, struct.pack("<I", link))
    finally:
        os.close(link)


def _get(path: str) -> int:
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_GET, struct.pack("<QII", _address(name), 0, 0))


def file_system_type(path: str) -> int:
    """The magic number of the file system at `path` (statfs(2)), 0 if there is none."""
    room = ctypes.create_string_buffer(120)
    if _libc.statfs(os.fsencode(path), room) < 0:
        return 0
    return int(struct.unpack_from("<Q", room.raw)[0])


class Assembler:
    """Instructions, one a call; registers are numbers, 10 is the frame pointer. Labels are resolved at the end."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}

    def _emit(self, opcode: int, dst: int = 0, src: int = 0, offset: int | str = 0, value: int = 0) -> None:
        self._code.append((opcode, dst, src, offset, value))

    def label(self, name: str) -> None:
        """The next instruction is called `name`."""
        self._labels[name] = len(self._code)

    def move(self, dst: int, src: int) -> None:
        """dst = src."""
        self._emit(0xBF, dst, src)

    def set(self, dst: int, value: int) -> None:
        """dst = value, 32 bits, sign-extended."""
        self._emit(0xB7, dst, value=value)

    def add(self, dst: int, value: int) -> None:
        """dst += value."""
        self._emit(0x07, dst, value=value)

    def keep(self, dst: int, mask: int) -> None:
        """dst &= mask."""
        self._emit(0x57, dst, value=mask)

    def shift_left(self, dst: int, bits: int) -> None:
        """dst <<= bits."""
        self._emit(0x67, dst, value=bits)

    def load(self, dst: int, base: int, offset: int, size: int) -> None:
        """dst = the `size` bytes at base + offset."""
        self._emit({1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}[size], dst, base, offset)

    def store(self, base: int, offset: int, src: int, size: int) -> None:
        """The `size` bytes at base + offset = src."""
        self._emit({1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}[size], base, src, offset)

    def store_value(self, base: int, offset: int, value: int, size: int) -> None:
        """The `size` bytes at base + offset = value."""
        self._emit({1: 0x72, 2: 0x6A, 4: 0x62, 8: 0x7A}[size], base, 0, offset, value)

    def jump(self, target: str) -> None:
        """Go to a label."""
        self._emit(0x05, offset=target)

    def jump_equal(self, register: int, value: int, target: str) -> None:
        """Go to a label if register == value."""
        self._emit(0x15, register, offset=target, value=value)

    def jump_unequal(self, register: int, value: int, target: str) -> None:
        """Go to a label if register != value."""
        self._emit(0x55, register, offset=target, value=value)

    def jump_any(self, register: int, mask: int, target: str) -> None:
        """Go to a label if register & mask."""
        self._emit(0x45, register, offset=target, value=mask)

    def map(self, dst: int, fd: int) -> None:
        """dst = a map."""
        self._emit(0x18, dst, _PSEUDO_MAP_FD, value=fd)
        self._emit(0)

    def call(self, helper: int) -> None:
        """r0 = helper (r1 .. r5); r1 to r5 are lost."""
        self._emit(0x85, value=helper)

    def exit(self) -> None:
        """Return r0."""
        self._emit(0x95)

    def assemble(self) -> bytes:
        """The program."""
        made = bytearray()
        for index, (opcode, dst, src, offset, value) in enumerate(self._code):
            distance = self._labels[offset] - index - 1 if isinstance(offset, str) else offset
            made += struct.pack("<BBhi", opcode, dst | src << 4, distance, value)
        return bytes(made)
