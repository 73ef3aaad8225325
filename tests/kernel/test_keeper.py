"""The keeper with real children: whoever dies, and however, recovery gets its turn, and nobody is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phaul import keeper
from phaul.transport import relay

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ID = "0123456789ab"


WRONG = 98


def child(act: Callable[[], int], wrong: type[Exception] | tuple[()] = ()) -> int:
    """Do this in a child, whose status is what it returns, or WRONG; its PID."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            keeper._PAUSE = 0.01
            status = act()
        except wrong:
            status = WRONG
        finally:
            os._exit(status)
    return pid


def in_a_child(act: Callable[[], int], wrong: type[Exception] | tuple[()] = ()) -> int:
    """The status of `child`."""
    return os.waitstatus_to_exitcode(os.waitpid(child(act, wrong), 0)[1])


def kept(agent: str, recovery: str) -> int:
    """The status of a keeper with these Python programs as agent and recovery."""
    return in_a_child(lambda: keeper.keep([sys.executable, "-c", agent], [sys.executable, "-c", recovery]))


def test_an_agent_that_ends_well_needs_no_recovery(tmp_path: Path) -> None:
    assert kept("pass", f"open({str(tmp_path / 'x')!r}, 'w')") == 0
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("death", ["import os; os.kill(os.getpid(), 9)", "raise SystemExit(1)"])
def test_an_agent_that_dies_is_recovered(tmp_path: Path, death: str) -> None:
    assert kept(death, f"open({str(tmp_path / 'x')!r}, 'w')") == 0
    assert (tmp_path / "x").exists()


def test_recovery_that_dies_is_started_again(tmp_path: Path) -> None:
    log = str(tmp_path / "x")
    again = f"f = open({log!r}, 'a'); f.write('x'); f.close(); raise SystemExit(open({log!r}).read() != 'xxx')"
    assert kept("raise SystemExit(1)", again) == 0
    assert Path(log).read_text() == "xxx"


def test_the_keeper_reaps_what_the_agent_leaves(tmp_path: Path) -> None:
    log = tmp_path / "pid"
    agent = (
        "import os, time\n"
        f"if not os.fork():\n open({str(log)!r}, 'w').write(str(os.getpid())); time.sleep(0.1); os._exit(0)\n"
        "os.kill(os.getpid(), 9)"
    )
    gone = f"import os, time; time.sleep(0.5); raise SystemExit(os.path.exists('/proc/' + open({str(log)!r}).read()))"
    assert kept(agent, gone) == 0


def test_recovery_that_never_succeeds_is_given_up(tmp_path: Path) -> None:
    log = str(tmp_path / "x")
    assert kept("raise SystemExit(1)", f"f = open({log!r}, 'a'); f.write('x'); raise SystemExit(3)") == 3
    assert Path(log).read_text() == "x" * keeper._TRIES


def test_an_agent_that_cannot_be_started_is_recovered(tmp_path: Path) -> None:
    recovery = [sys.executable, "-c", f"open({str(tmp_path / 'x')!r}, 'w')"]
    assert in_a_child(lambda: keeper.keep(["/no/such/program"], recovery)) == 0
    assert (tmp_path / "x").exists()


def test_a_child_is_as_if_nobody_kept_it() -> None:
    """It can be ended by signals, and for want of memory."""
    fields = "dict(line.split(':') for line in open('/proc/self/status'))"
    ignored = f"int({fields}['SigIgn'], 16) & sum(1 << number - 1 for number in (1, 2, 15))"
    score = "int(open('/proc/self/oom_score_adj').read())"
    text = f"import time; time.sleep(0.2); raise SystemExit(bool({ignored}) or {score} < 0)"
    assert kept(text, "raise SystemExit(9)") == 0


def test_a_kernel_without_subreapers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_PR_SET_CHILD_SUBREAPER", 9999)
    assert in_a_child(lambda: keeper.keep(["/bin/true"], ["/bin/true"]), wrong=OSError) == WRONG


def test_who_died_beside_the_agent_is_reaped() -> None:
    """The agent is the first that is seen; the others hold their PIDs until they are reaped too."""
    agent = (
        "import os, signal, time\n"
        "os.kill(os.getppid(), signal.SIGSTOP)\n"
        "if not os.fork():\n"
        " os.fork() or time.sleep(0.2)\n"
        " os._exit(0)\n"
        "os.wait(); time.sleep(0.1)"
    )

    def keep() -> int:
        status = keeper.keep([sys.executable, "-c", agent], ["/bin/false"])
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        return status

    pid = child(keep)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    deadline = time.monotonic() + 20
    while (states := _children(pid)) != ["Z", "Z"]:
        assert time.monotonic() < deadline, states
        time.sleep(0.02)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _children(pid: int) -> list[str]:
    """The states of a process's children."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] for one in pids]


# -- launched -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(keeper.AGENTS))
def test_an_agent_that_is_asked_for_nothing_leaves_nothing(tmp_path: Path, role: str) -> None:
    """Whoever had it started connects, and goes away: keeper and agent end well."""
    with relay._listener(tmp_path / f"{ID}.{role}.sock") as listener:
        keeper.launch(role, ID, listener, state_directory=tmp_path / "state")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / f"{ID}.{role}.sock"))
    deadline = time.monotonic() + 60
    while (left := [path.name for path in tmp_path.iterdir()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize("said", ["", "something went wrong\n"])
def test_one_that_is_ended_leaves_what_it_has_said(tmp_path: Path, said: str) -> None:
    with relay._listener(tmp_path / f"{ID}.source.sock") as listener:
        end = keeper.launch("source", ID, listener, state_directory=tmp_path / "state")
    log = keeper.log_path(tmp_path, ID, "source")
    log.write_text(said)
    end()
    end()  # what is gone is gone
    assert log.exists() == bool(said)


def test_without_a_place_for_its_log_it_goes_on(tmp_path: Path) -> None:
    with keeper._log(tmp_path / "missing", ID, "source") as (log, environment):
        assert os.fstat(log).st_rdev == os.stat(os.devnull).st_rdev
        assert environment == {}


def test_a_process_without_stderr_has_no_journal() -> None:
    text = "import os; os.close(2); from phaul import keeper; raise SystemExit(keeper.stderr_is_journal())"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
