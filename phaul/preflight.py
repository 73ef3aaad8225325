"""Questions asked of both hosts before anything is touched, and what the answers mean.

Three steps. Each host gathers *facts* (facts.py); the source puts *questions* about its program, and the destination
*answers* them; `compare`, which is pure, turns all of it into findings: blockers, which forbid the migration, and
warnings. Facts cross the wire as JSON. What a single process holds that cannot be carried is found by the engine's
survey.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from phaul_engine.probes import Probe

from phaul.events import Finding
from phaul.haul import trees
from phaul.haul.trees import Tree, TreeAnswer

_CLOCK_TOLERANCE = 0.5  # seconds of difference between the hosts' clocks that nobody is told about

T = TypeVar("T")


@dataclass(frozen=True)
class HostFacts:
    """What a host is and can do."""

    hostname: str
    version: str
    kernel: str
    boot_id: str
    cpu_features: tuple[str, ...]
    memory_available: int
    realtime: float
    addresses: tuple[tuple[str, str], ...]  # address, device
    devices: tuple[str, ...]
    probes: tuple[Probe, ...]
    arbiter: tuple[str, ...] = ()  # its members, as [arbiter] names them
    arbiter_problem: str = ""  # why it does not answer


@dataclass(frozen=True)
class NeededFile:
    """A file that the program executes, maps or reads, to be the same at the destination."""

    path: str
    size: int
    sha256: str
    who: str


@dataclass(frozen=True)
class WrittenFile:
    """A file on a disk that the program has open for writing. `token` was put beside it, to be read at the destination:
    without one nothing is known of what that sees."""

    path: str
    inode: int
    who: str
    token: str = ""
    secret: str = ""
    size: int = 0


@dataclass(frozen=True)
class CarriedFile:
    """A file on tmpfs that the program can write: it is sent like memory. `directory` has to be at the destination."""

    path: str
    directory: str
    who: str


@dataclass(frozen=True)
class Endpoint:
    """A local address and port that a socket of the program is bound to."""

    protocol: str  # tcp, udp
    address: str
    port: int
    established: bool = False
    inside: bool = False  # in a network namespace of the program's own: its address moves with it


@dataclass(frozen=True)
class Questions:
    """What the source asks of the destination about a program. `numbers` maps each PID, TID, session and process group
    that it needs to what it is."""

    numbers: dict[int, str] = field(default_factory=dict)
    needed: tuple[NeededFile, ...] = ()
    written: tuple[WrittenFile, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    carried: tuple[CarriedFile, ...] = ()
    features: dict[str, str] = field(default_factory=dict)  # of the host, with what of the program uses it
    workload: str = "pid"  # its kind, and what its runtime has to know of it there
    facts: dict[str, Any] = field(default_factory=dict)
    trees: tuple[Tree, ...] = ()
    haul: bool = False  # whether trees that are not there are to be sent


@dataclass(frozen=True)
class FileAnswer:
    """A file as the destination has it. The hash is empty where the size already differs."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Answers:
    """What the destination found. What is not in a mapping is free, missing or not seen."""

    taken: dict[int, str] = field(default_factory=dict)
    files: dict[str, FileAnswer] = field(default_factory=dict)
    shared: tuple[str, ...] = ()  # paths of written files that both hosts see
    free: tuple[str, ...] = ()  # of others, that could be made: at most what the program has left there is in the way
    occupied: tuple[Endpoint, ...] = ()
    existing: tuple[str, ...] = ()  # carried and written files, and directories of such, that are there
    lacking: dict[str, str] = field(default_factory=dict)  # features, with what to do about it
    workload: tuple[Finding, ...] = ()  # what keeps the runtime there from taking it over
    trees: dict[str, TreeAnswer] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramFacts:
    """What only the source knows about the program."""

    questions: Questions
    memory: int  # bytes that it needs at the destination
    findings: tuple[Finding, ...] = ()
    copies: int = 0  # how many of those are shared here: pages that processes have had in common since a fork
    tasks: int = 0  # this and the next as in the engine's Footprint
    uids: tuple[int, ...] = ()
    privileged: str = ""
    writes: tuple[str, ...] = ()
    pid: int = 0  # its first process


