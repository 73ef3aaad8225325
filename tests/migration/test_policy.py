"""/etc/phaul/agent.toml of the destination, and a key that can do nothing but migrate, with real sshd."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.migrate import Migration, migrate, parse
from tests.hosts.spec import OPERATOR
from tests.subjects.programs import Subject, start_heap, wait_until

ACCOUNT_FILES = "passwd group shadow sudoers hostname hosts"
SLEEPER = [
    "prlimit",
    "--core=0",
    "setpriv",
    "--reuid=4242",
    "--regid=4242",
    "--clear-groups",
    "--bounding-set=-all",
    "--inh-caps=-all",
]
IGNORANT = "import phaul.orchestrator as o\nasync def none(*_): return []\no._policies = none\n"
"""A phaul whose preflight does not ask for policies."""


@dataclass
class Policy:
    """The policy file of one host."""

    host: Host

    def write(self, text: str, mode: str = "644") -> None:
        script = f"cat > /etc/phaul/agent.toml; chmod {mode} /etc/phaul/agent.toml"
        self.host.run(["sh", "-c", script], feed=textwrap.dedent(text))


@pytest.fixture
def policy(hosts: Hosts) -> Iterator[Policy]:
    """Host b's, in an /etc of its own."""
    host = hosts.b
    done = host.run(
        [
            "sh",
            "-ec",
            f"mkdir -p /run/etc/u/phaul /run/etc/w; for f in {ACCOUNT_FILES}; do cp -a /etc/$f /run/etc/u/; done;"
            "mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/u,workdir=/run/etc/w /etc",
        ],
        check=False,
    )
    if done.returncode:
        pytest.skip(f"an overlay on /etc cannot be mounted here: {done.stderr}")
    yield Policy(host)
    host.run(["sh", "-c", "umount /etc; rm -r /run/etc"])


@pytest.fixture
def sleeper(hosts: Hosts) -> Iterator[int]:
    """A program without any privilege, on host a."""
    process = hosts.a.popen([*SLEEPER, "sleep", "600"])
    wait_until(lambda: "4242" in hosts.a.path(f"/proc/{process.pid}/status").read_text(), "the account")
    wait_until(lambda: hosts.a.path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "the program")
    yield process.pid
    for host in (hosts.a, hosts.b):
        if host.alive(process.pid):
            host.kill(process.pid)


def ignorant(hosts: Hosts, pid: int, *options: str) -> Migration:
    """Migrate with a phaul that does not ask beforehand: the agents have to find it."""
    code = (
        f"{IGNORANT}import sys, shutil\nfrom phaul.cli.main import main\nsys.argv[0] = shutil.which('phaul')\nmain()\n"
    )
    words = ["migrate", str(pid), f"root@{hosts.b.address}", "--json", "--yes", *options]
    return parse(hosts.a.run(["python", "-c", code, *words], check=False, timeout=60))


def refused(migration: Migration, words: str) -> None:
    assert (migration.outcome, migration.exit_status) == ("refused", 20), migration
    assert words in migration.reason, migration


def test_preflight_finds_what_the_policy_forbids(hosts: Hosts, policy: Policy, sleeper: int) -> None:
    policy.write('[[allow]]\nusers = ["root"]\naccounts = ["nobody"]\nmemory = "1KiB"\ntasks = 1\n')
    migration = migrate(sleeper, hosts.a, hosts.b)
    refused(migration, f"the program runs as {OPERATOR}, and root may move programs of nobody only")
    texts = [one["text"] for event in migration.of("preflight") for one in event["findings"]]
    assert any("of memory, and host-b lets root bring 0 MiB" in text for text in texts), texts
    policy.write('[[allow]]\nusers = ["root"]\ndirections = ["source"]\n')
    refused_early(migrate(sleeper, hosts.a, hosts.b), "root may not bring programs to host-b")
    policy.write('[[allow]]\nusers = ["operator"]\n')
    refused_early(migrate(sleeper, hosts.a, hosts.b), "root may ask host-b for nothing")
    assert hosts.a.alive(sleeper)


def refused_early(migration: Migration, words: str) -> None:
    """Before there is a preflight."""
    assert migration.exit_status == 20, migration
    assert words in migration.reason, migration


def test_a_bad_file_refuses_everything(hosts: Hosts, policy: Policy, sleeper: int) -> None:
    policy.write('[[allow]]\nusers = ["*"]\nrot = true\n')
    refused_early(migrate(sleeper, hosts.a, hosts.b), "allow.1.rot: there is no such key")
    policy.write('[[allow]]\nusers = ["*"]\n', "666")
    done = hosts.a.run(["phaul", "check", f"root@{hosts.b.address}"], check=False)
    assert done.returncode == 20
    assert "refuses everything until its /etc/phaul/agent.toml is put right" in done.stderr
    assert "can be written by others than root" in done.stderr


