"""Process 1 of a host: mounts what is the host's own, starts sshd, reaps orphans, and starts programs on request.

Requests come as JSON over SOCK_SEQPACKET with descriptors beside them (`tests.hosts.host` is the other end). A
program that is started here is a child of process 1 in a session of its own with no descriptor above 2, as one that
a service manager started.
"""

from __future__ import annotations

import array
import errno
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.hosts import audit, service_manager, syscalls
from tests.hosts.rootfs import build_root
from tests.hosts.spec import DEVICE, HOME, PREFIX4, PREFIX6, SERVICE4, SERVICE6, HostSpec

PHAULS = ("/run/phaul", "/var/lib/phaul")
VOLATILE = ("/tmp", *PHAULS, "/dev/shm", "/srv/own", "/var/log")
"""What `reset` empties."""
LOST = ("/tmp", "/run/phaul", "/dev/shm")
"""What a host does not have any more after a crash."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"
BPF_FS = "/sys/fs/bpf"
MESSAGE_MAX = 1 << 20


class Init:
    """The state of process 1."""

    def __init__(self, spec: HostSpec, state: Path, listener: socket.socket) -> None:
        self.spec = spec
        self.state = state
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.waiters: dict[int, socket.socket] = {}
        self.sshd = 0

    def run(self) -> NoReturn:
        """Serve until killed."""
        wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(wake_in, selectors.EVENT_READ, "wake")
        self.selector.register(self.listener, selectors.EVENT_READ, "listener")
        while True:
            for key, _ in self.selector.select():
                if key.data == "wake":
                    os.read(wake_in, 4096)
                elif key.data == "listener":
                    connection, _ = self.listener.accept()
                    self.selector.register(connection, selectors.EVENT_READ, connection)
                else:
                    self.serve(key.data)
            self.reap()

    def reap(self) -> None:
        """Collect the dead, and tell whoever started them."""
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                waiter = self.waiters.pop(pid, None)
                if waiter is not None:
                    self.reply(waiter, {"status": os.waitstatus_to_exitcode(status)})

    def reply(self, connection: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Answer; an asker who has gone away is no mistake."""
        packed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with suppress(OSError):
            connection.sendmsg([json.dumps(message).encode()], packed)

    def serve(self, connection: socket.socket) -> None:
        """One request, or the end of a connection."""
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(connection, MESSAGE_MAX, 16)
            if not data:
                raise ConnectionResetError
        except OSError:
            self.selector.unregister(connection)
            connection.close()
            return
        try:
            request = json.loads(data)
            match request["op"]:
                case "spawn":
                    answer = self.spawn(request, fds, connection)
                case "audit":
                    answer = {"left": self.audit()}
                case "crash":
                    answer = self.crash()
                case _:
                    answer = self.reset()
            pidfd = [os.pidfd_open(answer["pid"])] if "pid" in answer else []
            self.reply(connection, answer, pidfd)
            for fd in pidfd:
                os.close(fd)
        except OSError as error:
            self.reply(connection, {"errno": error.errno, "error": str(error)})
        finally:
            for fd in fds:
                os.close(fd)

    def spawn(self, request: dict[str, Any], fds: list[int], connection: socket.socket) -> dict[str, Any]:
        """Start a program; raises OSError as execve(2) does."""
        error_in, error_out = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                _exec(request, fds, error_out)
            except OSError as error:
                os.write(3, f"{error.errno} {error}".encode())
            finally:
                os._exit(127)
        os.close(error_out)
        with os.fdopen(error_in) as pipe:
            text = pipe.read()
        if text:
            os.waitpid(pid, 0)
            number, _, reason = text.partition(" ")
            raise OSError(int(number), f"{request['argv'][0]}: {reason}")
        self.waiters[pid] = connection
        return {"pid": pid}

    def audit(self) -> list[str]:
        """What is left on this host, as a child sees it: process 1 itself must not be delayed by a dying process."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, json.dumps(audit.inside()).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        if not text:
            raise OSError(errno.EIO, f"the audit of host {self.spec.name} failed")
        return [str(line) for line in json.loads(text)]

    def start_sshd(self) -> None:
        """Start the host's sshd and wait until it listens."""
        config = self.state / self.spec.name / "ssh" / "sshd_config"
        log = self.state / self.spec.name / "sshd.log"
        command = ["/usr/sbin/sshd", "-D", "-f", str(config), "-E", str(log)]
        self.sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True).pid
        deadline = time.monotonic() + 5
        while not _listens_on_22():
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"sshd does not listen, see {log}")
            time.sleep(0.005)

    def reset(self) -> dict[str, Any]:
        """Kill every program, empty what is the host's own, undo changes of the network; sshd starts again."""
        self._kill_all()
        for name in VOLATILE:
            if os.path.isdir(name):
                _empty(Path(name), os.stat(name).st_dev)
                if name in PHAULS:  # phaul makes them itself, with its own rights
                    os.rmdir(name)
        _reset_network(self.spec)
        self._start()
        return {}

    def crash(self) -> dict[str, Any]:
        """What is left of a host that lost power and came back: its disk and its own addresses, in another boot."""
        self._kill_all()
        for name in LOST:
            _empty(Path(name), os.stat(name).st_dev)
        _reset_network(self.spec, service=False)
        if not os.path.ismount(BOOT_ID):
            Path("/run/boot_id").touch()
            syscalls.mount("/run/boot_id", BOOT_ID, flags=syscalls.MS_BIND)
        Path(BOOT_ID).write_text(f"{uuid.uuid4()}\n")
        self._start()
        return {}

    def _start(self) -> None:
        if self.spec.sshd:
            self.start_sshd()

    def _kill_all(self) -> None:
        """Every process but this one, and their cgroups."""
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while _processes() != [1]:
            self.reap()
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"processes {_processes()} do not end")
            time.sleep(0.002)
        for directory, _, _ in os.walk("/sys/fs/cgroup", topdown=False):
            if directory != "/sys/fs/cgroup":
                os.rmdir(directory)


