"""The command `phaul`. Each command is a module with a typer application named `app`, imported when it is asked for:
`phaul --help` imports none of them, and an agent starts without what only a terminal needs."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
import typer.core

from phaul import __version__
from phaul.errors import Exit, PhaulError, report

# Name, module, and the line in `phaul --help`: the first line of the command's own help.
COMMANDS = {
    "migrate": ("phaul.cli.migrate", "Move a running program to another host while it works."),
    "dump": ("phaul.cli.dump", "Store a running program as images, and end it."),
    "pre-dump": ("phaul.cli.pre_dump", "Store the memory of a running program, which runs on."),
    "restore": ("phaul.cli.restore", "Make a program again from its images."),
    "page-server": ("phaul.cli.page_server", "Take the pages of one dump of another phaul, or of CRIU."),
    "check": ("phaul.cli.check", "Tell what this host can do, or what a pair of hosts can."),
    "status": ("phaul.cli.status", "Tell where the migrations of this host stand."),
    "resolve": ("phaul.cli.resolve", "Finish a migration that nobody works on, and say where the program runs."),
    "report": ("phaul.cli.report", "Tell all that this host knows of a migration."),
    "deploy": ("phaul.cli.deploy", "Install this phaul on another host, over SSH alone."),
    "images": ("phaul.cli.images", "Look at the images of a checkpoint, CRIU's or ours."),
    "agent": ("phaul.cli.agent", "Serve another phaul on stdin and stdout: what SSH starts on the destination."),
}


class _Commands(typer.core.TyperGroup):
    """The commands of the table above."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the module of a command that is used."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """From the table, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


app = typer.Typer(
    name="phaul",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"phaul {__version__}")
        raise typer.Exit


@app.callback()
def phaul(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Move a running program, or a container, to another host while it works."""


def main() -> None:
    """Run a command; an error ends it with its exit status."""
    try:
        app()
    except PhaulError as error:
        report(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(Exit.CANCELLED)
