"""The agent on this host: started through sudo where `phaul` does not run as root, spoken to through pipes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from phaul.errors import AuthenticationError, ConnectError, PhaulError
from phaul.transport import hello as greeting
from phaul.transport.control import StreamLink
from phaul.transport.hello import Hello

_TIMEOUT = 60.0  # seconds until the hello; a busy host takes its time to start a program
_STDERR_KEPT = 8192  # bytes
_BUFFER = 1 << 20  # bytes of the reader's limit; a frame may be longer


def agent_command() -> list[str]:
    """How this very installation starts an agent: by the name it was called by, so that a rule in sudoers may name
    the installed command, else by its interpreter."""
    called = Path(sys.argv[0])
    if called.name == "phaul" and called.is_absolute() and os.access(called, os.X_OK):
        command = [str(called)]
    elif called.name == "phaul" and (found := shutil.which("phaul")) and os.path.samefile(found, called):
        command = [found]
    else:
        command = [sys.executable, "-m", "phaul"]
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    return [*sudo, *command, "agent", "--stdio"]


@contextlib.asynccontextmanager
async def start_agent(ours: Hello) -> AsyncIterator[StreamLink]:
    """Start a relay to the agent that our hello asks for; its frames. The agent outlives the relay."""
    try:
        process = await asyncio.create_subprocess_exec(
            *agent_command(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_BUFFER,
            start_new_session=True,  # Ctrl-C is for phaul, which asks the agent to cancel
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except FileNotFoundError as error:
        raise AuthenticationError("sudo is not installed here", advice="run phaul as root") from error
    assert process.stdin
    assert process.stdout
    assert process.stderr
    errors = asyncio.create_task(_tail(process.stderr))
    try:
        try:
            async with asyncio.timeout(_TIMEOUT):
                await greeting.receive(process.stdout)
        except (ConnectError, TimeoutError) as error:
            raise await _explain(process, errors, error) from error
        process.stdin.write(ours.line())
        yield StreamLink(process.stdout, process.stdin)
    finally:
        process.stdin.close()
        await _end(process)
        errors.cancel()


async def _end(process: asyncio.subprocess.Process) -> None:
    """The relay ends with its stdin; one that does not is not waited for for long."""
    try:
        async with asyncio.timeout(3):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # sudo's child is not ours to kill
            process.kill()


async def _tail(reader: asyncio.StreamReader) -> str:
    kept = b""
    while data := await reader.read(4096):
        kept = (kept + data)[-_STDERR_KEPT:]
    return kept.decode(errors="replace").strip()


async def _explain(process: asyncio.subprocess.Process, errors: asyncio.Task[str], error: Exception) -> PhaulError:
    text = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            text = await asyncio.shield(errors)
    if text.startswith("sudo:"):
        return AuthenticationError(
            f"phaul has to be root here: {text.splitlines()[-1]}",
            advice="run it as root, or allow it in sudoers: USER ALL=(root) NOPASSWD: /path/to/phaul agent *",
        )
    said = f": {text[-300:]}" if text else f": {error}"
    return ConnectError(f"the agent on this host did not start{said}")
