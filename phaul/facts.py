"""Facts for the preflight: what this host is, what a program on it needs, and, at the destination, what is there."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phaul_engine import cgroup, sleep_log
from phaul_engine.errors import BlockedError, Blocker, BusyError, EngineError, GoneError
from phaul_engine.features import missing as missing_features
from phaul_engine.features import needed as needed_features
from phaul_engine.footprint import Footprint, footprint
from phaul_engine.network.interfaces import addresses
from phaul_engine.objects import carried_file, places
from phaul_engine.probes import probe_all
from phaul_engine.proc import access, maps, namespaces, sock_diag, tree
from phaul_engine.proc.stat import read_stat
from phaul_engine.proc.status import parse_status, read_status

from phaul import __version__, claims, config, workloads
from phaul.config import SLEEPS
from phaul.errors import StayedError, UsageError
from phaul.events import Finding
from phaul.guests import guests
from phaul.haul import trees
from phaul.journal import Store
from phaul.preflight import (
    Answers,
    CarriedFile,
    Endpoint,
    FileAnswer,
    HostFacts,
    NeededFile,
    ProgramFacts,
    Questions,
    WrittenFile,
)
from phaul.tokens import Token, sees, token
from phaul.urgency import Urgency

if TYPE_CHECKING:
    from phaul_engine.collect import Collector
    from phaul_engine.objects.base import Collection

# What /proc/cpuinfo calls features that a program may have found by CPUID and now uses. Its absence at the destination
# is SIGILL at some later time, or an XSAVE area that cannot be loaded.
_CPU_FEATURES = """
abm adx aes amx_bf16 amx_int8 amx_tile avx avx2 avx512_bf16 avx512_bitalg avx512_fp16 avx512_vbmi2 avx512_vnni
avx512_vp2intersect avx512_vpopcntdq avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vl avx_ifma
avx_vnni bmi1 bmi2 cldemote clflushopt clwb clzero cx16 erms f16c fma fsgsbase fsrm gfni movbe movdir64b movdiri
mwaitx pclmulqdq pku popcnt rdpid rdrand rdseed rdtscp rtm sha_ni sse4_1 sse4_2 sse4a ssse3 user_shstk vaes
vpclmulqdq waitpkg xsave xsavec xsaves
"""
_HASH_CHUNK = 1 << 20
_SURVEY_TIMEOUT = 1000  # milliseconds that all tasks together get to stop
_TCP_CLOSE, _TCP_LISTEN = 7, 10  # tcp_states.h


def host_facts() -> HostFacts:
    """Ask this host everything. The clock is read last: answers are compared by when they came."""
    arbiter = config.load().arbiter
    return HostFacts(
        hostname=os.uname().nodename,
        version=__version__,
        kernel=os.uname().release,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        cpu_features=tuple(sorted(_cpu_flags() & set(_CPU_FEATURES.split()))),
        memory_available=_memory_available(),
        addresses=tuple(addresses()),
        devices=tuple(name for _, name in socket.if_nameindex()),
        probes=tuple(probe_all()),
        arbiter=arbiter.endpoints,
        arbiter_problem=_arbiter_problem(arbiter),
        realtime=time.time(),
    )


def _arbiter_problem(settings: config.ArbiterSettings) -> str:
    """Why a migration could not have this arbiter; empty if it can, or does not need it."""
    if not settings.endpoints or not settings.required:
        return ""
    from phaul import arbiter

    return arbiter.problem(settings)


def _cpu_flags() -> set[str]:
    """The flags of the first processor; all that run user programs have the same on x86."""
    with open("/proc/cpuinfo") as file:
        return next((set(line.partition(":")[2].split()) for line in file if line.startswith("flags")), set())


def _memory_available() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def program_facts(pid: int, options: dict[str, Any] | None = None, store: Store | None = None) -> ProgramFacts:
    """What a program needs, and what speaks against moving it: looked at from outside, then surveyed by the engine
    with these options of its own. `store` are this host's journals: what another migration works on is left alone.
    PhaulError where there is no such program."""
    try:
        root = tree.read_tree(pid)
    except GoneError as error:
        raise UsageError(f"there is no process {pid} on this host") from error
    processes = [process for process in root if not process.dead]
    findings = [claim.finding for claim in claims.find(store, pid)] if store is not None else []
    numbers: dict[int, str] = {}
    needed: dict[str, NeededFile] = {}
    written: dict[str, WrittenFile] = {}
    carried: dict[str, CarriedFile] = {}
    inodes: set[int] = set()
    memory = copies = level = 0
    for process in processes:
        try:
            proc = access.open_process(process.pid)
        except GoneError:
            continue
        try:
            if process is root:
                level = len(read_status(proc).ns_pid) - 1
            numbers |= _numbers(process, proc, level)
            findings += _tracer(process, proc)
            more, shared = _memory(process.pid)
            memory, copies = memory + more, copies + shared
            _files(process, proc, needed, written, carried, inodes)
        except (GoneError, FileNotFoundError, ProcessLookupError):
            continue  # it ended: nothing of it has to move
        finally:
            os.close(proc)
    features: dict[str, str] = {}
    size: Footprint | None = None
    if not findings:
        try:
            found, features, size = survey(pid, options or {})
            findings += found
        except EngineError as error:
            raise StayedError(f"pid {pid} could not be examined: {error}", advice=error.advice) from error
    findings += _supervisors(root)
    apart = _apart(pid)
    if "pid" in apart:
        findings += guests(pid)
    endpoints = tuple(_endpoints(inodes, pid))
    questions = Questions(
        {} if "pid" in apart else numbers,
        tuple(needed.values()),
        tuple(written.values()),
        endpoints,
        tuple(carried.values()),
        features,
    )
    facts = ProgramFacts(questions, memory, tuple(findings), copies)
    return facts if size is None else replace(facts, **asdict(size))


def uids_of(pid: int) -> tuple[int, ...]:
    """The real and the effective user of a process; nothing if there is none."""
    try:
        status = parse_status(Path(f"/proc/{pid}/status").read_bytes())
    except (OSError, EngineError):
        return ()
    return tuple(sorted({status.uids.real, status.uids.effective}))


def _apart(pid: int) -> set[str]:
    """The kinds of namespaces that a container has to itself: its numbers and addresses are in nobody's way."""
    proc, ours = access.open_process(pid), access.open_process(os.getpid())
    try:
        theirs, here = (namespaces.identities(one, ("pid", "net")) for one in (proc, ours))
        apart = {name for name, identity in theirs.items() if identity != here.get(name)}
        if read_status(proc).inner_pid != 1:  # in a namespace that was made for it, with process 1 of ours (--pidns)
            apart.discard("pid")
        return apart
    finally:
        os.close(proc)
        os.close(ours)


