"""Settings of a network namespace under /proc/sys/net (Documentation/networking/ip-sysctl.rst and its neighbours).

CRIU's images have some by their place in a list, the rest stands in fields of ours, by name. A file of them shows the
namespace of who opened it, whoever reads: so all are opened once, and read again in the freeze through the same
descriptors.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import netdev_pb2, sysctl_pb2
from phaul_engine.objects import places

from .netlink import Namespace

ROOT = "/proc/sys/net"
_COUNT = f"{ROOT}/netfilter/nf_conntrack_count"
_SIZE = 4096
_MOST = 20_000  # files; a namespace with so many has some thousand devices

# The order is that of CRIU 4.2's images.
_CONF4 = (
    "accept_local accept_redirects accept_source_route arp_accept arp_announce arp_filter arp_ignore arp_notify "
    "bootp_relay disable_policy disable_xfrm force_igmp_version forwarding igmpv2_unsolicited_report_interval "
    "igmpv3_unsolicited_report_interval log_martians medium_id promote_secondaries proxy_arp proxy_arp_pvlan "
    "route_localnet rp_filter secure_redirects send_redirects shared_media src_valid_mark tag "
    "ignore_routes_with_linkdown drop_gratuitous_arp drop_unicast_in_l2_multicast"
)
_CONF6 = (
    "accept_dad accept_ra accept_ra_defrtr accept_ra_from_local accept_ra_min_hop_limit accept_ra_mtu accept_ra_pinfo "
    "accept_ra_rt_info_max_plen accept_ra_rtr_pref accept_redirects accept_source_route autoconf dad_transmits "
    "disable_ipv6 drop_unicast_in_l2_multicast drop_unsolicited_na force_mld_version force_tllao forwarding hop_limit "
    "ignore_routes_with_linkdown keep_addr_on_down max_addresses max_desync_factor mldv1_unsolicited_report_interval "
    "mldv2_unsolicited_report_interval mtu ndisc_notify optimistic_dad proxy_ndp regen_max_retry router_probe_interval "
    "router_solicitation_delay router_solicitation_interval router_solicitations stable_secret suppress_frag_ndisc "
    "temp_prefered_lft temp_valid_lft use_oif_addrs_only use_optimistic use_tempaddr"
)
CONF4, CONF6 = tuple(_CONF4.split()), tuple(_CONF6.split())
_TEXTS = {"stable_secret", "ping_group_range"}
_UNIX, _IPV4 = ("max_dgram_qlen",), ("ping_group_range",)
_OF_DEVICES = ("ipv4/conf", "ipv6/conf", "ipv4/neigh", "ipv6/neigh")
_ORDERS = {"ipv4/route/flush", "ipv6/route/flush"}
_OF_LINKS = {"ipv6/conf/addr_gen_mode"}  # the link has it; to write it here makes addresses
_DERIVED = {"ipv4/ip_forward"}  # the same as conf/all/forwarding


@dataclass
class Sysctls:
    """The files of one namespace, open."""

    namespace: Namespace
    _files: dict[str, int] = field(default_factory=dict)  # by name beneath ROOT
    _count: int = -1  # nf_conntrack_count

    def read(self) -> dict[str, bytes]:
        """All values that can be set, by name."""
        if not self._files:
            self.namespace.inside(self._open)
        found = {}
        for name, fd in self._files.items():
            with suppress(OSError):  # not set (stable_secret), or its device is gone
                found[name] = os.pread(fd, _SIZE, 0).rstrip(b"\n")
        return found

    def connections(self) -> bool:
        """Whether the packet filter follows any connection."""
        return self._count < 0 or os.pread(self._count, 64, 0).strip() != b"0"

    def refresh(self) -> None:
        """Devices have come or gone."""
        self.close()

    def _open(self) -> None:
        with suppress(OSError):
            self._count = os.open(_COUNT, os.O_RDONLY | os.O_CLOEXEC)
        for directory, _, names in os.walk(ROOT):
            for name in names:
                path = os.path.join(directory, name)
                short = path[len(ROOT) + 1 :]
                if short in _ORDERS | _DERIVED or len(self._files) >= _MOST:
                    continue
                with suppress(OSError):
                    if os.stat(path).st_mode & 0o200:
                        self._files[short] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close them."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        if self._count >= 0:
            os.close(self._count)
            self._count = -1


def device_of(name: str) -> tuple[str, str] | None:
    """For a setting of a device: its name, and that of the setting without it ("ipv4/conf/arp_ignore")."""
    for place in _OF_DEVICES:
        if name.startswith(place + "/"):
            device, _, rest = name[len(place) + 1 :].partition("/")
            return device, f"{place}/{rest}"
    return None


def describe(values: Mapping[str, bytes], usual: Mapping[str, bytes], entry: netdev_pb2.netns_entry) -> None:
    """Put the settings of the namespace as a whole into its entry. `usual` are those of a new namespace here."""
    entry.def_conf4.extend(_list(values, "ipv4/conf/default", CONF4))
    entry.all_conf4.extend(_list(values, "ipv4/conf/all", CONF4))
    entry.def_conf6.extend(_list(values, "ipv6/conf/default", CONF6))
    entry.all_conf6.extend(_list(values, "ipv6/conf/all", CONF6))
    entry.unix_conf.extend(_list(values, "unix", _UNIX))
    entry.ipv4_sysctl.extend(_list(values, "ipv4", _IPV4))
    for name, value in values.items():
        device = device_of(name)
        if (device is None or device[0] in ("all", "default")) and not _listed(name):
            entry.sysctls.append(_named(name, value, usual.get(name)))


def describe_devices(
    values: Mapping[str, bytes], usual: Mapping[str, bytes], entries: Iterable[netdev_pb2.net_device_entry]
) -> None:
    """The same for devices."""
    others: dict[str, list[netdev_pb2.named_sysctl]] = {}
    for name, value in values.items():
        of = None if _listed(name) else device_of(name)
        if of is not None and of[1] not in _OF_LINKS:
            family, kind, last = of[1].split("/", 2)
            one = _named(of[1], value, usual.get(f"{family}/{kind}/default/{last}"))
            others.setdefault(of[0], []).append(one)
    for entry in entries:
        device = os.fsdecode(entry.name)
        for name in ("conf4", "conf6", "sysctls"):
            entry.ClearField(name)
        entry.conf4.extend(_list(values, f"ipv4/conf/{device}", CONF4))
        entry.conf6.extend(_list(values, f"ipv6/conf/{device}", CONF6))
        entry.sysctls.extend(others.get(device, ()))


def _named(name: str, value: bytes, usual: bytes | None) -> netdev_pb2.named_sysctl:
    return netdev_pb2.named_sysctl(name=os.fsencode(name), value=value, usual=value == usual)


def _listed(name: str) -> bool:
    """Whether a setting stands in one of CRIU's lists."""
    place, _, last = name.rpartition("/")
    if name in ("unix/max_dgram_qlen", "ipv4/ping_group_range"):
        return True
    family, _, rest = place.partition("/")
    return rest.startswith("conf/") and last in (CONF4 if family == "ipv4" else CONF6)


