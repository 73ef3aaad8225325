"""`phaul images`: look at the images of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from phaul_engine.errors import ImageError
from phaul_engine.images import show as showing
from phaul_engine.images import verify as verifying

from phaul.errors import Exit

app = typer.Typer(help="Look at the images of a checkpoint, CRIU's or ours.", no_args_is_help=True)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The directory with the images.")]
File = Annotated[str | None, typer.Argument(metavar="[FILE]", help="One image in it, such as core-1234.img.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(directory: Directory, file: File = None, as_json: Json = False) -> None:
    """List the images in DIR, or decode one of them."""
    with _failing():
        if file is not None:
            _print(showing.show_file(directory, file), as_json)
            return
        listed = showing.list_images(directory)
    if as_json:
        print(json.dumps([vars(one) for one in listed], indent=1))
        return
    for one in listed:
        records = "" if one.records is None else f"{one.records} records"
        print(f"{one.name:<32} {one.size:>12} bytes  {records}".rstrip())


@app.command()
def verify(directory: Directory, as_json: Json = False) -> None:
    """Tell whether everything that the images in DIR refer to is there, and whether they agree."""
    with _failing():
        problems = verifying.verify(directory)
    if as_json:
        print(json.dumps({"problems": [vars(problem) for problem in problems]}, indent=1))
    else:
        for problem in problems:
            print(problem)
        print(f"{len(problems)} problems" if problems else "complete")
    if problems:
        raise typer.Exit(Exit.ERROR)


@app.command()
def stats(directory: Directory, as_json: Json = False) -> None:
    """Print what was measured at the dump, how large the images are, and in which round the pages stand."""
    with _failing():
        _print(showing.statistics(directory), as_json)


@app.command()
def unlock(directory: Directory) -> None:
    """Let the packets of the connections in DIR pass again: before CRIU restores them, or when nobody will.

    Until `phaul restore` makes them again they are dropped on the host of the dump, so that their peers wait.
    """
    from phaul_engine.images.checkpoint import Checkpoint
    from phaul_engine.network import lock

    with _failing():
        lock.lift(Checkpoint.load(directory, pagemaps=False))


def _print(shown: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(shown, indent=1))
    else:
        print("\n".join(showing.lines(shown)))


@contextmanager
def _failing() -> Iterator[None]:
    """End the command with what is wrong with the images."""
    try:
        yield
    except ImageError as error:
        typer.echo(f"phaul: {error}" + (f"\n{error.advice}" if error.advice else ""), err=True)
        raise typer.Exit(Exit.ERROR) from error
