"""Pseudoterminals whose both sides are in the tree, and consoles (`console`) (pty(7), ioctl_tty(2)).

A pair is one terminal with two images, CRIU's: one for the master, one for the slave. Settings are read and set
through the master, which the kernel lets speak for the slave. A terminal whose master is elsewhere is a person's: it
stays. A session gets its controlling terminal right after it has been made, so that children born later inherit it.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import struct
import termios
from dataclasses import dataclass
from typing import Any, ClassVar

from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import core_pb2, fdinfo_pb2, tty_pb2
from phaul_engine.program import Program
from phaul_engine.syscalls import NR

from . import console, unsupported
from .base import (
    Collection,
    Descriptor,
    DescriptorKind,
    Phase,
    RebuiltKind,
    Restoration,
    Scope,
    SkeletonTask,
    descriptor_kind,
    task_kind,
)
from .description import settle_status, signal_owner, status_flags
from .regular_file import open_at_root

_MASTER = os.makedev(5, 2)  # /dev/ptmx
_FIRST_SLAVE, _LAST_SLAVE = 136, 143  # majors (Documentation/admin-guide/devices.txt)
_MAX_INDEX = 4096  # kernel.pty.max
_PTMX = "/dev/ptmx"
_ON, _OFF = struct.pack("i", 1), struct.pack("i", 0)

# ioctl_tty(2); those that Python's termios does not have.
_TIOCGPTN = 0x80045430
_TIOCSPTLCK = 0x40045431
_TIOCGPTLCK = 0x80045439
_TIOCGPKT = 0x80045438
_TIOCGEXCL = 0x80045440
_TIOCGPTPEER = 0x5441
_TIOCGSID = 0x5429
_TCGETS2, _TCSETS2 = 0x802C542A, 0x402C542B
_TIOCGLCKTRMIOS, _TIOCSLCKTRMIOS = 0x5456, 0x5457
_termios2 = struct.Struct("<4I20B2I")  # flags, line and 19 characters, speeds
_termios = struct.Struct("<4I20B")
_winsize = struct.Struct("<4H")


@descriptor_kind
class Terminal(DescriptorKind):
    """Both sides of a pair are made together, at the index that the pair had."""

    name = "terminal"
    types: ClassVar = (fdinfo_pb2.TTY,)
    settled: ClassVar = ("fown",)

    def claims(self, descriptor: Descriptor) -> bool:
        status = descriptor.status
        if not stat.S_ISCHR(status.st_mode) or descriptor.info.flags & os.O_PATH:
            return False
        return status.st_rdev == _MASTER or _FIRST_SLAVE <= os.major(status.st_rdev) <= _LAST_SLAVE

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        index = _index(descriptor)
        is_master = descriptor.status.st_rdev == _MASTER
        collection.scratch.setdefault(self.name, {}).setdefault(index, []).append(descriptor)
        entry = tty_pb2.tty_file_entry(
            id=file_id,
            tty_info_id=_info_id(index, is_master),
            flags=status_flags(descriptor),
            fown=signal_owner(descriptor, collection),
        )
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.TTY, id=file_id, tty=entry)

    def finish(self, collection: Collection) -> None:
        for index, found in collection.scratch.pop(self.name, {}).items():
            master = next((one for one in found if one.status.st_rdev == _MASTER), None)
            if master is None and collection.options.get(console.OPTION):
                _collect_console(index, found, collection)
                continue
            if master is None:
                for descriptor in found:
                    collection.block(descriptor, *unsupported.TERMINAL)
                continue
            slave = next((one for one in found if one is not master), None)
            _collect_pair(index, master, slave, collection)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        info = _info(entry.tty.tty_info_id, restoration)
        if console.is_console(info, restoration):
            return console.open_slave(info.pty.index, entry.tty.flags, restoration)
        pair = _pair(info.pty.index, restoration)
        if info.id == _info_id(info.pty.index, True):
            if pair.given:
                raise ImageError(f"the master of terminal {info.pty.index} has more than one description")
            pair.given = True
            return fcntl.fcntl(pair.master, fcntl.F_DUPFD_CLOEXEC, 0)
        return _open_slave(pair.master, entry.tty.flags)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        info = _info(entry.tty.tty_info_id, restoration)
        if info.id == _info_id(info.pty.index, True):
            _settle_pair(fd, info)
        elif console.is_console(info, restoration):
            _settle_settings(fd, info)
        elif info.exclusive:
            fcntl.ioctl(fd, termios.TIOCEXCL)
        settle_status(fd, entry.tty.flags, entry.tty.fown, restoration)

    def release(self, restoration: Restoration) -> None:
        for pair in restoration.scratch.pop(self.name, {}).values():
            os.close(pair.master)

    def discard(self, restoration: Restoration) -> None:
        self.release(restoration)


@task_kind
class ControllingTerminal(RebuiltKind):
    """Which group of a session is in the foreground, set by the session's leader. See `adopt` for the terminal."""

    name = "controlling terminal"
    scope: ClassVar = Scope.PROCESS

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        info = _controlling(task.inner_pid, restoration)
        if phase is Phase.FINAL and info is not None and info.pgrp:
            fd = _open_in_task(info, program)
            numbering = restoration.numbering
            seen = numbering.name(info.pgrp).seen(numbering.name(task.inner_pid).space)
            group = program.data(struct.pack("<i", seen))
            program.order(NR.ioctl, fd, termios.TIOCSPGRP, group, label="set the foreground process group")
            program.order(NR.close, fd)


