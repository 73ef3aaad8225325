"""A host as a test sees it from outside: start programs there, look into its files and processes."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.hosts.rootfs import REPOSITORY
from tests.hosts.spec import DEVICE, HOME, HostSpec

DEVNULL = "/dev/null"
PIPE = subprocess.PIPE
Stdio = str | int | IO[Any]
"""A path inside the host (opened there: what a subject needs, whose descriptors must be of its own mount namespace),
a descriptor or file of the caller, or PIPE."""


class HostError(Exception):
    """A host did not do what was asked."""


@dataclass
class Process:
    """A program that was started on a host. Its parent is the host's process 1."""

    host: Host
    argv: list[str]
    pid: int
    """Inside the host."""
    pidfd: int
    connection: socket.socket
    stdin: IO[bytes] | None = None
    stdout: IO[bytes] | None = None
    stderr: IO[bytes] | None = None
    returncode: int | None = None
    """As subprocess has it: negative for the signal that ended it."""

    @property
    def outer_pid(self) -> int:
        """The PID in the caller's namespace; -1 once it has been reaped."""
        for line in Path(f"/proc/self/fdinfo/{self.pidfd}").read_text().splitlines():
            if line.startswith("Pid:"):
                return int(line.split()[1])
        raise HostError("no pidfd")

    def poll(self) -> int | None:
        """The return code, None while it runs."""
        with suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; TimeoutError after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise TimeoutError(f"{self.argv} on {self.host.name} has not ended after {timeout} s")
            data = self.connection.recv(4096)
            if not data:
                raise HostError(f"host {self.host.name} went away under {self.argv}")
            self.returncode = int(json.loads(data)["status"])
            self._close()
        return self.returncode

    def communicate(self, data: bytes = b"", timeout: float | None = None) -> tuple[bytes, bytes]:
        """Feed standard input, collect what is written to pipes until they close, wait for the end."""
        if self.stdin is not None:
            with suppress(BrokenPipeError):
                self.stdin.write(data)
            self.stdin.close()
        collected = {pipe.fileno(): bytearray() for pipe in (self.stdout, self.stderr) if pipe is not None}
        deadline = None if timeout is None else time.monotonic() + timeout
        unfinished = set(collected)
        while unfinished:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            readable = select.select(list(unfinished), [], [], left)[0]
            if not readable:
                raise TimeoutError(f"{self.argv} on {self.host.name} has not ended after {timeout} s")
            for fd in readable:
                chunk = os.read(fd, 65536)
                collected[fd] += chunk
                if not chunk:
                    unfinished.discard(fd)
        texts = [bytes(collected[pipe.fileno()]) if pipe is not None else b"" for pipe in (self.stdout, self.stderr)]
        self.wait(None if deadline is None else max(0.5, deadline - time.monotonic()))
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Signal it; ProcessLookupError when it has ended."""
        signal.pidfd_send_signal(self.pidfd, number)

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, its return code; SIGKILL and TimeoutError when it does not end in time."""
        with suppress(ProcessLookupError):
            self.send_signal(signal.SIGTERM)
        try:
            return self.wait(timeout)
        except TimeoutError:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL, and wait; once more is no mistake."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                self.send_signal(signal.SIGKILL)
            self.wait(10)

    def _close(self) -> None:
        self.connection.close()
        os.close(self.pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()


@dataclass
class Host:
    """One of the hosts; `init_pid` is its process 1 as the caller counts."""

    spec: HostSpec
    state: Path
    init_pid: int
    cgroup: Path
    """The root of its cgroups, from outside."""
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = base_environment() | self.environment

    @property
    def name(self) -> str:
        """a, b or client."""
        return self.spec.name

    @property
    def address(self) -> str:
        """Its own IPv4 address."""
        return self.spec.address

    @property
    def address6(self) -> str:
        """Its own IPv6 address."""
        return self.spec.address6

    @property
    def device(self) -> str:
        """The network device with the addresses."""
        return DEVICE

    @property
    def key(self) -> Path:
        """The private key that every host's root and operator accept, for a caller outside the hosts."""
        return self.state / self.name / "ssh" / "client" / "id_ed25519"

    @property
    def ssh_options(self) -> list[str]:
        """Options of ssh(1) that reach this host from another; inside the hosts the defaults do."""
        known = self.state / self.name / "ssh" / "client" / "known_hosts"
        return ["-i", str(self.key), "-o", f"UserKnownHostsFile={known}", "-o", "BatchMode=yes", "-F", "none"]

    def path(self, inside: str | os.PathLike[str]) -> Path:
        """The host's file of that name, seen from outside (absolute links in it lead astray)."""
        return Path(f"/proc/{self.init_pid}/root") / os.fspath(inside).lstrip("/")

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(self.state / self.name / "control"))
        except OSError as error:
            connection.close()
            raise HostError(f"host {self.name} is not there: {error}") from error
        return connection

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: Stdio = DEVNULL,
        stdout: Stdio = DEVNULL,
        stderr: Stdio = DEVNULL,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = "/",
        setsid: bool = True,
    ) -> Process:
        """Start a program with its standard descriptors and no others; `env` adds to the host's environment."""
        words = [os.fspath(word) for word in argv]
        fds: list[int] = []
        pipes: list[IO[bytes] | None] = [None, None, None]
        stdio: list[str | int] = []
        ours: list[int] = []
        for number, wanted in enumerate((stdin, stdout, stderr)):
            if isinstance(wanted, str):
                stdio.append(wanted)
                continue
            if wanted == PIPE:
                reader, writer = os.pipe()
                pipes[number] = os.fdopen(writer if number == 0 else reader, "wb" if number == 0 else "rb")
                ours.append(reader if number == 0 else writer)
                fds.append(ours[-1])
            else:
                fds.append(wanted if isinstance(wanted, int) else wanted.fileno())
            stdio.append(len(fds) - 1)
        request = {
            "op": "spawn",
            "argv": words,
            "env": self.environment | dict(env or {}),
            "cwd": os.fspath(cwd),
            "stdio": stdio,
            "setsid": setsid,
        }
        try:
            connection, answer, received = self._ask(request, fds)
        finally:
            for fd in ours:
                os.close(fd)
        return Process(self, words, answer["pid"], received[0], connection, pipes[0], pipes[1], pipes[2])

    def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> tuple[socket.socket, dict[str, Any], list[int]]:
        connection = self._connect()
        try:
            socket.send_fds(connection, [json.dumps(request).encode()], list(fds))
            data, received, _, _ = socket.recv_fds(connection, 1 << 20, 4)
            if not data:
                raise HostError(f"host {self.name} went away")
            answer = json.loads(data)
            if "error" in answer:
                raise OSError(answer["errno"] or 0, f"host {self.name}: {answer['error']}")
        except BaseException:
            connection.close()
            raise
        return connection, answer, received

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        feed: str = "",
        timeout: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] = "/",
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; CalledProcessError (with its output) when it fails and `check`."""
        with self.popen(argv, env=env, cwd=cwd, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
            out, err = process.communicate(feed.encode(), timeout)
        done = subprocess.CompletedProcess(
            process.argv, process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")
        )
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
            error.add_note(f"on host {self.name}: {done.stderr.strip()}")
            raise error
        return done

    def alive(self, pid: int) -> bool:
        """Whether there is a process with that PID inside, other than a zombie."""
        try:
            text = self.path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return text.rpartition(")")[2].split()[0] != "Z"

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Signal a process by its PID inside: one that this object did not start."""
        self.run(["/bin/kill", f"-{int(number)}", str(pid)])

    def processes(self) -> list[int]:
        """The PIDs inside."""
        return sorted(int(name) for name in os.listdir(self.path("/proc")) if name.isdigit())

    def addresses(self) -> list[str]:
        """The addresses on its eth0, with their prefixes."""
        found = json.loads(self.run(["ip", "-json", "addr", "show", "dev", DEVICE]).stdout)
        return [f"{item['local']}/{item['prefixlen']}" for item in found[0]["addr_info"]]

    def audit(self) -> set[str]:
        """Everything that an idle host has not, each line with the host's name (see `tests.hosts.audit`)."""
        connection, answer, _ = self._ask({"op": "audit"})
        connection.close()
        return {f"host {self.name}: {line}" for line in answer["left"]}

    def crash(self) -> None:
        """Have it lose power and come back: its processes, what it had in memory and the service address are gone."""
        self._ask({"op": "crash"})[0].close()

    def reset(self) -> None:
        """Kill every program on it, empty its volatile directories and put addresses and links back."""
        self._ask({"op": "reset"})[0].close()


def base_environment() -> dict[str, str]:
    """What a program on a host has in its environment; the tests' own interpreter is first in PATH."""
    scripts = virtual_environment() / "bin"
    return {
        "PATH": f"{scripts}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": HOME,
        "USER": "root",
        "LANG": "C.UTF-8",
        "MESONPY_EDITABLE_VERBOSE": "1",  # import only looks whether to build, and so needs no right to write
    }


def virtual_environment() -> Path:
    """Where `phaul` is installed: the running interpreter's own environment, or else the checkout's."""
    return Path(sys.prefix) if sys.prefix != sys.base_prefix else REPOSITORY / ".venv"
