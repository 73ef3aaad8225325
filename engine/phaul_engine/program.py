"""The assembler for the injected interpreter (native/include/ph_interp.h).

A program is a list of system calls that a task runs inside itself: a source task, to tell what cannot be seen
from outside, or a skeleton task on the destination, to become what it has to be. The assembler lays out
instructions and buffer, and hands out typed operands:

    program = Program()
    old = program.space(32)                       # 32 bytes in the slot's buffer
    program.call(NR.rt_sigaction, 10, 0, old, 8)  # fails the program if the call fails
    results = task.run(program)
    results.bytes(old)
"""

from __future__ import annotations

import struct
from typing import NamedTuple, TypeAlias

from .syscalls import NR

_INSTRUCTION = struct.Struct("<4H8s6q")
_CALL, _SET, _ADD, _STORE, _LOAD, _JUMP, _LESS, _FORK, _SIGRETURN, _COPY, _NEXT, _REST = range(1, 13)
_FAIL_STOP, _FAIL_KEEP, _FAIL_UNLESS_DST = range(3)
_IMMEDIATE, _REGISTER, _BUFFER = range(3)
_REGISTERS = 64
PART_SIZE = 40_000  # bytes of instructions and buffer that a slot surely holds (ph_interp.h)


class Reg(NamedTuple):
    """A register of the slot, 64 bits wide."""

    number: int


class Buf(NamedTuple):
    """A stretch of the slot's buffer. As an operand it is its address in the task."""

    offset: int
    size: int

    def at(self, offset: int, size: int | None = None) -> Buf:
        """The part of this stretch that begins at `offset`."""
        return Buf(self.offset + offset, self.size - offset if size is None else size)


Operand: TypeAlias = int | Reg | Buf


class Step(NamedTuple):
    """Who asked for an instruction, so that a failure can name it."""

    nr: int
    note: str

    @property
    def label(self) -> str:
        """In words: what was noted, or the system call's name."""
        return self.note or NR(self.nr).name


def going_on(program: int, buffer: int, count: int) -> bytes:
    """The instruction in place of END that goes on with another program in the slot: its offset, that of its buffer,
    and how many instructions it has, END included."""
    return _INSTRUCTION.pack(_NEXT, 0, 0, 0, bytes(8), program, buffer, count, 0, 0, 0)


