"""The stand-in of vzctl, cgget and cgset, by the name it is called by: see README.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.hosts import cgroups
from tests.openvz import files, starting

_BAD_PARAMETER, _NO_CONFIG, _SYSTEM = 20, 14, 3
_NOT_RUNNING, _RUNNING, _DISABLED = 31, 32, 105
_NOT_MOUNTED, _NO_PRIVATE, _CANNOT_MOUNT = 40, 43, 50
_CANNOT_REGISTER, _CANNOT_UNREGISTER = 140, 142


class Failed(Exception):
    """With an exit status of vzctl(8), DIAGNOSTICS."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _identified(name: str) -> str:
    """The id of a container that has this id or name."""
    link = files.ETC / "names" / name
    if not files.conf(name).exists() and link.exists():
        return files.read(link)["VEID"]
    return name


def _configured(ctid: str) -> dict[str, str]:
    if not files.conf(ctid).exists():
        raise Failed(_NO_CONFIG, f"Container configuration file {files.conf(ctid)} not found")
    return files.parameters(ctid) | {"VEID": ctid}


def _running(ctid: str) -> bool:
    group = files.GROUPS / ctid
    return bool(group.is_dir() and cgroups.members(group))


def status(ctid: str) -> None:
    exists = files.conf(ctid).exists()
    mounted = exists and files.mounted(files.parameters(ctid)["VE_ROOT"])
    words = ["exist" if exists else "deleted", "mounted" if mounted else "unmounted"]
    print("VEID", ctid, *words, "running" if _running(ctid) else "down")


def register(private: str, ctid: str, *flags: str) -> None:
    path = Path(private).resolve()
    if not (path / "ve.conf").exists():
        raise Failed(_CANNOT_REGISTER, f"Error: Broken Container, no {path / 've.conf'} file found")
    if not (path / ".ve.layout").is_symlink():
        raise Failed(_CANNOT_REGISTER, "Warning: Container in old data format, registration skipped.")
    conf = files.conf(ctid)
    if os.path.lexists(conf) and conf.resolve() != path / "ve.conf" and "--force" not in flags:
        raise Failed(_CANNOT_REGISTER, f"Error: Container ID {ctid} is used")
    (path / ".owner").write_text(os.uname().nodename)
    parameters = files.read(path / "ve.conf")
    same = path.name == ctid
    parameters |= {"VE_PRIVATE": f"{path.parent}/$VEID" if same else str(path), "VEID": ctid}
    parameters.setdefault("UUID", "00000000-0000-0000-0000-000000000000")
    files.write(path / "ve.conf", parameters)
    if parameters.get("NAME"):
        link = files.ETC / "names" / parameters["NAME"]
        link.unlink(missing_ok=True)
        link.symlink_to(path / "ve.conf")
    conf.unlink(missing_ok=True)
    conf.symlink_to(path / "ve.conf")
    print(f"Container {ctid} was successfully registered")


def unregister(ctid: str) -> None:
    parameters = _configured(ctid)
    if _running(ctid):
        raise Failed(_CANNOT_UNREGISTER, "Container is running, Stop Container before proceeding.")
    private = Path(parameters["VE_PRIVATE"])
    if files.mounted(parameters["VE_ROOT"]):
        umount(ctid)
    if private.is_dir():
        own = files.read(private / "ve.conf")
        own.pop("VEID", None)
        files.write(private / "ve.conf", own)
        (private / ".owner").unlink(missing_ok=True)
    if parameters.get("NAME"):
        (files.ETC / "names" / parameters["NAME"]).unlink(missing_ok=True)
    files.conf(ctid).unlink()
    print("Container unregistered succesfully")


def mount(ctid: str) -> None:
    parameters = _configured(ctid)
    source, root = Path(parameters["VE_PRIVATE"], "fs"), parameters["VE_ROOT"]
    if files.mounted(root):
        print("Container is already mounted")
        return
    if not source.is_dir():
        raise Failed(_NO_PRIVATE, f"Container private area {source} does not exist")
    Path(root).mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "--bind", source, root]).returncode:
        raise Failed(_CANNOT_MOUNT, f"Failed to bindmount {source} {root}")
    print("Container is mounted")


def umount(ctid: str) -> None:
    root = _configured(ctid)["VE_ROOT"]
    if _running(ctid):
        raise Failed(_RUNNING, "Unable to unmount running Container: stop it first")
    _clear(ctid)
    if not files.mounted(root):
        raise Failed(_NOT_MOUNTED, "Container is not mounted")
    subprocess.run(["umount", root], check=True)
    print("Container is unmounted")


