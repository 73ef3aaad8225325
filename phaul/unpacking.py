"""The part of `phaul deploy` that runs on the other host: its text goes there as an argument of `python3 -c`.

So it uses nothing but the standard library, and no pip: the archive on stdin is what a virtual environment's
site-packages shall hold. Each version gets an environment of its own, PREFIX/versions/DIGEST, and `PREFIX/current`
leads to it: agents that run go on with the one that they were started from. What it did is one line of JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

KEPT = 3  # versions
# All that a migration imports: that it can be is the proof that what came fits this host, and writes the bytecode.
MODULES = (
    "phaul_engine._native, phaul.agent, phaul.keeper, phaul.recovery, phaul.source.agent, phaul.dest.agent, "
    "phaul.cli.main, phaul.cli.migrate, phaul.orchestrator, phaul.cli.view, rich.live"
)
SCRIPT = "#!{python}\nimport sys\nfrom phaul.__main__ import main\nsys.exit(main())\n"


def install(home: Path) -> None:
    """Make the environment from the archive on stdin, and try it. SystemExit with what is wrong with it."""
    shutil.rmtree(home, ignore_errors=True)
    try:
        fill(home)
    except OSError as error:
        shutil.rmtree(home, ignore_errors=True)
        sys.exit(f"{home}: {error}")


def fill(home: Path) -> None:
    """Make it; OSError where there is no room for it."""
    venv.create(home, symlinks=True, with_pip=False)
    packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|gz") as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(packages, **safely)  # type: ignore[arg-type]
    python = home / "bin" / "python"
    tried = subprocess.run([python, "-I", "-c", f"import {MODULES}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        shutil.rmtree(home)
        sys.exit("what was sent does not work here: " + tried.stderr.strip()[-600:])
    script = home / "bin" / "phaul"
    script.write_text(SCRIPT.format(python=python))
    script.chmod(0o755)
    (home / "complete").touch()


def point(link: Path, target: str) -> bool:
    """Have a symbolic link lead to `target`; whether it did not before. What is no link of ours is left alone."""
    if link.is_symlink() and os.readlink(link) == target:
        return False
    link.parent.mkdir(parents=True, exist_ok=True)
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.symlink_to(target)
    draft.rename(link)
    return True


def remove_old(versions: Path, current: Path) -> list[str]:
    """Remove all but the newest versions."""
    found = sorted((path for path in versions.iterdir() if path != current), key=lambda path: -path.stat().st_mtime)
    for path in found[KEPT - 1 :]:
        shutil.rmtree(path)
    return [path.name for path in found[KEPT - 1 :]]


def main(prefix: str, digest: str, link: str) -> None:
    """Install what is on stdin, unless it is there, and lead to it. An empty `link`: none is made."""
    top = Path(prefix)
    home = top / "versions" / digest
    did = []
    if not (home / "complete").exists():
        install(home)
        did.append("installed")
    os.utime(home)
    if point(top / "current", f"versions/{digest}"):
        did.append("switched")
    command, others = top / "bin" / "phaul", []
    if (top / "bin").is_dir() and not (top / "bin").is_symlink():
        others.append(f"{command} is another phaul's, and was left alone")
        command = top / "current" / "bin" / "phaul"
    else:
        point(top / "bin", "current/bin")
    if link and Path(link).exists() and not Path(link).is_symlink():
        others.append(f"{link} is another phaul's, and was left alone")
    elif link and point(Path(link), str(command)):
        did.append("linked")
    removed = remove_old(top / "versions", home)
    print(json.dumps({"did": " ".join(did), "command": str(command), "removed": removed, "warning": "; ".join(others)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
