"""Podman's networks of bridges (podman-network(1)), and what of them a container has: it moves where it has the same.

Podman sets up each host's: bridge, leases of addresses, rules for published ports; and clears them away. A container
there gets its addresses from podman, as it was created: none is taken from the other host.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from phaul.errors import PhaulError
from phaul.events import Finding

from . import commands, podman_facts
from .podman_facts import Facts

_MODE = "bridge"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_UNKNOWN = "network not found"  # in what podman says where it has none of that name
_COMPARED = ("driver", "subnets", "internal", "ipv6_enabled", "dns_enabled", "options")
NETAVARK = "netavark"
_BACKENDS = ("cni", NETAVARK)
_MOST = 32  # of anything that a container has


@dataclass(frozen=True)
class Attachment:
    """A container on a network: its addresses there, the hardware address last, its device, the names that it has for
    others. `chosen` are those of the addresses that podman was told, and does not make up when it starts it. `network`
    is what podman says of that, as far as it has to be the same on both hosts (JSON)."""

    name: str
    addresses: tuple[str, ...]
    device: str
    aliases: tuple[str, ...]
    chosen: tuple[str, ...]
    network: dict[str, str]


def is_on_any(told: Facts) -> bool:
    """Whether a container has a network namespace that podman has plugged into bridges."""
    return bool(told["HostConfig"]["NetworkMode"] == _MODE)


def of(told: Facts) -> list[Attachment]:
    """Those of a container that runs. PhaulError if podman does not say."""
    if not is_on_any(told):
        return []
    settings, said = told["NetworkSettings"]["Networks"], _said(str(told["Name"]))
    return [_attachment(told, name, _given(settings[name]), said.get(name, {})) for name in sorted(settings)]


def _attachment(told: Facts, name: str, addresses: tuple[str, ...], said: dict[str, Any]) -> Attachment:
    made_up = str(told["Id"])[:12]
    aliases = tuple(sorted(set(said.get("aliases") or ()) - {made_up}))
    device = str(said.get("interface_name", ""))
    return Attachment(name, addresses, device, aliases, _chosen(said), _network(name) or {})


def _given(settings: dict[str, Any]) -> tuple[str, ...]:
    """The addresses that a container has which runs."""
    found = [str(settings.get(key) or "") for key in ("IPAddress", "GlobalIPv6Address", "MacAddress")]
    return tuple(one for one in found if one)


def _chosen(said: dict[str, Any]) -> tuple[str, ...]:
    """The addresses that it was created with."""
    mac = str(said.get("static_mac") or "")
    return (*sorted(map(str, said.get("static_ips") or ()), key=_version), *([mac] if mac else ()))


def _version(address: str) -> int:
    return ipaddress.ip_address(address).version


def _said(name: str) -> dict[str, dict[str, Any]]:
    """What podman was told of a container's networks, by their names (podman-generate-spec(1))."""
    return dict(json.loads(podman_facts.run("generate", "spec", name)).get("Networks") or {})


def _network(name: str) -> dict[str, str] | None:
    """What a network is, as far as that has to be the same on both hosts; None if this host has none of that name."""
    try:
        (told,) = json.loads(podman_facts.run("network", "inspect", name))
    except PhaulError as error:
        if _UNKNOWN in str(error):
            return None
        raise
    subnets = told.get("subnets") or ()
    told["subnets"] = [{key: one[key] for key in ("subnet", "gateway") if key in one} for one in subnets]
    found = {key: json.dumps(told[key], sort_keys=True) for key in _COMPARED if told.get(key)}
    ipam = str((told.get("ipam_options") or {}).get("driver", ""))
    return found | {"ipam": json.dumps(ipam), "backend": json.dumps(backend())}


def backend() -> str:
    """What makes this host's networks."""
    return podman_facts.run("info", "--format", "{{.Host.NetworkBackend}}").strip()


# -- JSON of the other host ------------------------------------------------------------------------------------------


def pack(attachments: list[Attachment]) -> list[dict[str, Any]]:
    """For the other host."""
    return [json.loads(json.dumps(asdict(one))) for one in attachments]


