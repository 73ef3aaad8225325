"""UTS, PID and user namespaces: names, numbers, ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel.namespaces.containers import container

_TEXT = """
def setup():
    global child, seen
    open("/proc/sys/kernel/hostname", "w").write("container-one")
    open("/proc/sys/kernel/domainname", "w").write("example.org")
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    seen = look()

def look():
    names = [open("/proc/sys/kernel/" + name).read() for name in ("hostname", "domainname")]
    maps = [open("/proc/self/" + name).read() for name in ("uid_map", "gid_map", "setgroups")]
    groups = open("/proc/thread-self/cgroup").read() if os.getpid() == 1 else ""
    return names, maps, groups, os.getpid(), os.getsid(0), os.getresuid(), os.getresgid(), os.getgroups(), child

def check():
    assert look() == seen, (look(), seen)
    assert seen[0][0] == "container-one\\n"
    os.kill(child, 0)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
"""


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--pid", "--cgroup", "--time"),
        ("--pid", "--user", "--map-root-user"),
        ("--pid", "--user", "--map-current-user"),
        ("--user", "--map-root-user"),
        ("--mount", "unshare", "--user", "--map-root-user"),
    ],
    ids=["host", "all", "user", "deny", "user and the host's numbers", "user after mounts"],
)
def test_names_and_numbers_of_a_container(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with container(tmp_path, _TEXT, "--uts", *flags) as subject:
        subject.check()
        subject.carry()
        subject.check()
        subject.carry()
        subject.check()
