"""What the native library does when a call of its own fails: each system call and each allocation, one at a time.

    LD_PRELOAD=<tests/subjects/failing.c> python -m tests.kernel.failing_calls SCENARIO DIRECTORY few|all

A scenario is run once to see which calls the library makes, and from where. Then a process is forked for each of them,
in which it fails: the first, some between and the last from each place; with "few", the first from every third place.
What it does must end, well or with an EngineError; must leave no descriptor and nothing that it made; and the scenario
looks whether its program is well. Prints a line of JSON: how many failed, and what was wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from phaul_engine import _native
from phaul_engine.catching import catch, kill
from phaul_engine.collect import Collector
from phaul_engine.dump import dump, open_store, pre_dump
from phaul_engine.errors import BlockedError, EngineError, GoneError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.memory import guards
from phaul_engine.memory.areas import Care, Mapping, care_of, open_shared
from phaul_engine.memory.extents import PAGE_SIZE, Extents, Place
from phaul_engine.memory.files import dump_pages
from phaul_engine.memory.shared import SharedMemory
from phaul_engine.memory.source import Codec
from phaul_engine.memory.tracker import Tracker
from phaul_engine.network import lock
from phaul_engine.proc.access import open_process
from phaul_engine.proc.maps import Area, read_maps
from phaul_engine.proc.stat import stat_of
from phaul_engine.restore import restore
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import adopting, reap
from tests.page_streams import identities, page_pair, run_round
from tests.subjects.programs import build, parse_status, wait_until

_LIBRARY = str(_native.__file__)
_SITES = 4096
_PROT_EXEC = 4
_SLOW = ("poll", "read", "write", "pread64", "pwrite64", "waitpid", "syscall", "ioctl")  # what a signal may interrupt
_MOVING = ("read", "write", "pread64", "pwrite64", "process_vm_readv", "process_vm_writev")
_FEW = 3  # of so many places one is tried in a selection
_OPTIONS = {"tcp": "established"}
_LONG = "7654"  # seconds that what is caught would sleep
_SECONDS = 30.0  # for one run, which takes a fraction of one
_REFUSED, _WRONG, _MISSED = 10, 11, 12
"""Exit statuses of a run that ended with an EngineError, that was not as it should be, and in which nothing failed:
how often a call is made may differ."""

# Two threads and a child, each with connections that must go on; a line to the file at each turn.
_PROGRAM = """
import mmap, os, socket, sys, threading, time
shared = mmap.mmap(-1, 1 << 16)
out = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
def pair():
    server = socket.create_server(("127.0.0.1", 0))
    return socket.create_connection(server.getsockname()), server.accept()[0]
def turn(who, near, far, inside):
    step, memory = 0, bytearray(1 << 20)
    while True:
        step += 1
        memory[step % 256 << 12] = shared[step % 16 << 12] = step % 256
        near.send(b"%08d" % step)
        inside[0].send(b"%08d" % step)
        said = far.recv(8), inside[1].recv(8)
        assert said == (b"%08d" % step,) * 2, said
        os.write(out, b"%s %d\\n" % (who, step))
        time.sleep(0.01)
far_end, near_end = pair()
near_end.send(b"it waits in a queue")
child = os.fork()
if child:
    threading.Thread(target=turn, args=(b"thread", *pair(), socket.socketpair())).start()
turn(b"main" if child else b"child", *pair(), socket.socketpair())
"""


class Site(NamedTuple):
    """Where the library makes a call, and how often it did."""

    address: int
    calls: int
    name: str


class _Counted(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("count", ctypes.c_uint64), ("name", ctypes.c_char_p))


class Preloaded:
    """What tests/subjects/failing.c offers."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.failing_sites.restype = ctypes.POINTER(_Counted)

    def watch(self) -> None:
        """From here on the native library's calls are counted."""
        (code,) = [area for area in _loaded() if area.prot & _PROT_EXEC]
        self._library.failing_watch(ctypes.c_uint64(code.start), ctypes.c_uint64(code.end))

    def rest(self) -> None:
        """No longer."""
        self._library.failing_watch(ctypes.c_uint64(0), ctypes.c_uint64(0))

    def arm(self, site: Site, hit: int, error: int) -> None:
        """Which call is to fail, and how: an errno, 0 for a likely one, -1 to move fewer bytes than it could."""
        self._library.failing_arm(ctypes.c_uint64(site.address), ctypes.c_uint64(hit), error)

    def failed(self) -> bool:
        """Whether that call has come."""
        return bool(self._library.failing_done())

    def sites(self) -> list[Site]:
        """What was counted."""
        counted = self._library.failing_sites()
        found = []
        for index in range(_SITES):
            one = counted[index]
            if not one.address:
                break
            found.append(Site(one.address, one.count, one.name.decode()))
        return found


