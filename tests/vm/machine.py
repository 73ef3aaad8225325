"""A virtual machine: start it, run commands in it, shut it down. Without KVM it is about ten times slower."""

from __future__ import annotations

import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hosts.audit import KEPT
from tests.vm import image

BOOT_TIMEOUT = 600.0
_COMING_AND_GOING = (" sh", " sshd", " bash", " find", " timeout", " cut")  # processes of whoever looks
MEMORY_MIB = 768


class MachineError(Exception):
    """A machine did not do what was asked."""


@dataclass
class Machine:
    """One machine. `number` (1 or 2) tells two apart: hvm-N, 10.78.0.N, PIDs from 6000 N on."""

    number: int
    kernel: str
    base: Path
    payload: Path
    directory: Path
    """Its console log and sockets, and the wire to the other machine."""
    process: subprocess.Popen[bytes]
    port: int

    @classmethod
    def start(cls, number: int, kernel: str, base: Path, payload: Path, directory: Path) -> Self:
        """Start booting; `wait` for it."""
        port = _free_port()
        words = _qemu(number, kernel, base, payload, directory, port)
        with (directory / f"qemu-{number}.log").open("wb") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return cls(number, kernel, base, payload, directory, process, port)

    @property
    def address(self) -> str:
        """Where the other machine finds it."""
        return f"10.78.0.{self.number}"

    def wait(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Until it answers; MachineError with the console's last words if it does not."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                if self.run(["test", "-e", "/opt/phaul/site"], timeout=15, check=False).returncode == 0:
                    return
            time.sleep(0.5)
        raise MachineError(f"machine {self.number} does not answer\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its console, and what qemu said."""
        texts = []
        for name in ("console", "qemu"):
            path = self.directory / f"{name}-{self.number}.log"
            texts += path.read_text(errors="replace").splitlines()[-25:] if path.exists() else []
        return "\n".join(texts)

    def ssh(self, command: str) -> list[str]:
        """The words that run a shell command there."""
        options = {
            "IdentityFile": self.base / "key",
            "UserKnownHostsFile": self.base / "known_hosts",
            "HostKeyAlias": "phaul-vm",
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "ControlMaster": "auto",
            "ControlPath": self.directory / f"ssh-{self.number}",
            "ControlPersist": "600",
            "LogLevel": "ERROR",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "none", *words, "-p", str(self.port), "root@127.0.0.1", command]

    def run(
        self, argv: Sequence[str], *, timeout: float = 120, check: bool = True, data: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program there and wait; MachineError with its output when it fails and `check` is set."""
        words = self.ssh(f"exec timeout {timeout:.0f} {shlex.join(argv)}")
        text = None if data is None else data.decode("latin-1")
        stdin = subprocess.DEVNULL if data is None else None
        done = subprocess.run(
            words,
            stdin=stdin,
            input=text,
            capture_output=True,
            encoding="latin-1" if data else "utf-8",
            timeout=timeout + 20,
        )
        if check and done.returncode:
            raise MachineError(
                f"{shlex.join(argv)} ended with status {done.returncode} on machine {self.number} ({self.kernel}):\n"
                f"{done.stdout}{done.stderr}"
            )
        return done

    def start_program(self, argv: Sequence[str]) -> int:
        """Start a program in a session of its own, a child of process 1; its PID."""
        inner = f"{shlex.join(argv)} </dev/null >/dev/null 2>&1 & echo $!"
        # setsid(1) forks only where it leads a group; the background shell is none, so $! is the program
        return int(self.run(["sh", "-c", f"cd / && setsid {inner}"]).stdout)

    def alive(self, pid: int) -> bool:
        """Whether a process with that PID is there and no zombie."""
        done = self.run(["sed", "-n", "s/^State:[[:space:]]*//p", f"/proc/{pid}/status"], check=False)
        return done.returncode == 0 and done.stdout[:1] not in ("", "Z")

    def leftovers(self) -> set[str]:
        """What phaul and its programs could have left: processes, network devices, pins, cgroups, sockets, mounts.
        Its rows stay: they are its memory."""
        script = "for p in /proc/[0-9]*; do test -e $p/exe && echo process $(basename $p) $(cat $p/comm); done;"
        script += "for d in /sys/class/net /sys/fs/bpf /run/phaul; do find $d/ -mindepth 1; done;"
        script += "find /sys/fs/cgroup -mindepth 1 -type d; cut -d ' ' -f 2 /proc/mounts"
        seen = self.run(["sh", "-c", f"({script}) 2>/dev/null"], check=False).stdout.splitlines()
        return {line for line in seen if not line.endswith((*_COMING_AND_GOING, *KEPT))}

    def put(self, source: Path, destination: str) -> None:
        """Copy a file there, executable."""
        with source.open("rb") as file:
            words = self.ssh(f"cat >{shlex.quote(destination)} && chmod 755 {shlex.quote(destination)}")
            subprocess.run(words, stdin=file, check=True, timeout=60)

    def close(self) -> None:
        """Power off."""
        with suppress(subprocess.TimeoutExpired, OSError):
            subprocess.run(self.ssh("busybox poweroff -f"), capture_output=True, timeout=10)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _qemu(number: int, kernel: str, base: Path, payload: Path, directory: Path, port: int) -> list[str]:
    wire = "on" if number == 1 else "off"
    words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    words += ["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB)]
    words += ["-serial", f"file:{directory}/console-{number}.log"]
    words += ["-kernel", str(base / f"vmlinuz-{kernel}"), "-initrd", str(base / f"initrd-{kernel}")]
    words += ["-append", f"console=ttyS0 panic=-1 net.ifnames=0 mitigations=off phaul.number={number}"]
    words += ["-drive", f"file={base}/root.img,if=virtio,format=raw,snapshot=on"]
    words += ["-drive", f"file={payload},if=virtio,format=raw,snapshot=on"]
    words += ["-netdev", f"stream,id=wire,server={wire},addr.type=unix,addr.path={directory}/wire"]
    words += ["-device", f"virtio-net-pci,netdev=wire,mac=02:78:00:00:00:{number:02x}"]
    words += ["-netdev", f"user,id=out,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"]
    words += ["-device", f"virtio-net-pci,netdev=out,mac=02:79:00:00:00:{number:02x}"]
    words += ["-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random"]
    # A machine ends with the thread that started it, however that ends.
    return ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "19", *words]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def machines(*kernels: str) -> Iterator[list[Machine]]:
    """One machine for each kernel (two at most), on one wire, up; powered off at the end."""
    base, payload = image.build_base(), image.build_payload()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phaul-vm-")))
        made = []
        for number, kernel in enumerate(kernels, 1):
            made.append(stack.enter_context(Machine.start(number, kernel, base, payload, directory)))
            _wait_for(directory / "wire", made[-1])
        for machine in made:
            machine.wait()
        yield made


def _wait_for(path: Path, machine: Machine) -> None:
    """On a busy host, at nice 19, it takes a while to start a program."""
    deadline = time.monotonic() + BOOT_TIMEOUT
    while not path.exists():
        if machine.process.poll() is not None or time.monotonic() > deadline:
            raise MachineError(f"qemu made no {path}\n{machine.last_words()}")
        time.sleep(0.05)