@dataclass(frozen=True)
class Wishes:
    """What of the operator's options decides. `channels`: addresses of SSH and the page stream."""

    destination: str
    pidns: bool = False
    stop_copy: bool = False
    tcp: str = "established"
    ship: str = "none"
    moved: tuple[tuple[str, str], ...] = ()  # address, device there
    channels: tuple[str, ...] = ()


def from_json(kind: type[T], content: object) -> T:
    """Facts from the other host, checked. ValueError for anything else."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(content)


def compare(
    program: ProgramFacts, source: HostFacts, destination: HostFacts, answers: Answers, wishes: Wishes
) -> list[Finding]:
    """Every finding, in the order in which an operator would want to read them."""
    there = wishes.destination
    return [
        *_abilities(source, "this host", wishes),
        *_abilities(destination, there, wishes),
        *_processors(source, destination, there),
        *_clocks(source, destination, there),
        *_arbiters(source, destination, there),
        *program.findings,
        *trees.findings(program.questions.trees, answers.trees, there, ship=wishes.ship == "missing"),
        *answers.workload,
        *_numbers(program.questions, answers, wishes),
        *_features(program.questions, answers, there),
        *_memory(program, destination, there),
        *_needed_files(program.questions, answers, wishes),
        *_written_files(program.questions, answers, wishes),
        *_carried_files(program.questions, answers, wishes),
        *_network(program.questions, source, destination, answers, wishes),
    ]


def check_host(host: HostFacts, name: str) -> list[Finding]:
    """What one host lacks, whatever program it is about."""
    return list(_abilities(host, name, Wishes("")))


def check_pair(source: HostFacts, destination: HostFacts, there: str) -> list[Finding]:
    """What stands between two hosts, whatever program it is about."""
    wishes = Wishes(there)
    return [
        *_abilities(source, "this host", wishes),
        *_abilities(destination, there, wishes),
        *_processors(source, destination, there),
        *_clocks(source, destination, there),
        *_arbiters(source, destination, there),
    ]


def _blocker(check: str, text: str, advice: str = "") -> Finding:
    return Finding("blocker", check, text, advice)


def _warning(check: str, text: str, advice: str = "") -> Finding:
    return Finding("warning", check, text, advice)


def _abilities(host: HostFacts, name: str, wishes: Wishes) -> Iterator[Finding]:
    """What the host lacks. Without dirty tracking a program still moves with --stop-copy."""
    for probe in host.probes:
        if probe.ok:
            continue
        text = f"{name}: {probe.name} ({probe.needed_for}): {probe.detail}"
        check = "host-" + probe.name.lower().replace(" ", "-").replace("_", "-")
        if probe.weight == "improves" or (probe.name == "dirty tracking" and wishes.stop_copy):
            yield _warning(check, text, probe.advice)
        elif probe.name == "dirty tracking":
            yield _blocker(check, text, f"{probe.advice}, or take the downtime of --stop-copy")
        else:
            yield _blocker(check, text, probe.advice)


def _processors(source: HostFacts, destination: HostFacts, there: str) -> Iterator[Finding]:
    lacking = sorted(set(source.cpu_features) - set(destination.cpu_features))
    if lacking:
        yield _blocker(
            "cpu-features",
            f"the processor of {there} lacks {', '.join(lacking)}, which the program may have found here and be using",
            "move to a host with a processor as new as this one's",
        )
    ours, theirs = (tuple(map(_number, host.kernel.split(".")[:2])) for host in (source, destination))
    if theirs < ours:
        yield _warning(
            "kernel-older",
            f"{there} runs Linux {destination.kernel}, this host {source.kernel}: "
            "a system call that the program found here may be missing there",
        )


def _number(text: str) -> int:
    return int("".join(filter(str.isdigit, text)) or 0)


def _features(questions: Questions, answers: Answers, there: str) -> Iterator[Finding]:
    for name, advice in answers.lacking.items():
        who = questions.features.get(name, "the program")
        yield _blocker("kernel-feature", f"{who} uses {name}, which {there} lacks", advice)


def _clocks(source: HostFacts, destination: HostFacts, there: str) -> Iterator[Finding]:
    ahead = destination.realtime - source.realtime
    if abs(ahead) > _CLOCK_TOLERANCE:
        yield _warning(
            "clock",
            f"the clock of {there} is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}: "
            "CLOCK_REALTIME will jump (CLOCK_MONOTONIC and CLOCK_BOOTTIME go on)",
            "synchronize both clocks (chrony, systemd-timesyncd)",
        )


def _arbiters(source: HostFacts, destination: HostFacts, there: str) -> Iterator[Finding]:
    """The source decides whether there is one; then both have to reach it."""
    if not source.arbiter:
        return
    if not destination.arbiter:
        text = f"this host has an arbiter ({', '.join(source.arbiter)}), and {there} has none"
        yield _blocker("arbiter", text, f"the same [arbiter] in /etc/phaul/phaul.toml of {there}")
    for name, problem in (("this host", source.arbiter_problem), (there, destination.arbiter_problem)):
        if problem:
            advice = "see [arbiter] in its /etc/phaul/phaul.toml; required = false goes on without"
            yield _blocker("arbiter", f"{name}: {problem}", advice)


def _numbers(questions: Questions, answers: Answers, wishes: Wishes) -> Iterator[Finding]:
    if wishes.pidns:  # the tree's numbers are its own there
        return
    for number, owner in sorted(answers.taken.items()):
        ours = questions.numbers.get(number)
        if ours:
            yield _blocker(
                "pid-taken",
                f"{ours} needs number {number}, which {wishes.destination} uses for {owner}",
                "end that process, or give the program a PID namespace there: --pidns",
            )


_COPIES_TOLD = 64 << 20  # bytes


def _memory(program: ProgramFacts, destination: HostFacts, there: str) -> Iterator[Finding]:
    needed, free = program.memory, destination.memory_available
    text = f"the program needs {_mebibytes(needed)}, {there} has {_mebibytes(free)} free"
    if program.copies >= _COPIES_TOLD and program.copies * 10 >= needed:
        shared = (
            f"{_mebibytes(program.copies)} more than here: each process gets its own copy of pages shared since fork"
        )
        text += f" ({shared})"
        if needed * 1.1 <= free:
            text = f"the program needs {_mebibytes(needed)} there, {shared}"
            yield _warning("memory-copies", text, "it fits; fewer worker processes need less")
            return
    if needed > free:
        yield _blocker("memory", text, "free memory there, or add swap")
    elif needed * 1.1 > free:
        yield _warning("memory", text, "it may be tight")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _needed_files(questions: Questions, answers: Answers, wishes: Wishes) -> Iterator[Finding]:
    there = wishes.destination
    for file in questions.needed:
        found = answers.files.get(file.path)
        if found is None:
            text = f"{file.path}, which {file.who} uses, is not on {there}"
            if wishes.ship == "missing":
                yield _warning("file-missing", text, "it will be sent")
            else:
                yield _blocker("file-missing", text, "install it there, or let phaul send it: --ship missing")
        elif found.size != file.size:
            yield _blocker(
                "file-differs",
                f"{file.path}, which {file.who} uses, has {file.size} bytes here (sha256 {file.sha256}) "
                f"and {found.size} bytes on {there}" + (f" (sha256 {found.sha256})" if found.sha256 else ""),
                "install the same version on both",
            )
        elif found.sha256 != file.sha256:
            yield _blocker(
                "file-differs",
                f"{file.path}, which {file.who} uses, has the SHA-256 {file.sha256} here and {found.sha256} on {there}",
                "install the same version on both",
            )


def _written_files(questions: Questions, answers: Answers, wishes: Wishes) -> Iterator[Finding]:
    there, existing = wishes.destination, set(answers.existing)
    for file in unshared(questions, answers):
        text = f"{file.path}, which {file.who} has open for writing, is not on storage that {there} sees"
        elsewhere = "keep it on storage that both hosts mount at the same place"
        if not file.token:
            text += ", as far as can be told: nothing can be made beside it"
            yield _blocker("file-not-shared", text, elsewhere)
        elif wishes.ship != "missing":
            yield _blocker("file-not-shared", text, f"{elsewhere}, or let phaul send it: --ship missing")
        elif file.path in answers.free:
            yield _warning("file-not-shared", text, f"it will be sent ({file.size:,} bytes)")
        elif os.path.dirname(file.path) in existing:
            yield _blocker(
                "file-in-the-way",
                f"{text} and would be sent, but a file of that name is there",
                "remove it there if nothing uses it",
            )
        else:
            yield _blocker(
                "directory-missing",
                f"{text} and would be sent, but there is no directory {os.path.dirname(file.path)}",
                "make it there, with the same owner and mode",
            )


def unshared(questions: Questions, answers: Answers) -> list[WrittenFile]:
    """The written files that the destination does not see."""
    shared = set(answers.shared)
    return [file for file in questions.written if file.path not in shared]


def _carried_files(questions: Questions, answers: Answers, wishes: Wishes) -> Iterator[Finding]:
    there, existing = wishes.destination, set(answers.existing)
    for file in questions.carried:
        text = f"{file.path}, which {file.who} has open for writing, is memory of this host (tmpfs) and would be sent"
        if file.path in existing:
            yield _blocker(
                "file-in-the-way",
                f"{text}, but a file of that name is on {there}",
                "remove it there if nothing uses it",
            )
        elif file.directory not in existing:
            yield _blocker(
                "directory-missing",
                f"{text}, but {there} has no directory {file.directory}",
                "make it there, with the same owner and mode",
            )


def _network(
    questions: Questions, source: HostFacts, destination: HostFacts, answers: Answers, wishes: Wishes
) -> Iterator[Finding]:
    there = wishes.destination
    yield from _moved_addresses(source, destination, wishes)
    coming = {address for address, _ in wishes.moved} | {address for address, _ in destination.addresses}
    occupied = set(answers.occupied)
    for endpoint in questions.endpoints:
        where = f"{endpoint.protocol} {_host_port(endpoint.address, endpoint.port)}"
        if endpoint.established and wishes.tcp == "refuse":
            yield _blocker("tcp-established", f"a connection at {where} is established", "see --tcp")
        elif endpoint.inside or (endpoint.established and wishes.tcp == "close"):
            continue
        elif not _arrives(endpoint.address, coming):
            advice = f"move the address: --move-address {endpoint.address}/PREFIX@DEV"
            advice += "; or close connections: --tcp close" if endpoint.established else ""
            yield _blocker(
                "address-missing", f"a socket at {where} needs an address that {there} does not have", advice
            )
        elif endpoint in occupied and not endpoint.established:
            yield _blocker("port-taken", f"another program on {there} uses {where}", "end it there first")


def _moved_addresses(source: HostFacts, destination: HostFacts, wishes: Wishes) -> Iterator[Finding]:
    there = wishes.destination
    here_now = {address for address, _ in source.addresses}
    there_now = dict(destination.addresses)
    for address, device in wishes.moved:
        if address in wishes.channels:
            yield _blocker(
                "move-address-channel",
                f"{address} is the address that this migration itself uses",
                f"reach {there} through another address, so that moving this one does not cut the migration",
            )
        if address not in here_now:
            yield _blocker("move-address-absent", f"{address} is not an address of this host")
        if address in there_now:
            yield _blocker(
                "move-address-present", f"{there} already has {address} (on {there_now[address]})", "take it off there"
            )
        if device not in destination.devices:
            names = ", ".join(name for name in destination.devices if name != "lo")
            yield _blocker("move-address-device", f"{there} has no network device {device}", f"it has {names}")


def _arrives(address: str, coming: set[str]) -> bool:
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
        parsed = parsed.ipv4_mapped
    return parsed.is_unspecified or parsed.is_loopback or parsed.is_multicast or str(parsed) in coming


def _host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
