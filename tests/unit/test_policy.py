"""The policy file: whom it lets do what, and that a bad one lets nobody do anything."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from phaul_engine.objects.confinement import Confinement

from phaul import policy
from phaul.config import parse_size
from phaul.policy import ANYTHING, Caller, Gate, Incoming, PolicyError, Rule, caller, gate

ALICE = Caller("alice", 1001, frozenset({"alice", "deployers"}))
KEY = Caller("key:web", 0)
ROOT = Caller("root", 0, frozenset({"root"}))
REFERENCE = Path(__file__).parents[2] / "configs" / "agent.toml"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the policy is; the one who runs the test stands for root."""
    monkeypatch.setattr(policy, "_OWNER", os.geteuid())
    directory = tmp_path / "phaul"
    directory.mkdir(mode=0o755)
    return directory / "agent.toml"


def write(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o644)


def test_without_a_file_all_is_allowed(file: Path) -> None:
    found = gate(ALICE, file)
    assert (found.problem, found.rule, found.strict) == ("", ANYTHING, False)
    everything = Incoming(memory=1 << 40, tasks=10**6, uids=(0,), privileged="root", writes=("/etc/passwd",))
    assert found.refusals("destination", everything) == []
    assert found.confinement is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("allow = 1", "allow: Input should be a valid tuple"),
        ("[[allow]]\nusers = ['root']\nmemroy = '8GiB'", r"allow\.1\.memroy: there is no such key"),
        ("[[alow]]\nusers = ['root']", "alow: there is no such key"),
        ("[[allow]]\nusers = []", r"allow\.1\.users: "),
        ("[[allow]]\nusers = ['a']\nmemory = '8 apples'", "is not a size"),
        ("[[allow]]\nusers = ['a']\npaths = ['srv']", "is no absolute path"),
        ("[[allow]]\nusers = ['a']\npaths = ['/srv/../etc']", "is no absolute path"),
        ("[[allow]]\nusers = ['a']\nworkloads = ['vm']", r"allow\.1\.workloads\.1: "),
        ("[[allow]]\nusers = ['a']\naddresses = ['10.0.0.1/24']", r"allow\.1\.addresses\.1"),
        ("[[allow", "Expected"),
        ("\xff", "codec"),
    ],
)
def test_what_makes_no_sense_refuses_everything(file: Path, text: str, why: str) -> None:
    file.write_bytes(text.encode("latin-1"))
    found = gate(ROOT, file)
    assert re.search(why, found.problem), found.problem
    assert "refuses everything until its" in found.problem
    for direction in ("source", "destination"):
        with pytest.raises(PolicyError):
            found.check(direction)


def test_what_others_can_write_refuses_everything(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, "[[allow]]\nusers = ['*']\n")
    for mode in (0o664, 0o646):
        file.chmod(mode)
        assert f"can be written by others than root (mode {mode:o})" in gate(ROOT, file).problem
    file.chmod(0o644)
    assert gate(ROOT, file).problem == ""
    file.parent.chmod(0o777)
    assert "can be written by others than root (mode 777)" in gate(ROOT, file).problem
    file.parent.chmod(0o755)
    monkeypatch.setattr(policy, "_OWNER", os.geteuid() + 1)
    assert "not to root" in gate(ROOT, file).problem


def test_a_file_that_cannot_be_read_refuses_everything(file: Path) -> None:
    file.mkdir()
    assert "refuses everything" in gate(ROOT, file).problem


def test_the_first_rule_that_names_a_caller_counts(file: Path) -> None:
    write(
        file,
        "[[allow]]\nusers = ['key:web']\nmemory = '1GiB'\n[[allow]]\nusers = ['@deployers', 'bob']\ntasks = 5\n"
        "[[allow]]\nusers = ['alice', 'root']\nroot = true\n",
    )
    assert gate(KEY, file).rule.memory == 1 << 30
    assert gate(ALICE, file).rule.tasks == 5
    assert gate(ROOT, file).rule.root
    carol = gate(Caller("carol", 1003, frozenset({"users"})), file)
    assert "carol may ask" in carol.problem
    assert "for nothing" in carol.problem


def test_a_rule_that_says_nothing_is_careful(file: Path) -> None:
    write(file, "[[allow]]\nusers = ['alice']\n")
    found = gate(ALICE, file)
    assert found.refusals("destination", Incoming(uids=(33,), writes=("/tmp/x",))) == []
    refused = Incoming(privileged="process 7 runs as root", writes=("/etc/cron.d/x",), moved=("192.0.2.7",))
    assert len(found.refusals("destination", refused)) == 3
    assert found.confinement == Confinement(("/tmp", "/var/tmp", "/dev/shm"))


