"""Reads a file with O_DIRECT into the same memory again and again: the device writes behind the page tables.

    python direct_reader.py DIRECTORY

Writes its PID to DIRECTORY/pid, and to DIRECTORY/reads how often it has read and how often that was wrong.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

_BLOCK = 1 << 20


def main() -> None:
    """Until it is killed."""
    directory = Path(sys.argv[1])
    blocks = [bytes([value]) * _BLOCK for value in range(1, 5)]
    (directory / "blocks").write_bytes(b"".join(blocks))
    file = os.open(directory / "blocks", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, _BLOCK)
    report = os.open(directory / "reads", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    (directory / "pid").write_text(str(os.getpid()))
    reads = wrong = 0
    while True:
        which = reads % len(blocks)
        os.preadv(file, [buffer], which * _BLOCK)
        wrong += buffer[:] != blocks[which]
        reads += 1
        os.pwrite(report, f"{reads:10d} {wrong:10d}".encode(), 0)


main()
