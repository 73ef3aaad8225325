"""The small parent of an agent, which starts recovery when the agent dies.

`launch` makes it: a process in a session of its own, so that no terminal and no sshd takes it along, protected from
the kernel's memory killer as far as it may be, and subreaper of what the agent makes, so that a dead skeleton leaves
no zombie that holds a PID. It uses nothing but the standard library, no network and little memory, and it has nothing
to do while the agent lives.

What keeper, agent and recovery say on stderr goes to systemd's journal where that runs (as phaul-ID.ROLE), else to a
file beside the listener, ID.ROLE.log, which is removed when an agent ends well and had nothing to say.
An agent that ends with status 0 has left nothing to do. Any other end, and it runs

    python -m phaul.recovery ROLE ID STATE_DIRECTORY

until that succeeds, at most a few times. If the keeper dies as well, the next `phaul` on the host finds the row.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
JOURNAL = Path("/run/systemd/journal/stdout")
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)  # by a keeper, and not by its children
_NOT_STARTED = 127  # status of a child that could not be, as shells have it
_PROTECTED, _ORDINARY = "-1000", "0"
_TRIES = 5
_PAUSE = 0.5  # seconds before the second try; doubles each time
AGENTS = {"source": "phaul.source", "destination": "phaul.dest"}


def launch(role: str, migration: str, listener: socket.socket, *, state_directory: Path) -> Callable[[], None]:
    """Start an agent under its keeper; it accepts on `listener`. Returns at once, with what ends both at once: for an
    agent that has not been asked for anything, and so has nothing to lose."""
    fd = listener.fileno()
    command = [sys.executable, "-P", "-m", "phaul.keeper", role, migration, str(fd), str(state_directory)]
    run_directory = Path(os.fsdecode(listener.getsockname())).parent
    with _log(run_directory, migration, role) as (log, environment):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
            pass_fds=(fd,),
            cwd="/",
        )
    process.returncode = 0  # it outlives us and is nobody's to wait for

    def end() -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
        path = log_path(run_directory, migration, role)
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()

    return end


def log_path(run_directory: Path, migration: str, role: str) -> Path:
    """Where an agent's words are, as long as there is something to explain."""
    return run_directory / f"{migration}.{role}.log"


def journal_name(migration: str, role: str) -> str:
    """What the journal knows an agent by: `journalctl -t NAME`."""
    return f"phaul-{migration}.{role}"


def stderr_is_journal() -> bool:
    """Whether stderr leads to systemd's journal (JOURNAL_STREAM in systemd.exec(5))."""
    try:
        return os.environ.get("JOURNAL_STREAM") == _identity(2)
    except OSError:
        return False


def _identity(fd: int) -> str:
    found = os.fstat(fd)
    return f"{found.st_dev}:{found.st_ino}"


def _journal(name: str) -> socket.socket | None:
    """A stream to the journal, as systemd-cat(1) makes it: a header says whose it is, at priority info where a line
    says none, and that lines begin with their priority."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(str(JOURNAL))
        stream.shutdown(socket.SHUT_RD)
        stream.sendall(f"{name}\n\n6\n1\n0\n0\n0\n".encode())
    except OSError:
        stream.close()
        return None
    return stream


@contextlib.contextmanager
def _log(run_directory: Path, migration: str, role: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Where an agent's stderr goes, and what tells it so: the journal, or a file, open to append; /dev/null where there
    can be neither."""
    stream = _journal(journal_name(migration, role))
    if stream is not None:
        with stream:
            yield stream.fileno(), {"JOURNAL_STREAM": _identity(stream.fileno())}
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    try:
        fd = os.open(log_path(run_directory, migration, role), flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        fd = os.open(os.devnull, flags)
    try:
        yield fd, {}
    finally:
        os.close(fd)


def _remove_silent_log() -> None:
    """Remove our stderr's file if nothing was ever said in it."""
    with contextlib.suppress(OSError):
        ours = os.fstat(2)
        path = Path(os.readlink("/proc/self/fd/2"))
        if stat.S_ISREG(ours.st_mode) and ours.st_size == 0 and path.suffix == ".log":
            path.unlink()


def keep(agent: Sequence[str], recovery: Sequence[str], *, pass_fds: tuple[int, ...] = ()) -> int:
    """Run the agent; if it dies, run recovery until it succeeds. Returns the last exit status."""
    _protect(_PROTECTED)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    status = _run(agent, pass_fds)
    pause = _PAUSE
    for _ in range(_TRIES):
        if status == 0:
            _remove_silent_log()
            return 0
        _tell(f"{' '.join(agent[3:5])} ended: {_ending(status)}")
        status = _run(recovery, ())
        if status:
            time.sleep(pause)
            pause *= 2
    return status


def _tell(text: str) -> None:
    """A line of our own, as logs.py writes them, which takes more to import than a keeper should."""
    prefix = "<4>" if stderr_is_journal() else time.strftime("%Y-%m-%dT%H:%M:%S%z warning ")
    print(f"{prefix}[keeper pid={os.getpid()}] {text}", file=sys.stderr, flush=True)


def _ending(status: int) -> str:
    """A status in words."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _run(command: Sequence[str], pass_fds: tuple[int, ...]) -> int:
    """Run a child to its end and reap whatever else dies meanwhile. Returns its status, negative for a signal."""
    for fd in pass_fds:
        os.set_inheritable(fd, True)
    try:
        pid = os.posix_spawn(command[0], list(command), os.environ, setsigdef=_IGNORED)
    except OSError as error:
        _tell(f"{command[0]} cannot be started: {error.strerror}")
        return _NOT_STARTED
    finally:
        for fd in pass_fds:
            os.close(fd)
    _protect(_ORDINARY, str(pid))
    while True:
        gone, status = os.waitpid(-1, 0)
        if gone == pid:
            _reap()
            return os.waitstatus_to_exitcode(status)


def _reap() -> None:
    """Reap what a child has left to us: dead tasks of a discarded copy hold their PIDs until somebody does."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _protect(score: str, pid: str = "self") -> None:
    """Tell the memory killer whom to spare (proc_pid_oom_score_adj(5)). Less than before takes CAP_SYS_RESOURCE."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(score, encoding="ascii")


def main(arguments: list[str]) -> int:
    """`python -m phaul.keeper ROLE ID LISTENER STATE_DIRECTORY`; see `launch`."""
    role, migration, listener, directory = arguments
    python = [sys.executable, "-P", "-m"]
    with _named(int(listener), f"{migration}.{role}.sock"):
        return keep(
            [*python, AGENTS[role], migration, listener, directory],
            [*python, "phaul.recovery", role, migration, directory],
            pass_fds=(int(listener),),
        )


@contextlib.contextmanager
def _named(listener: int, name: str) -> Iterator[None]:
    """Remove the listener's name in the end, unless it is another's by then: its agent will not accept any more.

    The relay bound the socket under another name and renamed it, so the socket itself tells only the directory.
    Nothing that goes wrong here may keep the keeper from its work.
    """
    path, inode = Path(), 0
    with contextlib.suppress(OSError, ValueError), socket.socket(fileno=os.dup(listener)) as own:
        path = Path(os.fsdecode(own.getsockname())).with_name(name)
        inode = path.stat().st_ino
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if inode and path.stat().st_ino == inode:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
