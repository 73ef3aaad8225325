"""User namespaces below that of a tree's first process: of single processes in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kernel.namespaces.containers import container

_COMMON = """
import ctypes, fcntl, json, socket, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
NEWUSER, NEWNS, NEWNET, NEWUTS, NEWIPC, NEWCGROUP = 0x10000000, 0x20000, 0x40000000, 0x4000000, 0x8000000, 0x2000000

class Child:
    # Does `prepare`, has its maps written by its parent, does `settle`, and then looks at itself whenever it is asked.
    def __init__(self, prepare, settle=lambda: None, uid_map="", gid_map="", deny=True):
        (self.asked, self.ask), (self.told, self.tell) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.live(prepare, settle)
            except BaseException:
                os.write(self.tell, traceback.format_exc().encode())
            os._exit(1)
        here = os.read(self.told, 100).decode()  # what /proc calls it
        for name, text in (("setgroups", "deny" * deny), ("gid_map", gid_map), ("uid_map", uid_map)):
            if text:
                open(f"/proc/{here}/{name}", "w").write(text)
        os.write(self.ask, b"?")
        self.expect(b"!")

    def live(self, prepare, settle):
        prepare()
        os.write(self.tell, os.readlink("/proc/self").encode())
        os.read(self.asked, 1)
        settle()
        before = look()
        os.write(self.tell, b"!")
        while os.read(self.asked, 1):
            now = look()
            os.write(self.tell, json.dumps([pair for pair in zip(before, now) if pair[0] != pair[1]]).encode())

    def expect(self, wanted):
        got = os.read(self.told, 100000)
        assert got == wanted, got.decode()

    def check(self):
        os.write(self.ask, b"?")
        self.expect(b"[]")

def call(name, *arguments):
    assert getattr(libc, name)(*arguments) == 0, (name, os.strerror(ctypes.get_errno()))

def rest():
    threading.Thread(target=signal.pause, daemon=True).start()

def look():
    # What the caller is, and how its namespaces stand to its user namespace.
    told = ("Cap", "NoNew", "Groups", "Uid", "Gid")
    status = [line for line in open("/proc/thread-self/status") if line.startswith(told)]
    maps = [open("/proc/self/" + name).read() for name in ("uid_map", "gid_map", "setgroups")]
    own = {name: owned(name) for name in ("mnt", "net", "uts", "ipc", "pid", "cgroup")}
    mounts = sorted(line.split()[4] for line in open("/proc/self/mountinfo")) if own["mnt"] is True else []
    return [status, maps, own, mounts, os.getresuid(), os.getresgid(), os.getgroups(), os.getpid(), os.getcwd(),
            numbers(), socket.gethostname()]

def numbers():
    # Of its threads, as they know them themselves.
    files = [open(f"/proc/self/task/{tid}/status").read() for tid in os.listdir("/proc/self/task")]
    return sorted(int(text.partition("NSpid:")[2].split("\\n")[0].split()[-1]) for text in files)

def owned(name):
    with open("/proc/self/ns/" + name) as file, open("/proc/self/ns/user") as mine:
        try:
            fd = fcntl.ioctl(file, 0xb701)  # NS_GET_USERNS
        except PermissionError:
            return "above"
        same = os.path.sameopenfile(fd, mine.fileno())
        os.close(fd)
        return same

def made_by(pid):
    with open(f"/proc/{pid}/ns/user") as file:
        return struct.unpack("I", fcntl.ioctl(file, 0xb704, bytes(4)))[0]  # NS_GET_OWNER_UID

def enter():
    call("unshare", NEWUSER)

def check():
    child.check()
"""


def _carried(place: Path, text: str, *flags: str) -> None:
    """Twice."""
    with container(place, _COMMON + text, *flags) as subject:
        subject.check()
        for _ in range(2):
            subject.carry()
            subject.check()


_FLAGS = {
    "host": (),
    "container": ("--pid", "--mount-proc"),
    "user": ("--pid", "--user", "--map-root-user"),
    "user and the host's numbers": ("--user", "--map-root-user"),
    "user after mounts": ("--mount", "--uts", "unshare", "--ipc", "--user", "--map-root-user"),
}
_ANYWHERE = pytest.mark.parametrize("flags", list(_FLAGS.values())[:2], ids=list(_FLAGS)[:2])

_SERVICE = """
def prepare():
    os.chdir(HOME)
    os.setgroups([33, 40])
    os.setresgid(33, 33, 33)
    enter()

def settle():
    global handle
    os.setresuid(33, 33, 33)
    rest()
    rest()
    handle = open("/proc/self/ns/user")

seen = look
def look():
    return seen() + [os.path.samefile(f"/proc/self/fd/{handle.fileno()}", "/proc/self/ns/user")]

def setup():
    global child, maker
    child = Child(prepare, settle, "0 0 1\\n33 33 1", "0 0 1\\n33 33 1")
    maker = made_by(child.pid)

def check():
    assert made_by(child.pid) == maker
    child.check()
