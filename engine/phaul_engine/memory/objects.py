"""Numbers that both sides know memory objects under: an address space by its process, shared memory by its shmid."""

from __future__ import annotations

_SHARED = 1 << 32


def address_space(inner_pid: int) -> int:
    """The object that is the private memory of a process."""
    return inner_pid


def shared(shmid: int) -> int:
    """The object that is shared memory: anonymous, or a memory file."""
    return _SHARED | (shmid & (_SHARED - 1))
