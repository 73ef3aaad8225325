"""What podman says of a container's networks, and where another host would not give it the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from phaul.errors import PhaulError
from phaul.workloads import podman_facts, podman_networks

_ADDRESSES = ["10.88.0.5", "fd88::5", "02:77:00:00:00:05"]


def _container(**host: Any) -> dict[str, Any]:
    """What `podman inspect` of 4.3 says of one that runs, so far as it is read."""
    given = {"IPAddress": "10.88.0.5", "GlobalIPv6Address": "fd88::5", "MacAddress": "02:77:00:00:00:05"}
    return {
        "Id": "c9aee386177e0fbb",
        "Name": "web",
        "HostConfig": {"NetworkMode": "bridge", "PortBindings": {}, **host},
        "NetworkSettings": {"Networks": {"podman": given}},
    }


def _network(**changed: Any) -> dict[str, Any]:
    """What `podman network inspect` says of one, so far as it is read."""
    subnets = [{"subnet": "10.88.0.0/16", "gateway": "10.88.0.1", "lease_range": {}}]
    network = {"name": "podman", "id": "2f25", "driver": "bridge", "network_interface": "cni-podman0"}
    ipam = {"driver": "host-local"}
    return {**network, "subnets": subnets, "internal": False, "ipam_options": ipam, **changed}


class _Podman:
    """What podman answers on a host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.networks: Mapping[str, Any] = {"podman": _network()}
        self.chosen: dict[str, Any] = {"interface_name": "eth0", "aliases": ["c9aee386177e"]}
        self.backend = "cni"
        monkeypatch.setattr(podman_facts, "run", self.run)

    def run(self, *words: str) -> str:
        """The command."""
        match words:
            case ("generate", "spec", "web"):
                return json.dumps({"Networks": {"podman": self.chosen}})
            case ("network", "inspect", name):
                if name not in self.networks:
                    raise PhaulError(f"podman network inspect {name} failed (125): network not found")
                return json.dumps([self.networks[name]])
            case ("info", *_):
                return f"{self.backend}\n"
            case ("ps", *_):
                return "web\n"
        raise AssertionError(words)

    def choose(self, *addresses: str) -> None:
        """The container was created with these, the last one its hardware address."""
        self.chosen |= {"static_ips": list(addresses[:-1]), "static_mac": addresses[-1]}


@pytest.fixture
def podman(monkeypatch: pytest.MonkeyPatch) -> _Podman:
    """One that knows the container, whose addresses it has made up."""
    return _Podman(monkeypatch)


def _facts() -> dict[str, Any]:
    return {"networks": podman_networks.pack(podman_networks.of(_container()))}


def test_the_command_says_which_addresses_it_has(podman: _Podman) -> None:
    create = "podman create --network podman small sh -c 'echo create'"
    attached = podman_networks.of(_container())
    options = "--ip 10.88.0.5 --ip6 fd88::5 --mac-address 02:77:00:00:00:05"
    assert podman_networks.with_addresses(create, attached) == create.replace("create ", f"create {options} ", 1)
    podman.choose(*_ADDRESSES)
    assert podman_networks.with_addresses(create, podman_networks.of(_container())) == create


def _told(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one.text, one.advice) for one in podman_networks.differs(facts, _container())]


def test_addresses_that_podman_would_make_up(podman: _Podman) -> None:
    facts = _facts()
    ((text, advice),) = _told(facts)
    assert "any that is free, here 10.88.0.5, fd88::5, 02:77:00:00:00:05" in text
    assert advice.startswith("there: podman network disconnect podman web, and podman network connect --ip 10.88.0.5 ")
    podman.choose(*_ADDRESSES)
    assert _told(facts) == []


def test_a_device_of_another_name(podman: _Podman) -> None:
    podman.choose(*_ADDRESSES)
    facts = _facts()
    podman.chosen |= {"interface_name": "eth1"}
    ((text, advice),) = _told(facts)
    assert text == "the container there is on the network podman as eth1, here as eth0"
    assert "--network podman:interface_name=eth0" in advice


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"internal": True}, "internal is true, here none"),
        ({"subnets": [{"subnet": "10.89.0.0/16"}]}, "subnets is"),
        ({"options": {"mtu": "1400"}}, "options is"),
        ({"driver": "macvlan"}, 'driver is "macvlan", here "bridge"'),
    ],
)
def test_another_network_of_that_name(podman: _Podman, network: dict[str, Any], words: str) -> None:
    podman.choose(*_ADDRESSES)
    facts = _facts()
    podman.networks = {"podman": _network(**network)}
    ((text, advice),) = _told(facts)
    assert words in text
    make = "podman network create --disable-dns --subnet 10.88.0.0/16 --gateway 10.88.0.1 podman"
    assert advice == f"make the same there: {make}"


def test_what_a_host_may_have_otherwise(podman: _Podman) -> None:
    podman.choose(*_ADDRESSES)
    facts = _facts()
    podman.networks = {"podman": _network(id="99", network_interface="br7", created="now")}
    podman.chosen |= {"aliases": ["7e2c42b1fc3c"]}
    there = _container() | {"Id": "7e2c42b1fc3c1111"}
    assert list(podman_networks.differs(facts, there)) == []


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"driver": "macvlan"}, "of driver macvlan"),
        ({"options": {"vlan": "7"}}, "in a VLAN"),
        ({"ipam_options": {"driver": "dhcp"}}, "DHCP"),
    ],
)
def test_networks_that_phaul_does_not_move(podman: _Podman, network: dict[str, Any], words: str) -> None:
    podman.networks = {"podman": _network(**network)}
    told = _container(PortBindings={"80/tcp": [{}]})
    blocker, warning = podman_networks.cannot(podman_networks.of(told), told)
    assert (blocker.severity, words in blocker.text) == ("blocker", True)
    assert (warning.severity, "(80/tcp)" in warning.text) == ("warning", True)


def test_a_backend_that_phaul_does_not_know(podman: _Podman) -> None:
    podman.choose(*_ADDRESSES)
    facts = _facts()
    podman.backend = "netavark"
    ((text, _),) = _told(facts)
    assert 'backend is "netavark", here "cni"' in text
    assert not list(podman_networks.cannot(podman_networks.of(_container()), _container()))
    podman.backend = "other"
    (blocker,) = podman_networks.cannot(podman_networks.of(_container()), _container())
    assert "made by other" in blocker.text


@pytest.mark.parametrize("change", [{"addresses": ["10.1;x"]}, {"name": "--opt"}, {"device": 7, "aliases": 3}])
def test_what_cannot_be_meant(podman: _Podman, change: dict[str, Any]) -> None:
    facts = _facts()
    facts["networks"][0] |= change
    with pytest.raises(PhaulError, match="cannot be understood"):
        podman_networks.unpack(facts)


def test_other_addresses_than_it_was_created_with(podman: _Podman) -> None:
    facts, told = _facts(), _container()
    podman_networks.check(facts, told)
    told["NetworkSettings"]["Networks"]["podman"]["IPAddress"] = "10.88.0.6"
    with pytest.raises(PhaulError, match=r"other addresses on the network podman: 10\.88\.0\.6, "):
        podman_networks.check(facts, told)
