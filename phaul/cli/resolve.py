"""`phaul resolve`: finish a migration that nobody works on."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from phaul.cli import options
from phaul.errors import Exit, PhaulError, UsageError, report

if TYPE_CHECKING:
    from phaul.config import Settings
    from phaul.resolve import Word

app = typer.Typer(add_completion=False)

Migration = Annotated[
    str | None,
    typer.Argument(metavar="[ID]", help="The migration, as `phaul status` names it; without, all that are not over."),
]
Keep = Annotated[
    str | None,
    typer.Option(metavar="source|destination", help="Which copy goes on, where the other host cannot say."),
]
Assertion = Annotated[
    str | None,
    typer.Option(
        "--assert",
        metavar="dead|running",
        help="What --keep asserts, in place of being asked: `dead`, it does not run there (for --keep source); "
        "`running`, it does (for --keep destination).",
    ),
]
_ASSERTS = {"source": "dead", "destination": "running"}
_STATUS = {"migrated": Exit.OK, "stayed": Exit.OK, "lost": Exit.LOST, "in-doubt": Exit.IN_DOUBT}


@app.command()
def resolve(
    migration: Migration = None,
    keep: Keep = None,
    assertion: Assertion = None,
    as_json: options.Json = False,
    identity: options.Identity = None,
    option: options.SshOption = None,
    ssh_config: options.SshConfig = None,
) -> None:
    """Finish a migration that nobody works on, and say where the program runs.

    The journals of both hosts decide; and an arbiter, where there is one and the other host does not answer. Where
    nobody can be asked, --keep is your decision: `source` goes on from the frozen copy, and rolls back what the other
    copy did since, if it ran; `destination` kills the frozen copy. You are told what you have to be sure of, and asked
    to type it; scripts say it with --assert.

    With --json each migration is one line, whatever came of it.

    Exit status: 0 resolved, 40 in doubt (needs --keep, or the other host back), 50 lost.
    """
    if keep not in (None, "source", "destination"):
        raise UsageError(f"--keep: {keep!r} is neither source nor destination")
    if assertion is not None and (keep is None or assertion != _ASSERTS[keep]):
        raise UsageError("--assert: --keep source asserts `dead`, --keep destination asserts `running`")
    settings = options.settings((identity, option, ssh_config))
    from phaul import resolve as resolving

    if migration is None and keep is not None:
        raise UsageError("--keep decides about one migration: name it")
    word = None if keep is None else resolving.Word(keep, partial(_vouched, keep, assertion))
    names = [migration] if migration is not None else resolving.unfinished(settings)
    statuses = [_resolve(name, word, settings, as_json=as_json, alone=migration is not None) for name in names]
    if not names and not as_json:
        print("nothing is left to finish")
    raise typer.Exit(max(statuses, default=Exit.OK))


def _resolve(name: str, word: Word | None, settings: Settings, *, as_json: bool, alone: bool) -> Exit:
    """Finish one. What goes wrong is raised if it is the only one, and else reported, so that the others have their
    turn."""
    from phaul import resolve as resolving

    try:
        verdict = asyncio.run(resolving.resolve(name, word, settings))
    except PhaulError as error:
        if as_json:
            _print(name, error.outcome, str(error), where=error.where, advice=error.advice)
        if alone:
            raise
        print(f"{name}:", file=sys.stderr)
        report(error)
        return _STATUS.get(error.outcome, Exit.ERROR)
    if as_json:
        _print(name, verdict.outcome, verdict.text)
    else:
        print(f"{name}: {verdict.text}")
    return _STATUS.get(verdict.outcome, Exit.ERROR)


def _print(name: str, outcome: str, reason: str, **more: str) -> None:
    """The one line of a migration with --json, however it went."""
    print(json.dumps({"event": "resolved", "id": name, "outcome": outcome, "reason": reason, **more}))


def _vouched(keep: str, assertion: str | None, text: str) -> bool:
    """Whether the operator is sure, having read what of."""
    wanted = _ASSERTS[keep]
    if assertion is not None:
        return True
    if not sys.stdin.isatty():
        raise UsageError(
            f"--keep {keep} decides what nobody here can know:\n{text}",
            advice=f"if you are sure: --keep {keep} --assert {wanted}",
        )
    print(text, file=sys.stderr)
    said = typer.prompt(f"If you are sure, type `{wanted}`", err=True, default="", show_default=False)
    return bool(said.strip() == wanted)
