"""The parsers against live processes."""

import ctypes
import mmap
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import GoneError
from phaul_engine.proc import access, auxv, cgroup, limits, maps, mountinfo, namespaces, sched, stat, status, tree
from phaul_engine.proc.locks import read_locks
from phaul_engine.proc.sock_diag import DiagSocket

LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def proc() -> Iterator[int]:
    fd = access.open_process(os.getpid())
    yield fd
    os.close(fd)


def test_maps_show_a_mapping(proc: int, tmp_path: Path) -> None:
    path = tmp_path / "a name"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=4096)
        try:
            (plain,) = [area for area in maps.read_maps(proc) if area.path == str(path)]
            (full,) = [area for area in maps.read_smaps(proc) if area.path == str(path)]
        finally:
            mapping.close()
    assert (plain.size, plain.offset, plain.shared, plain.prot) == (4096, 4096, True, mmap.PROT_READ)
    assert plain.ino == path.stat().st_ino
    assert {"rd", "mr", "sh"} <= full.flags
    assert full._replace(flags=frozenset()) == plain


def test_stat_and_status_of_a_thread_agree(proc: int) -> None:
    stat_line, state = stat.read_stat(proc), status.read_status(proc)
    assert stat_line.pid == state.pid == os.getpid()
    assert stat_line.session == os.getsid(0) == state.ns_sid[0]
    assert state.umask == int(Path("/proc/self/status").read_text().split("Umask:")[1].split()[0], 8)
    assert (state.uids.effective, state.gids.real) == (os.geteuid(), os.getgid())
    assert state.groups == tuple(os.getgroups())


def test_tree_with_threads_and_a_zombie() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        threading.Thread(target=signal.pause, daemon=True).start()
        if os.fork() == 0:
            os._exit(3)
        sleeper = os.fork()
        if sleeper == 0:
            signal.pause()
        os.write(writer, b"%d" % sleeper)
        signal.pause()
    try:
        sleeper = int(os.read(reader, 20))
        found = tree.read_tree(child)
        while not found.children[0].dead:
            found = tree.read_tree(child)
        assert len(found.threads) == 2
        dead, asleep = found.children
        assert (asleep.pid, asleep.dead, asleep.ppid) == (sleeper, False, child)
        assert [process.pid for process in found] == [child, dead.pid, sleeper]
        os.close(tree.open_verified(*found.identity))
        with pytest.raises(GoneError):
            tree.open_verified(child, found.start - 1)
        os.kill(sleeper, signal.SIGKILL)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    with pytest.raises(GoneError):
        tree.read_tree(child)


def test_limits_are_those_of_getrlimit(proc: int) -> None:
    for limit in limits.read_limits(proc):
        expected = tuple(value & limits.INFINITY for value in resource.getrlimit(limit.resource))
        assert (limit.soft, limit.hard) == expected, limit.name


def test_mounts_hold_proc(proc: int) -> None:
    assert any(mount.fstype == "proc" and mount.point == "/proc" for mount in mountinfo.read_mounts(proc))


def test_auxv_names_the_vdso(proc: int) -> None:
    vectors = dict(auxv.read_auxv(proc))
    assert vectors[6] == mmap.PAGESIZE
    assert any(area.path == "[vdso]" and area.start == vectors[33] for area in maps.read_maps(proc))


def test_namespaces(proc: int) -> None:
    found = namespaces.read_namespaces(proc)
    assert found["net"] == namespaces.namespace_id(proc, "net")
    assert found["uts"].ino == os.stat("/proc/self/ns/uts").st_ino
    assert {"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"} <= found.keys()


def test_cgroup_of_this_process(proc: int) -> None:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    unified = [line for line in lines if line.startswith("0::")]
    assert cgroup.unified_path(proc) == (unified[0].removeprefix("0::") if unified else None)
    assert len(cgroup.read_cgroups(proc)) == len(lines)


