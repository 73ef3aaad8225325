"""/proc/PID/status (proc_pid_status(5), fs/proc/array.c)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from phaul_engine.errors import EngineError

from .access import read_bytes

_COUNTS = b"\nvoluntary_ctxt_switches:"  # what follows changes by itself, and is not used


@dataclass(frozen=True)
class Ids:
    """Real, effective, saved and file system id."""

    real: int
    effective: int
    saved: int
    fs: int


@dataclass(frozen=True)
class Capabilities:
    """Capability sets (capabilities(7)); bit N is capability N."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


@dataclass(frozen=True)
class Status:
    """What is used of a task's status.

    Ids are those of the reader's user namespace, pids of the reader's pid namespace, except the `ns_` tuples: there
    the first number is the reader's and the last the task's own. Signal sets have bit N-1 for signal N.
    `umask` is None for a task without a file system context (a zombie). `seccomp` is 0 none, 1 strict, 2 filter.
    """

    name: str
    state: str
    umask: int | None
    tgid: int
    pid: int
    ppid: int
    tracer_pid: int
    uids: Ids
    gids: Ids
    groups: tuple[int, ...]
    ns_tgid: tuple[int, ...]
    ns_pid: tuple[int, ...]
    ns_pgid: tuple[int, ...]
    ns_sid: tuple[int, ...]
    threads: int
    pending: int
    shared_pending: int
    blocked: int
    ignored: int
    caught: int
    capabilities: Capabilities
    no_new_privs: bool
    seccomp: int
    seccomp_filters: int
    vm_rss_kib: int

    @property
    def inner_pid(self) -> int:
        """The task's number in its own pid namespace."""
        return self.ns_pid[-1]


def read_status(proc: int) -> Status:
    """The status of a process or thread directory."""
    return parse_status(read_bytes(proc, "status"))


class Statuses:
    """Those of tasks over several looks: what says the same as at the last one is not parsed again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[bytes, Status]] = {}

    def read(self, pid: int, proc: int) -> Status:
        """The status of process `pid`, whose directory is `proc`."""
        text = read_bytes(proc, "status").partition(_COUNTS)[0]
        known = self._known.get(pid)
        if known is None or known[0] != text:
            known = self._known[pid] = text, parse_status(text)
        return known[1]

    def keep(self, pids: Collection[int]) -> None:
        """Forget all but these."""
        for pid in self._known.keys() - pids:
            del self._known[pid]


def parse_status(text: bytes) -> Status:
    """Parse a status text. Its Name has newline and backslash escaped; other escapes there are none."""
    fields: dict[bytes, bytes] = {}
    for line in text.split(b"\n"):
        key, _, value = line.partition(b":\t")
        fields[key] = value
    try:
        umask = fields.get(b"Umask")
        return Status(
            name=_name(fields[b"Name"]),
            state=fields[b"State"][:1].decode("ascii"),
            umask=None if umask is None else int(umask, 8),
            tgid=int(fields[b"Tgid"]),
            pid=int(fields[b"Pid"]),
            ppid=int(fields[b"PPid"]),
            tracer_pid=int(fields[b"TracerPid"]),
            uids=Ids(*_numbers(fields[b"Uid"])),
            gids=Ids(*_numbers(fields[b"Gid"])),
            groups=_numbers(fields[b"Groups"]),
            ns_tgid=_numbers(fields[b"NStgid"]),
            ns_pid=_numbers(fields[b"NSpid"]),
            ns_pgid=_numbers(fields[b"NSpgid"]),
            ns_sid=_numbers(fields[b"NSsid"]),
            threads=int(fields[b"Threads"]),
            pending=int(fields[b"SigPnd"], 16),
            shared_pending=int(fields[b"ShdPnd"], 16),
            blocked=int(fields[b"SigBlk"], 16),
            ignored=int(fields[b"SigIgn"], 16),
            caught=int(fields[b"SigCgt"], 16),
            capabilities=Capabilities(
                *(int(fields[key], 16) for key in (b"CapInh", b"CapPrm", b"CapEff", b"CapBnd", b"CapAmb"))
            ),
            no_new_privs=fields[b"NoNewPrivs"] == b"1",
            seccomp=int(fields.get(b"Seccomp", b"0")),
            seccomp_filters=int(fields.get(b"Seccomp_filters", b"0")),
            vm_rss_kib=int(fields.get(b"VmRSS", b"0 kB").split()[0]),
        )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise EngineError(f"status in an unknown form ({error!r}): {text[:200]!r}") from error


def _numbers(value: bytes) -> tuple[int, ...]:
    return tuple(int(word) for word in value.split())


def _name(value: bytes) -> str:
    return value.replace(b"\\n", b"\n").replace(b"\\\\", b"\\").decode("utf-8", "surrogateescape")