def _loaded() -> list[Area]:
    """Where the native library is in our memory."""
    proc = open_process(os.getpid())
    try:
        return [area for area in read_maps(proc) if area.path == _LIBRARY]
    finally:
        os.close(proc)


class Scenario(Protocol):
    """Something that the native library is used for. `run` is what calls fail in; `check` is called after each run,
    and raises AssertionError or TimeoutError if something was lost, or is left."""

    directory: Path

    def run(self) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class _Running:
    """A program that must not take notice."""

    around: tuple[str, ...] = ()  # what starts it

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.out = directory / "out"
        command = [*self.around, sys.executable, "-c", _PROGRAM, str(self.out)]
        nothing = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
        self.check()

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """All three of its turns go on."""
        at = self.out.stat().st_size if self.out.exists() else 0

        def go_on() -> bool:
            assert self.process.poll() is None, f"the program has ended with {self.process.returncode}"
            said = self.out.read_bytes()[at:].split(b"\n") if self.out.exists() else []
            return {line.split()[0] for line in said[2:] if b" " in line} == {b"main", b"thread", b"child"}

        wait_until(go_on, "all three go on")

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Look(_Running):
    """Stop a tree and collect it, twice."""

    def run(self) -> None:
        with Tracer() as tracer, Collector() as collector:
            for _ in range(2):
                with stop_tree(tracer, self.pid, timeout_ms=1000) as tree:
                    tree.step_aside()
                    survey = collector.collect(tree, survey=True)
                if survey.blockers:
                    raise BlockedError(survey.blockers)


class Aside:
    """Threads that read clocks get out of the vDSO."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.status = directory, directory / "status"
        self.process = subprocess.Popen([build("clock_reader"), self.status], stdin=subprocess.DEVNULL)
        wait_until(lambda: self.status.exists() and "calls=" in self.status.read_text(), "it begins")

    def run(self) -> None:
        with Tracer() as tracer:
            for _ in range(16):  # in most of which one stands in it
                with stop_tree(tracer, self.process.pid, timeout_ms=1000) as tree:
                    tree.step_aside()

    def check(self) -> None:
        """It goes on, and no clock was wrong."""
        before = self._told()
        wait_until(lambda: self._told() > before, "it reads clocks")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _told(self) -> int:
        while "wrong" not in (fields := parse_status(self.status.read_text())):
            pass
        assert not fields["error"].strip(), fields
        return int(fields["calls"])


class Dump(_Running):
    """A round of pre-dump, and a dump of what differs that leaves the program running."""

    def run(self) -> None:
        with Tracer() as tracer, contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.directory)))
            first, last = place / "first", place / "last"
            for path, store in ((first, pre_dump), (last, dump)):
                path.mkdir()
                if path == last:
                    (last / "parent").symlink_to("../first")
                directory = stack.enter_context(ImageDirectory(path))
                more: dict[str, Any] = {"leave_running": True} if store is dump else {}
                store(tracer, self.pid, directory, open_store(directory, stack), options=_OPTIONS, **more)


class Follow(_Running):
    """What changes in a program's memory, round by round, and its guard pages."""

    def run(self) -> None:
        with Tracer() as tracer, Collector() as collector, contextlib.ExitStack() as stack:
            with stop_tree(tracer, self.pid, timeout_ms=1000) as tree:
                collector.collect(tree, survey=True, track=True)
            for pid, uffd in collector.uffds.items():
                proc = open_process(pid)
                stack.callback(os.close, proc)
                self._follow(pid, proc, stack.enter_context(Tracker(proc, os.dup(uffd))), stack)

    def _follow(self, pid: int, proc: int, tracker: Tracker, stack: contextlib.ExitStack) -> None:
        mem, file = os.open(f"/proc/{pid}/mem", os.O_RDONLY), os.memfd_create("pages")
        stack.callback(os.close, mem)
        stack.callback(os.close, file)
        shared: dict[int, SharedMemory] = {}
        for number in range(3):
            areas = read_maps(proc)
            tracker.track(areas)
            for area in areas:
                if care_of(area) is Care.SHARED_MEMORY:
                    if area.ino not in shared:
                        fd = open_shared(proc, area)
                        stack.callback(os.close, fd)
                        shared[area.ino] = SharedMemory(fd)
                    shared[area.ino].follow([(tracker, Mapping(area.start, area.size, area.offset))])
            for extents in tracker.scan(clear=True, first=number == 0):
                dump_pages(Place(pid, mem), extents, file)
            for one in shared.values():
                one.scan(clear=True, first=number == 0)
            guards.of_process(proc, areas)


