"""python -m tests.hosts up|down|status|enter|exec: the hosts by hand. They stay until `down`."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from tests.hosts import lab
from tests.hosts.host import HostError, Process
from tests.hosts.lease import leases, sweep

DEFAULT = "hand"


def _status() -> int:
    for lease in leases():
        print(lease.name, "kept" if lease.kept else "owned", lease.directory, lease.cgroup)
    return 0


def _exec(host: str, name: str, words: list[str]) -> int:
    """Run a program inside with the caller's standard descriptors; signals go on to it."""
    process: Process = getattr(lab.attach(name), host).popen(words, stdin=0, stdout=1, stderr=2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    return 128 - code if code < 0 else code


def _up(name: str) -> int:
    begun = time.monotonic()
    try:
        hosts = lab.attach(name)
        print(f"already up: {hosts.lease.directory}")
        return 0
    except HostError:
        pass
    hosts = lab.up(name, keep=True)
    hosts.lease.unlock()
    print(f"up in {time.monotonic() - begun:.2f} s")
    for host in hosts:
        print(f"  {host.name:7} {host.address:10} {host.address6:8} PIDs from {host.spec.first_pid}")
    print(f"  service {hosts.service} on a; /srv/shared is {hosts.shared}")
    print("next: python -m tests.hosts enter a")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__)
    parser.add_argument("--name", default=DEFAULT, help="which hosts, where there are several (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="make the hosts")
    commands.add_parser("down", help="remove them")
    commands.add_parser("status", help="list all there are on this machine")
    commands.add_parser("sweep", help="remove what killed runs left")
    for name, text in (("enter", "a shell on a host"), ("exec", "run a program on a host")):
        command = commands.add_parser(name, help=text)
        command.add_argument("host", choices=("a", "b", "client"))
        if name == "exec":
            command.add_argument("words", nargs=argparse.REMAINDER, metavar="PROGRAM [ARGUMENT ...]")
    options = parser.parse_args()
    try:
        match options.command:
            case "up":
                return _up(options.name)
            case "down":
                lab.down(options.name)
                return 0
            case "status":
                return _status()
            case "sweep":
                print("\n".join(sweep()) or "nothing was left over")
                return 0
            case "enter":
                return lab.interactive_shell(getattr(lab.attach(options.name), options.host))
            case _:
                words = options.words[1:] if options.words[:1] == ["--"] else options.words
                return _exec(options.host, options.name, words)
    except (HostError, OSError) as error:
        print(f"tests.hosts: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
