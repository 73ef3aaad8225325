"""What a network namespace has is the same in the one that is made of its images, by the tools that set it up."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.namespaces.net import needs
from phaul_engine.namespaces.net.reader import Reader
from phaul_engine.namespaces.net.state import to_images
from phaul_engine.objects import places
from phaul_engine.objects.base import Collection

from tests.kernel.namespaces.networks import NUMBER, Network, agree, built, carry, need, networks, plugged, read

_LINKS = "ip -d link show"
_BRIDGE = """
ip link set lo up
ip link add br0 type bridge priority 100 ageing_time 1000 stp_state 0 mcast_snooping 0
ip link add v0 type veth peer name v1
ip link set v0 master br0 up; ip link set v1 up; ip link set br0 up
"""
_ROUTED = _BRIDGE + "ip addr add 10.1.0.1/24 dev br0; ip addr add fd01::1/64 dev br0 nodad\n"


@pytest.mark.parametrize(
    "script",
    [
        "ip link set lo up mtu 9000",
        _BRIDGE + "ip link set dev v0 type bridge_slave hairpin on cost 7 isolated on",
        "ip link add v0 mtu 1400 txqueuelen 55 type veth peer name v1 mtu 1300; ip link set v0 arp off group 7 alias x",
        _BRIDGE + "ip link add mv0 link br0 type macvlan mode bridge; ip link set mv0 up",
        _BRIDGE + "ip link add mv0 link v1 type macvlan mode source; ip link set mv0 up",
        "ip link add ip0 type veth peer name ip1; ip link add iv0 link ip0 type ipvlan mode l3",
        "ip link add p0 type veth peer name p1; ip link add link p0 name p0.5 type vlan id 5 egress-qos-map 1:2",
        "ip link add d0 type dummy; ip link set d0 up",
        "ip link add ifb7 type ifb",
        _ROUTED + "ip link add vx0 type vxlan id 42 dstport 4789 local 10.1.0.1 dev br0 ttl 5; ip link set vx0 up",
        "ip tuntap add t0 mode tap user 5 group 6; ip tuntap add t1 mode tun; ip link set t0 address 02:00:00:00:00:09",
        "ip link add s1 type sit remote 10.0.0.1 local 10.0.0.2 ttl 9",
        "ip link add g1 type gre remote 10.0.0.1 local 10.0.0.2 key 9",
        "ip link add v0 type veth peer name v1; ip link property add dev v0 altname a-name-of-more-than-15",
        "ip link add v0 index 77 type veth peer name v1 index 66; ip link set v1 promisc on up",
    ],
)
def test_devices(script: str) -> None:
    carry(script, _LINKS)


def test_addresses() -> None:
    script = (
        _ROUTED
        + """
ip addr add 10.1.0.5/24 dev br0 label br0:x
ip addr add 10.2.0.1/24 brd + dev v1 valid_lft 1000 preferred_lft 500
ip addr add 10.3.0.1 peer 10.3.0.2/32 dev v1
ip addr add fd02::2/64 dev v1 nodad noprefixroute
ip addr add fd02::3/128 dev v1 valid_lft 2000 preferred_lft 0 nodad
ip link set v1 addrgenmode none
"""
    )
    carry(script, "ip -d addr show", "ip route show table all type local", "ip -6 route show table all type local")


def test_addresses_work_at_once() -> None:
    with networks(3) as (source, destination, home):
        source.attach(home, "eth0", "out0")
        source.run("ip link set lo up; ip link set eth0 up; ip addr add fd01::1/64 dev eth0")
        home.run("ip link set out0 up")
        source.settle()
        state, _ = read(source, home)
        home.run(
            "ip link del out0\nip link add br0 type bridge; ip link set br0 up; ip addr add fd01::9/64 dev br0 nodad"
        )
        with built(destination, home, state, "veth[eth0]:out1@br0") as builder:
            assert "tentative" not in destination.run("ip addr")
            listener = places.in_network(destination.net, lambda: socket.create_server(("fd01::1", 80), family=10))
            plugged(builder)
            client = places.in_network(home.net, lambda: socket.create_connection(("fd01::1", 80), timeout=5))
            client.close()
            listener.close()
            assert "nodad" not in destination.run("ip addr").replace("fd01::9", "")


def test_routes_and_rules() -> None:
    script = (
        _ROUTED
        + """