class Restore(_Running):
    """Make a program again of its images."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.images, self.root = directory / "images", self._root()
        self.images.mkdir()
        with Tracer() as tracer, contextlib.ExitStack() as stack:
            images = stack.enter_context(ImageDirectory(self.images))
            dump(tracer, self.root, images, open_store(images, stack), options=_OPTIONS)
        self.process.wait()
        self.said = self.out.read_bytes()
        self.check()

    def run(self) -> None:
        with Tracer() as tracer, ImageDirectory(self.images) as images:
            restore(tracer, images, options=_OPTIONS)
            os.killpg(self.pid, signal.SIGKILL)
            reap([self.pid])

    def check(self) -> None:
        """Nothing of it is left, and what it has written since does not stand in the way of the next run."""
        if self.process.returncode is None:
            super().check()
            return

        def gone() -> bool:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            return not self._left()

        wait_until(gone, "nothing is left of what was made", 5.0)
        self.out.write_bytes(self.said)

    def close(self) -> None:
        """Its packets are held since the dump, unless a restore has let them go."""
        with ImageDirectory(self.images) as images:
            lock.lift(Checkpoint.load(images, pagemaps=False))

    def _root(self) -> int:
        return self.pid

    def _left(self) -> list[int]:
        return _members(self.pid)


class Container(Restore):
    """The same in a pid namespace of its own, whose first process is another's, and caught."""

    around = ("unshare", "--fork", "--pid", "setsid")

    def run(self) -> None:
        with Tracer() as tracer, ImageDirectory(self.images) as images:
            caught = catch(tracer, ["sh", "-c", f"{shlex.join(self.around)} sleep {_LONG} &"], 2.0, privileged=True)
            try:
                restore(tracer, images, options=_OPTIONS | caught.options)
            finally:
                kill(tracer, caught)

    def _root(self) -> int:
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text())

    def _left(self) -> list[int]:
        return _bearing(str(self.out)) + _bearing(_LONG)


class Stream:
    """Two rounds of pages through two streams, compressed and compared."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        identities()

    def run(self) -> None:
        size = 4 << 20
        with contextlib.ExitStack() as stack:
            near, far = os.memfd_create("near"), os.memfd_create("far")
            stack.callback(os.close, near)
            stack.callback(os.close, far)
            os.pwrite(near, os.urandom(size // 4) + bytes(size // 4) + b"compress" * (size // 16), 0)
            os.ftruncate(far, size)
            source, sink = page_pair(2, Codec.ZSTD)
            stack.callback(sink.close)
            stack.callback(source.close)
            source.add(1, Place(0, near), hashed=True)
            sink.add(1, Place(0, far))
            for number in range(2):
                os.pwrite(near, b"changed", number * PAGE_SIZE)
                source.send(1, Extents.whole(0, size // 2), compare=True)
                source.send(1, Extents.whole(size // 2, size))
                run_round(source, sink, number, 2.0)
            assert os.pread(near, size, 0) == os.pread(far, size, 0)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class Catch:
    """The first process of a container is caught, and killed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self) -> None:
        with Tracer() as tracer:
            kill(tracer, catch(tracer, ["sh", "-c", f"unshare --fork --pid sleep {_LONG} | cat &"], 2.0))

    def check(self) -> None:
        """No `sleep` is left."""
        wait_until(lambda: not _bearing(_LONG), "no process is left", 5.0)

    def close(self) -> None:
        pass


