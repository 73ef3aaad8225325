"""Build what the machines boot: kernels and a root disk (kept in .state/vm), and a disk with this checkout's phaul.

Needs root, debootstrap, apt and mke2fs (e2fsprogs). Nothing of the machine that builds is changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
STATE = REPOSITORY / ".state" / "vm"
HERE = Path(__file__).parent
PACKAGES = ("python3", "openssh-server", "iproute2", "redis-server", "kmod", "procps", "busybox-static")
KERNELS = {"6.1": "linux-image-cloud-amd64", "6.12": "linux-image-6.12-cloud-amd64"}
"""The kernels of Debian 12, and the packages that stand for the newest build of each."""
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
ROOT_DISK_MIB, PAYLOAD_MIB = 1200, 400
_DISK_MODULES = ("virtio_blk", "virtio_pci")
_INITTAB = "::sysinit:/sbin/phaul-setup\n::respawn:/usr/sbin/sshd -D\n"
_SSHD = "PermitRootLogin prohibit-password\nUsePAM no\nUseDNS no\nMaxSessions 100\nMaxStartups 100\n"
_PHAUL = '#!/bin/sh\nexec /usr/bin/python3 -m phaul "$@"\n'
_PATH_FILE = "usr/local/lib/python3.11/dist-packages/phaul.pth"


class ImageError(Exception):
    """An image could not be built."""


def missing() -> str:
    """Why machines cannot be built and run here; empty if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if sys.version_info[:2] != (3, 11):
        return "needs Python 3.11, as in Debian 12: the machines get its packages"
    tools = ("qemu-system-x86_64", "debootstrap", "mke2fs", "apt-get", "ssh", "ssh-keygen", "unshare", "setpriv")
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    return f"needs {', '.join(lacking)}" if lacking else ""


def run(*words: str | Path, cwd: Path | None = None, timeout: float = 600) -> str:
    """A command's output; ImageError with its last words when it fails."""
    done = subprocess.run(words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise ImageError(f"{' '.join(map(str, words))} ended with status {done.returncode}:\n" + "\n".join(said))
    return done.stdout


@contextmanager
def _builder() -> Iterator[None]:
    """One builder at a time. Whatever it makes gets its name when it is whole."""
    STATE.mkdir(parents=True, exist_ok=True)
    with open(STATE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernel_packages() -> dict[str, str]:
    """The package of each kernel's newest build, as apt knows it now."""
    found = {kernel: _newest(meta) for kernel, meta in KERNELS.items()}
    if not all(found.values()):
        run("apt-get", "-o", "DPkg::Lock::Timeout=300", "update", "-qq")
        found = {kernel: _newest(meta) for kernel, meta in KERNELS.items()}
    for kernel, meta in KERNELS.items():
        if not found[kernel]:
            raise ImageError(f"apt knows no {meta}: it is in Debian 12's security updates")
    return found


def _newest(meta: str) -> str:
    """What a meta package depends on; empty if apt does not know it."""
    said = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False).stdout
    names = [line.split()[1] for line in said.splitlines() if line.strip().startswith("Depends: linux-image-")]
    return names[0] if names else ""


def build_base() -> Path:
    """The directory with root.img, key, and for each kernel vmlinuz-K and initrd-K; built anew when its recipe or the
    kernels have changed."""
    packages = kernel_packages()
    recipe = [*PACKAGES, *packages.values(), *(path.read_text() for path in (HERE / "setup.sh", HERE / "initrd.sh"))]
    recipe += [_INITTAB, _SSHD, _PHAUL, str(ROOT_DISK_MIB)]
    base = STATE / f"base-{hashlib.sha256('|'.join(recipe).encode()).hexdigest()[:12]}"
    with _builder():
        if base.exists():
            return base
        for old in STATE.glob("base-*"):
            shutil.rmtree(old)
        temporary = base.with_suffix(".new")
        temporary.mkdir()
        root = temporary / "root"
        run("cp", "-a", "--one-file-system", _debootstrap(), root)
        for kernel, package in packages.items():
            _add_kernel(temporary, root, kernel, package)
        _furnish(temporary, root)
        disk(root, temporary / "root.img", ROOT_DISK_MIB)
        shutil.rmtree(root)
        temporary.rename(base)
    return base


def disk(tree: Path, image: Path, mib: int) -> None:
    """An ext4 image with what is in the directory."""
    temporary = image.with_suffix(".new")
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, temporary, f"{mib}M")
    temporary.rename(image)


