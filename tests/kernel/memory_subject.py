"""A program whose memory changes in every way there is, at fixed addresses; and one that only has the same areas.

memory_subject.py work|hold FILE SHARED_FD SPARSE: prints a line when ready; SPARSE is the size of an area with little
in it. `work` makes a userfaultfd (its number, or -1, is in the line), waits for a line, closes it, and scribbles until
its standard input ends.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import sys
import time

PAGE = 4096
BASE = 0x5A0000000000
ANON, ANON_SIZE = BASE, 24 << 20
FILE, FILE_SIZE = BASE + (64 << 20), 2 << 20
SHARED, SHARED_SIZE = BASE + (80 << 20), 4 << 20
HIDDEN, HIDDEN_SIZE = BASE + (96 << 20), 1 << 20
SPARSE = BASE + (1 << 30)
END = SPARSE + (64 << 30)
USED = 256 << 20  # of the sparse area

_PROT_RW, _PROT_R = 3, 1
_SHARED, _PRIVATE, _ANONYMOUS, _NORESERVE, _FIXED = 1, 2, 0x20, 0x4000, 0x10
_DONTNEED, _REMOVE, _HUGE = 4, 9, 14
_SYS_USERFAULTFD = 323
_PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def map_at(start: int, size: int, flags: int, fd: int = -1) -> None:
    """mmap(2) at a fixed address."""
    got = libc.mmap(start, size, _PROT_RW, flags | _FIXED, fd, 0)
    assert got == start, os.strerror(ctypes.get_errno())


def lay_out(file: int, shared: int, sparse: int) -> None:
    """Make all areas."""
    map_at(ANON, ANON_SIZE, _PRIVATE | _ANONYMOUS)
    libc.madvise(ANON + (16 << 20), 4 << 20, _HUGE)
    map_at(FILE, FILE_SIZE, _PRIVATE, file)
    map_at(SHARED, SHARED_SIZE, _SHARED, shared)
    map_at(HIDDEN, HIDDEN_SIZE, _PRIVATE | _ANONYMOUS)
    map_at(SPARSE, sparse, _PRIVATE | _ANONYMOUS | _NORESERVE)


class Scribbler:
    """One random change at a time."""

    def __init__(self, shared: int, random_source: int) -> None:
        self.rng = random.Random(os.getpid())
        self.shared = shared
        self.source = random_source

    def stretch(self, start: int, size: int, most: int) -> tuple[int, int]:
        pages = self.rng.randint(1, most)
        page = self.rng.randrange(size // PAGE - pages)
        return start + page * PAGE, pages * PAGE

    def write(self, start: int, size: int, most: int) -> None:
        at, length = self.stretch(start, size, most)
        for page in range(at, at + length, PAGE):
            ctypes.memset(page + self.rng.randrange(PAGE - 8), self.rng.randrange(256), 8)

    def drop(self, start: int, size: int, most: int) -> None:
        at, length = self.stretch(start, size, most)
        libc.madvise(at, length, _DONTNEED)

    def drop_and_read(self) -> None:
        """What is read is a page of zeroes; where large pages are allowed, a large one."""
        at, length = self.stretch(ANON, ANON_SIZE, 20)
        libc.madvise(at, length, _DONTNEED)
        for page in range(at, at + length, PAGE):
            ctypes.c_char.from_address(page).value  # noqa: B018
        at = ANON + (16 << 20) + self.rng.randrange(2) * (2 << 20)
        libc.madvise(at, 2 << 20, _DONTNEED)
        ctypes.c_char.from_address(at + 3 * PAGE).value  # noqa: B018

    def zero(self) -> None:
        at, length = self.stretch(ANON, ANON_SIZE, 20)
        ctypes.memset(at, 0, length)

    def kernel_write(self) -> None:
        at, length = self.stretch(ANON, ANON_SIZE, 16)
        libc.read(self.source, at, length)

    def protect(self) -> None:
        at, length = self.stretch(ANON, ANON_SIZE, 30)
        libc.mprotect(at, length, _PROT_R)
        libc.mprotect(at, length, _PROT_RW)

    def replace(self) -> None:
        at, length = self.stretch(ANON, ANON_SIZE, 30)
        map_at(at, length, _PRIVATE | _ANONYMOUS)
        ctypes.memset(at, 0x77, PAGE)

    def shared_write_behind(self) -> None:
        at, length = self.stretch(0, SHARED_SIZE, 8)
        os.pwrite(self.shared, os.urandom(length), at)

    def shared_punch(self) -> None:
        at, length = self.stretch(0, SHARED_SIZE, 30)
        libc.fallocate(self.shared, _PUNCH, at, length)

    def step(self) -> None:
        """Do one of them."""
        chance = self.rng.random()
        if chance < 0.4:
            self.write(ANON, ANON_SIZE, 10)
        elif chance < 0.5:
            self.write(SHARED, SHARED_SIZE, 6)
        elif chance < 0.6:
            self.write(FILE, FILE_SIZE, 4)
        elif chance < 0.65:
            self.write(SPARSE, USED, 2)
        else:
            actions = (
                lambda: self.drop(ANON, ANON_SIZE, 40),
                lambda: self.drop(ANON, 8 << 20, 1024),
                lambda: self.drop(FILE, FILE_SIZE, 20),
                lambda: self.drop(SPARSE, USED, 2000),
                self.drop_and_read,
                *(self.zero, self.kernel_write, self.protect, self.shared_write_behind, self.shared_punch),
            )
            self.rng.choice(actions)()
        if chance > 0.999:
            self.replace()


def main() -> None:
    """See the module's text."""
    role, file, shared = sys.argv[1], os.open(sys.argv[2], os.O_RDONLY), int(sys.argv[3])
    lay_out(file, shared, int(sys.argv[4]))
    if role == "hold":
        print("ready", flush=True)
        while True:
            time.sleep(1000)
    scribbler = Scribbler(shared, os.open("/dev/urandom", os.O_RDONLY))
    ctypes.memset(HIDDEN + 5 * PAGE, 0x42, 3 * PAGE)
    libc.mprotect(HIDDEN, HIDDEN_SIZE, 0)
    for _ in range(300):
        scribbler.step()
    uffd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    print(f"ready {uffd}", flush=True)
    sys.stdin.readline()  # it has been taken
    if uffd >= 0:
        os.close(uffd)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(50):
            scribbler.step()
        time.sleep(0.001)


if __name__ == "__main__":
    main()