def test_the_agent_itself_refuses(hosts: Hosts, policy: Policy, sleeper: int) -> None:
    """Whatever phaul at the source has asked or not."""
    policy.write('[[allow]]\nusers = ["root"]\naccounts = ["nobody"]\n')
    migration = ignorant(hosts, sleeper)
    assert (migration.outcome, migration.exit_status) == ("stayed", 30), migration
    assert f"runs as {OPERATOR}" in migration.reason
    assert not hosts.b.alive(sleeper)
    policy.write('[[allow]]\nusers = ["root"]\naddresses = ["192.0.2.0/24"]\n')
    migration = ignorant(hosts, sleeper, "--move-address", f"{hosts.service}/24@eth0")
    assert "root may not bring the address 10.77.0.100 to host-b" in migration.reason, migration


def test_root_is_refused_unless_it_is_allowed(hosts: Hosts, policy: Policy) -> None:
    process = hosts.a.popen(["sleep", "600"])
    policy.write('[[allow]]\nusers = ["root"]\n')
    refused(migrate(process.pid, hosts.a, hosts.b), f"process {process.pid} runs as root")
    assert f"process {process.pid} runs as root" in ignorant(hosts, process.pid).reason
    policy.write('[[allow]]\nusers = ["root"]\nroot = true\n')
    assert migrate(process.pid, hosts.a, hosts.b).outcome == "migrated"
    hosts.b.kill(process.pid)


def test_more_memory_than_is_allowed_is_noticed_as_it_comes(hosts: Hosts, policy: Policy) -> None:
    subject = start_heap(hosts.a, heap_mib=64)
    policy.write('[[allow]]\nusers = ["root"]\nroot = true\npaths = ["/"]\nmemory = "40MiB"\n')
    migration = ignorant(hosts, subject.pid, "--bandwidth", "40M", "--compress", "none")
    assert migration.outcome == "stayed", migration
    assert "of memory, and host-b lets root bring 40 MiB" in migration.reason
    subject.goes_on()
    subject.finish()


def test_files_are_made_only_where_they_may_be(hosts: Hosts, policy: Policy) -> None:
    """A deleted file that the program has open, and its log on storage that both hosts see."""
    code = "import os, time\nf = open('/srv/shared/ghost', 'w')\nos.unlink('/srv/shared/ghost')\ntime.sleep(600)\n"
    hosts.a.run(["chmod", "1777", "/srv/shared"])
    process = hosts.a.popen([*SLEEPER, "/usr/bin/python3", "-c", code])
    fds = hosts.a.path(f"/proc/{process.pid}/fd")
    wait_until(lambda: any("deleted" in str(fd.readlink()) for fd in fds.iterdir()), "the deleted file")
    policy.write('[[allow]]\nusers = ["root"]\npaths = ["/tmp"]\n')
    words = "would write or make /srv/shared/ghost, and host-b lets it do so in /tmp"
    refused(migrate(process.pid, hosts.a, hosts.b), words)
    assert words in ignorant(hosts, process.pid).reason
    policy.write('[[allow]]\nusers = ["root"]\npaths = ["/tmp", "/srv/shared"]\n')
    migration = migrate(process.pid, hosts.a, hosts.b)
    assert migration.outcome == "migrated", migration
    hosts.b.kill(process.pid)


def test_the_user_behind_sudo_is_who_counts(hosts: Hosts, policy: Policy, sleeper: int) -> None:
    policy.write(f'[[allow]]\nusers = ["{OPERATOR}"]\naccounts = ["self"]\n')
    words = ["phaul", "migrate", str(sleeper), f"{OPERATOR}@{hosts.b.address}", "--json", "--yes"]
    migration = parse(hosts.a.run(words, check=False))
    assert migration.outcome == "migrated", migration
    (row,) = (json.loads(line) for line in hosts.b.run(["phaul", "status", "--all", "--json"]).stdout.splitlines())
    assert row["caller"] == OPERATOR


def test_the_source_has_a_policy_too(hosts: Hosts, policy: Policy) -> None:
    """Of host b, from which a program is to leave."""
    process = hosts.b.popen([*SLEEPER, "sleep", "600"])
    policy.write('[[allow]]\nusers = ["root"]\ndirections = ["destination"]\n')
    refused_early(migrate(process.pid, hosts.b, hosts.a), "root may not send programs from host-b")
    policy.write('[[allow]]\nusers = ["root"]\naccounts = ["nobody"]\n')
    refused_early(migrate(process.pid, hosts.b, hosts.a), "may move programs of nobody only")
    hosts.b.kill(process.pid)


# -- a key that can do nothing else ------------------------------------------------------------------------------


@pytest.fixture
def key(hosts: Hosts) -> Iterator[list[str]]:
    """Options of ssh for a key of host a that host b takes for phaul alone."""
    hosts.a.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/only"])
    public = hosts.a.path("/tmp/only.pub").read_text()
    authorized: Path = hosts.b.state / hosts.b.name / "ssh" / "authorized_keys"
    before = authorized.read_text()
    authorized.write_text(f'{before}restrict,command="phaul agent --stdio --key web" {public}')
    yield ["-i", "/tmp/only", "-o", "IdentitiesOnly=yes"]
    authorized.write_text(before)
    hosts.a.run(["rm", "/tmp/only", "/tmp/only.pub"])


