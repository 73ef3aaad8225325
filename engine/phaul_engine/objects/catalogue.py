"""Every kind of kernel object the engine knows: importing this module registers them all.

The order in which task kinds are rebuilt (see `Phase`) stands in `tasks`.
"""

from __future__ import annotations

from . import (
    char_device,
    epoll,
    eventfd,
    fifo,
    file_locks,
    inotify,
    memfd,
    namespace_file,
    netlink_socket,
    pidfd,
    pipe,
    regular_file,
    signalfd,
    tasks,
    tcp,
    timerfd,
    tty,
    tun,
    udp,
    unix_socket,
)

__all__ = [
    "char_device",
    "epoll",
    "eventfd",
    "fifo",
    "file_locks",
    "inotify",
    "memfd",
    "namespace_file",
    "netlink_socket",
    "pidfd",
    "pipe",
    "regular_file",
    "signalfd",
    "tasks",
    "tcp",
    "timerfd",
    "tty",
    "tun",
    "udp",
    "unix_socket",
]
