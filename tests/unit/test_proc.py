"""Texts of /proc as Linux 6.18 writes them."""

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phaul_engine.errors import EngineError
from phaul_engine.proc.auxv import parse_auxv
from phaul_engine.proc.cgroup import CgroupMembership, parse_cgroups
from phaul_engine.proc.limits import INFINITY, parse_limits
from phaul_engine.proc.locks import parse_lock
from phaul_engine.proc.maps import parse_maps, parse_smaps
from phaul_engine.proc.mountinfo import parse_mounts
from phaul_engine.proc.stat import parse_stat
from phaul_engine.proc.status import Ids, Statuses, parse_status
from phaul_engine.proc.timers import SIGEV_NONE, SIGEV_SIGNAL, SIGEV_THREAD_ID, PosixTimer, parse_timers

MAPS = b"""\
555b7632c000-555b76331000 r-xp 00002000 fe:00 260131                     /usr/bin/cat
555b76337000-555b76358000 rw-p 00000000 00:00 0                          [heap]
7f81efe08000-7f81eff08000 rw-p 00000000 00:00 0\x20
7f81eff08000-7f81eff09000 rw-s 00001000 00:01 1024                       /memfd:a b\\012c (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""

SMAPS = b"""\
555b7632c000-555b76331000 r-xp 00002000 fe:00 260131                     /usr/bin/cat
Size:                 20 kB
ProtectionKey:         0
VmFlags: rd ex mr mw me\x20
7ffe12345000-7ffe12366000 rw-p 00000000 00:00 0                          [stack]
Size:                132 kB
VmFlags: rd wr mr mw me gd ac\x20
"""

STATUS = b"""\
Name:\ta\\nb\\\\c
Umask:\t0022
State:\tT (stopped)
Tgid:\t9721
Ngid:\t0
Pid:\t9722
PPid:\t9689
TracerPid:\t0
Uid:\t1\t2\t3\t4
Gid:\t5\t6\t7\t8
FDSize:\t256
Groups:\t10 20\x20
NStgid:\t9721\t1
NSpid:\t9722\t2
NSpgid:\t9689\t0
NSsid:\t4149\t0
VmRSS:\t    1704 kB
Threads:\t2
SigQ:\t0/96365
SigPnd:\t0000000000000200
ShdPnd:\t0000000000000400
SigBlk:\t0000000000000001
SigIgn:\t0000000000001000
SigCgt:\t8000000000000000
CapInh:\t0000000000000001
CapPrm:\t000001fffeffffff
CapEff:\t0000000000000002
CapBnd:\t000001fffeffffff
CapAmb:\t0000000000000001
NoNewPrivs:\t1
Seccomp:\t2
Seccomp_filters:\t3
"""

STAT_TAIL = (
    "S 9689 9721 4149 34816 -1 4194304 90 0 0 0 1 2 3 4 20 -5 3 0 185934 3137536 426 18446744073709551615 11 12 13 "
    "0 0 0 0 0 0 0 0 0 17 1 7 1 0 0 0 14 15 16 17 18 19 20 256\n"
)

LIMITS = b"Limit                     Soft Limit           Hard Limit           Units     \n" + b"".join(
    f"{name:<25} {soft!s:<20} {hard!s:<20} {unit:<10}\n".encode()
    for name, soft, hard, unit in [
        ("Max cpu time", "unlimited", "unlimited", "seconds"),
        *[("Max file size", index, 2**63, "bytes") for index in range(1, 15)],
        ("Max realtime timeout", 5, "unlimited", "us"),
    ]
)


def test_maps() -> None:
    code, heap, anonymous, memfd, vsyscall = parse_maps(MAPS)
    assert (code.start, code.end, code.size) == (0x555B7632C000, 0x555B76331000, 0x5000)
    assert code.prot == mmap.PROT_READ | mmap.PROT_EXEC
    assert (code.offset, code.dev, code.ino, code.path) == (0x2000, os.makedev(0xFE, 0), 260131, "/usr/bin/cat")
    assert (heap.path, heap.is_file, heap.shared) == ("[heap]", False, False)
    assert anonymous.path == ""
    assert (memfd.path, memfd.shared, memfd.deleted, memfd.is_file) == ("/memfd:a b\nc (deleted)", True, True, True)
    assert (vsyscall.special, vsyscall.end) == (True, 0xFFFFFFFFFF601000)


def test_smaps() -> None:
    code, stack = parse_smaps(SMAPS)
    assert (code.path, code.flags) == ("/usr/bin/cat", frozenset({"rd", "ex", "mr", "mw", "me"}))
    assert (stack.path, stack.flags) == ("[stack]", frozenset({"rd", "wr", "mr", "mw", "me", "gd", "ac"}))
    assert [area._replace(flags=frozenset()) for area in (code,)] == parse_maps(MAPS)[:1]


def test_smaps_without_flags_is_refused() -> None:
    with pytest.raises(EngineError):
        parse_smaps(SMAPS.replace(b"VmFlags", b"VmFoo", 1))


@given(st.binary(min_size=1, max_size=60))
def test_strange_maps_are_refused(line: bytes) -> None:
    if line[:1] not in b"0123456789abcdef":
        with pytest.raises(EngineError):
            parse_maps(MAPS + line.replace(b"\n", b"") + b"\n")


@given(
    st.integers(0, 2**52),
    st.integers(1, 2**20),
    st.sampled_from(["r--p", "rwxs", "---p", "-w-s"]),
    st.text(alphabet=st.characters(exclude_characters="\n\\", exclude_categories=["Cs"]), max_size=40),
)
def test_any_area(start: int, pages: int, mode: str, name: str) -> None:
    path = f"/{name}"
    end = start * 4096 + pages * 4096
    (area,) = parse_maps(f"{start * 4096:08x}-{end:08x} {mode} 00001000 08:12 77                 {path}\n".encode())
    assert (area.start * 1, area.end, area.path) == (start * 4096, end, path)
    assert area.shared == (mode[3] == "s")
    assert bool(area.prot & mmap.PROT_WRITE) == (mode[1] == "w")


def test_status() -> None:
    status = parse_status(STATUS)
    assert (status.name, status.state, status.umask) == ("a\nb\\c", "T", 0o22)
    assert (status.uids, status.gids) == (Ids(1, 2, 3, 4), Ids(5, 6, 7, 8))
    assert (status.groups, status.ns_pid, status.inner_pid) == ((10, 20), (9722, 2), 2)
    assert (status.pending, status.shared_pending, status.caught) == (1 << 9, 1 << 10, 1 << 63)
    assert status.capabilities.permitted == 0x1FFFEFFFFFF
    assert (status.capabilities.effective, status.capabilities.ambient) == (2, 1)
    assert (status.no_new_privs, status.seccomp, status.seccomp_filters) == (True, 2, 3)
    assert status.vm_rss_kib == 1704


def test_a_zombies_status_has_no_umask() -> None:
    text = b"\n".join(line for line in STATUS.split(b"\n") if not line.startswith((b"Umask", b"VmRSS")))
    assert parse_status(text).umask is None


def test_a_status_that_says_the_same_is_not_parsed_again(tmp_path: Path) -> None:
    statuses, file = Statuses(), tmp_path / "status"
    proc = os.open(tmp_path, os.O_PATH)
    try:
        file.write_bytes(STATUS + b"\nvoluntary_ctxt_switches:\t1\n")
        first = statuses.read(7, proc)
        file.write_bytes(STATUS + b"\nvoluntary_ctxt_switches:\t2\n")
        assert statuses.read(7, proc) is first
        assert statuses.read(8, proc) is not first
        file.write_bytes(STATUS.replace(b"1704 kB", b"1708 kB"))
        assert statuses.read(7, proc).vm_rss_kib == 1708
        file.write_bytes(STATUS)
        statuses.keep([8])
        assert statuses.read(7, proc) == first
    finally:
        os.close(proc)


@pytest.mark.parametrize("field", [b"Uid", b"SigBlk", b"NSpid", b"CapAmb"])
def test_status_without_a_field_is_refused(field: bytes) -> None:
    with pytest.raises(EngineError):
        parse_status(STATUS.replace(field + b":", b"X:"))


@given(st.binary(max_size=15).filter(lambda name: b"\0" not in name))
def test_stat_with_any_name(name: bytes) -> None:
    stat = parse_stat(b"9721 (" + name + b") " + STAT_TAIL.encode())
    assert (stat.pid, os.fsencode(stat.comm), stat.state, stat.ppid) == (9721, name, "S", 9689)
    assert (stat.session, stat.tty, stat.nice, stat.threads, stat.start) == (4149, 34816, -5, 3, 185934)
    assert (stat.start_code, stat.end_code, stat.start_stack, stat.exit_signal) == (11, 12, 13, 17)
    assert (stat.rt_priority, stat.policy) == (7, 1)
    assert (stat.start_data, stat.end_data, stat.start_brk, stat.arg_start) == (14, 15, 16, 17)
    assert (stat.env_end, stat.exit_code, stat.dead) == (20, 256, False)


def test_short_stat_is_refused() -> None:
    with pytest.raises(EngineError):
        parse_stat(b"1 (a) S 1 2 3")


def test_limits() -> None:
    limits = parse_limits(LIMITS)
    assert [limit.resource for limit in limits] == list(range(16))
    assert (limits[0].soft, limits[0].hard) == (INFINITY, INFINITY)
    assert (limits[7].soft, limits[7].hard) == (7, 2**63)
    assert (limits[15].name, limits[15].soft) == ("Max realtime timeout", 5)


def test_mountinfo() -> None:
    text = (
        b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue\n"
        b"22 27 0:21 / /proc rw,relatime - proc proc rw\n"
    )
    first, second = parse_mounts(text)
    assert (first.id, first.parent, first.dev, first.root, first.point) == (
        36,
        35,
        os.makedev(98, 0),
        "/mnt1",
        "/mnt 2",
    )
    assert (first.propagates("shared"), first.propagates("master"), first.propagates("propagate_from")) == (7, 1, None)
    assert (first.fstype, first.source, first.super_options) == ("ext3", "/dev/root", ("rw", "errors=continue"))
    assert (second.propagation, second.options) == ((), ("rw", "relatime"))
    with pytest.raises(EngineError):
        parse_mounts(b"1 2 3:4 / / rw\n")


def test_timers() -> None:
    text = (
        "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n"
        "ID: 7\nsignal: 10/0000000000000000\nnotify: signal/tid.2635\nClockID: 1\n"
        "ID: 8\nsignal: 0/0000000000000000\nnotify: none/pid.2634\nClockID: -6\n"
    )
    assert parse_timers(text) == (
        PosixTimer(1, 60, 0x7FFF86E452A8, SIGEV_SIGNAL, 2634, 0),
        PosixTimer(7, 10, 0, SIGEV_SIGNAL | SIGEV_THREAD_ID, 2635, 1),
        PosixTimer(8, 0, 0, SIGEV_NONE, 2634, -6),
    )
    assert parse_timers("") == ()
    with pytest.raises(EngineError):
        parse_timers("signal: 1/2\n")


def test_cgroups() -> None:
    memberships = parse_cgroups("3:cpu,cpuacct:/a:b\n1:name=systemd:/\n0::/user.slice\n")
    assert memberships[0] == CgroupMembership(3, ("cpu", "cpuacct"), "/a:b")
    assert (memberships[1].controllers, memberships[2].unified) == (("name=systemd",), True)


def test_auxv_ends_at_null() -> None:
    data = b"".join(value.to_bytes(8, "little") for value in (33, 0x7000, 0, 0, 5, 5))
    assert parse_auxv(data) == ((33, 0x7000), (0, 0))
    with pytest.raises(EngineError):
        parse_auxv(data[:-4])


def test_a_waiting_lock() -> None:
    lock = parse_lock("1: -> POSIX  ADVISORY  READ  812 fe:00:77 0 9")
    assert (lock.waiting, lock.kind, lock.access, lock.pid, lock.start, lock.end) == (True, "POSIX", "READ", 812, 0, 9)
    with pytest.raises(EngineError):
        parse_lock("1: POSIX")