def adopt(leader: int, program: Program, restoration: Restoration) -> None:
    """Add what the leader of a session that has just been made does to get its controlling terminal, if it has one."""
    info = _controlling(leader, restoration)
    if info is not None:
        if not console.is_console(info, restoration):
            _pair(info.pty.index, restoration)
        fd = _open_in_task(info, program)
        program.order(NR.ioctl, fd, termios.TIOCSCTTY, 0, label="take the controlling terminal")
        program.order(NR.close, fd)


def controlled(collection: Collection) -> dict[int, int]:
    """The sessions that have a terminal of the tree: device number of the slave by inner session id."""
    records = collection.checkpoint.records("tty-info")
    return {record.message.sid: _slave_device(record.message.pty.index) for record in records if record.message.sid}


# -- collecting --------------------------------------------------------------------------------------------------


def _index(descriptor: Descriptor) -> int:
    rdev = descriptor.status.st_rdev
    if rdev == _MASTER:
        return _number(descriptor.own, _TIOCGPTN)
    return (os.major(rdev) - _FIRST_SLAVE << 8) + os.minor(rdev)


def _slave_device(index: int) -> int:
    return os.makedev(_FIRST_SLAVE + (index >> 8), index & 0xFF)


def _info_id(index: int, is_master: bool) -> int:
    """As CRIU numbers them."""
    return index << 1 | is_master


def _number(fd: int, request: int) -> int:
    value: int = struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0]
    return value


def _collect_pair(index: int, master: Descriptor, slave: Descriptor | None, collection: Collection) -> None:
    if not collection.survey:
        _refuse_unread(index, master, slave, collection)
    sid, pgrp = _session(index, master, collection)
    for is_master in (True, False):
        info = tty_pb2.tty_info_entry(
            id=_info_id(index, is_master),
            type=tty_pb2.PTY,
            locked=bool(_number(master.own, _TIOCGPTLCK)) and is_master,
            exclusive=bool(_number(slave.own, _TIOCGEXCL)) if slave is not None and not is_master else False,
            packet_mode=bool(_number(master.own, _TIOCGPKT)) and is_master,
            sid=0 if is_master else sid,
            pgrp=0 if is_master else pgrp,
            rdev=_kernel_dev(_MASTER if is_master else _slave_device(index)),
        )
        info.pty.index = index
        if slave is not None:
            ids = collection.ids
            info.uid, info.gid = ids.uid_inside(slave.status.st_uid), ids.gid_inside(slave.status.st_gid)
        _collect_settings(info, master.own)
        collection.checkpoint.put("tty-info", None, info)


