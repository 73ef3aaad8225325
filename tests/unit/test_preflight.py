"""The pure half of the preflight: facts in, findings out."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from typing import Any

import pytest
from phaul_engine.probes import Probe

from phaul import preflight
from phaul.events import Finding
from phaul.preflight import (
    Answers,
    CarriedFile,
    Endpoint,
    FileAnswer,
    HostFacts,
    NeededFile,
    ProgramFacts,
    Questions,
    Wishes,
    WrittenFile,
)

WORKING = Probe("cgroup2", True, "required", "works", "holding the program still")
HERE = HostFacts(
    hostname="db1",
    version="0.1.0",
    kernel="6.12.3",
    boot_id="a",
    cpu_features=("avx", "avx2"),
    memory_available=8 << 30,
    realtime=1000.0,
    addresses=(("127.0.0.1", "lo"), ("192.0.2.1", "eth0"), ("192.0.2.100", "eth0")),
    devices=("lo", "eth0"),
    probes=(WORKING,),
)
THERE = replace(
    HERE, hostname="db2", boot_id="b", addresses=(("127.0.0.1", "lo"), ("192.0.2.2", "ens1")), devices=("lo", "ens1")
)
REDIS = "pid 812 (redis-server)"
LIBC = NeededFile("/lib/libc.so.6", 100, "aa", REDIS)
LOG = WrittenFile("/srv/appendonly.aof", 7, REDIS, "/srv/.phaul-1", "secret", 1000)
LISTEN = Endpoint("tcp", "0.0.0.0", 6379)
CONNECTION = Endpoint("tcp", "192.0.2.100", 6379, established=True)
WISHES = Wishes("db2", moved=(("192.0.2.100", "ens1"),), channels=("192.0.2.1", "192.0.2.2"))
QUESTIONS = Questions({812: REDIS}, (LIBC,), (LOG,), (LISTEN, CONNECTION))
ANSWERS = Answers({}, {LIBC.path: FileAnswer(100, "aa")}, (LOG.path,), ())


def findings(
    questions: Questions = QUESTIONS,
    answers: Answers = ANSWERS,
    *,
    here: HostFacts = HERE,
    there: HostFacts = THERE,
    memory: int = 1 << 30,
    copies: int = 0,
    local: tuple[Any, ...] = (),
    **wishes: Any,
) -> list[tuple[str, str]]:
    found = preflight.compare(
        ProgramFacts(questions, memory, local, copies), here, there, answers, replace(WISHES, **wishes)
    )
    assert all(one.text and (one.advice or one.check in ("kernel-older", "move-address-absent")) for one in found)
    return [(one.severity, one.check) for one in found]


def test_a_pair_that_fits_has_no_findings() -> None:
    assert findings() == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cpu_features": ("avx",)}, [("blocker", "cpu-features")]),
        ({"cpu_features": ("avx", "avx2", "avx512f")}, []),
        ({"kernel": "6.1.0-13-amd64"}, [("warning", "kernel-older")]),
        ({"kernel": "6.18"}, []),
        ({"realtime": 1002.0}, [("warning", "clock")]),
        ({"realtime": 999.9}, []),
        ({"memory_available": 1 << 20}, [("blocker", "memory")]),
        ({"memory_available": (1 << 30) + 4096}, [("warning", "memory")]),
        ({"probes": (replace(WORKING, ok=False, advice="mount it"),)}, [("blocker", "host-cgroup2")]),
        ({"probes": (replace(WORKING, ok=False, weight="improves", advice="a"),)}, [("warning", "host-cgroup2")]),
        ({"devices": ("lo",)}, [("blocker", "move-address-device")]),
        ({"addresses": (("192.0.2.100", "ens1"),)}, [("blocker", "move-address-present")]),
    ],
)
def test_the_destination_decides(changes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert findings(there=replace(THERE, **changes)) == expected


@pytest.mark.parametrize(
    ("memory", "copies", "expected"),
    [
        (1 << 30, 10 << 20, []),
        (1 << 30, 512 << 20, [("warning", "memory-copies")]),
        (16 << 30, 12 << 30, [("blocker", "memory")]),
        (8 << 30, 4 << 30, [("warning", "memory")]),
    ],
)
def test_memory_shared_since_a_fork_is_needed_by_each(
    memory: int, copies: int, expected: list[tuple[str, str]]
) -> None:
    assert findings(memory=memory, copies=copies) == expected


def test_features_that_the_destination_lacks_are_named() -> None:
    questions = replace(QUESTIONS, features={"guard pages": "pid 7"})
    answers = replace(ANSWERS, lacking={"guard pages": "move it to Linux 6.13 or newer"})
    assert findings(questions, answers) == [("blocker", "kernel-feature")]
    assert findings(questions) == []


def test_without_dirty_tracking_only_stop_copy_is_left() -> None:
    lacking = Probe("dirty tracking", False, "required", "none", "rounds", "use Linux 6.7")
    here = replace(HERE, probes=(lacking,))
    assert findings(here=here) == [("blocker", "host-dirty-tracking")]
    assert findings(here=here, stop_copy=True) == [("warning", "host-dirty-tracking")]


def test_numbers_that_are_taken_name_both_sides() -> None:
    answers = replace(ANSWERS, taken={812: "pid 812 (sshd)"})
    assert findings(answers=answers) == [("blocker", "pid-taken")]
    assert findings(answers=answers, pidns=True) == []
    (finding,) = preflight.compare(ProgramFacts(QUESTIONS, 0), HERE, THERE, answers, WISHES)
    assert REDIS in finding.text
    assert "pid 812 (sshd)" in finding.text
    assert "--pidns" in finding.advice


def test_an_answer_that_was_not_asked_for_is_no_finding() -> None:
    assert findings(answers=replace(ANSWERS, taken={4: "pid 4 (init)"})) == []


@pytest.mark.parametrize(
    ("files", "ship", "expected"),
    [
        ({}, "none", [("blocker", "file-missing")]),
        ({}, "missing", [("warning", "file-missing")]),
        ({LIBC.path: FileAnswer(100, "bb")}, "missing", [("blocker", "file-differs")]),
        ({LIBC.path: FileAnswer(99, "")}, "none", [("blocker", "file-differs")]),
    ],
)
def test_files_that_are_read(files: dict[str, FileAnswer], ship: str, expected: list[tuple[str, str]]) -> None:
    assert findings(answers=replace(ANSWERS, files=files), ship=ship) == expected


def test_differing_files_name_both_hashes() -> None:
    answers = replace(ANSWERS, files={LIBC.path: FileAnswer(100, "bb")})
    (finding,) = preflight.compare(ProgramFacts(QUESTIONS, 0), HERE, THERE, answers, WISHES)
    assert "aa here and bb on db2" in finding.text


@pytest.mark.parametrize(
    ("changes", "ship", "expected"),
    [
        ({}, "none", ("blocker", "file-not-shared")),
        ({"free": (LOG.path,)}, "none", ("blocker", "file-not-shared")),
        ({"free": (LOG.path,)}, "missing", ("warning", "file-not-shared")),
        ({"existing": (os.path.dirname(LOG.path), LOG.path)}, "missing", ("blocker", "file-in-the-way")),
        ({}, "missing", ("blocker", "directory-missing")),
    ],
)
def test_files_that_are_written_are_seen_by_both_or_sent(
    changes: dict[str, Any], ship: str, expected: tuple[str, str]
) -> None:
    assert findings(answers=replace(ANSWERS, shared=(), **changes), ship=ship) == [expected]


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        (("/dev/shm",), []),
        ((), [("blocker", "directory-missing")]),
        (("/dev/shm", "/dev/shm/ring"), [("blocker", "file-in-the-way")]),
    ],
)
def test_files_that_are_memory_need_a_place(existing: tuple[str, ...], expected: list[tuple[str, str]]) -> None:
    questions = replace(QUESTIONS, carried=(CarriedFile("/dev/shm/ring", "/dev/shm", REDIS),))
    found = preflight.compare(ProgramFacts(questions, 0), HERE, THERE, replace(ANSWERS, existing=existing), WISHES)
    assert [(finding.severity, finding.check) for finding in found] == expected


def test_what_the_survey_found_is_passed_on() -> None:
    assert findings(local=(Finding("blocker", "state", "fd 7 is an io_uring", "close it"),)) == [("blocker", "state")]


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"moved": ()}, [("blocker", "address-missing")]),
        ({"moved": (), "tcp": "close"}, []),
        ({"tcp": "refuse"}, [("blocker", "tcp-established")]),
        ({"moved": (("192.0.2.1", "ens1"), ("192.0.2.100", "ens1"))}, [("blocker", "move-address-channel")]),
        ({"moved": (("192.0.2.9", "ens1"), ("192.0.2.100", "ens1"))}, [("blocker", "move-address-absent")]),
        ({"moved": (("192.0.2.100", "eth9"),)}, [("blocker", "move-address-device")]),
    ],
)
def test_addresses(wishes: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert findings(**wishes) == expected


def test_ports_that_are_taken() -> None:
    assert findings(answers=replace(ANSWERS, occupied=(LISTEN,))) == [("blocker", "port-taken")]
    # A connection does not compete with a listening socket of the same port there: it has its own peer.
    assert findings(answers=replace(ANSWERS, occupied=(CONNECTION,))) == []


@pytest.mark.parametrize("address", ["::", "::1", "127.0.0.1", "::ffff:192.0.2.2", "192.0.2.2"])
def test_addresses_that_are_everywhere_or_there(address: str) -> None:
    assert findings(replace(QUESTIONS, endpoints=(Endpoint("tcp", address, 1),))) == []


@pytest.mark.parametrize("facts", [HERE, QUESTIONS, ANSWERS])
def test_facts_survive_the_wire(facts: HostFacts | Questions | Answers) -> None:
    assert preflight.from_json(type(facts), json.loads(json.dumps(asdict(facts)))) == facts


def test_what_comes_over_the_wire_is_checked() -> None:
    with pytest.raises(ValueError, match="memory_available"):
        preflight.from_json(HostFacts, {**asdict(HERE), "memory_available": "lots"})
