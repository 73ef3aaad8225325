"""Hosts on one machine for tests, demo and benchmarks; see README.md beside this file."""

from tests.hosts.host import DEVNULL, PIPE, Host, HostError, Process
from tests.hosts.lab import Hosts, attach, down, missing, two_hosts, up

__all__ = ["DEVNULL", "PIPE", "Host", "HostError", "Hosts", "Process", "attach", "down", "missing", "two_hosts", "up"]
