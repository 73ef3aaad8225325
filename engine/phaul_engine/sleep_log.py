"""How long the sleeps of threads have to go on.

Nothing tells it of a thread that stands: the kernel keeps it in a restart block that nobody can read, or forgets it
when the stop ends the call. So threads are looked at before they are stopped. When one went to sleep is when it ran
last, and its call says how long it may sleep. What was learnt is kept, since after a stop neither can be seen any more:
the call that the kernel makes again has another number (restart_syscall(2)), and the one that we have made again a
shorter limit.

If a thread turns out to have run between look and stop, its call is taken to have just begun; this is wrong by no more
than the time between the two, unless it was woken in vain. A wake-up in vain, and a stop by somebody else, make the
time count from then: sleeps may end late by that, never early.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import EngineError, GoneError
from .native import check, ffi, lib, new_error
from .proc.access import open_process, read_bytes
from .proc.maps import Area, parse_maps
from .proc.tree import read_tree
from .proc.waiting import (
    Waiting,
    clock_ahead,
    read_last_run,
    read_runs,
    read_switches,
    read_wait_channel,
    read_waiting,
)
from .registers import ARGUMENTS, general, interrupted_call, signed
from .sleeps import LIMITS, End, Form, Read, milliseconds, packed, rest_written, time_limit
from .syscalls import NR

if TYPE_CHECKING:
    from .target import Process, Thread, Tree

_BELOW = 32768  # bytes under the stack pointer: what a signal handler that comes first uses is above
_SYSCALL_SIZE = 2  # bytes of the instruction
_NO_HAND = -514  # ERESTARTNOHAND: a call that the kernel makes again by what it has written
_ORIG_AX = general("orig_ax")
_ARGUMENTS = tuple(map(general, ARGUMENTS))
_NEVER = -2  # as a count of switches: none is one more
_CALLS_BY_CHANNEL = (("futex", NR.futex), ("poll", NR.poll))
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Sleep:
    """The interrupted call of a stopped thread. `nr` is the call that the program made; `left` is in nanoseconds, None
    if its time is not limited, or ends at a time. `cut`: the stop has ended the call, which the thread makes again."""

    nr: int
    left: int | None = None
    cut: bool = False


@dataclass
class _Known:
    """A sleep as it was seen: `nr` is the program's call, `end` in nanoseconds of our CLOCK_MONOTONIC (None: without
    limit). `kept`: it has been interrupted since it began."""

    waiting: Waiting
    nr: int
    end: int | None
    switches: int
    kept: bool = False
    runs: int = 0  # as often as it has run; 0 where the kernel does not count


class SleepLog:
    """What is known of the sleeps of threads, by tid."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._file: Path | None = None

    def remember(self, file: Path) -> None:
        """Share what is learnt with other processes of this host, before and after: a program is looked at by one,
        and moved by another. `file` is where what is true until the next boot may stand."""
        self._file = file
        for tid, known in self._read().items():
            self._known.setdefault(tid, known)

    def save(self) -> None:
        """Write down what cannot be seen of sleeping threads. If that fails, sleeps may be longer."""
        if self._file is None:
            return
        now, found = time.monotonic_ns(), self._read()
        kept = found | {tid: one for tid, one in self._known.items() if one.kept}
        kept = {
            tid: one
            for tid, one in kept.items()
            if (one.end is None or one.end > now) and os.path.exists(f"/proc/{tid}")
        }
        if kept == found:
            return
        lines = [
            json.dumps([tid, one.waiting.nr, *one.waiting.args, one.waiting.sp, one.waiting.ip, one.nr, one.end, now])
            for tid, one in kept.items()
        ]
        with contextlib.suppress(OSError):
            beside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
            beside.write_text("\n".join(lines))
            beside.rename(self._file)
            if not kept:
                self._file.unlink()

    def _read(self) -> dict[int, _Known]:
        found: dict[int, _Known] = {}
        now = time.monotonic_ns()
        with contextlib.suppress(OSError, ValueError):
            for line in self._file.read_text().splitlines() if self._file is not None else ():
                tid, nr, *args, sp, ip, call, end, written = json.loads(line)
                if written <= now and (end is None or now < end) and call in LIMITS:
                    found[tid] = _Known(Waiting(nr, tuple(args), sp, ip), call, end, 0, kept=True)
        return found

    def expect(self, tid: int, waiting: Waiting, left: int) -> None:
        """A thread that is built here will sleep in this call for so many nanoseconds more."""
        self._known[tid] = _Known(waiting, waiting.nr, time.monotonic_ns() + left, 0, kept=True)

    def look(self, root: int) -> None:
        """Before a tree is stopped: note what its threads sleep in."""
        ahead: dict[int, int] = {}  # by processor
        with contextlib.suppress(GoneError):
            for process in read_tree(root):
                with contextlib.suppress(GoneError):
                    self._look_at(process.pid, process.threads, ahead)

    def _look_at(self, pid: int, tids: tuple[int, ...], ahead: dict[int, int]) -> None:
        proc = open_process(pid)
        try:
            for tid in tids:
                with contextlib.suppress(EngineError, OSError):
                    self._look_at_thread(proc, tid, _reader(pid), ahead)
        finally:
            os.close(proc)

    def _look_at_thread(self, proc: int, tid: int, read: Read, ahead: dict[int, int]) -> None:
        waiting, before = read_waiting(proc, tid), self._known.get(tid)
        if waiting is None or (before is not None and before.kept and _goes_on(before, waiting)):
            return
        self._known.pop(tid, None)
        if waiting.nr not in LIMITS and waiting.nr != NR.restart_syscall:
            return
        nr = waiting.nr
        if nr == NR.restart_syscall:
            nr = _call_by_channel(read_wait_channel(proc, tid), waiting)
            if nr == NR.restart_syscall:
                return
        limit, end, switches, runs = time_limit(nr, waiting.args, read), None, _NEVER, 0
        if limit is None and not _is_restarted(nr, waiting):
            return
        run = None if limit is None else read_last_run(proc, tid)
        if limit is not None and run is not None:
            if run.cpu not in ahead:
                ahead[run.cpu] = clock_ahead(run.cpu)
            end, switches = min(run.time + ahead[run.cpu], time.monotonic_ns()) + limit, run.switches
            runs = read_runs(proc, tid)
        self._known[tid] = _Known(waiting, nr, end, switches, waiting.nr == NR.restart_syscall, runs)

    def settle(self, tree: Tree) -> None:
        """After a tree was stopped and its threads' states were read: tell of each what is left of its sleep. Calls
        that the stop has cut short are to be made again by the thread, for what is left: its state says so now."""
        now = time.monotonic_ns()
        for process in tree.processes.values():
            for thread in process.threads:
                if thread.zombie:
                    continue
                if thread.sleep is None:
                    thread.sleep = self._settle(process, thread, now)
                elif thread.sleep.left is not None:  # its state is read once more in the same stop
                    thread.sleep = replace(thread.sleep, left=self._left(thread, now))
                if thread.sleep is not None and thread.state.regs[_ORIG_AX] == NR.restart_syscall:
                    thread.state.call = thread.sleep.nr

    def _settle(self, process: Process, thread: Thread, now: int) -> Sleep | None:
        state, known = thread.state, self._known.get(thread.tid)
        code = interrupted_call(state)
        if not (code or state.restarted):
            return None
        if known is None and code != _NO_HAND and state.regs[_ORIG_AX] != NR.restart_syscall:
            return None  # it ran when it was looked at: if it sleeps, that has just begun
        waiting = _waiting(state)
        if known is None or not _goes_on(known, waiting):
            return self._begin(process, thread, waiting, now)
        left = rest_written(known.nr, waiting.args, code, _reader(process.pid))
        if left is not None:
            known.end = now + left
        elif not known.kept and (known.end is None or _has_run(process, thread, known)):
            return self._begin(process, thread, waiting, now)
        known.kept = LIMITS[known.nr].end is End.BLOCK
        if known.end is None:
            return Sleep(known.nr)
        left = max(known.end - now, 0)
        if state.restarted and not self._cut(process, thread, left):
            return Sleep(known.nr)
        return Sleep(known.nr, left, bool(state.restarted))

    def _begin(self, process: Process, thread: Thread, waiting: Waiting, now: int) -> Sleep | None:
        """A call that has begun after the look, or that has no limit."""
        if waiting.nr not in LIMITS:
            return Sleep(waiting.nr) if waiting.nr == NR.restart_syscall else None
        read = _reader(process.pid)
        left = rest_written(waiting.nr, waiting.args, interrupted_call(thread.state), read)
        if left is None:
            left = time_limit(waiting.nr, waiting.args, read)
        end, kept = None if left is None else now + left, LIMITS[waiting.nr].end is End.BLOCK
        self._known[thread.tid] = _Known(waiting, waiting.nr, end, _NEVER, kept)
        return Sleep(waiting.nr, None if thread.state.restarted else left)

    def _left(self, thread: Thread, now: int) -> int:
        end = self._known[thread.tid].end
        return max((now if end is None else end) - now, 0)

    def shorten(self, tree: Tree) -> None:
        """Before a tree runs on: the time that it stood is time that its calls waited."""
        now, states = time.monotonic_ns(), []
        for process in tree.processes.values():
            for thread in process.threads:
                if thread.sleep is None or thread.sleep.left is None:
                    continue
                known, left = self._known[thread.tid], self._left(thread, now)
                limit = LIMITS[known.nr]
                if limit.form is not Form.MILLISECONDS:
                    if thread.sleep.cut or limit.end is End.WRITTEN:
                        with contextlib.suppress(OSError):
                            _write(process.pid, known.waiting.args[limit.argument], packed(left, limit.form))
                elif thread.sleep.cut:
                    thread.state.regs[general(ARGUMENTS[limit.argument])] = milliseconds(left)
                if thread.sleep.cut:
                    known.waiting = known.waiting._replace(args=_arguments(thread.state))
                    states.append(thread.state)
        if states:
            together = ffi.new("struct ph_thread_state[]", len(states))
            for place, state in zip(together, states, strict=True):
                ffi.memmove(ffi.addressof(place), state, ffi.sizeof("struct ph_thread_state"))
            err = new_error()
            check(lib.ph_set_states(tree.tracer.handle, together, len(states), err), err)

    def _cut(self, process: Process, thread: Thread, left: int) -> bool:
        """Have a call that the thread is to make again end in time."""
        known = self._known[thread.tid]
        limit = LIMITS[known.nr]
        if limit.form is Form.MILLISECONDS:
            value = milliseconds(left)
        else:
            value = _lend(process, thread, packed(left, limit.form))
            if not value:
                return False
        thread.state.regs[general(ARGUMENTS[limit.argument])] = value
        known.waiting, known.kept = _waiting(thread.state), True
        return True


