"""Who shares a descriptor table, over several looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

import pytest
from phaul_engine import calls
from phaul_engine.sharing import Sharing

from tests.subjects.programs import wait_until

# Bears a child for each line that it reads, which shares its table or does not, until SIGUSR1.
PARENT = """
import ctypes, os, signal, sys
LIBC, CLONE, FILES = ctypes.CDLL(None), 56, 0x400
signal.signal(signal.SIGUSR1, lambda *_: LIBC.unshare(FILES))
for line in sys.stdin:
    child = LIBC.syscall(CLONE, (FILES if line == "shares\\n" else 0) | signal.SIGCHLD, 0, 0, 0, 0)
    if not child:
        while True:
            signal.pause()
    print(child, flush=True)
"""


class Family:
    """A process and the children that it has borne, which end with it."""

    def __init__(self, process: subprocess.Popen[str], said: IO[str], heard: IO[str]) -> None:
        self.pid = process.pid
        self.children: list[int] = []
        self._said, self._heard = said, heard

    def bear(self, how: str) -> int:
        """The pid of one more child."""
        self._said.write(f"{how}\n")
        self._said.flush()
        self.children.append(int(self._heard.readline()))
        return self.children[-1]


@pytest.fixture
def family() -> Iterator[Family]:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin
        assert process.stdout
        one = Family(process, process.stdin, process.stdout)
        yield one
        for pid in one.children:
            os.kill(pid, signal.SIGKILL)


def test_only_what_is_shared_is_compared_again(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def counted(left: int, right: int, what: int) -> int:
        asked.append((left, right))
        return kcmp(left, right, what)

    kcmp = calls.kcmp
    monkeypatch.setattr(calls, "kcmp", counted)
    sharing = Sharing(calls.KCMP_FILES)

    def look() -> list[int]:
        found = sharing.numbers(processes)
        return [found[pid] for pid in processes]

    processes = {family.pid: 1, family.bear("shares"): 2, family.bear("apart"): 3, family.bear("apart"): 4}
    shares = family.children[0]
    for _ in range(2):
        asked.clear()
        assert look() == [1, 1, 3, 4]
    assert asked == [(family.pid, shares)]
    processes[family.bear("shares")] = 5
    assert look() == [1, 1, 3, 4, 1]
    os.kill(shares, signal.SIGUSR1)
    wait_until(lambda: kcmp(family.pid, shares, calls.KCMP_FILES) != 0, "it has a table of its own")
    assert look() == [1, 2, 3, 4, 1]


def test_a_number_of_a_process_that_is_another_one_now_is_compared(family: Family) -> None:
    sharing = Sharing(calls.KCMP_FILES)
    apart = family.bear("apart")
    assert sharing.numbers({family.pid: 1, apart: 2}) == {family.pid: 1, apart: 2}
    shares = family.bear("shares")
    assert sharing.numbers({family.pid: 1, shares: 3}) == {family.pid: 1, shares: 1}
    assert sharing.numbers({shares: 3, apart: 2}) == {shares: 3, apart: 2}
