"""/proc/PID/fdinfo/FD: what the kernel tells about an open file description (proc_pid_fdinfo(5), fs/proc/fd.c).

The first four lines stand for every descriptor; the rest depends on its kind and is absent (None, empty) elsewhere.
Bases are the kernel's and differ line by line; here all are plain numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phaul_engine.errors import EngineError

from .access import read_text
from .locks import FileLock, parse_lock


@dataclass(frozen=True)
class EpollTarget:
    """One registration of an epoll instance (eventpoll.c, ep_show_fdinfo).

    `tfd` is the number under which the descriptor was added; it need not be open any more. `data` is the program's
    64 bits. `pos`, `ino` and `sdev` (the kernel's s_dev, major << 20 | minor) are those of the file watched.
    """

    tfd: int
    events: int
    data: int
    pos: int
    ino: int
    sdev: int


@dataclass(frozen=True)
class TimerFd:
    """State of a timerfd (timerfd.c, timerfd_show).

    `ticks` are unread expirations. `value` is the time left and `interval` the period, in nanoseconds. A timer that
    has expired and was not read yet shows `value` 0 though it goes on: timerfd_gettime on a duplicate re-arms it.
    """

    clockid: int
    ticks: int
    settime_flags: int
    value: int
    interval: int


@dataclass(frozen=True)
class FileHandle:
    """A file's handle as for open_by_handle_at(2)."""

    type: int
    handle: bytes


@dataclass(frozen=True)
class InotifyWatch:
    """One watch of an inotify instance. `sdev` is the kernel's s_dev (major << 20 | minor)."""

    wd: int
    ino: int
    sdev: int
    mask: int
    handle: FileHandle | None


@dataclass(frozen=True)
class FanotifyMark:
    """One mark of a fanotify group: on an inode (`ino` is set), a mount (`mnt_id` is set) or a file system."""

    mask: int
    ignored_mask: int
    mflags: int
    ino: int | None
    sdev: int | None
    mnt_id: int | None
    handle: FileHandle | None


@dataclass(frozen=True)
class FdInfo:
    """One descriptor's fdinfo.

    `flags` are those of open(2), with O_CLOEXEC when the descriptor (not the description) has FD_CLOEXEC. `mnt_id` is
    the mount's number in the reader's mount namespace's mountinfo. `raw` is the whole text.
    """

    pos: int
    flags: int
    mnt_id: int
    ino: int
    raw: str
    locks: tuple[FileLock, ...] = ()
    eventfd_count: int | None = None
    eventfd_id: int | None = None
    eventfd_semaphore: bool | None = None
    epoll: tuple[EpollTarget, ...] = ()
    timerfd: TimerFd | None = None
    sigmask: int | None = None  # signalfd: bit N-1 is signal N, as the program gave it
    inotify: tuple[InotifyWatch, ...] = ()
    fanotify_flags: int | None = None
    fanotify_event_flags: int | None = None
    fanotify: tuple[FanotifyMark, ...] = ()
    pid: int | None = None  # pidfd: the process in the reader's pid namespace, -1 once it has been reaped
    ns_pids: tuple[int, ...] = ()  # pidfd: outermost first

    @property
    def cloexec(self) -> bool:
        """Whether the descriptor closes on exec."""
        return bool(self.flags & os.O_CLOEXEC)

    def field(self, name: str) -> str | None:
        """The text of any other line `name:` (io_uring, bpf, dma-buf, tun, ...), None if there is no such line."""
        prefix = f"{name}:"
        for line in self.raw.split("\n"):
            if line.startswith(prefix):
                return line[len(prefix) :].strip()
        return None


def read(proc: int, fd: int) -> FdInfo:
    """The fdinfo of descriptor `fd` of the process whose /proc directory is `proc`."""
    return parse(read_text(proc, f"fdinfo/{fd}"))


def parse(text: str) -> FdInfo:
    """Parse a whole fdinfo text."""
    try:
        lines = text.split("\n")
        pos, flags, mnt_id, ino = lines[:4]
        fields: dict[str, Any] = {}
        if len(lines) > 5:  # the text ends in a newline: four lines give five parts
            for line in lines[4:]:
                key, colon, value = line.partition(":")
                parser = _LINES.get(key if colon else key.partition(" ")[0])
                if parser is None and colon:
                    parser = _LINES.get(key.partition(" ")[0])
                if parser is not None:
                    parser(fields, value if colon else "", line)
        if "timer" in fields:
            fields["timerfd"] = TimerFd(**fields.pop("timer"))
        for name in _LISTS & fields.keys():
            fields[name] = tuple(fields[name])
        return FdInfo(
            pos=int(pos.removeprefix("pos:")),
            flags=int(flags.removeprefix("flags:"), 8),
            mnt_id=int(mnt_id.removeprefix("mnt_id:")),
            ino=int(ino.removeprefix("ino:")),
            raw=text,
            **fields,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise EngineError(f"fdinfo in an unknown form: {text[:200]!r}") from error


_Fields = dict[str, Any]
_LISTS = {"locks", "epoll", "inotify", "fanotify"}


def _words(line: str) -> dict[str, str]:
    """`tfd: 3 events: 19` and `wd:1 ino:3f` both as a dictionary."""
    parts = line.replace(":", " ").split()
    return dict(zip(parts[0::2], parts[1::2], strict=True))


def _lock(fields: _Fields, value: str, _line: str) -> None:
    fields.setdefault("locks", []).append(parse_lock(value))


def _epoll(fields: _Fields, _value: str, line: str) -> None:
    _, tfd, _, events, _, data, pos, ino, sdev = line.split()
    target = EpollTarget(
        int(tfd), int(events, 16), int(data, 16), int(pos[4:]), int(ino[4:], 16), int(sdev.partition(":")[2], 16)
    )
    fields.setdefault("epoll", []).append(target)


def _handle(words: dict[str, str]) -> FileHandle | None:
    if "f_handle" not in words:
        return None
    return FileHandle(int(words["fhandle-type"], 16), bytes.fromhex(words["f_handle"]))


def _inotify(fields: _Fields, _value: str, line: str) -> None:
    words = _words(line.partition(" ")[2])
    watch = InotifyWatch(
        int(words["wd"], 16), int(words["ino"], 16), int(words["sdev"], 16), int(words["mask"], 16), _handle(words)
    )
    fields.setdefault("inotify", []).append(watch)


def _fanotify(fields: _Fields, _value: str, line: str) -> None:
    words = _words(line.partition(" ")[2])
    if "event-flags" in words:
        fields["fanotify_flags"] = int(words["flags"], 16)
        fields["fanotify_event_flags"] = int(words["event-flags"], 16)
        return
    mark = FanotifyMark(
        mask=int(words["mask"], 16),
        ignored_mask=int(words["ignored_mask"], 16),
        mflags=int(words["mflags"], 16),
        ino=int(words["ino"], 16) if "ino" in words else None,
        sdev=int(words["sdev"], 16) if "sdev" in words else None,
        mnt_id=int(words["mnt_id"], 16) if "mnt_id" in words else None,
        handle=_handle(words),
    )
    fields.setdefault("fanotify", []).append(mark)


def _timer(name: str, read_value: Callable[[str], int]) -> Callable[[_Fields, str, str], None]:
    def line_parser(fields: _Fields, value: str, _line: str) -> None:
        fields.setdefault("timer", {})[name] = read_value(value)

    return line_parser


def _nanoseconds(value: str) -> int:
    seconds, nanoseconds = value.strip(" ()").split(",")
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def _number(name: str, base: int, wrap: Callable[[int], Any] = int) -> Callable[[_Fields, str, str], None]:
    def line_parser(fields: _Fields, value: str, _line: str) -> None:
        fields[name] = wrap(int(value, base))

    return line_parser


def _ns_pids(fields: _Fields, value: str, _line: str) -> None:
    fields["ns_pids"] = tuple(int(pid) for pid in value.split())


_LINES: dict[str, Callable[[_Fields, str, str], None]] = {
    "lock": _lock,
    "tfd": _epoll,
    "inotify": _inotify,
    "fanotify": _fanotify,
    "eventfd-count": _number("eventfd_count", 16),
    "eventfd-id": _number("eventfd_id", 10),
    "eventfd-semaphore": _number("eventfd_semaphore", 10, bool),
    "clockid": _timer("clockid", int),
    "ticks": _timer("ticks", int),
    "settime flags": _timer("settime_flags", lambda value: int(value, 8)),
    "it_value": _timer("value", _nanoseconds),
    "it_interval": _timer("interval", _nanoseconds),
    "sigmask": _number("sigmask", 16),
    "Pid": _number("pid", 10),
    "NSpid": _ns_pids,
}
