"""The file system of a host: the machine's own root with everything that must be private covered."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from tests.hosts import syscalls
from tests.hosts.spec import HOME, OPERATOR, HostSpec

PRIVATE = ("/tmp", "/run", "/var/lib", "/var/log", "/srv", "/root")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "net/tun", "userfaultfd", "fuse", "kmsg")
REPOSITORY = Path(__file__).resolve().parents[2]


def _bind(source: Path | str, target: Path | str, flags: int = 0) -> None:
    syscalls.mount(str(source), str(target), flags=syscalls.MS_BIND | flags)


def _tmpfs(target: str, mode: int = 0o755, flags: int = 0) -> None:
    syscalls.mount("tmpfs", target, "tmpfs", flags, f"mode={mode:o}")


def needed() -> list[Path]:
    """Directories of the checkout and the interpreter that a private directory would hide."""
    wanted = {REPOSITORY, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return sorted(path for path in wanted if any(path.is_relative_to(top) for top in PRIVATE))


def _private_directories(spec: HostSpec, state: Path) -> None:
    kept = {str(path): os.open(path, os.O_PATH) for path in needed()}
    kept["/srv/shared"] = os.open(state / "shared", os.O_PATH)
    kept["/srv/own"] = os.open(state / spec.name / "own", os.O_PATH)
    for name in PRIVATE:
        _tmpfs(name, 0o1777 if name == "/tmp" else 0o755, syscalls.MS_NOSUID)
    for path, fd in kept.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        _bind(f"/proc/self/fd/{fd}", path, syscalls.MS_REC)
        os.close(fd)
    for name in ("/run/sshd", "/run/lock"):
        Path(name).mkdir()


def _dev() -> None:
    """/dev with its own ptys and shared memory, and the nodes that the programs under test open."""
    nodes = {name: os.stat(f"/dev/{name}") for name in DEVICES if Path(f"/dev/{name}").exists()}
    syscalls.detach("/dev")
    _tmpfs("/dev", flags=syscalls.MS_NOSUID)
    for name, info in nodes.items():
        if stat.S_ISCHR(info.st_mode):
            path = Path("/dev") / name
            path.parent.mkdir(exist_ok=True)
            os.mknod(path, info.st_mode, info.st_rdev)
            path.chmod(stat.S_IMODE(info.st_mode))
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"/dev/{name}")
    for name, fstype, data in (
        ("pts", "devpts", "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("shm", "tmpfs", "mode=1777"),
        ("mqueue", "mqueue", None),
    ):
        Path("/dev", name).mkdir()
        syscalls.mount(fstype, f"/dev/{name}", fstype, syscalls.MS_NOSUID | syscalls.MS_NOEXEC, data)
    os.symlink("pts/ptmx", "/dev/ptmx")


def _kernel_file_systems() -> None:
    """proc, sysfs, cgroup2 and bpf of the host's own namespaces; the machine's are gone, not only covered, so that
    /proc/self/mountinfo tells of one of each."""
    for name in ("/proc", "/sys"):
        syscalls.detach(name)
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("proc", "/proc", "proc", flags)
    syscalls.mount("sysfs", "/sys", "sysfs", flags)
    syscalls.mount("cgroup2", "/sys/fs/cgroup", "cgroup2", flags)
    if Path("/sys/fs/bpf").is_dir():
        syscalls.mount("bpf", "/sys/fs/bpf", "bpf", flags)


def _accounts(spec: HostSpec, state: Path) -> None:
    """/etc files that name the hosts, move root's home and add the operator; and the two homes with their keys."""
    own = state / spec.name / "etc"
    for source in own.iterdir():
        target = Path("/etc") / source.name
        if target.exists():
            _bind(source, target)
    for home, user in ((HOME, 0), (f"/var/lib/{OPERATOR}", 4242)):
        ssh = Path(home) / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        for source in (state / spec.name / "ssh" / "client").iterdir():
            (ssh / source.name).write_bytes(source.read_bytes())
            (ssh / source.name).chmod(0o600)
            os.chown(ssh / source.name, user, user)
        os.chown(ssh, user, user)
        os.chown(home, user, user)


def build_root(spec: HostSpec, state: Path) -> None:
    """Mount it all; the caller is alone in a new mount, PID, network, IPC and cgroup namespace."""
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    _private_directories(spec, state)
    _kernel_file_systems()
    _dev()
    _accounts(spec, state)
