"""A service that counts: `service.py FILE [keep-alive]`.

Ten times a second it appends a line to FILE, with the host that it runs on, its PID and its count, and writes one to
its standard output. With keep-alive it keeps the watchdog quiet.

Lines of one count on two hosts, or by two PIDs, would be two copies of it.
"""

from __future__ import annotations

import os
import socket
import sys
import time


def notify(text: str) -> None:
    """sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])


def main() -> None:
    """Count."""
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    keep_alive = "keep-alive" in sys.argv
    if os.fork() == 0:
        while True:
            time.sleep(1)
    if keep_alive:
        notify("READY=1\nSTATUS=counting")
    for count in range(1_000_000):
        os.write(file, f"{os.uname().nodename} {os.getpid()} {count}\n".encode())
        print(f"count {count}", flush=True)
        if keep_alive:
            notify("WATCHDOG=1")
        time.sleep(0.1)


main()
