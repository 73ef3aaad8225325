"""`phaul dump`: a running program to images on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phaul.cli import options

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Pid = Annotated[int, typer.Option("--pid", metavar="PID", min=2, help="The program: the first process of its tree.")]
Images = Annotated[Path, typer.Option("--images", metavar="DIR", help="Where the images go; made if it is missing.")]
Parent = Annotated[
    Path | None, typer.Option("--parent", metavar="DIR", help="Images of the round before: store what differs.")
]
PageServer = Annotated[
    str | None, typer.Option("--page-server", metavar="HOST:PORT", help="Send the pages there, and only the rest here.")
]
LeaveRunning = Annotated[bool, typer.Option("--leave-running", help="Let the program run on.")]
Tcp = Annotated[
    str | None, typer.Option("--tcp", metavar="established|close|refuse", help="Connections: store, close or refuse.")
]
ShellJob = Annotated[bool | None, typer.Option("--shell-job", help="Store a program that was started from a shell.")]


@app.command()
def dump(
    pid: Pid,
    images: Images,
    leave_running: LeaveRunning = False,
    parent: Parent = None,
    tcp: Tcp = None,
    shell_job: ShellJob = None,
    page_server: PageServer = None,
    external: options.External = None,
    root: options.Root = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    as_json: options.Json = False,
) -> None:
    """Store a running program as images, and end it.

    Exit status: 0 stored, 20 refused (it runs on, untouched), 1 failed (it runs on).
    """
    settings = options.settings(migrate={"tcp": tcp, "shell_job": shell_job})
    from phaul import disk

    remote = disk.Remote.of(page_server, tls_cert, tls_key, tls_ca)
    journals = settings.agent.state_directory
    order = disk.DumpOrder(
        pid,
        images,
        parent,
        disk.engine_options(settings) | disk.container_options(external, root),
        remote,
        leave_running,
        journals,
    )
    disk.show(disk.dump(order), "dumped", as_json)
