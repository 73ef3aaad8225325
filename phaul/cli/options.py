"""Options that several commands have, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phaul.errors import UsageError

Identity = Annotated[
    list[str] | None, typer.Option("--identity", "-i", metavar="FILE", help="A private key to try, as ssh -i.")
]
SshOption = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="OPTION=VALUE", help="An option, as ssh -o.")
]
SshConfig = Annotated[
    str | None, typer.Option("--ssh-config", "-F", metavar="FILE", help="In place of ~/.ssh/config, as ssh -F.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
External = Annotated[
    list[str] | None,
    typer.Option("--external", metavar="WHAT", help="What stays outside and is given anew, as criu's --external."),
]
Root = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="The root directory of the container, as seen from here.")
]
TlsCert = Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="Our certificate, for the pages.")]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="The key of our certificate.")]
TlsCa = Annotated[Path | None, typer.Option("--tls-ca", metavar="FILE", help="Who has signed the other's certificate.")]


def settings(ssh: tuple[list[str] | None, list[str] | None, str | None] | None = None, **sections: Any) -> Any:
    """All settings with these flags on top. `ssh` is -i, -o and -F; a wrong value is a UsageError."""
    from phaul.config import ConfigError, load

    flags = dict(sections)
    if ssh is not None:
        identity, option, config = ssh
        flags["ssh"] = {"identity": identity or None, "options": option or None, "config": config}
    try:
        loaded = load(flags)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    from phaul import logs

    logs.set_up(loaded.log)
    return loaded