def _who(process: tree.Process) -> str:
    return f"pid {process.pid} ({process.comm})"


def _numbers(process: tree.Process, proc: int, level: int) -> dict[int, str]:
    """Inner numbers: what the first process of the tree knows the process and its threads by, and they are to be known
    by there. Its pid namespace is the one `level` below ours."""
    found: dict[int, str] = {}
    status = read_status(proc)
    for tid in process.threads:
        with contextlib.suppress(EngineError):
            inner = parse_status(access.read_bytes(proc, f"task/{tid}/status")).ns_pid[level]
            found[inner] = _who(process) if tid == process.pid else f"a thread of {_who(process)}"
    for number, name in ((status.ns_sid[level], "session"), (status.ns_pgid[level], "process group")):
        if number and number not in found:
            found[number] = f"the {name} of {_who(process)}"
    return found


def _tracer(process: tree.Process, proc: int) -> Iterator[Finding]:
    """Two tracers cannot share a process, so this is known before it is tried."""
    tracer = read_status(proc).tracer_pid
    if tracer:
        text = f"{_who(process)} is traced by {_name_of(tracer)}"
        yield Finding("blocker", "traced", text, "end that debugger or strace first, or wait for that phaul")


def _supervisors(root: tree.Process) -> Iterator[Finding]:
    """Who will see the program end here, and may start it again beside the one that has moved: nothing can keep that
    from them."""
    if root.ppid > 1:
        text = f"{_name_of(root.ppid)}, the parent of {_who(root)}, will see it killed here when it has moved"
        yield Finding("warning", "parent", text, "if it starts again what ends, have it not do so first")
    with contextlib.suppress(EngineError):
        unit = cgroup.path_of(root.pid).rpartition("/")[2]
        if unit.endswith(".service"):
            text = f"{_who(root)} belongs to systemd's unit {unit}, which ends here when it has moved"
            yield Finding("warning", "unit", text, f"systemctl show -p Restart {unit}: let it not be started again")


def survey(pid: int, options: dict[str, Any]) -> tuple[list[Finding], dict[str, str], Footprint | None]:
    """What of the program's state cannot be carried, by the engine, the features of the kernel that it uses, and what
    it would have at a destination. Stops the program for some milliseconds, and again where something of it ends
    meanwhile. EngineError where it cannot be looked at."""
    from phaul_engine.collect import Collector
    from phaul_engine.looks import look_again

    sleep_log.log.remember(SLEEPS)  # the agent that moves it has to know what is learnt here
    with Collector({**options, carried_file.OPTION: True}) as collector:
        try:
            collection = look_again(partial(_look, collector, pid), _SURVEY_TIMEOUT)
        except BlockedError as error:  # nothing more can be learnt about such a program
            return [_state(one) for one in error.blockers], {}, None
    found = [_state(one) for one in collection.blockers]
    return found, needed_features(collection.checkpoint, options), footprint(collection.checkpoint)