def test_such_a_key_can_do_nothing_but_migrate(hosts: Hosts, policy: Policy, key: list[str], sleeper: int) -> None:
    policy.write('[[allow]]\nusers = ["key:web"]\ndirections = ["destination"]\naccounts = ["4242"]\n')
    there = f"root@{hosts.b.address}"
    ssh = ["ssh", *key, "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
    for words in (
        [*ssh, there, "touch /tmp/touched; id"],
        [*ssh, there],
        [*ssh, "-tt", there, "id"],
        [*ssh, "-s", there, "sftp"],
        [*ssh, there, "phaul deploy x; id"],
        [*ssh, there, "PHAUL_LOG_LEVEL=debug; touch /tmp/touched"],
    ):
        done = hosts.a.run(words, check=False, timeout=20)
        assert done.returncode != 0, done
        assert "uid=" not in done.stdout, done
    for forward in (["-N", "-R", "9999:127.0.0.1:22"], ["-W", "127.0.0.1:22"]):
        assert hosts.a.run([*ssh, *forward, there], check=False, timeout=20).returncode != 0
    assert not hosts.b.path("/tmp/touched").exists()
    assert hosts.a.run(["phaul", "deploy", there, *key], check=False).returncode != 0
    migration = migrate(sleeper, hosts.a, hosts.b, key)
    assert migration.outcome == "migrated", migration
    (row,) = (json.loads(line) for line in hosts.b.run(["phaul", "status", "--all", "--json"]).stdout.splitlines())
    assert row["caller"] == "key:web"
    back = hosts.b.run(["phaul", "migrate", str(sleeper), f"root@{hosts.a.address}", "--dry-run"], check=False)
    assert back.returncode == 20
    assert "root may ask host-b for nothing" in back.stderr


def test_what_a_key_asks_in_phauls_own_language(hosts: Hosts, policy: Policy, key: list[str]) -> None:
    """Somebody who has the key speaks to the desk: no file is read or removed, no agent of the other role started."""
    policy.write('[[allow]]\nusers = ["key:web"]\ndirections = ["destination"]\n')
    code = """
        import asyncio, json
        from dataclasses import replace
        from phaul.config import load
        from phaul.desk import Kind, Visitor, _frame
        from phaul.transport import hello, relay, ssh
        from phaul.transport.ssh_config import Destination, SshOptions

        FILE = {"size": 1, "sha256": "", "uid": 0, "gid": 0, "mtime": 0}
        ASKED = [
            (Kind.READ, {"path": "/etc/shadow", "offset": 0}),
            (Kind.DESCRIBE, {"path": "/etc/shadow", "sha256": ""}),
            (Kind.PROGRAM, {"pid": 1, "options": {}}),
            (Kind.REMOVE, {"made": [{"path": "/etc/passwd", "inode": 1, "directories": [], "seal": "0"}]}),
            (Kind.RECEIVE, FILE | {"path": "/etc/cron.d/x", "mode": 0o644}),
            (Kind.RECEIVE, FILE | {"path": "/tmp/x", "mode": 0o4755}),
            (Kind.START, {"role": "source", "migration": "0123456789ab"}),
            (Kind.RESOLVE, {"migration": "0123456789ab", "role": "source", "answer": "", "keep": "source"}),
        ]

        async def main():
            options = replace(SshOptions.of(load().ssh), identity=("/tmp/only",), options=("IdentitiesOnly=yes",))
            async with ssh.connect(Destination.parse("root@10.77.0.2"), options) as connection:
                link = (await connection.start_agent(hello.local(relay.FEATURES))).link()
                for kind, body in ASKED:
                    await link.send(_frame(kind, body))
                    answer = await link.receive()
                    print(Kind(kind).name, Kind(answer.type).name, json.loads(answer.body).get("text"))
                await link.send(_frame(Kind.ATTACH, {"role": "source", "migration": "0123456789ab"}))
                try:
                    print("ATTACH", await link.receive())
                except Exception as error:
                    print("ATTACH", type(error).__name__)

        asyncio.run(main())
    """
    lines = hosts.a.run(["python", "-c", textwrap.dedent(code)]).stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["FAILURE"] * 8 + ["ChannelClosed"], lines
    assert "key:web may not send programs from host-b" in lines[0]
    assert "was not made here" in lines[3]
    assert "takes files in /tmp, /var/tmp, /dev/shm" in lines[4]
    assert "it would run as somebody else" in lines[5]


def test_a_program_of_the_subject_kind_moves_under_a_policy(hosts: Hosts, policy: Policy) -> None:
    """A rule as an operator would write it, and a program that checks itself."""
    subject: Subject = start_heap(hosts.a, heap_mib=8)
    policy.write(
        '[[allow]]\nusers = ["root"]\nroot = true\nmemory = "256MiB"\ntasks = 8\npaths = ["/srv/shared", "/tmp"]\n'
    )
    migration = migrate(subject.pid, hosts.a, hosts.b)
    assert migration.outcome == "migrated", migration
    subject.moved_to(hosts.b)
    subject.goes_on()
    subject.finish()