def _debootstrap() -> Path:
    """A Debian 12 with PACKAGES and an empty /dev (the machine mounts one); built once.

    What debootstrap mounts there goes with its mount namespace: nobody copies or removes our devices through it.
    """
    name = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    tree = STATE / f"debian-{name}"
    if not tree.exists():
        temporary = STATE / f"debian-{name}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        include = f"--include={','.join(PACKAGES)}"
        alone = ("unshare", "--mount", "--propagation", "private")
        run(*alone, "debootstrap", "--variant=minbase", include, SUITE, temporary, MIRROR, timeout=1200)
        shutil.rmtree(temporary / "dev")
        (temporary / "dev").mkdir()
        for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"):
            shutil.rmtree(temporary / waste, ignore_errors=True)
        temporary.rename(tree)
    return tree


def _add_kernel(base: Path, root: Path, kernel: str, package: str) -> None:
    """Its modules into the root, vmlinuz and an initrd beside it."""
    debs = STATE / "debs"
    debs.mkdir(exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        run("apt-get", "download", "-o", "APT::Sandbox::User=root", package, cwd=debs)
    unpacked = base / f"kernel-{kernel}"
    run("dpkg-deb", "-x", next(debs.glob(f"{package}_*.deb")), unpacked)
    release = package.removeprefix("linux-image-")
    (unpacked / f"boot/vmlinuz-{release}").rename(base / f"vmlinuz-{kernel}")
    modules = root / "lib/modules" / release
    shutil.copytree(unpacked / "lib/modules" / release, modules, symlinks=True)
    for waste in ("drivers/gpu", "drivers/infiniband", "drivers/scsi", "sound"):
        shutil.rmtree(modules / "kernel" / waste, ignore_errors=True)
    run("chroot", root, "/sbin/depmod", release)
    _initrd(base / f"initrd-{kernel}", modules, root / "bin/busybox")
    shutil.rmtree(unpacked)


def _initrd(initrd: Path, modules: Path, busybox: Path) -> None:
    """A first file system that loads what the disk needs and goes on there."""
    entries: list[tuple[str, int, bytes]] = [(name, 0o040755, b"") for name in ("bin", "dev", "root", "modules")]
    entries += [("bin/busybox", 0o100755, busybox.read_bytes())]
    entries += [("init", 0o100755, (HERE / "initrd.sh").read_bytes())]
    for number, path in enumerate(_with_needed(modules, _DISK_MODULES)):
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        entries.append((f"modules/{number:02d}-{path.name.removesuffix('.xz')}", 0o100644, content))
    initrd.write_bytes(b"".join(_cpio([*entries, ("TRAILER!!!", 0, b"")])))


def _with_needed(modules: Path, names: Sequence[str]) -> list[Path]:
    """The files of these modules after those that they need; without what is built into the kernel."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path.rpartition("/")[2].partition(".")[0]] = [path, *others.split()]
    # modules.dep(5) names what a module needs, the deepest last
    wanted = [path for name in names for path in reversed(needs.get(name, []))]
    return [modules / path for path in dict.fromkeys(wanted)]


def _cpio(entries: Sequence[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """An archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst, newc)."""
    for number, (name, mode, content) in enumerate(entries, 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        yield head + bytes(-len(head) % 4)
        yield content + bytes(-len(content) % 4)


def _furnish(base: Path, root: Path) -> None:
    """The machine's process 1, keys, and the way to phaul."""
    for kind in ("ecdsa", "rsa"):
        for path in root.glob(f"etc/ssh/ssh_host_{kind}_key*"):
            path.unlink()
    key = base / "key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "phaul-tests", "-f", key)
    home = root / "root/.ssh"
    home.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(key, home / "id_ed25519")
    public = key.with_suffix(".pub").read_text()
    (home / "authorized_keys").write_text(public)
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    if not host_key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host_key)
    known = " ".join(host_key.with_suffix(".pub").read_text().split()[:2])
    (home / "known_hosts").write_text("".join(f"10.78.0.{number} {known}\n" for number in (1, 2)))
    (base / "known_hosts").write_text(f"phaul-vm {known}\n")
    for name, text, mode in (
        ("etc/inittab", _INITTAB, 0o644),
        ("etc/ssh/sshd_config.d/phaul.conf", _SSHD, 0o644),
        ("sbin/phaul-setup", (HERE / "setup.sh").read_text(), 0o755),
        ("usr/local/bin/phaul", _PHAUL, 0o755),
        (_PATH_FILE, "/opt/phaul/site\n/opt/phaul/checkout\n", 0o644),
        ("etc/fstab", "", 0o644),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(mode)
    (root / "opt/phaul").mkdir()


def build_payload() -> Path:
    """The disk with phaul: a wheel of this checkout and what it needs, and the tests; built anew when they change."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=REPOSITORY).splitlines()
    files = sorted(name for name in listed if (REPOSITORY / name).is_file())
    sources = [name for name in files if name.startswith(("phaul/", "engine/", "meson.build", "pyproject.toml"))]
    image = STATE / f"payload-{_digest(files)}.img"
    with _builder():
        if not image.exists():
            for old in STATE.glob("payload-*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            tree = image.with_suffix(".tree")
            shutil.copytree(_site(sources), tree / "site", symlinks=True)
            for name in files:
                if name.startswith("tests/") or name == "pyproject.toml":
                    (tree / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(REPOSITORY / name, tree / "checkout" / name)
            run(sys.executable, "-m", "compileall", "-q", "-j2", tree / "checkout")
            disk(tree, image, PAYLOAD_MIB)
            shutil.rmtree(tree)
    return image


def _site(sources: Sequence[str]) -> Path:
    """phaul and its dependencies, as installed: the wheel anew when a source has changed, the rest is kept."""
    needs = STATE / f"needs-{_digest(['pyproject.toml'])}"
    install = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if shutil.which("uv"):
        install = ["uv", "pip", "install", "-q", "--python", sys.executable, "--compile-bytecode"]
    if not needs.exists():
        for old in STATE.glob("needs-*"):
            shutil.rmtree(old)
        temporary = needs.with_suffix(".new")
        run(*install, "--target", temporary, *_requirements())
        temporary.rename(needs)
    site = STATE / f"site-{_digest(sources)}"
    if not site.exists():
        for old in STATE.glob("site-*"):
            shutil.rmtree(old)
        temporary = site.with_suffix(".new")
        shutil.copytree(needs, temporary, symlinks=True)
        environment = ["env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"]
        options = ["--no-build-isolation", "--no-deps", "--target", str(temporary)]
        run(*environment, *install, *options, str(REPOSITORY))
        temporary.rename(site)
    return site


def _requirements() -> list[str]:
    """What phaul and its tests need, as pyproject.toml has it."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["test"]]


def _digest(files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\0".encode() + (REPOSITORY / name).read_bytes())
    return digest.hexdigest()[:12]


def main() -> int:
    """Make both disks, and say how long that took; 3 if machines cannot be run here."""
    import time

    if reason := missing():
        print(f"virtual machines cannot be run here: {reason}")
        return 3
    begun = time.monotonic()
    try:
        print("making the disks of virtual machines: about 3 minutes the first time", flush=True)
        build_base()
        build_payload()
    except (ImageError, OSError, subprocess.TimeoutExpired) as error:
        print(f"the disks of virtual machines cannot be made here: {error}")
        return 3
    print(f"they stand in {STATE} after {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
