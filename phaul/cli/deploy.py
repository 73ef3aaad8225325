"""`phaul deploy`: phaul on the other host."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer

from phaul.cli import options

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Host = Annotated[str, typer.Argument(metavar="[USER@]HOST[:PORT]", help="Where to, as for ssh.")]
Prefix = Annotated[
    str, typer.Option("--prefix", metavar="DIR", help="Where it goes there; elsewhere than here, nothing is linked.")
]


@app.command()
def deploy(
    host: Host,
    prefix: Prefix = "/opt/phaul",
    as_json: options.Json = False,
    identity: options.Identity = None,
    option: options.SshOption = None,
    ssh_config: options.SshConfig = None,
) -> None:
    """Install this phaul on another host, over SSH alone.

    It goes into a virtual environment below /opt/phaul and is linked into /usr/local/bin. Python 3.11 or newer has to
    be there, and root or sudo; no network. A migration that runs is not disturbed. Exit status 0 if it is there now.
    """
    settings = options.settings((identity, option, ssh_config))
    from phaul import deploy as deploying
    from phaul.errors import UsageError
    from phaul.transport.ssh_config import Destination

    if not prefix.startswith("/"):
        raise UsageError(f"--prefix: {prefix!r} is not an absolute path")
    done = asyncio.run(deploying.deploy(Destination.parse(host), settings, prefix=prefix.rstrip("/")))
    if as_json:
        print(json.dumps({"event": "deployed", **asdict(done)}))
        return
    what = {"installed": f"installed ({done.sent / 2**20:.1f} MiB sent)", "switched": "in use", "linked": "linked"}
    did = ", ".join(what[one] for one in done.did) or "was there already"
    print(f"phaul {done.version} on {done.host}: {did}; {done.command}, with {done.python}")
    if done.warning:
        print(f"warning: {done.warning}")
