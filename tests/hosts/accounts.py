"""Keys and /etc files of the hosts, made for one run and thrown away with it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.hosts.host import base_environment
from tests.hosts.spec import HOME, HOSTS, OPERATOR, SERVICE4, HostSpec

OPERATOR_ID = 4242


def _key(path: Path) -> str:
    """Make an Ed25519 key pair; the public line."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.parent.name, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path.with_suffix(".pub").read_text().strip()


def _sshd_config(directory: Path) -> str:
    environment = base_environment()
    lines = [
        "Port 22",
        f"HostKey {directory}/host_key",
        f"AuthorizedKeysFile {directory}/authorized_keys",
        "AuthenticationMethods publickey",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PermitRootLogin prohibit-password",
        "StrictModes no",
        "UsePAM no",
        "UseDNS no",
        "PidFile none",
        "PrintMotd no",
        "MaxStartups 100",
        "MaxSessions 100",
        "AllowTcpForwarding yes",
        "AllowStreamLocalForwarding yes",
        "Subsystem sftp internal-sftp",
        "SetEnv " + " ".join(f'{name}="{environment[name]}"' for name in ("PATH", "LANG", "MESONPY_EDITABLE_VERBOSE")),
    ]
    return "\n".join(lines) + "\n"


def _etc(spec: HostSpec, directory: Path) -> None:
    """Copies of the machine's account files with root's home moved and the operator added."""
    directory.mkdir()
    passwd = []
    for line in Path("/etc/passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == "root":
            fields[5:] = [HOME, "/bin/sh"]
        passwd.append(":".join(fields))
    home = f"/var/lib/{OPERATOR}"
    files = {
        "passwd": [*passwd, f"{OPERATOR}:x:{OPERATOR_ID}:{OPERATOR_ID}::{home}:/bin/sh"],
        "group": [*Path("/etc/group").read_text().splitlines(), f"{OPERATOR}:x:{OPERATOR_ID}:"],
        "shadow": [*Path("/etc/shadow").read_text().splitlines(), f"{OPERATOR}:*:19000:0:99999:7:::"],
        "sudoers": [
            "Defaults !requiretty, !use_pty",
            f'Defaults secure_path="{base_environment()["PATH"]}"',
            "root ALL=(ALL:ALL) ALL",
            f"{OPERATOR} ALL=(ALL:ALL) NOPASSWD: ALL",
        ],
        "hostname": [f"host-{spec.name}"],
        "hosts": ["127.0.0.1 localhost", "::1 localhost", f"{SERVICE4} service"],
    }
    files["hosts"] += [f"{host.address} host-{host.name}" for host in HOSTS]
    files["hosts"] += [f"{host.address6} host-{host.name}" for host in HOSTS]
    modes = {"shadow": 0o600, "sudoers": 0o440}
    for name, lines in files.items():
        path = directory / name
        path.write_text("\n".join(lines) + "\n")
        path.chmod(modes.get(name, 0o644))


def write_accounts(state: Path) -> None:
    """Everything under `state`/HOST/etc and `state`/HOST/ssh."""
    state.chmod(0o755)
    public, known = "", []
    for spec in HOSTS:
        directory = state / spec.name / "ssh"
        (directory / "client").mkdir(parents=True)
        (state / spec.name / "own").mkdir()
        if not public:
            public = _key(state / "key")
        if spec.sshd:
            line = _key(directory / "host_key")
            known.append(f"{spec.address},{spec.address6},host-{spec.name} {' '.join(line.split()[:2])}")
        (directory / "authorized_keys").write_text(public + "\n")
        (directory / "sshd_config").write_text(_sshd_config(directory))
        _etc(spec, state / spec.name / "etc")
    for spec in HOSTS:
        client = state / spec.name / "ssh" / "client"
        (client / "id_ed25519").write_text((state / "key").read_text())
        (client / "id_ed25519").chmod(0o600)
        (client / "id_ed25519.pub").write_text(public + "\n")
        (client / "known_hosts").write_text("\n".join(known) + "\n")
    os.unlink(state / "key")
