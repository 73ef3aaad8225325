"""Arenas: memory that the engine shares with interpreters (native/include/ph_interp.h), and running programs there."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import RebuildError, TargetError
from .native import check, error_text, failure, ffi, lib, new_error
from .program import Buf, Program, Results, going_on

_HEAD = 1024
_ALIGNED = 8
_SOON_US = 2000
_NAP_US, _LONG_NAP_US = 20, 500
_LIMIT = lib.PH_SLOT_SIZE - lib.PH_SLOT_STACK - lib.PH_SLOT_FRAME - 2048


class Seat(NamedTuple):
    """A task that interprets: its slot, and its tid in our pid namespace."""

    slot: int
    tid: int


def loads(programs: Iterable[Program]) -> list[list[Program]]:
    """Programs that are to run one after the other, by what fits into a slot at once."""
    packed: list[list[Program]] = []
    room = 0
    for program in programs:
        size = program.size + _ALIGNED
        if size > room:
            packed.append([])
            room = _LIMIT - _HEAD
        packed[-1].append(program)
        room -= size
    return packed


def failed(program: Program, head: Any, tid: int) -> TargetError:
    """The error of a program that stopped early, naming the instruction. `head` tells which (struct ph_slot)."""
    step = program.steps[head.failed_at]
    problem = TargetError(f"{step.label} in task {tid}: {error_text(head.error)} (result {head.result})")
    problem.errno = head.error
    return problem


class Arena:
    """A number of slots in memory at `pointer`."""

    def __init__(self, pointer: Any, slots: int) -> None:
        self.pointer = ffi.cast("char *", pointer)
        self.slots = slots
        self._loaded: dict[int, dict[int, Program]] = {}  # what a slot holds, by offset

    def load(self, slot: int, programs: Sequence[Program]) -> None:
        """Write programs into a slot, to run one after the other."""
        base, at, before = self.pointer + slot * lib.PH_SLOT_SIZE, _HEAD, 0
        loaded = self._loaded[slot] = {}
        for program in programs:
            code, buffer = program.assemble()
            room = at + len(code)
            if room + len(buffer) > _LIMIT:
                raise RebuildError(f"a program of {len(code) // 64} instructions and {len(buffer)} bytes is too large")
            ffi.memmove(base + at, code, len(code))
            ffi.memmove(base + room, buffer, len(buffer))
            if before:
                step = going_on(at, room, len(program.steps) + 1)
                ffi.memmove(base + before - len(step), step, len(step))
            else:
                head = self._head(slot)
                head.program, head.buffer, head.count = at, room, len(program.steps) + 1
            loaded[at] = program
            before, at = room, room + len(buffer) + -len(buffer) % _ALIGNED

    def lend(self, slot: int, content: bytes) -> int:
        """Put up to 1 KiB where no program of a slot stands; returns its offset in the arena."""
        at: int = slot * lib.PH_SLOT_SIZE + _LIMIT
        ffi.memmove(self.pointer + at, content, len(content))
        return at

    def prepare(self, slot: int, address: int) -> None:
        """Clear a slot for a new task, in which slot 0 of the arena is at `address`."""
        head = self._head(slot)
        ffi.memmove(head, bytes(ffi.sizeof("struct ph_slot")), ffi.sizeof("struct ph_slot"))
        head.arena = address

    def check(self, seat: Seat) -> None:
        """Raise TargetError, naming the instruction, if a program stopped early."""
        head = self._head(seat.slot)
        if head.error:
            raise failed(self._loaded[seat.slot][head.program], head, seat.tid)

    def results(self, slot: int, program: Program) -> Results:
        """What the program left."""
        head = self._head(slot)
        size = len(program.assemble()[1])
        base = self.pointer + slot * lib.PH_SLOT_SIZE + head.buffer
        return Results(tuple(head.regs), bytes(ffi.buffer(base, size)))

    def words(self, slot: int, room: Buf) -> Any:
        """A stretch of the buffer of a program that was loaded, 64 bits each, as it is while the program runs."""
        return ffi.cast(
            "volatile uint64_t *", self.pointer + slot * lib.PH_SLOT_SIZE + self._head(slot).buffer + room.offset
        )

    def run(self, tracer: Any, programs: Mapping[Seat, Program], timeout_ms: int = 10_000) -> dict[Seat, Results]:
        """Run programs, all at once, one in each seat."""
        self.order(tracer, {seat: [program] for seat, program in programs.items()}, timeout_ms)
        return {seat: self.results(seat.slot, program) for seat, program in programs.items()}

    def order(
        self,
        tracer: Any,
        programs: Mapping[Seat, Sequence[Program]],
        timeout_ms: int = 10_000,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """The same, any number in each, where nobody asks for what they leave; TargetError all the same if one stops
        early. `meanwhile` is done while they run, and needs no tracer."""
        for seat, mine in programs.items():
            self.begin(seat, mine)
        self.wait(tracer, programs.keys(), timeout_ms, meanwhile)

    def begin(self, seat: Seat, programs: Sequence[Program]) -> None:
        """Begin programs in a seat. `wait` must follow, unless they do not come to their end: `check` raises if one
        did, because it failed."""
        self.load(seat.slot, programs)
        lib.ph_ring(self.pointer, seat.slot)

    def wait_without(self, seats: Collection[Seat]) -> bool:
        """Wait for programs that have been begun in these seats, none of which needs the tracer, as births do: to wake
        that one takes longer than most of them. False if it has to be waited for with it after all."""
        resting = [seat.slot for seat in seats if self._last(seat).rests]  # of these nobody hears
        ending = [seat.slot for seat in seats if not self._last(seat).rests]
        for these, nap in ((ending, _LONG_NAP_US), (resting, _NAP_US)):
            if lib.ph_run_wait(self.pointer, ffi.new("int32_t[]", these), len(these), nap, _SOON_US):
                return False
        for seat in seats:
            self.check(seat)
        return True

    def _last(self, seat: Seat) -> Program:
        return next(reversed(self._loaded[seat.slot].values()))

    def wait(
        self,
        tracer: Any,
        seats: Collection[Seat],
        timeout_ms: int = 10_000,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Wait for programs that have been begun in these seats; the rest as in `order`."""
        slots = ffi.new("int32_t[]", [seat.slot for seat in seats])
        tids = ffi.new("int32_t[]", [seat.tid for seat in seats])
        err = new_error()
        running = lib.ph_run_begin(tracer, self.pointer, slots, tids, len(seats), timeout_ms, err)
        if not running:
            raise failure(err)
        try:
            if meanwhile is not None:
                meanwhile()
        finally:
            result = lib.ph_run_end(running)
        check(result, err)
        for seat in seats:
            self.check(seat)

    def _head(self, slot: int) -> Any:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} of {self.slots}")
        return ffi.cast("struct ph_slot *", self.pointer + slot * lib.PH_SLOT_SIZE)


class OwnArena(Arena):
    """An arena in a memory file of ours, for skeleton tasks to map."""

    def __init__(self, slots: int) -> None:
        self.size = slots * lib.PH_SLOT_SIZE
        self.fd = os.memfd_create("phaul-arena", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)
        self._view: Any = ffi.from_buffer(self._map)
        super().__init__(self._view, slots)

    def close(self) -> None:
        """Give the memory back."""
        ffi.release(self._view)
        self._map.close()
        os.close(self.fd)