def _look(collector: Collector, pid: int, number: int, patience: int) -> Collection:
    """A survey. In the first the program runs again as soon as nothing is asked inside of it; where it changes too much
    meanwhile (BusyError), it stands until the end of the others. Each has a tracer of its own: a task that was still
    answering when another one died is free of it then."""
    from phaul_engine.target import Tracer, stop_tree

    urgency, moving = Urgency(), number == 0
    collector.prepare(pid)
    if moving:
        urgency.begin()
    try:
        with access.looking(), Tracer() as tracer, stop_tree(tracer, pid, timeout_ms=patience) as stopped:

            def hold() -> None:
                if moving:
                    stopped.let_go()
                    urgency.end()

            collection = collector.collect(stopped, survey=True, hold=hold)
    finally:
        urgency.end()
    if collection.blockers and moving:  # perhaps of what was closed while it was looked at
        raise BusyError("what was found of the tree does not fit together")
    return collection


def _state(blocker: Blocker) -> Finding:
    return Finding("blocker", "state", f"{blocker.where} is {blocker.kind}: {blocker.why}", blocker.advice)


def _name_of(pid: int) -> str:
    try:
        return f"pid {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return f"pid {pid}, which is gone"


def _memory(pid: int) -> tuple[int, int]:
    """Bytes that a process adds to what has to exist at the destination, swapped pages too, and how many of those it
    shares here: private pages that a fork has left in common are each process's own there (proc_pid_smaps(5))."""
    kib: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, value = line.partition(":")
            if value.endswith("kB\n"):
                kib[name] = int(value.split()[0])
    private = kib["Anonymous"] + kib["Swap"]
    proportional = kib.get("Pss_Anon", kib["Anonymous"]) + kib["SwapPss"]
    others = kib.get("Pss_File", 0) + kib.get("Pss_Shmem", 0)  # each is there once
    return (private + others) * 1024, max(0, private - proportional) * 1024


def _files(
    process: tree.Process,
    proc: int,
    needed: dict[str, NeededFile],
    written: dict[str, WrittenFile],
    carried: dict[str, CarriedFile],
    sockets: set[int],
) -> None:
    """Regular files with a name, by what the program does with them; and the inodes of its sockets."""
    for area in maps.read_maps(proc):
        path = area.path
        if area.ino and path.startswith("/") and path not in needed:
            _note(path, area.ino, bool(area.shared and area.prot & 2), process, needed, written, carried)
    for fd in access.list_numbers(proc, "fd"):
        try:
            found = os.stat(f"fd/{fd}", dir_fd=proc)
            path = access.read_link(proc, f"fd/{fd}")
            flags = int(access.read_bytes(proc, f"fdinfo/{fd}").split(b"flags:")[1].split()[0], 8)
        except (OSError, EngineError):
            continue
        if stat.S_ISSOCK(found.st_mode):
            sockets.add(found.st_ino)
        elif stat.S_ISREG(found.st_mode) and path.startswith("/") and found.st_nlink and not flags & os.O_PATH:
            _note(path, found.st_ino, flags & os.O_ACCMODE != os.O_RDONLY, process, needed, written, carried)


def _note(
    path: str,
    inode: int,
    writes: bool,
    process: tree.Process,
    needed: dict[str, NeededFile],
    written: dict[str, WrittenFile],
    carried: dict[str, CarriedFile],
) -> None:
    """A name that leads elsewhere now (a library that was upgraded) is the engine's to carry, as a deleted file."""
    if path.startswith(("/proc/", "/sys/")):
        return
    try:
        found = os.stat(path)
        if found.st_ino != inode or not stat.S_ISREG(found.st_mode):
            return
        if writes and _on_tmpfs(path, found.st_dev):
            needed.pop(path, None)
            carried[path] = CarriedFile(path, os.path.dirname(path), _who(process))
        elif writes:
            needed.pop(path, None)
            written.setdefault(path, WrittenFile(path, inode, _who(process), size=found.st_size))
        elif path not in needed and path not in written and path not in carried:
            needed[path] = NeededFile(path, found.st_size, file_hash(path), _who(process))
    except OSError:
        return


def _on_tmpfs(path: str, device: int) -> bool:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return carried_file.on_tmpfs(fd, device)
    finally:
        os.close(fd)


