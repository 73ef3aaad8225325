"""Registers of a thread: `struct ph_thread_state` to image and back (x86-64).

Images hold what CRIU's do: general registers, FXSAVE fields and the XSAVE components CRIU knows, and a system call
that the stop interrupted is shown as about to be made again. Besides, in fields of our own, the whole XSAVE area and
the kernel's restart code, so that nothing is lost between two phauls; zeros at the area's end are left out, which on
processors with tiles is nearly all of it. To take an area apart costs more than to read
it, so that in a freeze only the area is carried, with its layout; `spread` fills in the rest.
"""

from __future__ import annotations

import functools
import operator
import struct
from typing import Any, NamedTuple

from .images.pb import core_pb2, core_x86_pb2
from .native import ffi, lib

_GENERAL = (
    *("r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di"),
    *("orig_ax", "ip", "cs", "flags", "sp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_registers_of = operator.attrgetter(*_GENERAL)
_AX, _ORIG, _IP = (_GENERAL.index(name) for name in ("ax", "orig_ax", "ip"))
ARGUMENTS = ("di", "si", "dx", "r10", "r8", "r9")  # of a system call, in order
_ALL_ONES = (1 << 64) - 1
_RESTART_CODES = (512, 513, 514, 516)
_RESTART_BLOCK = 516
_FXSAVE_HEAD = struct.Struct("<HHHHQQII")
_FXSAVE = struct.Struct("<HHHHQQII32I64I")
_GENERAL_BYTES = struct.Struct("<27Q")
_PLACE = struct.Struct("<2I")
_FXSAVE_SIZE = 512
_XCR0_AT = 464
_XSTATE_BV_AT = 512
_HEADER_END = 576


class _Component(NamedTuple):
    """An XSAVE component that CRIU's format knows: its number, the image's field, and struct code of one element."""

    number: int
    field: str
    code: str
    length: int

    @property
    def form(self) -> struct.Struct:
        """How it stands in the area."""
        return struct.Struct(f"<{self.length}{self.code}")


_COMPONENTS = (
    _Component(2, "ymmh_space", "I", 64),
    _Component(3, "bndreg_state", "Q", 8),
    _Component(4, "bndcsr_state", "Q", 8),
    _Component(5, "opmask_reg", "Q", 8),
    _Component(6, "zmm_upper", "Q", 64),
    _Component(7, "hi16_zmm", "Q", 128),
    _Component(9, "pkru", "I", 2),
)
_SIZES = {component.number: component.form.size for component in _COMPONENTS}


def general(name: str) -> int:
    """The index of a general register in `ph_thread_state.regs`."""
    return _GENERAL.index(name)


def signed(value: int) -> int:
    """A register as a signed number."""
    return value - (1 << 64) if value >> 63 else value


def interrupted_call(state: Any) -> int:
    """The restart code (negative) if a system call of this thread was interrupted by the stop, else 0."""
    result = signed(state.regs[_AX])
    return result if signed(state.regs[_ORIG]) >= 0 and -result in _RESTART_CODES else 0


def collect_registers(state: Any, core: core_pb2.core_entry) -> None:
    """Put a thread's registers, rseq registration, robust list and mask into its image."""
    core.mtype = core_pb2.core_entry.X86_64
    info, thread = core.thread_info, core.thread_core
    general = list(_GENERAL_BYTES.unpack_from(ffi.buffer(state.regs)))
    code = interrupted_call(state)
    if code:
        thread.interrupted = code
        general[_AX], general[_IP] = general[_ORIG], general[_IP] - 2
    registers = info.gpregs
    for name, value in zip(_GENERAL, general, strict=True):
        setattr(registers, name, value)
    registers.mode = core_x86_pb2.NATIVE
    area = bytes(ffi.buffer(state.xstate, state.xstate_size))
    info.xstate = area.rstrip(b"\0").ljust(min(len(area), _HEADER_END), b"\0")
    info.xstate_layout = _layout()
    fp = info.fpregs
    (fp.cwd, fp.swd, fp.twd, fp.fop, fp.rip, fp.rdp, fp.mxcsr, fp.mxcsr_mask) = _FXSAVE_HEAD.unpack_from(area)
    thread.blk_sigset = state.sigmask
    thread.futex_rla, thread.futex_rla_len = state.robust_head, state.robust_size
    if state.rseq_address:
        rseq = thread.rseq_entry
        rseq.rseq_abi_pointer, rseq.rseq_abi_size = state.rseq_address, state.rseq_size
        rseq.signature = state.rseq_signature


def spread(core: core_pb2.core_entry) -> None:
    """Fill in what CRIU's images have of the extended state, from the area and its layout."""
    info = core.thread_info
    area, fp = info.xstate, info.fpregs
    if not area or fp.xmm_space:
        return
    places = dict(_PLACE.iter_unpack(info.xstate_layout))
    area = area.ljust(max([at + _SIZES.get(number, 0) for number, at in places.items()], default=0), b"\0")
    registers = _FXSAVE.unpack_from(area)[8:]
    fp.st_space.extend(registers[:32])
    fp.xmm_space.extend(registers[32:])
    if len(area) < _HEADER_END:
        return
    (fp.xsave.xstate_bv,) = struct.unpack_from("<Q", area, _XSTATE_BV_AT)
    for component in _COMPONENTS:
        at, form = places.get(component.number, 0), component.form
        if at and at + form.size <= len(area):
            getattr(fp.xsave, component.field).extend(form.unpack_from(area, at))


@functools.cache
def _layout() -> bytes:
    """The components of this CPU, as in an image."""
    found = ((component.number, _component_at(component, 1 << 32)) for component in _COMPONENTS)
    return b"".join(_PLACE.pack(number, at) for number, at in found if at)


def rebuild_registers(
    core: core_pb2.core_entry, state: Any, *, sleeping: bool = False, result: int | None = None
) -> None:
    """Fill a `struct ph_thread_state` from an image.

    A call that was interrupted is left to the kernel's own restart (its code stands in rax again), so that a signal
    that is delivered first has its due effect. One that needs the kernel's restart block is so only if the thread has
    got it (`sleeping`, see sleeps.py), and else made again. One that has come to an end since has its `result`.
    """
    info, thread = core.thread_info, core.thread_core
    general = list(_registers_of(info.gpregs))
    code = thread.interrupted
    if code and result is not None:
        general[_AX], general[_ORIG], general[_IP] = result & _ALL_ONES, _ALL_ONES, general[_IP] + 2
    elif code and (sleeping or -code != _RESTART_BLOCK):
        general[_AX], general[_IP] = code & _ALL_ONES, general[_IP] + 2
    else:
        general[_ORIG] = _ALL_ONES
    _GENERAL_BYTES.pack_into(ffi.buffer(state.regs), 0, *general)
    area = _rebuild_extended(core)
    ffi.memmove(state.xstate, area, len(area))
    state.xstate_size = len(area)
    state.sigmask = signal_mask(core)


def signal_mask(core: core_pb2.core_entry) -> int:
    """The signals that a thread blocks. CRIU's images tell those of a process's first thread in another place."""
    thread = core.thread_core
    return int(thread.blk_sigset if thread.HasField("blk_sigset") or not core.HasField("tc") else core.tc.blk_sigset)


def _rebuild_extended(core: core_pb2.core_entry) -> bytes:
    empty, area = _empty_area(), core.thread_info.xstate
    if len(area) <= len(empty) and area[_XCR0_AT : _XCR0_AT + 8] == empty[_XCR0_AT : _XCR0_AT + 8]:
        return area.ljust(len(empty), b"\0")
    spread(core)
    ours, fp = bytearray(empty), core.thread_info.fpregs
    fields = (fp.cwd, fp.swd, fp.twd, fp.fop, fp.rip, fp.rdp, fp.mxcsr, fp.mxcsr_mask)
    _FXSAVE.pack_into(ours, 0, *fields, *fp.st_space, *fp.xmm_space)
    present = fp.xsave.xstate_bv if fp.HasField("xsave") else 3
    kept = present & 3
    for component in _COMPONENTS:
        values = getattr(fp.xsave, component.field)
        at = _component_at(component, len(ours))
        if at and len(values) == component.length and present >> component.number & 1:
            component.form.pack_into(ours, at, *values)
            kept |= 1 << component.number
    struct.pack_into("<Q", ours, _XSTATE_BV_AT, kept)
    return bytes(ours)


@functools.cache
def _component_at(component: _Component, limit: int) -> int:
    """Offset of a component in this CPU's XSAVE area; 0 if it has none or it is beyond the area."""
    offset = ffi.new("unsigned *")
    size = lib.ph_xstate_component(component.number, offset)
    return int(offset[0]) if size and offset[0] + size <= limit else 0


@functools.cache
def _empty_area() -> bytes:
    """An XSAVE area of this CPU as ptrace takes it, all components in their initial state."""
    size, xcr0 = ffi.new("unsigned *"), ffi.new("uint64_t *")
    lib.ph_xstate_layout(size, xcr0)
    area = bytearray(size[0])
    struct.pack_into("<Q", area, _XCR0_AT, xcr0[0])
    return bytes(area)