ip addr add 10.2.0.1/24 dev v1
ip route add default via 10.1.0.2
ip route add 10.5.0.0/24 via 10.1.0.3 table 77 metric 5 mtu 1400
ip route add 10.6.0.0/24 nexthop via 10.1.0.3 weight 2 nexthop via 10.1.0.4
ip route add blackhole 10.7.0.0/24
ip route add 10.8.0.0/24 dev v1 src 10.2.0.1 scope link tos 8
ip route add 192.168.5.0/24 via 172.16.0.1 dev v1 onlink
ip route add 10.9.0.0/24 via 192.168.5.1 dev v1 onlink
ip -6 route add fd05::/64 via fd01::9 metric 7
ip -6 route add fd06::/64 nexthop via fd01::9 nexthop via fd01::a
ip -6 route add fd07::/64 via fd01::9 expires 3000
ip -6 route add unreachable fd08::/64
ip rule add from 10.9.0.0/16 lookup 77
ip rule add fwmark 3 lookup 78 pref 50
ip rule del lookup default
ip rule add not from 10.9.0.0/16 iif v1 lookup 77 pref 60
ip -6 rule add from fd09::/64 lookup 77 pref 100
ip nexthop add id 5 via 10.1.0.7 dev br0
ip nexthop add id 6 via 10.1.0.8 dev br0
ip nexthop add id 10 group 5,2/6
ip route add 10.66.0.0/16 nhid 10
ip route del 10.2.0.0/24
"""
    )
    tools = ("ip -d route show table all", "ip -d -6 route show table all", "ip rule", "ip -6 rule", "ip nexthop")
    carry(script, *tools)


def test_neighbours() -> None:
    script = (
        _ROUTED
        + """
ip neigh add 10.1.0.2 lladdr 02:00:00:00:00:05 dev br0 nud permanent
ip neigh add fd01::5 lladdr 02:00:00:00:00:05 dev br0 nud permanent
ip neigh add proxy 10.1.0.77 dev br0
bridge fdb add 02:00:00:00:00:99 dev v0 master static
"""
    )
    carry(script, "ip neigh show nud permanent", "ip neigh show proxy", "bridge fdb show dev v0 state static")


def test_settings() -> None:
    names = [
        "net.ipv4.ip_forward=1",
        "net.ipv4.conf.all.rp_filter=1",
        "net.ipv4.conf.br0.rp_filter=2",
        "net.ipv4.conf.default.arp_ignore=1",
        "net.ipv6.conf.v1.accept_ra=0",
        "net.ipv6.conf.all.forwarding=1",
        "net.ipv6.conf.default.disable_ipv6=1",
        "net.core.somaxconn=77",
        "net.ipv4.neigh.br0.gc_stale_time=77",
        "net.unix.max_dgram_qlen=33",
        "net.ipv4.ip_local_port_range=20000_30000",
        "net.ipv4.tcp_rmem=4096_10000_20000",
        "net.ipv4.ping_group_range=5_6",
        "net.ipv6.conf.v1.disable_ipv6=1",
        "net.ipv4.conf.v0.forwarding=0",
    ]
    pairs = (name.split("=") for name in names)
    sets = "\n".join(f"sysctl -qw {key}='{value.replace('_', ' ')}'" for key, value in pairs)
    ignored = "stable_secret|tcp_fastopen_key"
    carry(_BRIDGE + sets, f"cd /proc/sys/net; grep -rs . . | grep -vE '{ignored}' | sort")


def test_packet_filters() -> None:
    need("nft", "iptables-legacy-save", "iptables-nft-save", "ipset")
    script = """