class Program:
    """A program under construction. Registers are handed out once each; there are 64."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._buffer = bytearray()
        self._next_register = 0
        self._scratch: Reg | None = None
        self._before: list[Program] = []
        self.steps: list[Step] = []
        self.rests = False  # whether it ends with `rest`

    def register(self) -> Reg:
        """A register nobody else uses."""
        if self._next_register == _REGISTERS:
            raise ValueError("a program has 64 registers")
        self._next_register += 1
        return Reg(self._next_register - 1)

    def space(self, size: int, align: int = 8) -> Buf:
        """Zeroed room in the buffer."""
        self._buffer.extend(bytes(-len(self._buffer) % align))
        offset = len(self._buffer)
        self._buffer.extend(bytes(size))
        return Buf(offset, size)

    def data(self, content: bytes, align: int = 8) -> Buf:
        """Room in the buffer that holds `content`."""
        room = self.space(len(content), align)
        self._buffer[room.offset : room.offset + len(content)] = content
        return room

    def make_room(self, size: int) -> bool:
        """Be able to take `size` more bytes of instructions (64 each) and buffer.

        If they would not fit into a slot, what was assembled so far becomes a program of its own, to be run before
        this one: operands handed out before must not be used any more. The answer tells whether that happened.
        """
        if len(self._code) + len(self._buffer) + size <= PART_SIZE or not self.steps:
            return False
        part = Program()
        part._code, part._buffer, part.steps = self._code, self._buffer, self.steps
        self._code, self._buffer, self.steps = bytearray(), bytearray(), []
        self._next_register, self._scratch = 0, None
        self._before.append(part)
        return True

    @property
    def parts(self) -> list[Program]:
        """The programs to be run one after the other, this one last; those without instructions left out."""
        return [part for part in (*self._before, self) if part.steps]

    def call(
        self,
        nr: NR,
        *args: Operand,
        into: Reg | None = None,
        keep_errors: bool = False,
        expect: int | None = None,
        label: str = "",
    ) -> Reg:
        """A system call. Its result is in the returned register.

        A failing call ends the program, unless `keep_errors` (then the register holds -errno). With `expect`,
        any other result ends it too.
        """
        dst = self.register() if into is None else into
        policy = _FAIL_KEEP if keep_errors else _FAIL_STOP
        if expect is not None:
            self.set(dst, expect)
            policy = _FAIL_UNLESS_DST
        self._emit(_CALL, args, dst=dst, nr=nr, policy=policy, label=label)
        return dst

    def order(self, nr: NR, *args: Operand, keep_errors: bool = False, label: str = "") -> None:
        """A system call whose result nobody asks for: as `call`, but it uses up no register."""
        if self._scratch is None:
            self._scratch = self.register()
        policy = _FAIL_KEEP if keep_errors else _FAIL_STOP
        self._emit(_CALL, args, dst=self._scratch, nr=nr, policy=policy, label=label)

    def ask(self, nr: NR, *args: Operand, label: str = "") -> Buf:
        """A system call whose result, or -errno, is left in the buffer for `Results.answer`; it uses up no register."""
        answer = self.space(8)
        self.order(nr, *args, keep_errors=True, label=label)
        assert self._scratch is not None
        self.store(answer, self._scratch)
        return answer

    def set(self, dst: Reg, value: Operand) -> None:
        """dst = value."""
        self._emit(_SET, (value,), dst=dst)

    def add(self, dst: Reg, left: Operand, right: Operand) -> None:
        """dst = left + right."""
        self._emit(_ADD, (left, right), dst=dst)

    def less(self, dst: Reg, left: Operand, right: Operand) -> None:
        """dst = left < right, signed."""
        self._emit(_LESS, (left, right), dst=dst)

    def store(self, address: Operand, value: Operand) -> None:
        """Write 64 bits at an address of the task."""
        self._emit(_STORE, (address, value))

    def load(self, dst: Reg, address: Operand) -> None:
        """Read 64 bits at an address of the task."""
        self._emit(_LOAD, (address,), dst=dst)

    def copy(self, to: Operand, source: Operand, size: Operand) -> None:
        """Copy bytes inside the task."""
        self._emit(_COPY, (to, source, size))

    def here(self) -> int:
        """The index of the next instruction, a target for `jump_if`."""
        return len(self.steps)

    def jump_if(self, target: int, condition: Operand) -> None:
        """Go to instruction `target` if `condition` is not zero."""
        self._emit(_JUMP, (target, condition))

    def fork(self, clone_args: Buf, slot: int, *, label: str = "clone3") -> Reg:
        """clone3; the child interprets in `slot`. The result is its pid."""
        dst = self.register()
        self._emit(_FORK, (clone_args, clone_args.size, slot), dst=dst, nr=int(NR.clone3), label=label)
        return dst

    def rest(self, nr: NR, *args: Operand) -> None:
        """The last instruction: the program is done, and the task sleeps in a system call until it is halted."""
        self._emit(_REST, args, nr=nr)
        self.rests = True

    def assemble(self) -> tuple[bytes, bytes]:
        """Instructions (END included) and buffer."""
        return bytes(self._code) + bytes(_INSTRUCTION.size), bytes(self._buffer)

    @property
    def size(self) -> int:
        """Bytes of what `assemble` gives."""
        return len(self._code) + _INSTRUCTION.size + len(self._buffer)

    def _emit(
        self,
        op: int,
        args: tuple[Operand, ...],
        *,
        dst: Reg | None = None,
        nr: int = 0,
        policy: int = _FAIL_STOP,
        label: str = "",
    ) -> None:
        kinds = bytearray(8)
        values = [0] * 6
        for index, arg in enumerate(args):
            if isinstance(arg, Buf):
                kinds[index], values[index] = _BUFFER, arg.offset
            elif isinstance(arg, Reg):
                kinds[index], values[index] = _REGISTER, arg.number
            else:
                values[index] = arg if arg < 1 << 63 else arg - (1 << 64)
        self._code += _INSTRUCTION.pack(op, policy, dst.number if dst else 0, nr, kinds, *values)
        self.steps.append(Step(nr, label))


class Results:
    """What a program that ran to its end left behind."""

    def __init__(self, registers: tuple[int, ...], buffer: bytes) -> None:
        self._registers = registers
        self._buffer = buffer

    @property
    def buffer(self) -> bytes:
        """All of the buffer."""
        return self._buffer

    def value(self, register: Reg) -> int:
        """A register, signed."""
        return self._registers[register.number]

    def answer(self, room: Buf) -> int:
        """What `Program.ask` was told: the result of a system call, or -errno."""
        return int.from_bytes(self.bytes(room), "little", signed=True)

    def bytes(self, room: Buf) -> bytes:
        """A stretch of the buffer."""
        return self._buffer[room.offset : room.offset + room.size]
