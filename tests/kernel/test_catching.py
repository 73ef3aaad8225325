"""The first process of a new pid namespace is caught as its program begins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from phaul_engine.catching import Caught, Port, catch, kill
from phaul_engine.errors import RebuildError
from phaul_engine.target import Tracer

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


@pytest.mark.parametrize("privileged", [False, True])
def test_it_keeps_its_privileges_if_it_is_to(tracer: Tracer, privileged: bool) -> None:
    caught = catch(tracer, ["sh", "-c", f"{_RUNTIME} &"], _TIMEOUT, privileged=privileged)
    assert _ids(caught) == ({"0"} if privileged else {"4242"})
    kill(tracer, caught)


def test_its_pipes_are_held(tracer: Tracer) -> None:
    caught = catch(tracer, ["sh", "-c", f"{_RUNTIME} | cat &"], _TIMEOUT)
    assert list(caught.pipes) == [1]
    assert os.readlink(f"/proc/self/fd/{caught.pipes[1]}") == os.readlink(f"/proc/{caught.pid}/fd/1")
    kill(tracer, caught)


def test_a_command_that_starts_none_is_an_error(tracer: Tracer) -> None:
    with pytest.raises(RebuildError, match="sh -c exit 0 failed"):
        catch(tracer, ["sh", "-c", "exit 0"], _TIMEOUT)


_PLUGGING = """
import os, socket, struct, sys
from phaul_engine.namespaces.net import link
from phaul_engine.namespaces.net.netlink import NESTED, Namespace, attribute
index = socket.if_nametoindex
master = attribute(link.MASTER, index("bridge").to_bytes(4, "little"))
hairpin = attribute(12 | NESTED, attribute(4, b"\\1"))  # IFLA_PROTINFO, IFLA_BRPORT_MODE
with Namespace(os.open("/proc/self/ns/net", os.O_RDONLY)) as home:
    home.route.request(link.SETLINK, 0, link.head(index("out")) + master)
    home.route.request(link.SETLINK, 0, link.head(index("out"), family=7) + hairpin)
    home.route.request(link.SETLINK, 0, link.head(index("other"), flags=1, change=1))
"""


def test_what_it_plugs_in_by_netlink_is_left_out(tracer: Tracer) -> None:
    """As podman's plugins do it: the caught container is not heard, and what would have been is known."""
    _ip("link add bridge type bridge", "link add out type veth peer name other")
    plugging = ["sh", "-c", f"'{sys.executable}' -c '{_PLUGGING}' && {_RUNTIME} &"]
    caught = catch(tracer, plugging, _TIMEOUT)
    (index,) = caught.plugs
    assert caught.plugs[index].bridge == "bridge"
    assert caught.plugs[index] == Port("bridge", b"\5\0\4\0\1\0\0\0")
    said = _ip("-d link show out", "link show other")
    assert f"{index}: out@other" in said
    assert "master bridge" not in said
    assert ",UP" in said.partition(": other@")[2], "what is no port of a bridge is done"
    kill(tracer, caught)
    _ip("link del out", "link del bridge")


_MAKING = """
import os
from phaul_engine.namespaces.net import link
from phaul_engine.namespaces.net.device import info
from phaul_engine.namespaces.net.netlink import CREATE, EXCL, Namespace, attribute
from phaul_engine.objects import places
def go_up(space, name):
    space.route.request(link.SETLINK, 0, link.head(link.read_link(space, name=name).index, flags=1, change=1))
inside = places.in_new_network(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY))
with Namespace(inside) as away, Namespace(os.open("/proc/self/ns/net", os.O_RDONLY)) as home:
    master = attribute(link.MASTER, link.read_link(home, name="bridge").index.to_bytes(4, "little"))
    place = attribute(link.NET_NS_FD, inside.to_bytes(4, "little"))
    body = link.head() + attribute(link.NAME, b"out\\0") + info("veth", attribute(1, link.head() + place))
    home.route.request(link.NEWLINK, CREATE | EXCL, body + master)
    go_up(away, "lo")
    go_up(home, "out")
    go_up(home, "bridge")
    os.set_inheritable(inside, True)  # or the pair ends with this program
    os.execvp("sh", ["sh", "-c", os.environ["RUNTIME"]])
"""


def test_one_that_it_makes_as_a_port_stays_down(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As netavark does it: nothing is heard at the port, and its bridge is one in use."""
    _ip("link add bridge type bridge")
    monkeypatch.setenv("RUNTIME", f"{_RUNTIME} &")
    caught = catch(tracer, [sys.executable, "-c", _MAKING], _TIMEOUT)
    ((index, port),) = caught.plugs.items()
    assert port == Port("bridge")
    said = _ip("-d link show out", "link show bridge")
    assert f"{index}: out@" in said
    assert "master bridge" in said
    assert ",UP" not in said.partition("bridge: ")[0]
    assert ",UP" in said.partition("bridge: ")[2], "what is no port of a bridge is done"
    _ip("link del out", "link del bridge")
    kill(tracer, caught)


def _ip(*commands: str) -> str:
    return "".join(subprocess.run(["ip", *one.split()], check=True, stdout=-1).stdout.decode() for one in commands)