nft add table inet t
nft add chain inet t c '{ type filter hook input priority 0; policy drop; }'
nft add rule inet t c tcp dport 7 counter packets 5 bytes 600 drop
nft add set inet t s '{ type ipv4_addr; flags timeout; }'
nft add element inet t s '{ 1.2.3.4 timeout 1h }'
nft add table bridge b
iptables-nft -A INPUT -p tcp -m tcp --dport 5 -m comment --comment hi -m limit --limit 3/min -j LOG --log-prefix x
iptables-nft -t nat -A POSTROUTING -j MASQUERADE
ip6tables-nft -A FORWARD -p tcp -m multiport --dports 1,2 -j DROP
ipset create addresses hash:ip timeout 1000
ipset add addresses 10.0.0.1
iptables-legacy -A INPUT -m set --match-set addresses src -j DROP
iptables-legacy -t nat -A POSTROUTING -p tcp -j MASQUERADE
ip6tables-legacy -t mangle -A PREROUTING -j MARK --set-mark 4
"""
    sets = "ipset list | sed 's/timeout [0-9]*$//'"
    tools = ("nft list ruleset | sed 's/expires [^ ]*//'", "iptables-nft-save", "ip6tables-nft-save")
    carry(script, *tools, "iptables-legacy-save | sort", "ip6tables-legacy-save", sets)


def test_followed_connections() -> None:
    need("conntrack", "iptables-legacy")
    script = """
ip link set lo up
iptables-legacy -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT
iptables-legacy -t nat -A POSTROUTING -j MASQUERADE
conntrack -I -p tcp -s 10.0.0.1 -d 10.0.0.2 --sport 1000 --dport 80 --state ESTABLISHED -t 1000 -u SEEN_REPLY,ASSURED
conntrack -I -p udp -s 10.0.0.1 -d 10.0.0.2 --sport 1001 --dport 53 -t 1000 -m 7
conntrack -I -p tcp -s 10.0.0.1 -d 10.0.0.2 --sport 1002 --dport 80 --state ESTABLISHED -t 1000 --src-nat 10.0.0.9
"""
    carry(script, "conntrack -L 2>/dev/null | sed -E 's/ +[0-9]+ +[0-9]+ / /' | sort")


def test_what_differs_is_settled() -> None:
    with networks(3) as (source, destination, home):
        source.run(_ROUTED + "ip route add default via 10.1.0.2; ip link add gone type veth peer name gone2")
        state, _ = read(source, home)
        tools = (_LINKS, "ip -d addr show", "ip route", "ip -6 route", "ip rule", "sysctl net.ipv4.conf.br0.rp_filter")
        with built(destination, home, state) as builder:
            source.run("""
