"""`phaul pre-dump`: the memory of a running program to images on disk."""

from __future__ import annotations

import typer

from phaul.cli import options
from phaul.cli.dump import Images, PageServer, Parent, Pid, ShellJob, Tcp

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def pre_dump(
    pid: Pid,
    images: Images,
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
    """Store the memory of a running program, which runs on.

    A later dump, or another pre-dump, with --parent stores only what differs.

    Exit status: 0 stored, 20 a dump would be refused, 1 failed.
    """
    settings = options.settings(migrate={"tcp": tcp, "shell_job": shell_job})
    from phaul import disk

    remote = disk.Remote.of(page_server, tls_cert, tls_key, tls_ca)
    order = disk.DumpOrder(
        pid,
        images,
        parent,
        disk.engine_options(settings) | disk.container_options(external, root),
        remote,
        journals=settings.agent.state_directory,
    )
    disk.show(disk.pre_dump(order), "pre-dumped", as_json)
