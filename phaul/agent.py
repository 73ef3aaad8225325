"""`phaul agent --stdio`: what SSH starts on the other host, and `phaul` itself here, through sudo."""

from __future__ import annotations

import asyncio
import os
from functools import partial

from phaul import keeper, logs, policy
from phaul.config import AgentSettings, ConfigError, load
from phaul.desk import Desk
from phaul.errors import UsageError
from phaul.policy import Gate
from phaul.transport import relay

_OURS = "agent --stdio"  # what every command holds by which a phaul starts an agent


def run(key: str | None = None) -> None:
    """Serve another phaul on stdin and stdout until it leaves. PhaulError if that cannot be. `key` names the key that
    this was started by, as the forced command of an authorized_keys says."""
    if key is not None:
        _check_forced(key)
    try:
        settings = load()
    except ConfigError as error:
        raise UsageError(str(error)) from error
    logs.set_up(settings.log, role="relay")
    asyncio.run(_serve(settings.agent, _gate(key)))


def _check_forced(key: str) -> None:
    """What a client wanted to run in place of us is never run; one that wanted something else is told so."""
    wanted = os.environ.get("SSH_ORIGINAL_COMMAND")
    if "SSH_CONNECTION" in os.environ and (wanted is None or _OURS not in wanted):
        what = "a shell" if wanted is None else repr(wanted[:200])
        raise UsageError(f"the key {key!r} is for phaul migrate alone, and somebody asked for {what}")


def _gate(key: str | None) -> Gate:
    """The rule that whoever started us stands under; the agents that we start are told whose they are."""
    try:
        who = policy.caller(key)
    except policy.PolicyError as error:
        os.environ[policy.CALLER] = ""
        return Gate("?", problem=str(error), strict=True)
    os.environ[policy.CALLER] = who.name
    return policy.gate(who)


async def _serve(settings: AgentSettings, gate: Gate) -> None:
    reader, writer = await relay.stdio()
    await relay.serve(
        reader,
        writer,
        desk=Desk(settings.state_directory, settings.run_directory, gate),
        run_directory=settings.run_directory,
        features=relay.FEATURES,
        launch=partial(keeper.launch, state_directory=settings.state_directory),
    )
    writer.close()
    await writer.wait_closed()