def start(ctid: str, *flags: str) -> None:
    parameters = _configured(ctid)
    if _running(ctid):
        raise Failed(_RUNNING, "Container is already running")
    if any(flag not in ("--wait", "--skip-fsck") for flag in flags):
        raise Failed(_BAD_PARAMETER, f"Unrecognized option '{flags[0]}'")
    if parameters.get("DISABLED") == "yes":
        raise Failed(_DISABLED, "Container start disabled")
    print("Starting Container ...")
    mount(ctid)
    try:
        starting.start(ctid, parameters)
    except (OSError, subprocess.CalledProcessError) as error:
        stop(ctid, "--fast", again=True)
        raise Failed(_SYSTEM, f"Container start failed: {error}") from error
    print("Container start in progress...")


def change(ctid: str, *words: str) -> None:
    _configured(ctid)
    match words:
        case ["--disabled", ("yes" | "no") as value, "--save"]:
            path = files.conf(ctid).resolve()
            files.write(path, files.read(path) | {"DISABLED": value})
        case _:
            raise Failed(_BAD_PARAMETER, f"Unrecognized option '{' '.join(words)}'")


def stop(ctid: str, *flags: str, again: bool = False) -> None:
    _configured(ctid)
    if not _running(ctid) and not again:
        raise Failed(_NOT_RUNNING, "Unable to stop: container is not running")
    print("Stopping the Container ...")
    group = files.GROUPS / ctid
    if "--fast" not in flags and _running(ctid):
        os.kill(int(files.init_pid(ctid).read_text()), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while _running(ctid) and time.monotonic() < deadline:
            time.sleep(0.05)
    cgroups.remove(group)
    _clear(ctid)
    root = files.parameters(ctid)["VE_ROOT"]
    if "--skip-umount" not in flags and files.mounted(root):
        subprocess.run(["umount", root], check=True)
    print("Container was stopped")


def _clear(ctid: str) -> None:
    """What a container that ended has left."""
    if (files.GROUPS / ctid).is_dir():
        cgroups.remove(files.GROUPS / ctid)
    files.init_pid(ctid).unlink(missing_ok=True)
    (files.NETNS / ctid).unlink(missing_ok=True)
    for path in files.ve(ctid).glob("*"):
        path.unlink()
    if files.ve(ctid).is_dir():
        files.ve(ctid).rmdir()


def execute(ctid: str, *command: str) -> None:
    _configured(ctid)
    if not _running(ctid):
        raise Failed(_NOT_RUNNING, "Container is not running")
    pid = files.init_pid(ctid).read_text().strip()
    Path(files.GROUPS / ctid / "cgroup.procs").write_text("0")
    done = subprocess.run(["nsenter", "-t", pid, "-a", "-r", "-w", "--", *command])
    raise SystemExit(done.returncode)


_ACTIONS: dict[str, Callable[..., None]] = {
    "status": status,
    "unregister": unregister,
    "mount": mount,
    "umount": umount,
    "start": start,
    "set": change,
    "stop": stop,
    "exec": execute,
}


def vzctl(words: list[str]) -> int:
    while words and words[0] in ("--quiet", "--verbose"):
        words = words[1:]
    try:
        match words:
            case ["register", private, ctid, *flags]:
                register(private, ctid, *flags)
            case [action, name, *rest] if action in _ACTIONS:
                _ACTIONS[action](_identified(name), *rest)
            case _:
                raise Failed(_BAD_PARAMETER, f"Bad command: {' '.join(words)}")
    except Failed as error:
        print(error, file=sys.stderr)
        return error.status
    return 0


def cgget(words: list[str]) -> int:
    match words:
        case ["-n", "-v", "-r", name, group] if (files.ve(group) / name).is_file():
            print((files.ve(group) / name).read_text())
            return 0
    print("cgget: cannot read the group's variable", file=sys.stderr)
    return 96


def cgset(words: list[str]) -> int:
    match words:
        case ["-r", setting, group] if (files.ve(group) / setting.partition("=")[0]).is_file():
            (files.ve(group) / setting.partition("=")[0]).write_text(setting.partition("=")[2])
            return 0
    print("cgset: the group can't be modified", file=sys.stderr)
    return 96


if __name__ == "__main__":
    called = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in ("vzctl", "cgget", "cgset") else "vzctl"
    arguments = sys.argv[2:] if len(sys.argv) > 1 and sys.argv[1] == called else sys.argv[1:]
    raise SystemExit({"vzctl": vzctl, "cgget": cgget, "cgset": cgset}[called](arguments))
