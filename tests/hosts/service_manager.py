"""systemd as process 1 of a host, with a journal and nothing else: no unit of the machine is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = "/lib/systemd/systemd"
_UNITS = Path("/run/systemd/system")
_PACKAGED = Path("/usr/lib/systemd/system")
_TARGET = """[Unit]
DefaultDependencies=no
Wants=systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket
"""
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "container": "phaul-tests",  # so that it leaves the kernel's settings alone
    "SYSTEMD_GENERATOR_PATH": "/nonexistent",
    "SYSTEMD_UNIT_PATH": f"{_UNITS}:/run/systemd/transient:{_PACKAGED}",
}
_PATIENCE = 20.0  # seconds


def missing() -> str | None:
    """Why there can be no host with systemd here; None if there can."""
    if not os.access(PROGRAM, os.X_OK) or shutil.which("systemctl") is None:
        return "hosts with systemd need it: apt-get install systemd"
    return None


def boot() -> None:
    """The caller, process 1, becomes systemd; its child goes on from here when that is up."""
    _UNITS.mkdir(parents=True)
    (_UNITS / "default.target").write_text(_TARGET)
    for unit in _PACKAGED.glob("*.wants/*"):  # what sysinit.target wants changes the kernel's settings
        if "journal" not in unit.name and not (_UNITS / unit.name).is_symlink():
            (_UNITS / unit.name).symlink_to(os.devnull)
    if os.fork() != 0:
        os.execve(PROGRAM, [PROGRAM, "--log-target=journal", "--show-status=0"], _ENVIRONMENT)
    os.setsid()
    deadline = time.monotonic() + _PATIENCE
    while not _is_up():
        if time.monotonic() > deadline:
            raise TimeoutError(f"systemd is not up after {_PATIENCE:.0f} s")
        time.sleep(0.05)


def _is_up() -> bool:
    if not Path("/run/systemd/private").exists():
        return False
    command = ["systemctl", "is-active", "--quiet", "systemd-journald.service"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