ip link del gone; ip link add new type veth peer name new2; ip link set new up; ip link set new2 up mtu 1300
ip link set v1 down; ip link set v1 name other; ip link set other up
ip addr del 10.1.0.1/24 dev br0; ip addr add 10.1.0.7/24 dev br0; ip addr add 10.1.0.8/24 dev br0
ip route add default via 10.1.0.9; ip rule add from 10.9.0.0/16 lookup 77
sysctl -qw net.ipv4.conf.br0.rp_filter=2
""")
            source.settle()
            state, _ = read(source, home)
            builder.build(state)
            agree(destination, source.look(*tools))


def test_outer_ends_are_plugged_in_the_end() -> None:
    with networks(3) as (source, destination, home):
        home.run("ip link add br9 type bridge; ip link set br9 up")
        source.attach(home, "eth0", "out0")
        home.run("ip link set out0 up master br9")
        source.run("ip link set eth0 up; ip addr add 10.9.0.1/24 dev eth0")
        source.settle()
        state, _ = read(source, home)
        with built(destination, home, state) as builder:
            assert "out0" not in home.run("ip link show master br9").replace("out0@", "", 1)
            outer = builder.making.plugs[2].name
            assert (outer != "out0", builder.making.plugs[2].bridge) == (True, "br9")
            plugged(builder)
            assert outer in home.run("ip link show master br9")
            agree(destination, source.look("ip addr show eth0"))


def test_lower_device_outside() -> None:
    with networks(3) as (source, destination, home):
        home.run("ip link add base type veth peer name far; ip link add other type veth peer name far2")
        home.run(
            "ip link add mv0 link base type macvlan mode private; for l in base far far2; do ip link set $l up; done"
        )
        _move(home, source, "mv0")
        source.run("ip link set mv0 up; ip addr add 10.9.0.1/24 dev mv0")
        source.settle()
        state, blockers = read(source, home)
        assert not blockers
        before = source.look("ip addr show mv0")
        home.run("ip link del base; ip link set other up")
        with (
            pytest.raises(RebuildError, match=r"mv0 .macvlan. stands on base of the host, which is not here"),
            built(destination, home, state),
        ):
            pass
        with built(destination, home, state, "macvlan[mv0]:other"):
            assert "mode private" in destination.run("ip -d link show mv0")
            agree(destination, before)


def _move(home: Network, there: Network, device: str) -> None:
    command = ["ip", "link", "set", device, "netns", f"/proc/{os.getpid()}/fd/{there.net}"]
    places.in_network(home.net, lambda: subprocess.run(command, check=True))


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (
            "ip link add v0 type veth peer name v1; tc qdisc add dev v0 root tbf rate 1mbit burst 10k latency 1s",
            "tbf",
        ),
        ("ip link add v0 type veth peer name v1; ip link add mt0 link v0 type macvtap", "macvtap"),
        ("ip xfrm policy add src 10.0.0.0/8 dst 10.1.0.0/16 dir out", "IPsec policies"),
    ],
)
def test_what_does_not_move_is_named(script: str, name: str) -> None:
    with networks(2) as (source, home):
        source.run(script)
        _, blockers = read(source, home)
        assert [name in str(blocker) for blocker in blockers] == [True]


def test_a_name_that_is_taken_and_a_bridge_that_is_not_there() -> None:
    with networks(3) as (source, destination, home):
        source.attach(home, "eth0", "out0")
        state, _ = read(source, home)
        with (
            pytest.raises(RebuildError, match="there is no such bridge"),
            built(destination, home, state, "veth[eth0]:free@nowhere"),
        ):
            pass
        with pytest.raises(RebuildError, match="is taken here"), built(destination, home, state, "veth[eth0]:out0"):
            pass


def test_what_changes_after_a_survey_is_seen() -> None:
    with networks(2) as (source, home):
        source.run(_ROUTED)
        source.settle()
        reader = Reader(os.dup(source.net), os.dup(home.net), NUMBER)
        try:
            first = reader.read(Collection(Checkpoint(), survey=True))
            assert reader.read(Collection(Checkpoint())) == first
            changes = (
                "ip addr add 10.7.0.1/24 dev v1",
                "ip route add 10.8.0.0/24 via 10.7.0.2",
                "ip -6 rule add from fd09::/64 lookup 77",
                "ip neigh add 10.7.0.9 lladdr 02:00:00:00:00:05 dev v1 nud permanent",
                "ip link set v1 mtu 1400",
                "sysctl -qw net.core.somaxconn=77",
                "nft add table inet t",
                "iptables-legacy -A INPUT -j ACCEPT",
                "ip link add new type veth peer name new2",
            )
            for change in changes:
                source.run(change)
                now = reader.read(Collection(Checkpoint()))
                assert now != first, change
                first = now
        finally:
            reader.close()


def test_what_is_needed_of_another_host() -> None:
    with networks(2) as (source, home):
        home.run("ip link add br9 type bridge; ip link set br9 up")
        source.attach(home, "eth0", "out0")
        home.run("ip link set out0 up master br9")
        source.run("ip link add vx0 type vxlan id 42 dstport 4789; nft add table inet t")
        state, _ = read(source, home)
        checkpoint = Checkpoint()
        to_images(state, NUMBER, checkpoint)
        found = needs.needed(checkpoint, {})
        assert found == {
            "network devices of kind veth": "network device eth0",
            "a bridge br9": "network device eth0",
            "network devices of kind vxlan": "network device vx0",
            "the program nft": "its packet filter",
        }
        assert "a bridge br9" not in needs.needed(checkpoint, {"external": ["veth[eth0]:x@other"]})
    told = {need: needs.advice(need) for need in found}
    assert told.pop("a bridge br9") == "make br9 there, on the same network"
    assert set(told.values()) == {""}
    assert needs.advice("network devices of kind nonsense") == (
        "load the module for nonsense there (modprobe nonsense)"
    )
    assert needs.advice("the program no-such-program") == "install no-such-program there"
    assert needs.advice("a bridge with-a-name-that-is-too-long") != ""
    assert needs.advice("guard pages") is None
