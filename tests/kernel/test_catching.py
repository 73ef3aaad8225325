"""The first process of a new pid namespace is caught as its program begins."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from phaul_engine.catching import Caught, catch
from phaul_engine.errors import RebuildError
from phaul_engine.target import Tracer, reap

pytestmark = pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")

_RUNTIME = "unshare --fork --pid --setuid 4242 --setgid 4242 sleep 100"  # drops its ids, and executes sleep then
_TIMEOUT = 10.0


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    """What traces it; it dies with that."""
    with Tracer() as one:
        yield one


def _ids(caught: Caught) -> set[str]:
    with open(f"/proc/{caught.pid}/status") as file:
        return {word for line in file if line.startswith(("Uid:", "Gid:")) for word in line.split()[1:]}


def _end(tracer: Tracer, caught: Caught) -> None:
    for fd in caught.pipes.values():
        os.close(fd)
    os.kill(caught.pid, signal.SIGKILL)
    reap(tracer, [caught.pid])


@pytest.mark.parametrize("privileged", [False, True])
def test_it_keeps_its_privileges_if_it_is_to(tracer: Tracer, privileged: bool) -> None:
    caught = catch(tracer, ["sh", "-c", f"{_RUNTIME} &"], _TIMEOUT, privileged=privileged)
    assert _ids(caught) == ({"0"} if privileged else {"4242"})
    _end(tracer, caught)


def test_its_pipes_are_held(tracer: Tracer) -> None:
    caught = catch(tracer, ["sh", "-c", f"{_RUNTIME} | cat &"], _TIMEOUT)
    assert list(caught.pipes) == [1]
    assert os.readlink(f"/proc/self/fd/{caught.pipes[1]}") == os.readlink(f"/proc/{caught.pid}/fd/1")
    _end(tracer, caught)


def test_a_command_that_starts_none_is_an_error(tracer: Tracer) -> None:
    with pytest.raises(RebuildError, match="sh -c exit 0 failed"):
        catch(tracer, ["sh", "-c", "exit 0"], _TIMEOUT)
