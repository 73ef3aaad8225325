"""/proc/PID/auxv: the auxiliary vector (getauxval(3)), of 64-bit processes."""

from __future__ import annotations

import struct

from phaul_engine.errors import EngineError

from .access import read_bytes

AT_NULL = 0
AT_PHDR = 3
AT_BASE = 7
AT_ENTRY = 9
AT_HWCAP = 16
AT_SYSINFO_EHDR = 33

_PAIR = struct.Struct("<QQ")


def read_auxv(proc: int) -> tuple[tuple[int, int], ...]:
    """Type and value of each entry in order, AT_NULL included if it is there."""
    return parse_auxv(read_bytes(proc, "auxv"))


def parse_auxv(data: bytes) -> tuple[tuple[int, int], ...]:
    """Parse an auxiliary vector; the kernel may show unused zero pairs behind AT_NULL, which are left out."""
    if len(data) % _PAIR.size:
        raise EngineError(f"an auxiliary vector of {len(data)} bytes is not one of a 64-bit process")
    pairs = []
    for kind, value in _PAIR.iter_unpack(data):
        pairs.append((kind, value))
        if kind == AT_NULL:
            break
    return tuple(pairs)