log = SleepLog()  # whoever stops a thread has to know what was learnt before an earlier stop, of whatever purpose


def _has_run(process: Process, thread: Thread, known: _Known) -> bool:
    """Whether a thread has run between the look and the stop, for which it had to run once."""
    if read_runs(process.proc, thread.tid) == known.runs + 1:
        return False  # for certain; else it may have been interrupted on its way
    return read_switches(process.proc, thread.tid) != known.switches + 1


def _goes_on(known: _Known, waiting: Waiting) -> bool:
    """Whether a call is the one that is known, possibly made again by the kernel: which has then another number."""
    again = NR.restart_syscall if known.kept and LIMITS[known.nr].end is End.BLOCK else known.nr
    return known.waiting[1:] == waiting[1:] and waiting.nr in (again, NR.restart_syscall)


def _is_restarted(nr: int, waiting: Waiting) -> bool:
    """Whether a call without a limit goes on as restart_syscall(2): poll(2), and futex(2) until a time."""
    return nr == NR.poll or (nr == NR.futex and waiting.args[LIMITS[nr].argument] != 0)


def _call_by_channel(channel: str, waiting: Waiting) -> int:
    """Which call the kernel has made again, by where the thread sleeps."""
    if not channel:
        return NR.restart_syscall
    for name, nr in _CALLS_BY_CHANNEL:
        if name in channel:
            return nr
    # The functions of the others pass for the scheduler's, and are not named: what is, is their caller. The first
    # argument of one is an address, of the other the number of a clock.
    return NR.clock_nanosleep if signed(waiting.args[0]) < 4096 else NR.nanosleep


