"""Mount namespaces: programs that made mounts of every kind, and look whether they find them as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from phaul_engine.errors import BlockedError

from tests.kernel.namespaces.containers import container

_TOOLS = """
import ctypes, socket, stat, struct
libc = ctypes.CDLL(None, use_errno=True)
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, NOATIME, BIND, REC = 1, 2, 4, 8, 32, 1024, 4096, 16384
UNBINDABLE, PRIVATE, SLAVE, SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20

def call(name, *arguments):
    values = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*values) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"{name}{arguments}")

def mount(source, target, kind=None, flags=0, data=None):
    call("mount", source, target, kind, ctypes.c_ulong(flags), data)

def make(path):
    os.makedirs(path, exist_ok=True)
    return path

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

def read(path):
    with open(path) as file:
        return file.read()

def table():
    groups, found = {}, []
    for line in open("/proc/self/mountinfo"):
        fields = line.split()
        dash = fields.index("-")
        found.append((fields[4], fields[3], fields[5], fields[6:dash], fields[dash + 1], fields[dash + 3]))
    result = []
    for point, root, flags, tags, kind, options in sorted(found, key=lambda one: (one[0], one[1], one[4])):
        names = []
        for tag in tags:
            name, _, number = tag.partition(":")
            names.append(name + str(groups.setdefault(number, len(groups)) if number else ""))
        result.append((point, root, flags, names, kind, options))
    return result

