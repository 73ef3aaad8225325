"""A program whose death the kernel would tell the others that map its file: it holds a robust lock there, and its
threads' tid word lies there too.

    last_words.py FILE

FILE is 4096 bytes: at 0 the robust list's only entry, at 8 its lock word, at 16 the tid word, at 24 a counter that a
second thread keeps moving. `read` tells what stands there. (get_robust_list(2), set_tid_address(2); Linux
kernel/futex/core.c.)
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

LOCK, TID, COUNT = 8, 16, 24
OWNER_DIED = 0x40000000
_SET_ROBUST_LIST, _SET_TID_ADDRESS = 273, 218


@dataclass(frozen=True)
class Words:
    """What the file says: who holds the lock, the tid word, and how far it is."""

    lock: int
    tid: int
    count: int


def read(path: Path) -> Words:
    """Look at the file."""
    raw = path.read_bytes()
    return Words(*(int.from_bytes(raw[at : at + 4], "little") for at in (LOCK, TID, COUNT)))


def _call(number: int, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_void_p, args)) < 0:
        raise OSError(ctypes.get_errno(), "syscall")


def _count(memory: mmap.mmap) -> None:
    number = 0
    while True:
        number += 1
        memory[COUNT : COUNT + 4] = number.to_bytes(4, "little")
        time.sleep(0.002)


def _sleep(address: int) -> None:
    _call(_SET_TID_ADDRESS, address + TID)
    time.sleep(1e6)


def main(path: str) -> None:
    """Hold the lock until somebody ends us."""
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    head = (ctypes.c_uint64 * 3)(address, LOCK, 0)  # list.next, futex_offset, list_op_pending
    memory[0:8] = ctypes.addressof(head).to_bytes(8, "little")
    memory[LOCK : LOCK + 4] = memory[TID : TID + 4] = os.getpid().to_bytes(4, "little")
    _call(_SET_ROBUST_LIST, ctypes.addressof(head), 24)
    _call(_SET_TID_ADDRESS, address + TID)
    for _ in range(4):  # a thread zeroes its word only if it leaves others behind: one of these will
        threading.Thread(target=_sleep, args=(address,), daemon=True).start()
    threading.Thread(target=_count, args=(memory,), daemon=True).start()
    while True:
        time.sleep(10)


if __name__ == "__main__":
    main(*sys.argv[1:])
