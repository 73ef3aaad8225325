"""Programs that count in a status file ("COUNT ok") and are known by PID: an interpreter, a JVM, a job of a shell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.host import Host, Process
from tests.subjects.programs import wait_until

SOURCES = Path(__file__).parent
DIRECTORY = "/srv/shared"
PIPELINE = (
    "n=0; while :; do n=$((n + 1)); echo $n; sleep 0.01; done | tee {directory}/pipeline.numbers | "
    "while read -r n; do before=$((before + 1)); "
    '[ "$n" = "$before" ] && echo "$n ok" > {directory}/pipeline.new || echo "$n wrong" > {directory}/pipeline.new; '
    "mv {directory}/pipeline.new {directory}/pipeline.status; done"
)
"""One command writes numbers, forking for each, one copies them, one compares; they are joined by pipes."""


@dataclass
class Job:
    """A program that counts; `process` is its leader."""

    host: Host
    process: Process
    status: str
    log: str

    @property
    def pid(self) -> int:
        """The same on every host."""
        return self.process.pid

    def count(self) -> int:
        """How far it is; AssertionError when it says that something is wrong."""
        number, _, verdict = self.host.path(self.status).read_text().strip().partition(" ")
        assert verdict == "ok", f"{number} {verdict}: {self.host.path(self.log).read_text()}"
        return int(number)

    def goes_on(self, by: int = 10) -> None:
        """Wait until it has counted on."""
        before = self.count()
        try:
            wait_until(lambda: self.count() >= before + by, f"process {self.pid} counts")
        except TimeoutError as error:
            error.add_note(self.host.path(self.log).read_text())
            raise


def start(host: Host, name: str, words: Sequence[str]) -> Job:
    """Start a program that counts in /srv/shared/NAME.status; returns when it has begun."""
    job_log, status = f"{DIRECTORY}/{name}.log", f"{DIRECTORY}/{name}.status"
    process = host.popen(words, stdout=job_log, stderr=job_log)

    def begun() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with status {process.returncode}: {host.path(job_log).read_text()}")
        return host.path(status).exists() and " " in host.path(status).read_text()

    wait_until(begun, f"{name} counts", 30.0)
    return Job(host, process, status, job_log)


def start_python(host: Host) -> Job:
    """Threads and a child process: threads_and_child.py, by Debian's own interpreter."""
    return start(
        host, "python", ["/usr/bin/python3", str(SOURCES / "threads_and_child.py"), f"{DIRECTORY}/python.status"]
    )


def start_java(host: Host, *options: str) -> Job:
    """A JVM with a small heap: Counter.java, with options for the JVM."""
    words = ["java", "-Xmx64m", *options, str(SOURCES / "Counter.java"), f"{DIRECTORY}/java.status"]
    return start(host, "java", words)


def start_pipeline(host: Host) -> Job:
    """A job of a shell: see PIPELINE."""
    return start(host, "pipeline", ["sh", "-c", PIPELINE.format(directory=DIRECTORY)])