@pytest.mark.parametrize(
    ("rule", "program", "words"),
    [
        ({"memory": "1MiB"}, Incoming(memory=2 << 20), "has 2 MiB of memory, and .* lets alice bring 1 MiB"),
        ({"tasks": 3}, Incoming(tasks=4), "has 4 processes and threads, and .* bring 3"),
        ({"workloads": ["lxc"]}, Incoming(), "may not move a workload of kind pid"),
        ({}, Incoming(privileged="process 9 has capabilities"), r"process 9 has capabilities.*root = false"),
        ({"accounts": ["self"]}, Incoming(uids=(1001, 0)), "runs as root, and alice may move programs of self only"),
        ({"accounts": ["4242"]}, Incoming(uids=(4243,)), "runs as 4243"),
        ({}, Incoming(writes=("/tmp/../etc/x",)), r"would write or make /tmp/\.\./etc/x"),
        ({"paths": ["/srv/a"]}, Incoming(writes=("/srv/abc",)), "would write or make /srv/abc"),
        ({"paths": ["/srv/a"]}, Incoming(shipped=("/usr/bin/x",)), "would write or make /usr/bin/x"),
        ({"addresses": ["192.0.2.0/24"]}, Incoming(moved=("192.0.3.1",)), r"may not bring the address 192\.0\.3\.1"),
        ({"addresses": ["192.0.2.0/24"]}, Incoming(moved=("2001:db8::1",)), "may not bring the address"),
        ({"directions": ["source"]}, Incoming(), "alice may not bring programs to"),
    ],
)
def test_what_a_rule_refuses(rule: dict[str, object], program: Incoming, words: str) -> None:
    found = Gate("alice", Rule.model_validate({"users": ["alice"], **rule}), 1001, strict=True)
    (refusal,) = found.refusals("destination", program)
    assert re.search(words, refusal), refusal
    with pytest.raises(PolicyError, match=words) as raised:
        found.demand("destination", program)
    assert raised.value.exit_status == 20


def test_what_leaves_is_measured_by_who_it_is_alone() -> None:
    found = Gate("alice", Rule(users=("alice",), memory=1, tasks=1), 1001)
    assert found.refusals("source", Incoming(memory=10, tasks=10, writes=("/etc/x",), moved=("192.0.2.1",))) == []
    assert len(found.refusals("source", Incoming(privileged="process 7 runs as root"))) == 1


def test_files_that_are_sent(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    found = Gate("alice", Rule(users=("alice",), paths=(str(tmp_path / "in"),)), 1001)
    found.demand_shipped(f"{tmp_path}/in/x", 0o755)
    for path, mode in ((f"{tmp_path}/out/x", 0o644), (f"{tmp_path}/in/link/x", 0o644), (f"{tmp_path}/in/x", 0o4755)):
        with pytest.raises(PolicyError):
            found.demand_shipped(path, mode)


def test_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "65534")
    assert caller().name == "nobody"
    with pytest.raises(PolicyError, match="through sudo the user's name counts"):
        caller("web")
    monkeypatch.setenv("SUDO_UID", "4000000000")
    assert caller().name == "uid:4000000000"
    assert Caller.of("uid:4000000000").uid == 4_000_000_000
    monkeypatch.delenv("SUDO_UID")
    assert caller().uid == os.geteuid()
    monkeypatch.setattr(policy, "_parent_is_sudo", lambda: False)
    assert caller("web-1").name == "key:web-1"
    for name in ("", "a b", "../x", "-x", "x" * 65):
        with pytest.raises(PolicyError):
            caller(name)


def test_whose_a_migration_is() -> None:
    alice, root, key = Gate("alice", uid=1001), Gate("root", uid=0), Gate("key:web", uid=0)
    assert alice.owns("alice")
    assert not alice.owns("bob")
    assert not key.owns("bob")
    assert root.owns("bob")


def test_the_reference_names_every_key_and_can_be_used(file: Path) -> None:
    text = REFERENCE.read_text()
    (rule,) = tomllib.loads(text)["allow"]
    assert set(rule) == set(Rule.model_fields)
    write(file, text)
    assert gate(ROOT, file).problem == ""
    assert gate(ROOT, file).confinement is None
    example = re.search(r"# \[\[allow\]\]\n(?:# .*\n)+", text)
    assert example
    write(file, example[0].replace("# ", ""))
    assert gate(KEY, file).rule.tasks == 64


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("500M", 500_000_000), (17, 17), ("1.5KiB", 1536), ("4kB", 4000)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1", True, "1Gbit"])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
