"""`phaul migrate`: move a running program to another host while it works."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phaul.cli import options
from phaul.errors import Exit, PhaulError, UsageError

if TYPE_CHECKING:
    from phaul.config import MovedAddress
    from phaul.events import Finding

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Words = Annotated[
    list[str],
    typer.Argument(metavar="[PID] [USER@]HOST[:PORT]", help="The first process of the program; where to, as for ssh."),
]
Lxc = Annotated[str | None, typer.Option("--lxc", metavar="NAME", help="In place of PID: a container of LXC.")]
Runc = Annotated[str | None, typer.Option("--runc", metavar="ID", help="In place of PID: a container of runc or crun.")]
Podman = Annotated[str | None, typer.Option("--podman", metavar="NAME", help="In place of PID: a container of Podman.")]
Unit = Annotated[str | None, typer.Option("--unit", metavar="NAME", help="In place of PID: a service of systemd.")]
Vz = Annotated[str | None, typer.Option("--vz", metavar="CTID", help="In place of PID: a container of OpenVZ.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what stands in the way.")]
MaxDowntime = Annotated[str | None, typer.Option(metavar="MS", help="The downtime that is good enough.")]
MaxRounds = Annotated[int | None, typer.Option(metavar="N", help="Rounds of copying before the switchover.")]
Bandwidth = Annotated[str | None, typer.Option(metavar="RATE", help="Bytes a second at most: 100M, 50MiB, 1Gbit.")]
Compress = Annotated[str | None, typer.Option(metavar="auto|none|zstd[:LEVEL]", help="Compression of pages.")]
Streams = Annotated[int | None, typer.Option(metavar="N", help="Connections for pages; 0: phaul chooses.")]
Tunnel = Annotated[bool | None, typer.Option("--tunnel", help="Send pages through SSH.")]
Tcp = Annotated[
    str | None, typer.Option(metavar="established|close|refuse", help="Connections: move, close or refuse.")
]
Move = Annotated[list[str] | None, typer.Option(metavar="ADDR/PREFIX@DEV", help="An address that goes along.")]
Ship = Annotated[str | None, typer.Option(metavar="missing|none", help="Send files that are not there.")]
StopCopy = Annotated[bool | None, typer.Option("--stop-copy", help="Stop first, then send everything.")]
AutoConverge = Annotated[bool | None, typer.Option("--auto-converge", help="Slow the program down if it must be.")]
Verify = Annotated[bool | None, typer.Option("--verify", help="Compare every page while the program stands still.")]
Pidns = Annotated[bool | None, typer.Option("--pidns", help="A PID namespace there, where PIDs are taken.")]
ShellJob = Annotated[bool | None, typer.Option("--shell-job", help="Move a program that was started from a shell.")]
KeepImages = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the images of what was moved, here.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Go on in spite of warnings, without asking.")]


@app.command()
def migrate(
    words: Words,
    lxc: Lxc = None,
    runc: Runc = None,
    podman: Podman = None,
    unit: Unit = None,
    vz: Vz = None,
    dry_run: DryRun = False,
    max_downtime: MaxDowntime = None,
    max_rounds: MaxRounds = None,
    bandwidth: Bandwidth = None,
    compress: Compress = None,
    streams: Streams = None,
    tunnel: Tunnel = None,
    tcp: Tcp = None,
    move_address: Move = None,
    ship: Ship = None,
    stop_copy: StopCopy = None,
    auto_converge: AutoConverge = None,
    verify: Verify = None,
    pidns: Pidns = None,
    shell_job: ShellJob = None,
    keep_images: KeepImages = None,
    as_json: options.Json = False,
    yes: Yes = False,
    identity: options.Identity = None,
    option: options.SshOption = None,
    ssh_config: options.SshConfig = None,
) -> None:
    """Move a running program to another host while it works.

    Exit status: 0 migrated, 2 usage, 10 not reached, 11 not let in, 12 versions, 20 refused (nothing was touched),
    30 stayed here, 40 in doubt (phaul resolve), 50 lost, 130 called off.
    """
    flags = {
        "max_downtime": max_downtime,
        "max_rounds": max_rounds,
        "bandwidth": bandwidth,
        "compress": compress,
        "streams": streams,
        "tunnel": tunnel,
        "tcp": tcp,
        "ship": ship,
        "stop_copy": stop_copy,
        "auto_converge": auto_converge,
        "verify": verify,
        "pidns": pidns,
        "shell_job": shell_job,
    }
    settings = options.settings((identity, option, ssh_config), migrate=flags)
    from phaul import orchestrator
    from phaul.cli.view import view
    from phaul.transport.ssh_config import Destination

    workload, subject, host = _what(words, {"lxc": lxc, "oci": runc, "podman": podman, "unit": unit, "vz": vz})
    order = orchestrator.Order(
        workload=workload,
        subject=subject,
        destination=Destination.parse(host),
        moved=_moved(move_address or []),
        dry_run=dry_run,
        keep_images=str(keep_images.absolute()) if keep_images else "",
        confirm=_confirm if sys.stdin.isatty() and not (yes or as_json) else lambda _: True,
    )
    with view(as_json) as sink:
        try:
            result = orchestrator.run(order, settings, sink)
        except PhaulError as error:
            if as_json:
                sink(orchestrator.failed(error, order))
            raise
        sink(result)
    free = dry_run and result.outcome == "stayed"
    raise typer.Exit(Exit.OK if free else result.exit_status)


def _what(words: list[str], named: dict[str, str | None]) -> tuple[str, str, str]:
    """The kind of workload, its name, and the host. A name takes the place of the PID."""
    given = [(kind, name) for kind, name in named.items() if name is not None]
    if len(given) + len(words) != 2 or not words:
        raise UsageError("one program and one host are needed: phaul migrate PID HOST", advice="see --help")
    if given:
        return *given[0], words[0]
    if not words[0].isdecimal() or not 1 < int(words[0]) < 1 << 22:
        raise UsageError(f"{words[0]!r} is not the PID of a program that can move")
    return "pid", words[0], words[1]


def _moved(texts: list[str]) -> tuple[MovedAddress, ...]:
    from phaul.config import parse_moved_address

    try:
        return tuple(map(parse_moved_address, texts))
    except ValueError as error:
        raise UsageError(f"--move-address: {error}") from error


def _confirm(warnings: tuple[Finding, ...]) -> bool:
    text = "there is a warning" if len(warnings) == 1 else f"there are {len(warnings)} warnings"
    return typer.confirm(f"{text}: go on?", err=True)