def _collect_console(index: int, slaves: list[Descriptor], collection: Collection) -> None:
    if not collection.survey:
        console.refuse_unread(index, slaves, collection)
    sid, pgrp = console.leaders(_slave_device(index), collection)
    info = tty_pb2.tty_info_entry(
        id=_info_id(index, False),
        type=tty_pb2.PTY,
        locked=False,
        exclusive=False,
        packet_mode=False,
        sid=sid,
        pgrp=pgrp,
        rdev=_kernel_dev(_slave_device(index)),
    )
    info.pty.index = index
    _collect_settings(info, slaves[0].own)
    collection.checkpoint.put("tty-info", None, info)


def _kernel_dev(dev: int) -> int:
    return os.major(dev) << 20 | os.minor(dev)


def _session(index: int, master: Descriptor, collection: Collection) -> tuple[int, int]:
    """Inner ids of the session that the terminal controls and of its foreground group; 0 for none."""
    try:
        sid = _number(master.own, _TIOCGSID)
    except OSError:  # ENOTTY: it controls no session
        return 0, 0
    pgrp = _number(master.own, termios.TIOCGPGRP)
    inner = collection.inner_pids
    if inner.get(sid, 0) == 0:
        collection.block(
            master,
            f"terminal /dev/pts/{index}",
            f"the session that it controls is led by process {sid}, which stays or has ended",
            "move the leader too",
        )
    return inner.get(sid, 0), inner.get(pgrp, 0)


def _refuse_unread(index: int, master: Descriptor, slave: Descriptor | None, collection: Collection) -> None:
    poll = select.poll()
    poll.register(master.own, select.POLLIN)
    typed = slave is not None and _number(slave.own, termios.FIONREAD) > 0
    if typed or any(event & select.POLLIN for _, event in poll.poll(0)):
        collection.block(
            master,
            f"terminal /dev/pts/{index} with unread {'input' if typed else 'output'}",
            "it cannot be read without taking it from the program",
            "try again when it has been read",
            passing=True,
        )


def _collect_settings(info: tty_pb2.tty_info_entry, master: int) -> None:
    now = _termios2.unpack(fcntl.ioctl(master, _TCGETS2, bytes(_termios2.size)))
    _fill_termios(info.termios, now[:4], now[4:24], now[24:])
    locked = _termios.unpack(fcntl.ioctl(master, _TIOCGLCKTRMIOS, bytes(_termios.size)))
    _fill_termios(info.termios_locked, locked[:4], locked[4:], (0, 0))
    size = _winsize.unpack(fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(_winsize.size)))
    info.winsize.ws_row, info.winsize.ws_col, info.winsize.ws_xpixel, info.winsize.ws_ypixel = size


def _fill_termios(
    entry: tty_pb2.termios_entry, flags: tuple[int, ...], characters: tuple[int, ...], speeds: tuple[int, ...]
) -> None:
    entry.c_iflag, entry.c_oflag, entry.c_cflag, entry.c_lflag = flags
    entry.c_line = characters[0]
    entry.c_ispeed, entry.c_ospeed = speeds
    entry.c_cc.extend(characters[1:])


# -- rebuilding --------------------------------------------------------------------------------------------------


@dataclass
class _Pair:
    """A pair at the destination, by our descriptor of its master."""

    master: int
    given: bool = False


def _infos(restoration: Restoration) -> dict[int, tty_pb2.tty_info_entry]:
    found: dict[int, tty_pb2.tty_info_entry] | None = restoration.cache.get(Terminal.name)
    if found is None:
        records = restoration.checkpoint.records("tty-info")
        found = restoration.cache[Terminal.name] = {record.message.id: record.message for record in records}
    return found