def pivoted(place):
    # A root of our own on a tmpfs, with what python needs from the host
    new = make(place + "/root")
    mount("root", new, "tmpfs", 0, "size=32m,mode=755")
    for name in ("usr", "bin", "lib", "lib64", "etc", "root"):
        if os.path.islink("/" + name):
            os.symlink(os.readlink("/" + name), f"{new}/{name}")
        elif os.path.isdir("/" + name):
            mount("/" + name, make(f"{new}/{name}"), None, BIND)
    mount(place, make(new + place), None, BIND)
    for name in ("proc", "dev", "tmp", "run", "old"):
        make(f"{new}/{name}")
    mount("proc", new + "/proc", "proc", NOSUID | NODEV | NOEXEC)
    mount("dev", new + "/dev", "tmpfs", NOSUID, "mode=755")
    mount("devpts", make(new + "/dev/pts"), "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    for name in ("null", "zero", "urandom"):
        write(f"{new}/dev/{name}", "")
        mount("/dev/" + name, f"{new}/dev/{name}", None, BIND)
    os.symlink("pts/ptmx", new + "/dev/ptmx")
    os.chdir(new)
    call("pivot_root", ".", "old")
    os.chdir("/")
    call("umount2", "/old", 2)
    os.rmdir("/old")
"""

_MANY = (
    _TOOLS
    + """
def setup():
    global seen, held, content
    pivoted(PLACE)
    mount("tmp", make("/data"), "tmpfs", NODEV | NOATIME, "size=8m,nr_inodes=1000")
    make("/data/a/b/c")
    write("/data/file", "content of a file")
    os.link("/data/file", "/data/other")
    os.mkfifo("/data/fifo", 0o640)
    os.symlink("file", "/data/link")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("/data/stale")
    sock.close()
    os.chmod("/data/stale", 0o700)
    if os.getuid() == 0 and not USER:
        os.setxattr("/data/file", "trusted.name", b"value")
    with open("/data/sparse", "wb") as file:
        file.truncate(1 << 26)
        file.seek(1 << 25)
        file.write(b"middle")
    # binds: of a directory, read-only, of a file, of something that is deleted
    mount("/data/a", make("/run/bind"), None, BIND)
    mount(None, "/run/bind", None, BIND | REMOUNT | RDONLY | NOEXEC)
    write("/run/file", "")
    mount("/data/file", "/run/file", None, BIND)
    make("/data/gone")
    mount("/data/gone", make("/run/gone"), None, BIND)
    os.rmdir("/data/gone")
    write("/data/lost", "content of a deleted file")
    write("/run/lost", "")
    mount("/data/lost", "/run/lost", None, BIND)
    os.unlink("/data/lost")
    # over-mounts, with files open on what is hidden
    make("/run/over/deep")
    mount("one", "/run/over", "tmpfs")
    make("/run/over/deep")
    mount("two", "/run/over/deep", "tmpfs")
    write("/run/over/hidden", "hidden")
    write("/run/over/deep/hidden", "hidden too")
    held = [open("/run/over/hidden", "r+"), open("/run/over/deep/hidden"), os.open("/run/over/deep", os.O_RDONLY)]
    held[0].read(3)
    mount("three", "/run/over", "tmpfs", 0, "mode=700")
    write("/run/over/top", "top")
    # a deleted file, and a socket that listens
    ghost = open("/data/ghost", "w+")
    ghost.write("boo")
    ghost.flush()
    os.unlink("/data/ghost")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/run/listener")
    listener.listen()
    held += [ghost, listener]
    # a read-only file system
    mount("fixed", make("/run/fixed"), "tmpfs")
    write("/run/fixed/file", "fixed")
    mount(None, "/run/fixed", None, REMOUNT | RDONLY)
    # layers
    for name in ("lower", "upper", "work", "merged"):
        make("/data/" + name)
    write("/data/lower/below", "below")
    write("/data/lower/gone", "gone")
    mount("layers", "/data/merged", "overlay", 0, "lowerdir=/data/lower,upperdir=/data/upper,workdir=/data/work")
    write("/data/merged/above", "above")
    os.unlink("/data/merged/gone")
    mount("one more", make("/data/merged/dir"), "tmpfs")
    mount("mqueue", make("/dev/mqueue"), "mqueue")
    mount("/data/a/b", make("/run/unbindable"), None, BIND)
    mount(None, "/run/unbindable", None, UNBINDABLE)
    content = look()
    seen = table()

def look():
    found = [
        read("/data/file"), read("/run/file"), read("/run/lost"), read("/run/over/top"), read("/run/fixed/file"),
        sorted(os.listdir("/data")), sorted(os.listdir("/run/over")), sorted(os.listdir("/data/merged")),
        os.listdir("/run/gone"), read("/data/merged/above"), read("/data/merged/below"), os.readlink("/data/link"),
    ]
    for name in ("file", "other", "fifo", "stale", "sparse", ".", "a", "upper/gone"):
        status = os.lstat("/data/" + name)
        links = status.st_nlink if name != "upper/gone" else 0  # overlayfs keeps others where it works
        found.append((status.st_mode, links, status.st_uid, status.st_size, status.st_blocks, status.st_mtime_ns))
    found.append(os.stat("/data/file").st_ino == os.stat("/data/other").st_ino == os.stat("/run/file").st_ino)
    if os.getuid() == 0 and not USER:
        found.append(os.getxattr("/data/file", "trusted.name"))
    return found

def check():
    assert table() == seen, "\\n".join(map(str, [set(map(str, table())) ^ set(map(str, seen))]))
    assert look() == content, (look(), content)
    assert held[0].tell() == 3 and os.pread(held[0].fileno(), 10, 0) == b"hidden"
    assert os.pread(held[1].fileno(), 10, 0) == b"hidden too"
    assert os.listdir(held[2]) == ["hidden"]
    assert os.pread(held[3].fileno(), 10, 0) == b"boo" and os.fstat(held[3].fileno()).st_nlink == 0
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect("/run/listener")
        held[4].accept()[0].close()
    for path in ("/run/bind/x", "/run/fixed/x"):
        try:
            write(path, "")
        except OSError as error:
            assert error.errno == 30, error
        else:
            raise AssertionError(path + " can be written")
    first, second = os.openpty()
    assert os.ttyname(second) == "/dev/pts/0", os.ttyname(second)
    os.close(first)
    os.close(second)
    # what hides can go, and what it hid is there
    call("umount2", "/run/over", 0)
    assert read("/run/over/hidden") == "hidden" and read("/run/over/deep/hidden") == "hidden too"
    mount("three", "/run/over", "tmpfs", 0, "mode=700")
    write("/run/over/top", "top")
"""
)

_FLAVOURS = {
    "mounts": ("--mount",),
    "container": ("--mount", "--pid", "--uts", "--ipc", "--cgroup"),
    "user": ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--user", "--map-root-user"),
}


def _text(text: str, place: Path, flags: tuple[str, ...] = ()) -> str:
    return f"PLACE, USER = {str(place)!r}, {'--user' in flags}\n{text}"


@pytest.mark.parametrize("flavour", _FLAVOURS)
def test_mounts_of_every_kind(tmp_path: Path, flavour: str) -> None:
    flags = _FLAVOURS[flavour]
    with container(tmp_path, _text(_MANY, tmp_path, flags), *flags) as subject:
        subject.check()
        subject.carry()
        subject.check()
        subject.carry()
        subject.check()


_SHARING = (
    _TOOLS
    + """
def setup():
    # Three namespaces: ours, one whose mounts are peers of ours, one that only receives
    global seen, pipes
    pivoted(PLACE)
    mount("shared", make("/run/shared"), "tmpfs")
    mount(None, "/run/shared", None, SHARED)
    mount("/run/shared", make("/run/peer"), None, BIND)
    mount("/run/shared", make("/run/slave"), None, BIND)
    mount(None, "/run/slave", None, SLAVE)
    mount("/run/slave", make("/run/both"), None, BIND)
    mount(None, "/run/both", None, SHARED)
    make("/run/shared/sub")
    mount("/run/shared/sub", make("/run/part"), None, BIND)
    mount("private", make("/run/private"), "tmpfs")
    mount("in all", make("/run/shared/inner"), "tmpfs")
    pipes = []
    for kind in (None, SLAVE):
        ask, answer = os.pipe(), os.pipe()
        if os.fork() == 0:
            call("unshare", 0x20000)
            if kind:
                mount(None, "/", None, REC | kind)
            mount("own", make("/run/own"), "tmpfs")
            write("/run/own/file", str(kind))
            if kind:
                call("umount2", "/run/private", 0)
            mine = table()
            os.write(answer[1], b"R")
            while True:
                word = os.read(ask[0], 1)
                told = "same" if table() == mine else repr((mine, table()))
                if word == b"m":
                    told = repr([one[0] for one in table() if one[0].endswith("/new")])
                os.write(answer[1], (told + "\\n").encode())
        assert os.read(answer[0], 1) == b"R"
        pipes.append((ask, answer))
    seen = table()

def ask(word):
    found = []
    for ask, answer in pipes:
        os.write(ask[1], word)
        text = b""
        while not text.endswith(b"\\n"):
            text += os.read(answer[0], 65536)
        found.append(text.decode().strip())
    return found

def check():
    assert table() == seen, (table(), seen)
    assert ask(b"t") == ["same", "same"], ask(b"t")
    make("/run/shared/new")
    mount("new", "/run/peer/new", "tmpfs")
    everywhere = repr(sorted(f"/run/{name}/new" for name in ("both", "peer", "shared", "slave")))
    assert repr(sorted(one[0] for one in table() if one[0].endswith("/new"))) == everywhere
    assert ask(b"m") == [everywhere, everywhere], ask(b"m")
    call("umount2", "/run/shared/new", 0)
    os.rmdir("/run/shared/new")
    make("/run/both/only")
    mount("new", "/run/both/only", "tmpfs")
    assert [one[0] for one in table() if one[0].endswith("/only")] == ["/run/both/only"]
    call("umount2", "/run/both/only", 0)
    os.rmdir("/run/both/only")
    assert table() == seen and ask(b"t") == ["same", "same"]
"""
)


@pytest.mark.parametrize("flavour", ["container", "user"])
def test_who_shares_with_whom(tmp_path: Path, flavour: str) -> None:
    flags = _FLAVOURS[flavour]
    with container(tmp_path, _text(_SHARING, tmp_path, flags), *flags) as subject:
        subject.check()
        subject.carry()
        subject.check()
        subject.carry()
        subject.check()


_OUTSIDE = (
    _TOOLS
    + """
def setup():
    global seen
    pivoted(PLACE)
    mount(PLACE + "/outside", make("/run/named"), None, BIND | REC)
    seen = table()

def check():
    assert read("/run/named/file") == "moved to " + WHERE, read("/run/named/file")
    assert [one[0] for one in table()] == [one[0] for one in seen]
"""
)


def test_mounts_from_outside_are_given_anew(tmp_path: Path) -> None:
    for name in ("outside", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"moved to {name}")
    text = _text(_OUTSIDE, tmp_path) + "\nWHERE = 'elsewhere'\n"
    with container(tmp_path, text, "--mount", "--pid") as subject:
        subject.carry(external=["mnt[/run/named]:named", f"mnt[named]:{tmp_path}/elsewhere"])
        subject.check()


_LOST = (
    _TOOLS
    + """
def setup():
    global held
    if KIND == "detached":
        mount("lost", make(PLACE + "/lost"), "tmpfs")
        write(PLACE + "/lost/file", "content")
        held = open(PLACE + "/lost/file")
        call("umount2", PLACE + "/lost", 2)
    else:
        ends = os.pipe()
        mount("served", make(PLACE + "/served"), "autofs", 0, f"fd={ends[1]},minproto=5,maxproto=5,indirect")

def check():
    pass
"""
)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("detached", "it is on a mount that the program does not see any more"),
        ("autofs", "a mount that cannot be made again"),
    ],
)
def test_what_cannot_be_carried_is_named(tmp_path: Path, kind: str, told: str) -> None:
    text = _text(_LOST, tmp_path) + f"\nKIND = {kind!r}\n"
    with container(tmp_path, text, "--mount") as subject:
        with pytest.raises(BlockedError, match=told):
            subject.carry()
        subject.check()
