"""What the hosts are called and what addresses they have."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX4 = 24
PREFIX6 = 64
DEVICE = "eth0"
SERVICE4 = "10.77.0.100"
SERVICE6 = "fd77::100"
HOME = "/var/lib/root"
"""root's home directory inside a host: private, so that nobody's own ~/.ssh or ~/.config takes part."""
OPERATOR = "operator"
"""A user without privileges who may use `sudo -n`."""


@dataclass(frozen=True)
class HostSpec:
    """One host: `number` is the last part of its addresses, `first_pid` where its PIDs begin, so that those of
    two hosts never meet; the offsets (seconds) are those of its time namespace, None without one. With `systemd`, that
    is its process 1."""

    name: str
    number: int
    first_pid: int
    sshd: bool = True
    monotonic: int | None = None
    boottime: int | None = None
    systemd: bool = False

    @property
    def address(self) -> str:
        """IPv4, without the prefix."""
        return f"10.77.0.{self.number}"

    @property
    def address6(self) -> str:
        """IPv6, without the prefix."""
        return f"fd77::{self.number}"

    @property
    def mac(self) -> str:
        """The hardware address of its eth0."""
        return f"02:77:00:00:00:{self.number:02x}"


HOSTS = (
    HostSpec("a", 1, 1000),
    HostSpec("b", 2, 16000, monotonic=1_000_000, boottime=2_000_000),
    HostSpec("client", 3, 26000, sshd=False),
)
"""Host b is up for eleven days longer than a."""
