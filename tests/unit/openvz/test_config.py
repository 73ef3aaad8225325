"""Configurations as the documentation of OpenVZ shows them, and what becomes of them at another host."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul.errors import PhaulError
from phaul.workloads.openvz import config

VSWAP = """# of ve-vswap.512MB.conf-sample, vzctl of OpenVZ 7
VERSION="2"

ONBOOT="yes"
PHYSPAGES="131072:131072"
SWAPPAGES="0"
CPUUNITS="1000"
NETFILTER="full"
DISKSPACE="10485760:10485760"
DISKINODES="655360:655360"
QUOTATIME="0"
IP_ADDRESS="0.0.0.0"
PLATFORM="linux"
NUMMEMORYSUBGROUPS="512"
"""
BRIDGED = """PHYSPAGES="0:262144"
SWAPPAGES="0:512M"
DISKSPACE="2G:2.2G"
NETFILTER="stateless"
VE_ROOT="/var/lib/vz/root/$VEID"
VE_PRIVATE="/var/lib/vz/private/$VEID"
VE_LAYOUT="simfs"
OSTEMPLATE="ubuntu-16.04-x86_64"
ORIGIN_SAMPLE="vswap-256m"
NETIF="ifname=eth0,bridge=br0,mac=00:18:51:A1:C6:35,host_ifname=veth1.eth0,host_mac=00:18:51:BF:1D:AC"
"""
_CARRIED = ["DISKSPACE", "NETFILTER", "NETIF", "ORIGIN_SAMPLE", "OSTEMPLATE", "PHYSPAGES", "SWAPPAGES"]


def test_samples_are_read() -> None:
    found = config.parse(VSWAP)
    assert found["PHYSPAGES"] == "131072:131072"
    assert config.addresses(found["IP_ADDRESS"]) == []
    assert config.foreign(found) == []
    found = config.parse(BRIDGED)
    assert config.expand(found["VE_PRIVATE"], "1") == "/var/lib/vz/private/1"
    interface = config.Interface("eth0", "veth1.eth0", "br0", "00:18:51:A1:C6:35")
    assert list(config.interfaces(found["NETIF"])) == [interface]
    assert config.foreign(found) == []
    assert sorted(config.carried(found)) == _CARRIED


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ONBOOT=yes", {"ONBOOT": "yes"}),  # quotes are needed for spaces only
        ('NAME="a b"', {"NAME": "a b"}),
        ("  ONBOOT='no'", {"ONBOOT": "no"}),
        ("ONBOOT = yes", {}),  # no extra spaces
        ('NAME="open', {}),
        ("onboot=yes", {}),
        ("#ONBOOT=yes", {}),
        ("A=1\nA=2", {"A": "2"}),
    ],
)
def test_lines(line: str, found: config.Config) -> None:
    assert config.parse(line) == found


def test_what_is_written_is_read() -> None:
    assert config.parse(config.text(config.parse(VSWAP))) == config.parse(VSWAP)


@pytest.mark.parametrize(
    "value", ['a"\nVE_PRIVATE="/', "a\nB=1", "$(reboot)", "`reboot`", "a\\", "a'b", "a\0", "$HOME"]
)
def test_a_value_that_could_be_more_than_one_is_not_written(value: str) -> None:
    with pytest.raises(PhaulError, match="NAME has a value that is none"):
        config.text({"NAME": value})
    with pytest.raises(PhaulError, match="has a value that is none"):
        config.text({value: "a"})


@pytest.mark.parametrize("name", ["BINDMOUNT", "DEVNODES", "CAPABILITY", "NETDEV", "PCI", "UNHEARD_OF"])
def test_what_is_of_the_host_does_not_come_along(name: str) -> None:
    found = config.parse(f'{VSWAP}{name}="x"\n')
    assert config.foreign(found) == [name]
    assert name not in config.carried(found)


@pytest.mark.parametrize("netif", ["ifname=eth0", "ifname=eth0,host_ifname=a b", "ifname=../x,host_ifname=veth1", "x"])
def test_interfaces_that_are_none(netif: str) -> None:
    with pytest.raises(PhaulError, match="NETIF"):
        list(config.interfaces(netif))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PhaulError, match="No such file"):
        config.read(tmp_path / "101.conf")
    (tmp_path / "101.conf").write_bytes(b"#" * (config.LARGEST + 1))
    with pytest.raises(PhaulError, match="is larger than"):
        config.read(tmp_path / "101.conf")
