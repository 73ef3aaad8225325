"""What `phaul deploy` sends: this phaul and the packages it needs, as files of a site-packages directory.

For a host with this host's Python they are taken from here as they are installed, so nothing is downloaded. For
another Python, packages with compiled parts have to be others: pip or uv gets them, here, from where they get packages.
phaul itself is built for the stable ABI and serves every Python from 3.11 on (PEP 384).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import phaul
from phaul.errors import PhaulError

OLDEST_PYTHON = (3, 11)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLATFORM = "manylinux_2_28_x86_64"


@dataclass(frozen=True)
class Bundle:
    """Files by their paths in site-packages. The digest names content and Python."""

    files: Mapping[str, Path]
    python: tuple[int, int]

    @property
    def digest(self) -> str:
        """The same for the same files."""
        total = hashlib.sha256(repr(self.python).encode())
        for name in sorted(self.files):
            total.update(name.encode() + b"\0" + hashlib.sha256(self.files[name].read_bytes()).digest())
        return f"{phaul.__version__}-{total.hexdigest()[:12]}"

    def archive(self) -> bytes:
        """A compressed tar archive."""
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=3, mtime=0) as compressed:
            with tarfile.open(fileobj=compressed, mode="w|") as archive:
                for name in sorted(self.files):
                    entry = archive.gettarinfo(self.files[name], name)
                    entry.uid = entry.gid = 0
                    entry.uname = entry.gname = "root"
                    entry.mode = 0o755 if entry.mode & 0o100 else 0o644
                    with self.files[name].open("rb") as content:
                        archive.addfile(entry, content)
        return packed.getvalue()


@contextlib.contextmanager
def bundle(python: tuple[int, int]) -> Iterator[Bundle]:
    """The bundle for a Python of that version, there for the length of a `with`. PhaulError if it cannot be had."""
    own = dict(_own_files())
    if python == sys.version_info[:2]:
        yield Bundle(own | dict(_installed_files()), python)
        return
    with tempfile.TemporaryDirectory(prefix="phaul-deploy-") as directory:
        _download(Path(directory), python)
        yield Bundle(own | dict(_files_below(Path(directory))), python)


def _own_files() -> Iterator[tuple[str, Path]]:
    """phaul and its engine, as they are imported here: an editable installation has them in two places."""
    for package in ("phaul", "phaul_engine"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        top = Path(spec.origin).parent
        for path in sorted(top.rglob("*.py")):
            yield f"{package}/{path.relative_to(top)}", path
    native = importlib.util.find_spec("phaul_engine._native")
    assert native is not None
    assert native.origin is not None
    yield "phaul_engine/_native.abi3.so", Path(native.origin)
    ours = importlib.metadata.distribution("phaul")  # what it needs: for whoever deploys from there
    name = f"phaul-{ours.version}.dist-info/METADATA"
    yield name, Path(str(ours.locate_file(name)))


def _installed_files() -> Iterator[tuple[str, Path]]:
    for distribution in needed():
        if not distribution.files:
            raise PhaulError(
                f"the installed {distribution.metadata['Name']} does not say which files it has",
                advice="install phaul here with pip or uv, then deploy",
            )
        for file in distribution.files:
            name = str(file)
            if not name.startswith(("..", "/")) and "__pycache__" not in name:
                yield name, Path(str(file.locate()))


def needed() -> list[importlib.metadata.Distribution]:
    """The installed distributions that phaul needs, directly or not; without phaul."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(requirements())
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python: its marker is not met here
        waiting += _requirements(found[name])
    return [found[name] for name in sorted(found)]


def requirements() -> list[str]:
    """What phaul itself needs, by name."""
    return _requirements(importlib.metadata.distribution("phaul"))


def _requirements(distribution: importlib.metadata.Distribution) -> list[str]:
    names = []
    for text in distribution.requires or ():
        match = _NAME.match(text)
        if match and "extra ==" not in text.partition(";")[2]:
            names.append(re.sub(r"[-_.]+", "-", match[0]).lower())
    return names


def _files_below(top: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(top.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(top).parts[0] != "bin":
            yield str(path.relative_to(top)), path


def _download(target: Path, python: tuple[int, int]) -> None:
    """The needed packages for another Python, by pip or uv, in the versions that are installed here."""
    wanted = [f"{one.metadata['Name']}=={one.version}" for one in needed()]
    version = f"{python[0]}.{python[1]}"
    common = ["--target", str(target), "--no-deps", "--only-binary", ":all:", "--python-version", version]
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "-q", *common, "--platform", _PLATFORM, *wanted]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "-q", *common, "--python-platform", "x86_64-manylinux_2_28", *wanted]
    else:
        raise _other_python(version, "neither pip nor uv is here to get them")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _other_python(version, done.stderr.strip()[-400:])


def _other_python(version: str, why: str) -> PhaulError:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return PhaulError(
        f"the packages that phaul needs cannot be had for Python {version}: {why}",
        advice=f"install Python {here} there, which this host has packages of; or deploy from a host with Python "
        f"{version} or with access to packages",
    )