def unpack(facts: dict[str, Any]) -> list[Attachment]:
    """What came from the other host. PhaulError if it cannot be meant."""
    try:
        found = [_checked(dict(one)) for one in facts.get("networks") or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise PhaulError("what the source says of the container's networks cannot be understood") from error
    return found


def _checked(one: dict[str, Any]) -> Attachment:
    addresses = tuple(map(str, one["addresses"]))
    names = [str(one["name"]), str(one["device"]), *map(str, one["aliases"])]
    if len(names) > _MOST or not all(map(_NAME.fullmatch, names)):
        raise ValueError("names")
    for address in addresses:
        if not _MAC.fullmatch(address):
            ipaddress.ip_address(address)
    network = {str(key): str(value) for key, value in dict(one["network"]).items()}
    return Attachment(names[0], addresses, names[1], tuple(names[2:]), tuple(map(str, one["chosen"])), network)


# -- commands that make the same -------------------------------------------------------------------------------------


def with_addresses(create: str, attachments: list[Attachment]) -> str:
    """A command that creates a container, with the addresses that it has."""
    words = shlex.split(create)
    if "create" not in words or len(attachments) != 1:  # on several networks it is connected afterwards
        return create
    (one,) = attachments
    missing = [address for address in one.addresses if address not in one.chosen]
    place = words.index("create") + 1
    return shlex.join([*words[:place], *_options(missing), *words[place:]])


def _options(addresses: list[str]) -> Iterator[str]:
    for address in addresses:
        yield from (_option(address), address)


def _option(address: str) -> str:
    if _MAC.fullmatch(address):
        return "--mac-address"
    return "--ip6" if _version(address) == 6 else "--ip"


def _connecting(one: Attachment, container: str) -> str:
    aliases = [word for alias in one.aliases for word in ("--alias", alias)]
    return shlex.join(
        ["podman", "network", "connect", *_options(list(one.addresses)), *aliases, one.name, container],
    )


def _making(one: Attachment) -> str:
    """The command that makes a network like it."""
    words = ["podman", "network", "create"]
    told = {key: json.loads(value) for key, value in one.network.items()}
    for flag, key in (("--internal", "internal"), ("--ipv6", "ipv6_enabled")):
        words += [flag] if told.get(key) else []
    words += [] if told.get("dns_enabled") else ["--disable-dns"]
    for subnet in told.get("subnets", ()):
        words += ["--subnet", str(subnet.get("subnet"))]
        words += ["--gateway", str(subnet["gateway"])] if "gateway" in subnet else []
    for key, value in (told.get("options") or {}).items():
        words += ["--opt", f"{key}={value}"]
    return shlex.join([*words, one.name])


# -- what speaks against it ------------------------------------------------------------------------------------------


def cannot(attachments: list[Attachment], told: Facts) -> Iterator[Finding]:
    """What makes a container that does not move, and what does not move with it."""
    for one in attachments:
        told_driver = json.loads(one.network.get("driver", '""'))
        if told_driver != "bridge" or "vlan" in json.loads(one.network.get("options", "{}")):
            what = f"is of driver {told_driver}" if told_driver != "bridge" else "is in a VLAN of its bridge"
            text = f"its network {one.name} {what}, and phaul moves containers on bridges of podman's"
            yield Finding("blocker", "podman-network", text, "create it on a network of driver bridge, without vlan")
        elif (maker := json.loads(one.network.get("backend", '""'))) not in _BACKENDS:
            text = f"podman's networks are made by {maker}, and phaul knows how {' and '.join(_BACKENDS)} does that"
            advice = f'network_backend = "{NETAVARK}" in containers.conf, on both hosts (podman system reset)'
            yield Finding("blocker", "podman-network", text, advice)
        elif json.loads(one.network.get("ipam", '""')) == "dhcp":
            text = f"its address on the network {one.name} is one that was leased to this host (DHCP)"
            yield Finding("blocker", "podman-network", text, "create it on a network whose addresses podman gives")
    ports = sorted(told["HostConfig"].get("PortBindings") or {})
    if attachments and ports:
        text = f"connections that came in through the ports published here ({', '.join(ports)}) end"
        advice = "these clients know this host's address: they have to connect anew, to the other host's"
        yield Finding("warning", "podman-ports", text, advice)


def differs(facts: dict[str, Any], there: Facts) -> Iterator[Finding]:
    """At the destination: where the container there would not have the networks and the addresses that it has."""
    wanted = unpack(facts)
    if not wanted or not is_on_any(there):
        return  # or it was created with another --network: an option like others
    name = str(there["Name"])
    said = _said(name)
    for one in wanted:
        own = _attachment(there, one.name, (), said.get(one.name, {}))
        yield from _other_network(one, own.network) or _other_place(one, own, name)
    for extra in sorted(said.keys() - {one.name for one in wanted}):
        text = f"the container there is on another network too: {extra}"
        yield Finding("blocker", "podman-network", text, f"there: podman network disconnect {extra} {name}")


def _other_network(one: Attachment, here: dict[str, str]) -> list[Finding]:
    """Whether this host has the network, and it is the same."""
    if not here:
        advice = f"make it there, its bridge on the network that the container is reached by: {_making(one)}"
        return [Finding("blocker", "podman-network", f"there is no network {one.name} there", advice)]
    for key in sorted(here.keys() | one.network.keys()):
        own, wanted = here.get(key, "none"), one.network.get(key, "none")
        if own != wanted:
            text = f"the network {one.name} there is another one: {key} is {own}, here {wanted}"
            return [Finding("blocker", "podman-network", text, f"make the same there: {_making(one)}")]
    return []


def _other_place(one: Attachment, own: Attachment, container: str) -> list[Finding]:
    """Whether the container there is to have the same addresses on the network, and nobody else has them."""
    leave = shlex.join(["podman", "network", "disconnect", one.name, container])
    again, where = f"there: {leave}, and {_connecting(one, container)}", f"on the network {one.name}"
    addresses, wanted = ", ".join(own.chosen) or "any that is free", ", ".join(one.addresses)
    if not own.device:
        text, advice = f"the container there is not {where}", f"there: {_connecting(one, container)}"
    elif set(own.chosen) != set(one.addresses):
        text, advice = f"the container there has other addresses {where}: {addresses}, here {wanted}", again
    elif own.device != one.device:  # podman numbers those of several networks in any order
        text = f"the container there is {where} as {own.device}, here as {one.device}"
        advice = f"create it there with --network {one.name}:interface_name={one.device}, and the like for the others"
    elif own.aliases != one.aliases:
        names, others = (", ".join(each.aliases) or "no other name" for each in (own, one))
        text, advice = f"the container there is {where} as {names}, here as {others}", again
    elif other := _holder(one, container):
        text, advice = f"the container {other} there has its address {where}", "stop that one"
    else:
        return []
    return [Finding("blocker", "podman-address", text, advice)]


def _holder(one: Attachment, container: str) -> str:
    """Another container of this host that runs with one of these addresses; empty if there is none."""
    names = podman_facts.run("ps", "--filter", f"network={one.name}", "--format", "{{.Names}}").split()
    for name in names:
        told = podman_facts.inspect(name) if name != container else None
        settings = (told or {"NetworkSettings": {}})["NetworkSettings"].get("Networks") or {}
        if set(_given(settings.get(one.name) or {})) & set(one.addresses):
            return name
    return ""


def check(facts: dict[str, Any], told: Facts) -> None:
    """PhaulError if the container which runs now was given other addresses than it has at the source."""
    settings = told["NetworkSettings"].get("Networks") or {}
    for one in unpack(facts):
        given = _given(settings.get(one.name) or {})
        if given != one.addresses:
            text = f"podman has given the container other addresses on the network {one.name}"
            raise PhaulError(f"{text}: {', '.join(given)}, not {', '.join(one.addresses)}")


def pin(told: Facts) -> None:
    """Podman was started in a mount namespace of its own (`Places.command`), and has mounted the container's network
    namespace in that alone, by the name that its commands know. The host gets it too. PhaulError if that fails."""
    if not is_on_any(told):
        return
    state = told["State"]
    name, space = f"/proc/{int(state['Pid'])}/ns/net", os.readlink(f"/proc/{int(state['Pid'])}/ns/net")
    with open(f"/proc/{int(state['ConmonPid'])}/mountinfo") as file:
        mounted = [line.split()[4] for line in file if line.split()[3] == space]
    for path in mounted[:1]:
        if os.stat(path).st_ino != os.stat(name).st_ino:
            commands.run(("mount", "--bind", name, path), podman_facts.PATIENCE)