def file_hash(path: str) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _endpoints(inodes: set[int], pid: int) -> Iterator[Endpoint]:
    """Where the sockets of the tree are bound, in the network namespace of its root."""
    proc = access.open_process(pid)
    try:
        net = namespaces.open_namespace(proc, "net")
        inside = not places.same_namespace(net, "net")
        try:
            with sock_diag.DiagSocket(net) as diag:
                found = diag.inet_by_inode()
        finally:
            os.close(net)
    finally:
        os.close(proc)
    for inode in sorted(inodes & found.keys()):
        entry = found[inode]
        if entry.source_port:
            yield replace(_endpoint(entry), inside=inside)


def _endpoint(entry: sock_diag.InetSocket) -> Endpoint:
    protocol = "tcp" if entry.protocol == socket.IPPROTO_TCP else "udp"
    established = protocol == "tcp" and entry.state not in (_TCP_LISTEN, _TCP_CLOSE)  # closed: bound only
    return Endpoint(protocol, str(ipaddress.ip_address(entry.source)), entry.source_port, established)


@contextlib.contextmanager
def tokens(questions: Questions) -> Iterator[Questions]:
    """The questions with a token beside each file that is written, for as long as the destination is asked."""
    made: dict[str, Token | None] = {}  # by directory
    written: list[WrittenFile] = []
    with contextlib.ExitStack() as stack:
        for file in questions.written:
            directory = os.path.dirname(file.path)
            if directory not in made:
                made[directory] = stack.enter_context(token(directory))
            known = made[directory]
            written.append(file if known is None else replace(file, token=known.path, secret=known.secret))
        yield replace(questions, written=tuple(written))


def answer(questions: Questions) -> Answers:
    """The destination's part: look, and touch nothing."""
    numbers = _numbers_in_use()
    files: dict[str, FileAnswer] = {}
    paths = [file.path for file in questions.carried] + [file.path for file in questions.written]
    for file in questions.needed:
        with contextlib.suppress(OSError):
            size = os.stat(file.path).st_size
            files[file.path] = FileAnswer(size, file_hash(file.path) if size == file.size else "")
    places = [one.path for one in questions.trees]
    found = {one.path: trees.answer(one, places) for one in questions.trees}
    hauled = trees.hauled(questions.trees, found) if questions.haul else ()
    return Answers(
        taken={number: numbers[number] + _arriving(number) for number in questions.numbers if number in numbers},
        files=files,
        shared=tuple(file.path for file in questions.written if _sees(file)),
        free=tuple(file.path for file in questions.written if _is_free(file.path)),
        occupied=tuple(_occupied(questions.endpoints)),
        existing=tuple(_existing(paths)),
        lacking=missing_features(questions.features),
        workload=tuple(workloads.of(questions.workload).examine(questions.facts, hauled)),
        trees=found,
    )


def _arriving(pid: int) -> str:
    """Whose a process is that a migration is making here: its cgroup bears the migration's name."""
    with contextlib.suppress(EngineError):
        name = cgroup.path_of(pid).rpartition("/")[2]
        if name.startswith(cgroup.PREFIX):
            return f", which migration {name.removeprefix(cgroup.PREFIX)} is making there"
    return ""


def _existing(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        yield from (one for one in (path, os.path.dirname(path)) if os.path.lexists(one))


def _is_free(path: str) -> bool:
    """Whether a file can be made there."""
    if not os.path.isdir(os.path.dirname(path)):
        return False
    return not os.path.lexists(path) or carried_file.left_behind(path)


def _sees(file: WrittenFile) -> bool:
    try:
        return sees(file.token, file.secret, os.path.dirname(file.path)) and os.stat(file.path).st_ino == file.inode
    except OSError:
        return False


def _numbers_in_use() -> dict[int, str]:
    """Every PID, TID, process group and session on this host, with its owner."""
    found: dict[int, str] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            proc = access.open_process(pid)
        except EngineError:
            continue
        try:
            own = read_stat(proc)
            who = f"pid {pid} ({own.comm})"
            for tid in tree.threads(proc):
                found[tid] = who if tid == pid else f"a thread of {who}"
            found.setdefault(own.pgrp, f"the process group of {who}")
            found.setdefault(own.session, f"the session of {who}")
        except EngineError:
            continue
        finally:
            os.close(proc)
    return found


def _occupied(endpoints: Iterable[Endpoint]) -> Iterator[Endpoint]:
    """Those that a listening or bound socket of this host is in the way of."""
    with sock_diag.DiagSocket() as diag:
        here = [_endpoint(entry) for entry in diag.inet_by_inode().values() if entry.source_port]
    bound = [(one.protocol, one.port, one.address) for one in here if not one.established]
    for wanted in endpoints:
        for protocol, port, address in bound:
            if (protocol, port) == (wanted.protocol, wanted.port) and _overlap(address, wanted.address):
                yield wanted
                break


def _overlap(one: str, other: str) -> bool:
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    return first == second or first.is_unspecified or second.is_unspecified