"""


@_ANYWHERE
def test_a_service_whose_other_users_are_nobody(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Its working directory is one that only its user may enter; it has threads, and a group with no number inside."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 33, 33)
    _carried(tmp_path, _SERVICE.replace("HOME", repr(str(home))), *flags)


_SANDBOX = """
def settle():
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    call("unshare", NEWNS | NEWNET | NEWUTS | NEWIPC)
    socket.sethostname("sandbox")
    call("mount", b"tmp", b"/mnt", b"tmpfs", 0, b"uid=7")
    open("/mnt/file", "w").write("inside")
    os.chown("/mnt/file", 3, 3)
    call("prctl", 24, 21, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_SYS_ADMIN
    rest()

seen = look
def look():
    status = os.stat("/mnt/file")
    return seen() + [status.st_uid, status.st_gid, open("/mnt/file").read(), os.stat("/mnt").st_uid]

def setup():
    global child
    child = Child(enter, settle, "0 1000 10", "0 2000 10")
"""


@_ANYWHERE
def test_a_sandbox_that_other_namespaces_belong_to(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, _SANDBOX, *flags)


_FILES = """
def settle():
    global removed, listener
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    call("unshare", NEWNS)
    call("mount", b"tmp", b"/mnt", b"tmpfs", 0, None)
    removed = open("/mnt/removed", "w+")
    removed.write("still here")
    removed.flush()
    os.unlink("/mnt/removed")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/mnt/socket")
    listener.listen()
    os.chown("/mnt/socket", 5, 6)

def look():
    client = socket.socket(socket.AF_UNIX)
    client.connect("/mnt/socket")
    listener.accept()[0].send(b"heard")
    status, inner = os.stat("/mnt/socket"), os.fstat(removed.fileno())
    found = [client.recv(10).decode(), status.st_uid, status.st_gid, inner.st_uid, inner.st_nlink]
    return found + [os.pread(removed.fileno(), 100, 0).decode(), os.listdir("/mnt")]

def setup():
    global child
    child = Child(enter, settle, "0 1000 10", "0 2000 10")
"""


@_ANYWHERE
def test_files_that_are_made_on_its_own_file_system(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Which knows no user that has no number in there, as root outside has none."""
    _carried(tmp_path, _FILES, *flags)


_NOBODY = """
def prepare():
    os.setgroups([5])
    os.setresuid(6, 7, 8)
    enter()

def setup():
    global child
    child = Child(prepare, rest, deny=False)

def check():
    child.check()
    status = open(f"/proc/{child.pid}/status").read()
    assert "Uid:\\t6\\t7\\t8\\t7" in status and "Groups:\\t5 " in status, status
    assert made_by(child.pid) == 7
"""


def test_users_that_have_no_number_inside(tmp_path: Path) -> None:
    _carried(tmp_path, _NOBODY)


_LEVELS = """
def setup():
    global child
    child = Child(enter, lower, "0 0 COUNT", "0 0 COUNT", deny=DENY)

def lower():
    global children
    if not DENY:
        os.setgroups([3, 4])
    children = [Child(enter, lowest, "0 FIRST 1", "0 FIRST 1") for _ in range(2)]
    rest()

def lowest():
    global children
    children = []
    os.setresuid(0, 0, 0)

seen = look
def look():
    for one in children:
        one.check()
    return seen()
"""


@pytest.mark.parametrize("flags", _FLAGS.values(), ids=_FLAGS)
def test_several_levels(tmp_path: Path, flags: tuple[str, ...]) -> None:
    count, first, deny = (1, 0, True) if "--user" in flags else (1000, 5, False)
    text = _LEVELS.replace("COUNT", str(count)).replace("FIRST", str(first)).replace("DENY", str(deny))
    _carried(tmp_path, text, *flags)


_ABOVE = """
def prepare():
    global above
    above = os.fork()
    if above == 0:
        while True:
            signal.pause()
    enter()

def setup():
    global child
    child = Child(prepare, uid_map="0 0 1", gid_map="0 0 1")

def look():
    return os.getuid(), os.waitpid(above, os.WNOHANG)

def check():
    child.check()
    for pid in (child.pid, int(open(f"/proc/{child.pid}/task/{child.pid}/children").read())):
        assert os.path.samefile(f"/proc/{pid}/ns/user", "/proc/self/ns/user") == (pid != child.pid), pid
"""


def test_a_child_that_is_above_the_user_namespace_of_its_parent(tmp_path: Path) -> None:
    _carried(tmp_path, _ABOVE)


_BETWEEN = """
def settle():
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    call("unshare", NEWUTS | NEWCGROUP)
    enter()
    call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: what is in /proc/self is not its own otherwise
    for name, text in (("setgroups", "deny"), ("gid_map", "7 0 1"), ("uid_map", "7 0 1")):
        open("/proc/self/" + name, "w").write(text)
    rest()

seen = look
def look():
    return seen() + [owners("uts"), owners("cgroup"), open("/proc/thread-self/cgroup").read().count(":/\\n")]

def owners(name):
    # Who made the user namespace that a namespace belongs to, and the one above that.
    with open("/proc/self/ns/" + name) as file:
        try:
            fd = fcntl.ioctl(file, 0xb701)
        except PermissionError:
            return "above"
        try:
            return struct.unpack("I", fcntl.ioctl(fd, 0xb704, bytes(4)))
        finally:
            os.close(fd)

def setup():
    global child
    child = Child(enter, settle, "0 3 9", "0 3 9")
"""


@_ANYWHERE
def test_a_user_namespace_that_nobody_is_in(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """A cgroup namespace belongs to it, among others."""
    _carried(tmp_path, _BETWEEN, *flags)