def _bearing(word: str) -> list[int]:
    """Processes with this word in their command line."""
    return [pid for pid in _all_pids() if word.encode() in _words_of(pid)]


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _words_of(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


def _members(session: int) -> list[int]:
    found = []
    for pid in _all_pids():
        with contextlib.suppress(GoneError):
            if stat_of(pid).session == session or pid == session:
                found.append(pid)
    return found


def _in_a_process(work: Callable[[], int]) -> tuple[int, str]:
    """Exit status (negative: a signal) and last words of work in a process of its own."""
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(there, 2)
        os.close(here)
        os.close(there)
        sys.exit(work())
    os.close(there)
    deadline, said = time.monotonic() + _SECONDS, b""
    with os.fdopen(here, "rb", buffering=0) as words:
        while time.monotonic() < deadline:
            if select.select([words], [], [], 0.2)[0]:
                chunk = words.read(65536)
                said += chunk
                if not chunk:
                    break
        else:
            os.kill(pid, signal.SIGKILL)
            said += b"it does not end"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode(errors="replace")[-2000:]


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _attempt(scenario: Scenario, preloaded: Preloaded) -> int:
    """Run it once; what it leaves open is wrong."""
    before, status = _descriptors(), 0
    try:
        preloaded.watch()
        scenario.run()
    except EngineError as problem:
        print("refused:", problem, file=sys.stderr)
        status = _REFUSED
    except BaseException:
        traceback.print_exc()
        status = _WRONG
    finally:
        preloaded.rest()
    left = {name: path for name, path in _descriptors().items() if name not in before}
    if left:
        print("left open:", left, file=sys.stderr)
        status = _WRONG
    return status


def _sites(scenario: Scenario, preloaded: Preloaded) -> list[Site]:
    """Where the library makes calls when all is well."""
    told = scenario.directory / "sites"

    def work() -> int:
        status = _attempt(scenario, preloaded)
        told.write_text(json.dumps(preloaded.sites()))
        return status

    status, said = _in_a_process(work)
    assert status == 0, (status, said)
    scenario.check()
    return [Site(*one) for one in json.loads(told.read_text())]


def _failures(calls: int, name: str) -> Iterator[tuple[int, int]]:
    """Which of so many calls from one place are tried, and how they fail."""
    for hit in sorted({1, calls, *(hit for hit in (2, 5, 11, 23, 47, 95) if hit < calls)}):
        yield hit, 0
    for hit in sorted({1, calls}):
        if name in _SLOW:
            yield hit, errno.EINTR
        if name in _MOVING:
            yield hit, -1


def try_all(scenario: Scenario, *, every: bool) -> dict[str, Any]:
    """All calls, one at a time."""
    preloaded, wrong, ends = Preloaded(), [], {"well": 0, "refused": 0}
    for number, site in enumerate(_sites(scenario, preloaded)):
        some = [(1, 0)] if number % _FEW == 0 else []
        for hit, error in _failures(site.calls, site.name) if every else some:

            def work(site: Site = site, hit: int = hit, error: int = error) -> int:
                preloaded.arm(site, hit, error)
                status = _attempt(scenario, preloaded)
                return status if status == _WRONG or preloaded.failed() else _MISSED

            status, said = _in_a_process(work)
            where = f"{site.name} from {_line(site)}, number {hit} of {site.calls}, failing by {error}"
            if status in (0, _REFUSED):
                ends["well" if status == 0 else "refused"] += 1
            elif status != _MISSED:
                wrong.append(f"{where}: status {status}: {said}")
            try:
                scenario.check()
            except (AssertionError, TimeoutError) as problem:
                return ends | {"wrong": [*wrong, f"{where}: {problem}"]}
    return ends | {"wrong": wrong}


def _line(site: Site) -> str:
    first = min(area.start for area in _loaded())
    command = ["addr2line", "-f", "-s", "-e", _LIBRARY, hex(site.address - 1 - first)]
    return " ".join(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "look": Look,
    "aside": Aside,
    "dump": Dump,
    "follow": Follow,
    "restore": Restore,
    "container": Container,
    "stream": Stream,
    "catch": Catch,
}


def main() -> None:
    """See the module's text."""
    name, directory, extent = sys.argv[1:]
    os.environ.pop("LD_PRELOAD")
    scenario, we = SCENARIOS[name](Path(directory)), os.getpid()
    try:
        with adopting():
            print(json.dumps(try_all(scenario, every=extent == "all")))
    finally:
        if os.getpid() == we:  # not in what was forked
            scenario.close()


if __name__ == "__main__":
    main()
