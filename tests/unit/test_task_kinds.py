"""Task kinds without a task: the assembler's short forms, the order of rebuilding, and when programs are used again."""

import struct
import subprocess
import sys

import pytest
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import core_pb2, mm_pb2, seccomp_pb2
from phaul_engine.objects import tasks
from phaul_engine.objects.base import Restoration, task_kinds
from phaul_engine.program import Program, Results
from phaul_engine.syscalls import NR

INSTRUCTION = struct.Struct("<4H8B6q")


def test_orders_share_one_register_and_answers_lie_in_the_buffer() -> None:
    program = Program()
    rooms = [program.ask(NR.getpid) for _ in range(100)]
    for _ in range(100):
        program.order(NR.close, 3)
    assert program.register().number == 1
    assert len({room.offset for room in rooms}) == 100
    buffer = bytearray(len(program.assemble()[1]))
    buffer[rooms[7].offset : rooms[7].offset + 8] = (-13).to_bytes(8, "little", signed=True)
    results = Results((0,) * 64, bytes(buffer))
    assert (results.answer(rooms[7]), results.answer(rooms[8])) == (-13, 0)


def test_operands_and_policies() -> None:
    program = Program()
    room = program.space(8)
    program.order(NR.read, 3, room, (1 << 64) - 1, keep_errors=True, label="reading")
    program.order(NR.close, program.register())
    code, _ = program.assemble()
    op, policy, dst, nr, *rest = INSTRUCTION.unpack_from(code)
    assert (op, policy, dst, nr) == (1, 1, 0, NR.read)
    assert rest[:3] == [0, 2, 0]
    assert rest[8:11] == [3, room.offset, -1]
    assert INSTRUCTION.unpack_from(code, INSTRUCTION.size)[4] == 1
    assert [step.label for step in program.steps] == ["reading", "close"]


def test_what_privileges_are_needed_for_comes_before_they_go() -> None:
    names = [kind.name for kind in task_kinds()]
    last = names.index("credentials")
    for name in ("scheduling", "resource limits", "seccomp filters"):
        assert names.index(name) < last
    for name in ("dumpable", "thread attributes", "thread addresses"):
        assert names.index(name) > last


def restoration() -> Restoration:
    checkpoint = Checkpoint()
    checkpoint.put("mm", 7, mm_pb2.mm_entry(dumpable=1))
    filters = [seccomp_pb2.seccomp_filter(filter=bytes(8))]
    checkpoint.put("seccomp", None, seccomp_pb2.seccomp_entry(seccomp_filters=filters))
    return Restoration(checkpoint)


def core() -> core_pb2.core_entry:
    made = core_pb2.core_entry()
    made.thread_core.creds.uid = 5
    made.thread_core.seccomp_filter = 0
    made.tc.oom_score_adj = 3
    return made


@pytest.mark.parametrize(
    "path", ["thread_info.clear_tid_addr", "thread_core.creds.uid", "thread_core.futex_rla", "tc.oom_score_adj"]
)
def test_a_program_is_not_used_again_when_what_it_makes_has_changed(path: str) -> None:
    changed = core()
    *way, name = path.split(".")
    place = changed
    for step in way:
        place = getattr(place, step)
    setattr(place, name, getattr(place, name) + 1)
    assert tasks.fingerprint(changed, 7, restoration()) != tasks.fingerprint(core(), 7, restoration())


def test_nor_when_another_image_it_depends_on_has() -> None:
    before = tasks.fingerprint(core(), 7, restoration())
    other = restoration()
    other.checkpoint.one("mm", 7).dumpable = 0
    assert tasks.fingerprint(core(), 7, other) != before
    other = restoration()
    other.checkpoint.one("seccomp").seccomp_filters[0].flags = 2
    assert tasks.fingerprint(core(), 7, other) != before


def test_it_is_when_only_passing_state_has() -> None:
    passing = core()
    passing.thread_core.blk_sigset = 9
    passing.thread_core.signals_p.signals.add(siginfo=bytes(128))
    passing.tc.timers.real.vsec = 4
    passing.tc.sigactions.add(sigaction=1, flags=0, restorer=0, mask=0)
    assert tasks.fingerprint(passing, 7, restoration()) == tasks.fingerprint(core(), 7, restoration())


@pytest.mark.parametrize("module", ["skeleton", "collect", "landing"])
def test_filters_are_installed_before_the_credentials_go(module: str) -> None:
    """Whatever is imported first: who has no privileges any more can install none (seccomp(2), EACCES)."""
    code = f"""
import phaul_engine.{module}
from phaul_engine.objects import base, tasks
print(*(type(kind).__name__ for kind in base.task_kinds()))
"""
    kinds = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert kinds.index("Seccomp") < kinds.index("Credentials") < kinds.index("LandlockDomain")
