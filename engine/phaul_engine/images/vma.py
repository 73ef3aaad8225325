"""What the status of a vma_entry says: what kind of memory area it is."""

from __future__ import annotations

import enum


class Status(enum.IntFlag):
    """Bits of `status`, CRIU's numbers. A file mapping is REGULAR | FILE_PRIVATE, a heap REGULAR | HEAP |
    ANON_PRIVATE, the vDSO REGULAR | VDSO, and so on; VSYSCALL alone is not REGULAR."""

    REGULAR = 1 << 0
    STACK = 1 << 1
    VSYSCALL = 1 << 2
    VDSO = 1 << 3
    HEAP = 1 << 5
    FILE_PRIVATE = 1 << 6
    FILE_SHARED = 1 << 7
    ANON_SHARED = 1 << 8
    ANON_PRIVATE = 1 << 9
    SYSVIPC = 1 << 10
    SOCKET = 1 << 11  # of a packet socket; shmid is its inode
    VVAR = 1 << 12
    AIO_RING = 1 << 13
    MEMFD = 1 << 14  # beside FILE_SHARED or FILE_PRIVATE; shmid is the file id of a memfd
    SHADOW_STACK = 1 << 15
    GUARD = 1 << 16
    UPROBES = 1 << 17