def _list(values: Mapping[str, bytes], place: str, names: Sequence[str]) -> list[sysctl_pb2.sysctl_entry]:
    if not any(f"{place}/{name}" in values for name in names):
        return []
    return [_value(name, values.get(f"{place}/{name}")) for name in names]


def _value(name: str, value: bytes | None) -> sysctl_pb2.sysctl_entry:
    if name in _TEXTS or value is None or not value.lstrip(b"-").isdigit():
        return sysctl_pb2.sysctl_entry(type=sysctl_pb2.CTL_STR, sarg=value)
    return sysctl_pb2.sysctl_entry(type=sysctl_pb2.CTL_32, iarg=int(value))


def wanted_values(
    entry: netdev_pb2.netns_entry, devices: list[netdev_pb2.net_device_entry]
) -> tuple[dict[str, bytes], set[str]]:
    """What an image wants set, in the order in which it can be, and the names that another kernel need not have."""
    wanted: dict[str, bytes] = {}
    usual: set[str] = set()
    for place, names, listed in (
        ("ipv4/conf/all", CONF4, entry.all_conf4),
        ("ipv6/conf/all", CONF6, entry.all_conf6),
        ("ipv4/conf/default", CONF4, entry.def_conf4),
        ("ipv6/conf/default", CONF6, entry.def_conf6),
        ("unix", _UNIX, entry.unix_conf),
        ("ipv4", _IPV4, entry.ipv4_sysctl),
    ):
        _add_list(wanted, place, names, listed)
    for one in entry.sysctls:
        name = _safe(one.name)
        wanted[name] = one.value
        if one.usual:
            usual.add(name)
    for device in devices:
        own = os.fsdecode(device.name)
        _add_list(wanted, f"ipv4/conf/{own}", CONF4, device.conf4)
        _add_list(wanted, f"ipv6/conf/{own}", CONF6, device.conf6)
        for one in device.sysctls:
            family, kind, *rest = _safe(one.name).split("/")
            name = "/".join((family, kind, own, *rest))
            wanted[name] = one.value
            if one.usual:
                usual.add(name)
    return wanted, usual


def _safe(name: bytes) -> str:
    text = os.fsdecode(name)
    parts = text.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise ImageError(f"{text!r} is no name of a setting")
    return text


def _add_list(
    wanted: dict[str, bytes], place: str, names: Sequence[str], listed: Iterable[sysctl_pb2.sysctl_entry]
) -> None:
    for name, one in zip(names, listed, strict=False):
        if one.type == sysctl_pb2.CTL_STR and one.sarg:
            wanted[f"{place}/{name}"] = one.sarg
        elif one.type == sysctl_pb2.CTL_32 and one.HasField("iarg"):
            wanted[f"{place}/{name}"] = b"%d" % one.iarg


def apply(sysctls: Sysctls, wanted: Mapping[str, bytes], usual: set[str]) -> None:
    """Set what differs. Settings of all devices change those of each, so it is done until nothing differs."""
    for _ in range(3):
        there = sysctls.read()
        differing = {name: value for name, value in wanted.items() if there.get(name) != value}
        refused = sysctls.namespace.inside(lambda changes=differing: _write(changes))  # type: ignore[misc]
        if not differing.keys() - refused.keys():
            break
    for name, error in refused.items():
        if not (error.errno in (errno.ENOENT, errno.ENODEV) and name in usual):
            raise RebuildError(
                f"/proc/sys/net/{name} cannot be set to {wanted[name].decode(errors='replace')!r}: {error.strerror}"
            )


def _write(changes: Mapping[str, bytes]) -> dict[str, OSError]:
    refused = {}
    for name, value in changes.items():
        try:
            fd = os.open(f"{ROOT}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            refused[name] = error
            continue
        try:
            os.write(fd, value)
        except OSError as error:
            refused[name] = error
        finally:
            os.close(fd)
    return refused


def usual_values() -> dict[str, bytes]:
    """The settings of a new namespace of this kernel."""

    def look() -> dict[str, bytes]:
        fresh = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with Namespace(fresh) as namespace:
                sysctls = Sysctls(namespace)
                try:
                    return sysctls.read()
                finally:
                    sysctls.close()
        finally:
            os.close(fresh)

    return places.in_new_network(look)
