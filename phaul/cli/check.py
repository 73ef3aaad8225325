"""`phaul check`: what this host can do, or what a pair of hosts can."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phaul.cli import options
from phaul.errors import ConnectError, Exit

if TYPE_CHECKING:
    from phaul.events import Finding
    from phaul.preflight import HostFacts

app = typer.Typer(add_completion=False)

Host = Annotated[str | None, typer.Argument(metavar="[USER@]HOST[:PORT]", help="The other host of the pair.")]


@app.command()
def check(
    host: Host = None,
    identity: options.Identity = None,
    option: options.SshOption = None,
    ssh_config: options.SshConfig = None,
    as_json: options.Json = False,
) -> None:
    """Tell what this host can do, or what a pair of hosts can.

    Exit status 0 if programs can move, 20 if something is missing.
    """
    settings = options.settings((identity, option, ssh_config))
    from phaul import facts, preflight

    there, asked = asyncio.run(_ask(host, settings)) if host is not None else (None, 0.0)
    here = facts.host_facts()
    hosts, findings = {"this host": here}, preflight.check_host(here, "this host")
    if host is not None and there is not None:
        there = replace(there, realtime=there.realtime + time.monotonic() - asked)  # both clocks at one moment
        hosts[host] = there
        findings = preflight.check_pair(here, there, host)
    _print(hosts, findings, as_json)
    if any(finding.severity == "blocker" for finding in findings):
        raise typer.Exit(Exit.REFUSED)


async def _ask(host: str, settings: Any) -> tuple[HostFacts, float]:
    """The other host's facts, from phaul there, and when they came (monotonic)."""
    from phaul.desk import Visitor
    from phaul.transport import hello, relay, ssh
    from phaul.transport.control import ChannelClosed
    from phaul.transport.ssh_config import Destination, SshOptions

    destination = Destination.parse(host)
    async with ssh.connect(destination, SshOptions.of(settings.ssh)) as connection:
        agent = await connection.start_agent(hello.local(relay.FEATURES))
        try:
            return await Visitor(agent.link(), connection.name).host(), time.monotonic()
        except ChannelClosed as error:
            raise ConnectError(f"phaul on {connection.name} ended{await agent.last_words()}") from error


def _print(hosts: dict[str, HostFacts], findings: list[Finding], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        for name, host in hosts.items():
            print(json.dumps({"event": "host", "name": name, **asdict(host)}))
        print(json.dumps({"event": "findings", "findings": [asdict(finding) for finding in findings]}))
        return
    _print_table(hosts)
    for finding in findings:
        print(f"{finding.severity}: {finding.text}" + (f"\n  {finding.advice}" if finding.advice else ""))
    blockers = sum(finding.severity == "blocker" for finding in findings)
    print(f"{blockers} things stand in the way" if blockers else "programs can move")


def _print_table(hosts: dict[str, HostFacts]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "for", *hosts, box=None, pad_edge=False, header_style="bold")
    columns = [{probe.name: probe for probe in host.probes} for host in hosts.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name) for column in columns]
        use = next(cell.needed_for for cell in cells if cell)
        marks = ["?" if not cell else cell.detail if cell.ok else f"[red]no[/]: {cell.detail}" for cell in cells]
        table.add_row(name, use, *marks)
    Console(highlight=False, soft_wrap=False).print(table)