def test_scheduling_of_a_child() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        os.setpriority(os.PRIO_PROCESS, child, 7)
        os.sched_setaffinity(child, {0})
        assert LIBC.syscall(251, 1, child, 2 << 13 | 5) == 0  # ioprio_set
        assert sched.read_scheduling(child).nice == 7
        assert sched.read_affinity(child) == {0}
        assert sched.read_ioprio(child) == 2 << 13 | 5
        os.sched_setscheduler(child, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(3))
        found = sched.read_scheduling(child)
        assert (found.policy, found.priority, found.flags) == (os.SCHED_FIFO, 3, sched.SCHED_FLAG_RESET_ON_FORK)
        assert len(sched.pack_scheduling(found)) == 48
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(GoneError):
        sched.read_scheduling(child)


def test_locks(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "locked").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        ino = os.fstat(file.fileno()).st_ino
        (lock,) = [lock for lock in read_locks() if lock.ino == ino]
        assert (lock.kind, lock.access, lock.start, lock.end) == ("FLOCK", "READ", 0, -1)


def inode(made: socket.socket) -> int:
    return os.fstat(made.fileno()).st_ino


def test_unix_sockets(tmp_path: Path) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right, listener, client, abstract, DiagSocket() as diag:
        path = tmp_path / "s"
        listener.bind(os.fspath(path))
        listener.listen(5)
        client.connect(os.fspath(path))
        abstract.bind(b"\0hidden")
        right.send(b"12345")
        right.shutdown(socket.SHUT_RD)
        found = diag.unix()
        assert (found[inode(left)].peer, found[inode(right)].peer) == (inode(right), inode(left))
        assert (found[inode(left)].kind, found[inode(left)].state) == (socket.SOCK_SEQPACKET, 1)
        assert found[inode(left)].receive_queue == 5
        assert (found[inode(right)].shutdown, found[inode(left)].shutdown) == (1, 2)
        assert found[inode(listener)].name == os.fsencode(path) + b"\0"
        assert found[inode(listener)].state == 10
        assert found[inode(listener)].waiting == (inode(client),)
        assert (found[inode(listener)].vfs or (0, 0))[0] == path.stat().st_ino
        assert found[inode(client)].peer in (0, None)
        assert (found[inode(abstract)].name, found[inode(abstract)].peer) == (b"\0hidden", None)


def test_inet_sockets() -> None:
    listener, udp = socket.socket(socket.AF_INET6), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listener, udp, DiagSocket() as diag:
        listener.bind(("::1", 0))
        listener.listen(9)
        udp.bind(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname()[:2])
        with client:
            client.send(b"abc")
            found = diag.inet_by_inode()
            one = found[inode(listener)]
            assert (one.state, one.receive_queue, one.send_queue, one.family) == (10, 1, 9, socket.AF_INET6)
            assert (one.source, one.source_port) == (bytes(15) + b"\1", listener.getsockname()[1])
            other = found[inode(client)]
            assert (other.state, other.destination_port, len(other.info) > 100) == (1, one.source_port, True)
            assert (other.congestion != "", other.interface) == (True, 0)
            assert found[inode(udp)].protocol == socket.IPPROTO_UDP
            waiting = [entry for entry in diag.inet(socket.AF_INET6, socket.IPPROTO_TCP) if entry.inode == 0]
            assert any(entry.source_port == one.source_port and entry.receive_queue == 3 for entry in waiting)


def test_sockets_of_another_namespace() -> None:
    reader, writer = os.pipe()
    release, hold = os.pipe()
    child = os.fork()
    if child == 0:
        assert LIBC.unshare(0x40000000) == 0  # CLONE_NEWNET
        made = socket.socket()
        made.listen()
        os.write(writer, b"%d" % inode(made))
        os.read(release, 1)
        os._exit(0)
    try:
        wanted = int(os.read(reader, 20))
        before = os.stat("/proc/thread-self/ns/net").st_ino
        net = os.open(f"/proc/{child}/ns/net", os.O_RDONLY)
        with DiagSocket(net) as diag, DiagSocket() as own:
            assert list(diag.inet_by_inode()) == [wanted]
            assert wanted not in own.inet_by_inode()
        os.close(net)
        assert os.stat("/proc/thread-self/ns/net").st_ino == before
    finally:
        os.write(hold, b"x")
        os.waitpid(child, 0)
        for fd in (reader, writer, release, hold):
            os.close(fd)
