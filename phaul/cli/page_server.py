"""`phaul page-server`: the receiving side of a dump's pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phaul.cli import options

app = typer.Typer(add_completion=False, rich_markup_mode=None)

Images = Annotated[Path, typer.Option("--images", metavar="DIR", help="Where the pages go; made if it is missing.")]
Listen = Annotated[str, typer.Option("--listen", metavar="ADDR:PORT", help="Where clients connect; port 0: any.")]
Parent = Annotated[Path | None, typer.Option("--parent", metavar="DIR", help="Pages of the round before.")]
Plain = Annotated[bool, typer.Option("--plain", help="Without TLS: on a loopback address only.")]


@app.command()
def page_server(
    images: Images,
    listen: Listen,
    parent: Parent = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    plain: Plain = False,
) -> None:
    """Take the pages of one dump of another phaul, or of CRIU.

    Prints the address when it listens. Exit status: 0 when all pages are there, 1 if the client failed or went away.
    """
    from phaul import disk
    from phaul.page_link import Address, Credentials

    credentials = Credentials.of(tls_cert, tls_key, tls_ca)
    disk.serve_pages(disk.ServeOrder(images, Address.parse(listen), parent, credentials, plain=plain))