def _exec(request: dict[str, Any], fds: list[int], error_out: int) -> None:
    """In the child: take the place of the program that is asked for. The error pipe becomes descriptor 3."""
    if request["setsid"]:
        os.setsid()
    os.chdir(request["cwd"])
    sources: list[int] = []
    for number, spec in enumerate(request["stdio"]):
        if isinstance(spec, int):
            source = fds[spec]
        else:
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            source = os.open(spec, flags, 0o644)
        sources.append(os.dup(source))
    high = max([*sources, error_out, 3]) + 1
    sources = [os.dup2(fd, high + index) for index, fd in enumerate([*sources, error_out])]
    for number, fd in enumerate(sources):
        os.dup2(fd, number, inheritable=number < 3)
    os.closerange(4, 1 << 20)
    for name in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.umask(0o022)
    os.execvpe(request["argv"][0], request["argv"], request["env"])


def _empty(directory: Path, device: int) -> None:
    """Remove what is in `directory`, and nothing that is mounted there: the checkout may stand in a /tmp."""
    for entry in os.scandir(directory):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif os.stat(entry.path).st_dev == device and not os.path.ismount(entry.path):
            _empty(Path(entry.path), device)
            with suppress(OSError):  # ENOTEMPTY: something is mounted below
                os.rmdir(entry.path)


def _listens_on_22() -> bool:
    """Whether something listens on port 22, asked without connecting: sshd would fork a child for that."""
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(":0016") and line.split()[3] == "0A" for line in lines)


def _processes() -> list[int]:
    """The PIDs of this host."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _ip(lines: list[str], *, force: bool = False) -> None:
    subprocess.run(
        ["ip", *(["-force"] if force else []), "-batch", "-"],
        input="\n".join(lines),
        text=True,
        check=not force,
        stderr=subprocess.DEVNULL if force else None,
    )


def _set_up_network(spec: HostSpec) -> None:
    """Links up, addresses on, without waiting for duplicate address detection."""
    Path(f"/proc/sys/net/ipv4/conf/{DEVICE}/promote_secondaries").write_text("1")
    for path in (f"conf/{DEVICE}/accept_dad", "conf/lo/accept_dad", f"conf/{DEVICE}/accept_ra"):
        Path("/proc/sys/net/ipv6", path).write_text("0")
    _ip(
        [
            "link set lo up",
            f"link set {DEVICE} up",
            f"addr add {spec.address}/{PREFIX4} dev {DEVICE}",
            f"addr add {spec.address6}/{PREFIX6} dev {DEVICE} nodad",
            *_service_address(spec),
        ]
    )


def _service_address(spec: HostSpec) -> list[str]:
    """The commands that put the service address on; host a has it at first."""
    if spec.name != "a":
        return []
    return [
        f"addr add {SERVICE4}/{PREFIX4} dev {DEVICE}",
        f"addr add {SERVICE6}/{PREFIX6} dev {DEVICE} nodad",
    ]


def _reset_network(spec: HostSpec, *, service: bool = True) -> None:
    """Back to the addresses and links of the beginning; those of the service only if wanted."""
    for pin in os.listdir(BPF_FS) if os.path.isdir(BPF_FS) else []:
        if pin.startswith("phaul"):
            os.unlink(f"{BPF_FS}/{pin}")
    links = [name for name in os.listdir("/sys/class/net") if name not in (DEVICE, "lo")]
    lines = [f"link del {name}" for name in links]
    for device in (DEVICE, "lo"):
        lines += [f"addr del {SERVICE4}/{PREFIX4} dev {device}", f"addr del {SERVICE4}/32 dev {device}"]
        lines += [f"addr del {SERVICE6}/{PREFIX6} dev {device}", f"addr del {SERVICE6}/128 dev {device}"]
    _ip([*lines, *(_service_address(spec) if service else []), "neigh flush all"], force=True)


def main(spec: HostSpec, state: Path, listener: socket.socket, go: int) -> NoReturn:
    """Process 1 of `spec`, or the child of a process 1 that becomes systemd; never returns."""
    try:
        syscalls.prctl(syscalls.PR_SET_NAME, b"init")
        os.setsid()
        syscalls.sethostname(f"host-{spec.name}")
        build_root(spec, state)
        os.chdir("/")
        os.environ["HOME"] = HOME
        os.read(go, 1)
        os.close(go)
        _set_up_network(spec)
        if spec.systemd:
            service_manager.boot()
        host = Init(spec, state, listener)
        if spec.sshd:
            host.start_sshd()
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(spec.first_pid))
        (state / spec.name / "up").touch()
        host.run()
    except BaseException as error:
        sys.stderr.write(f"host {spec.name}: {error!r}\n")
        os._exit(1)