def _info(info_id: int, restoration: Restoration) -> tty_pb2.tty_info_entry:
    info = _infos(restoration).get(info_id)
    if info is None:
        raise ImageError(f"there is no image of terminal {info_id}")
    if info.type != tty_pb2.PTY or not info.HasField("pty") or info.pty.index >= _MAX_INDEX:
        raise RebuildError(f"terminal {info_id} is no pseudoterminal that can be made again")
    return info


def _controlling(leader: int, restoration: Restoration) -> tty_pb2.tty_info_entry | None:
    return next((info for info in _infos(restoration).values() if info.sid == leader and leader), None)


def _pair(index: int, restoration: Restoration) -> _Pair:
    pairs: dict[int, _Pair] = restoration.scratch.setdefault(Terminal.name, {})
    if index not in pairs:
        master = _open_master(index, restoration)
        pairs[index] = _Pair(master)
        fcntl.ioctl(master, _TIOCSPTLCK, _OFF)
        owner = _infos(restoration).get(_info_id(index, False))
        if owner is not None and owner.HasField("uid"):
            slave = _open_slave(master, os.O_RDWR)
            os.fchown(slave, restoration.ids.uid_here(owner.uid), restoration.ids.gid_here(owner.gid))
            os.close(slave)
    return pairs[index]


def _open_master(index: int, restoration: Restoration) -> int:
    """A master with this index. The kernel gives the lowest that is free, so lower ones are held meanwhile."""
    held: list[int] = []
    try:
        while True:
            fd = open_at_root(_PTMX, os.O_RDWR, restoration, os.O_NOCTTY)
            got = _number(fd, _TIOCGPTN)
            if got == index:
                return fd
            held.append(fd)
            if got > index:
                raise RebuildError(
                    f"/dev/pts/{index} is taken on this host", advice="end who has it, or move into a container"
                )
    finally:
        for fd in held:
            os.close(fd)


def _open_slave(master: int, flags: int) -> int:
    flags &= os.O_ACCMODE | os.O_NONBLOCK
    return fcntl.ioctl(master, _TIOCGPTPEER, flags | os.O_NOCTTY | os.O_CLOEXEC)


def _open_in_task(info: tty_pb2.tty_info_entry, program: Program) -> Any:
    path = program.data(f"/dev/pts/{info.pty.index}\0".encode())
    return program.call(NR.open, path, os.O_RDWR | os.O_NOCTTY, 0, label=f"open /dev/pts/{info.pty.index}")


def _settle_pair(master: int, info: tty_pb2.tty_info_entry) -> None:
    _settle_settings(master, info)
    fcntl.ioctl(master, termios.TIOCPKT, _ON if info.packet_mode else _OFF)
    fcntl.ioctl(master, _TIOCSPTLCK, _ON if info.locked else _OFF)


def _settle_settings(master: int, info: tty_pb2.tty_info_entry) -> None:
    """Through either side."""
    if info.HasField("termios"):
        fcntl.ioctl(master, _TCSETS2, _termios2.pack(*_settings(info.termios), *_speeds(info.termios)))
    if info.HasField("termios_locked"):
        fcntl.ioctl(master, _TIOCSLCKTRMIOS, _termios.pack(*_settings(info.termios_locked)))
    if info.HasField("winsize"):
        size = info.winsize
        fields = (size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel)
        if max(fields) > 0xFFFF:
            raise ImageError(f"terminal {info.pty.index} has an impossible size")
        fcntl.ioctl(master, termios.TIOCSWINSZ, _winsize.pack(*fields))


def _settings(entry: tty_pb2.termios_entry) -> tuple[int, ...]:
    characters = (entry.c_line, *entry.c_cc)
    if len(characters) > 20 or any(value > 0xFF for value in characters):
        raise ImageError("a terminal with impossible control characters")
    padded = (*characters, *(0 for _ in range(20 - len(characters))))
    return (entry.c_iflag, entry.c_oflag, entry.c_cflag, entry.c_lflag, *padded)


def _speeds(entry: tty_pb2.termios_entry) -> tuple[int, int]:
    return entry.c_ispeed, entry.c_ospeed
