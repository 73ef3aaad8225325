"""Programs that get a pid namespace where they go on (`--pidns`), and have other namespaces of their own already."""

from __future__ import annotations

from pathlib import Path

import pytest
from phaul_engine.proc.access import open_process
from phaul_engine.proc.status import read_status

from tests.kernel.namespaces.containers import container

_PROGRAM = """
import ctypes, threading, time

def rest():
    threading.Thread(target=signal.pause, daemon=True).start()

def setup():
    global before, child
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    rest()
    child = os.fork()
    if child == 0:
        rest()
        while True:
            signal.pause()
    orphan = os.fork()
    if orphan == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                signal.pause()
        os._exit(0)
    os.waitpid(orphan, 0)
    time.sleep(0.2)
    before = look()

def look():
    found = [os.getpid(), os.getsid(child), os.getresuid(), os.getgroups()]
    found += [open("/proc/self/" + name).read() for name in ("uid_map", "gid_map", "setgroups")]
    for pid in (os.getpid(), child):
        found.append(sorted(int(tid) for tid in os.listdir(f"/proc/{pid}/task")))
        found.append([line for line in open(f"/proc/{pid}/status") if line.startswith("Cap")])
        found.append(open(f"/proc/{pid}/task/{pid}/children").read())
    found.append(open("/proc/sys/kernel/hostname").read())
    return found

def check():
    now = look()
    assert now == before, [pair for pair in zip(before, now) if pair[0] != pair[1]]
    assert os.path.exists("/proc/1/comm")
"""


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="none"),
        pytest.param(("--uts", "--ipc"), id="names"),
        pytest.param(("--mount",), id="mounts"),
        pytest.param(("--user", "--map-root-user"), id="user"),
        pytest.param(("--user", "--map-root-user", "--uts", "--ipc"), id="user and names"),
        pytest.param(("--mount", "--uts", "unshare", "--ipc", "--user", "--map-root-user"), id="user after mounts"),
    ],
)
def test_a_program_gets_a_pid_namespace(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with container(tmp_path, _PROGRAM.replace("\\\\\\\\n", "\\\\n"), *flags) as subject:
        subject.check()
        subject.carry(pidns=True)
        assert len(read_status(open_process(subject.pid)).ns_pid) == 2
        subject.check()
        subject.carry()  # under its old numbers again
        subject.check()