def _waiting(state: Any) -> Waiting:
    """The interrupted call of a stopped thread, as it would be seen if it still slept."""
    regs, args = state.regs, _arguments(state)
    if state.restarted:
        return Waiting(regs[general("ax")], args, regs[general("sp")], regs[general("ip")] + _SYSCALL_SIZE)
    return Waiting(regs[general("orig_ax")], args, regs[general("sp")], regs[general("ip")])


def _arguments(state: Any) -> tuple[int, ...]:
    return tuple(state.regs[index] for index in _ARGUMENTS)


def _reader(pid: int) -> Read:
    """Reads what the program itself may read in its memory."""

    def read(address: int, size: int) -> bytes:
        content = ctypes.create_string_buffer(size)
        _transfer(_libc.process_vm_readv, pid, address, content, size)
        return content.raw

    return read


class _Vector(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def _transfer(call: Any, pid: int, address: int, content: Any, size: int) -> None:
    here, there = _Vector(ctypes.addressof(content), size), _Vector(address, size)
    if call(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != size:
        raise OSError(ctypes.get_errno(), f"memory of process {pid} at {address:#x}")


def _write(pid: int, address: int, content: bytes) -> None:
    size = len(content)
    _transfer(_libc.process_vm_writev, pid, address, ctypes.create_string_buffer(content, size), size)


def _lend(process: Process, thread: Thread, content: bytes) -> int:
    """Put bytes into unused stack of a thread; returns their address, 0 if it is not sure that it is unused.

    That is so on a main thread's stack, and on one that ends in the thread's own control block, as the stacks of C
    libraries do, with no other thread's in between.
    """
    pointer, block = thread.state.regs[general("sp")], thread.state.regs[general("fs_base")]
    address = (pointer - _BELOW) & ~15
    area = _area_at(process, pointer)
    if area is None or area.shared or area.is_file or address < area.start:
        return 0
    if area.path != "[stack]" and not pointer <= block < area.end:
        return 0
    others = [other.state.regs[general("fs_base")] for other in process.threads if not other.zombie]
    if any(address <= other < pointer for other in others):
        return 0
    with contextlib.suppress(OSError):
        _write(process.pid, address, content)
        return int(address)
    return 0


def _area_at(process: Process, address: int) -> Area | None:
    """The area of an address. Only that one is parsed: a program may have thousands."""
    for line in read_bytes(process.proc, "maps").split(b"\n"):
        start, _, rest = line.partition(b"-")
        if rest and int(start, 16) <= address < int(rest.partition(b" ")[0], 16):
            return parse_maps(line + b"\n")[0]
    return None
