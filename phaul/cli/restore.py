"""`phaul restore`: images on disk to a running program."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from phaul.cli import options

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Connections(enum.Enum):
    """What becomes of connections."""

    ESTABLISHED = "established"
    CLOSE = "close"


Images = Annotated[Path, typer.Option("--images", metavar="DIR", help="The images of a dump, CRIU's or ours.")]
Pidfile = Annotated[Path | None, typer.Option("--pidfile", metavar="FILE", help="Write the program's PID here.")]
Detach = Annotated[bool, typer.Option("--detach", help="Leave the program to init, and do not wait for its end.")]
Tcp = Annotated[
    Connections, typer.Option("--tcp", metavar="established|close", help="Connections: go on with them, or end them.")
]

ShellJob = Annotated[
    bool, typer.Option("--shell-job", help="A program that was started from a shell lives on in this session.")
]


@app.command()
def restore(
    images: Images,
    pidfile: Pidfile = None,
    detach: Detach = False,
    tcp: Tcp = Connections.ESTABLISHED,
    external: options.External = None,
    root: options.Root = None,
    shell_job: ShellJob = False,
) -> None:
    """Make a program again from its images.

    Exit status: the program's own, 128 and the signal's number if it is killed; with --detach 0 as soon as it runs.
    1: it could not be restored, and nothing of it is left.
    """
    from phaul import disk

    engine = {"tcp": tcp.value, "shell_job": shell_job, **disk.container_options(external, root)}
    raise typer.Exit(disk.restore(disk.RestoreOrder(images, pidfile, detach=detach, options=engine)))
