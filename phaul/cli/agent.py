"""`phaul agent`: what SSH starts on the destination, and `phaul` through sudo at the source."""

from __future__ import annotations

from typing import Annotated

import typer

from phaul.errors import UsageError

app = typer.Typer(add_completion=False)

Stdio = Annotated[bool, typer.Option("--stdio", help="Speak on stdin and stdout.")]
Key = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the policy calls the key of authorized_keys whose forced command this is."),
]


@app.command()
def agent(stdio: Stdio = False, key: Key = None) -> None:
    """Serve another phaul on stdin and stdout: what SSH starts on the destination.

    As the forced command of a key in root's authorized_keys it makes a key that can do nothing else:
    restrict,command="phaul agent --stdio --key NAME" ssh-ed25519 ...
    /etc/phaul/agent.toml says what key:NAME may ask for.
    """
    if not stdio:
        raise UsageError("an agent is started by phaul, through SSH", advice="phaul agent --stdio is what it starts")
    from phaul import agent as serving

    serving.run(key)
