"""What an operator touches: the terminal, exit statuses, ways to the other host, and what is left after a failure."""

from __future__ import annotations

import json
import os
import pty
import re
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.host import Process
from tests.hosts.migrate import migrate, parse
from tests.hosts.spec import OPERATOR
from tests.subjects.programs import Subject, start_heap, wait_until

PATIENT = ["--max-downtime", "5000", "--yes"]
LATE = ["--stop-copy", "--max-downtime", "1"]
ID = "0123456789ab"


@pytest.fixture
def small(hosts: Hosts) -> Iterator[Subject]:
    """A heap of 8 MiB written at 10 MB/s on host a; afterwards it must pass, wherever it is."""
    subject = start_heap(hosts.a, heap_mib=8)
    yield subject
    subject.finish()


CROWD = """
import threading
for _ in range(400):
    threading.Thread(target=threading.Event().wait).start()
open("/srv/shared/crowd", "w").close()
"""
"""More threads than can be stopped within a millisecond."""


@contextmanager
def crowd(hosts: Hosts, program: str = "/usr/bin/python3") -> Iterator[Process]:
    """The crowd, on host a, by some Python."""
    with hosts.a.popen([program, "-c", CROWD]) as process:
        wait_until(hosts.a.path("/srv/shared/crowd").exists, "all threads")
        yield process
    hosts.a.run(["rm", "/srv/shared/crowd"])


class Screen:
    """The lines of a terminal, as far as phaul writes to one: text, newlines, cursor up, erase line, colours."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = 0
        self.seen: set[str] = set()

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\r":
                self.column = 0
            elif part.startswith("\x1b["):
                self._control(part)
            else:
                self.lines[self.row] += part
                self.seen.add(self.lines[self.row])

    def _control(self, sequence: str) -> None:
        if sequence.endswith("A"):
            self.row -= int(sequence[2:-1] or 1)
        elif sequence == "\x1b[2K":
            self.lines[self.row] = ""
        else:
            assert sequence[-1] in "mhl", f"{sequence!r} is nothing that this screen knows"


def on_terminal(host: Host, words: list[str]) -> tuple[int, Screen]:
    """Run a program with a terminal of 100 columns; its status and what the screen shows in the end."""
    ours, theirs = pty.openpty()
    screen, raw = Screen(), b""
    with host.popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env={"TERM": "xterm", "COLUMNS": "100"}
    ) as process:
        os.close(theirs)
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the last one that had it has closed it: EIO
                break
            if not data:
                break
            raw += data
        status = process.wait(10)
    os.close(ours)
    screen.feed(raw.decode())
    return status, screen


def test_the_picture_on_a_terminal(hosts: Hosts, small: Subject) -> None:
    """One live line while a round runs; what lasts stands above it; nothing of it remains."""
    words = ["phaul", "migrate", str(small.pid), f"root@{hosts.b.address}", "--bandwidth", "8M", "--compress", "none"]
    status, screen = on_terminal(hosts.a, [*words, *PATIENT])
    shown = "\n".join(screen.lines)
    assert status == 0, shown
    small.moved_to(hosts.b)
    assert any(re.match(r"round 0 +\d+%  link [0-9.]+ .B/s", line) for line in screen.seen), screen.seen
    order = ["connected to ", "migration ", "round 0: ", "predicted ", "running on ", "  downtime ", "migrated to "]
    places = [next((n for n, line in enumerate(screen.lines) if line.startswith(start)), -1) for start in order]
    assert -1 not in places, shown
    assert places == sorted(places), shown
    assert not any("%  link" in line for line in screen.lines), shown
    assert all(len(line) <= 100 for line in screen.lines if line.startswith("round 0 ")), shown


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["migrate", "PID", "B", "--tcp", "maybe"], 2),
        (["migrate", "1", "B"], 2),
        (["migrate", "PID", "B", "--move-address", "10.0.0.1"], 2),
        (["migrate", "4194303", "B"], 2),
        (["migrate", "PID", "B:1"], 10),
        (["migrate", "PID", "root@no-such-host.invalid"], 10),
        (["migrate", "PID", "B", "-o", "IdentityFile=none"], 11),
        (["migrate", "PID", "B", "-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=yes"], 11),
        (["migrate", "PID", "B", "--move-address", "10.77.0.1/24@eth0"], 20),
        (["status", ID], 1),
        (["resolve", ID], 1),
        (["report", ID], 1),
    ],
)
def test_exit_statuses(hosts: Hosts, words: list[str], status: int) -> None:
    """Each failure has its own, says what to do, and leaves the program alone."""
    with hosts.a.popen(["cat", "/dev/zero"]) as process:
        said = [word.replace("PID", str(process.pid)).replace("B", hosts.b.address) for word in words]
        done = hosts.a.run(["phaul", *said], check=False)
        assert done.returncode == status, done
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("phaul: ") or "Usage:" in done.stderr or "blocker: " in done.stdout, done
        assert process.poll() is None


def test_a_freeze_beyond_its_deadline_is_let_go(hosts: Hosts) -> None:
    """Every freeze is let go, and the program goes on where it is."""
    with crowd(hosts) as process:
        moved = migrate(process.pid, hosts.a, hosts.b, LATE)
        assert moved.outcome == "stayed", str(moved)
        assert moved.of("freeze-let-go"), str(moved)
        assert not moved.of("committed")
        assert not hosts.b.alive(process.pid)
        assert process.poll() is None


def test_what_was_sent_is_removed_if_the_program_stays(hosts: Hosts) -> None:
    """And what was there before is not: neither files nor directories."""
    hosts.a.run(["sh", "-c", "cd /srv/own && mkdir -p new/bin && cp /usr/bin/python3 new/bin/crowd"])
    hosts.b.run(["sh", "-c", "cd /srv/own && mkdir new && cp /bin/cat new/old"])
    with crowd(hosts, "/srv/own/new/bin/crowd") as process:
        moved = migrate(process.pid, hosts.a, hosts.b, ["--ship", "missing", *LATE])
        assert moved.outcome == "stayed", str(moved)
        assert any("sending /srv/own/new/bin/crowd" in one["text"] for one in moved.of("notice"))
    left = hosts.b.run(["find", "/srv/own", "-mindepth", "1"]).stdout.split()
    for host in (hosts.a, hosts.b):
        host.run(["rm", "-r", "/srv/own/new"])
    assert sorted(left) == ["/srv/own/new", "/srv/own/new/old"]


def test_a_user_moves_it_through_sudo(hosts: Hosts, small: Subject) -> None:
    """Without privileges on either host, but `sudo -n`."""
    hosts.a.run(["prlimit", "--pid", str(small.pid), "--core=0:0"])  # sudo(8) gives its programs no more than that
    who = ["setpriv", "--reuid", OPERATOR, "--regid", OPERATOR, "--clear-groups"]
    home = ["env", f"HOME=/var/lib/{OPERATOR}", f"USER={OPERATOR}"]
    words = ["phaul", "migrate", str(small.pid), f"{OPERATOR}@{hosts.b.address}", "--json", *PATIENT]
    moved = parse(hosts.a.run([*who, *home, *words], check=False))
    assert moved.outcome == "migrated", str(moved)
    small.moved_to(hosts.b)


def test_the_way_of_the_operators_ssh_is_taken(hosts: Hosts, small: Subject) -> None:
    """An alias, a jump host, another known_hosts and a key that only an agent has: all as ssh_config(5) says."""
    ssh = "/var/lib/root/.ssh"
    config = f"""\
        Host target
          HostName {hosts.b.address}
          User root
          ProxyJump root@{hosts.a.address}
        Host *
          IdentityFile none
          UserKnownHostsFile {ssh}/known
        """
    hosts.a.path(f"{ssh}/config").write_text(textwrap.dedent(config))
    script = (
        f"set -e; mv {ssh}/known_hosts {ssh}/known; eval $(ssh-agent) >/dev/null; trap 'kill $SSH_AGENT_PID' EXIT; "
        f"ssh-add -q {ssh}/id_ed25519; phaul migrate {small.pid} target --json {' '.join(PATIENT)}"
    )
    moved = parse(hosts.a.run(["sh", "-c", script], check=False))
    hosts.a.run(["sh", "-c", f"mv {ssh}/known {ssh}/known_hosts; rm {ssh}/config"])
    assert moved.outcome == "migrated", str(moved)
    small.moved_to(hosts.b)


ROWS = f"""
import sys
from pathlib import Path
from phaul.journal import Row, Store, Task, boot_id
from phaul.migration import Role, Row as State
role, owner, peer, *states = sys.argv[1:]
facts = dict(boot=boot_id(), owner=Task.of(int(owner)) if owner != "0" else Task(pid=1, start=1), peer=peer)
row = Row(migration="{ID}", role=Role(role), program="pid 812", **facts)
with Store(Path("/var/lib/phaul")).create(row) as journal:
    for state in states:
        journal.transition(journal.row.state, State(state))
"""


@pytest.mark.parametrize(("states", "status"), [(("parked", "resumed"), 50), (("parked",), 40)])
def test_a_destination_that_went_down_since(hosts: Hosts, states: tuple[str, ...], status: int) -> None:
    """With the program, or before it can be known whether it ran there: the frozen copy stays for the operator."""
    earlier = ROWS.replace("boot=boot_id()", f'boot="{uuid.uuid4()}"')
    hosts.a.run(["python3", "-c", ROWS, "source", "0", f"root@{hosts.b.address}", "frozen", "committed"])
    hosts.b.run(["python3", "-c", earlier, "destination", "0", "", *states])
    done = hosts.a.run(["phaul", "resolve", ID], check=False)
    state = json.loads(hosts.a.run(["phaul", "status", ID, "--json"]).stdout)["state"]
    for host in (hosts.a, hosts.b):
        host.run(["sh", "-c", "rm -rf /var/lib/phaul/*"])
    assert (done.returncode, state) == (status, "committed"), done.stderr
    assert f"phaul resolve {ID} --keep source" in done.stderr, done


def test_resolve_asks_the_other_host_through_ssh(hosts: Hosts) -> None:
    """A source that had committed and lost its agent; the destination's is alive, and stays so."""
    with hosts.b.popen(["cat", "/dev/zero"]) as agent:
        hosts.a.run(["python3", "-c", ROWS, "source", "0", f"root@{hosts.b.address}", "frozen", "committed"])
        hosts.b.run(["python3", "-c", ROWS, "destination", str(agent.pid), "", "parked"])
        assert f"{ID}" in hosts.a.run(["phaul", "status"]).stdout
        done = hosts.a.run(["phaul", "resolve", ID, "--json"], check=False)
        assert json.loads(done.stdout)["outcome"] == "stayed", done
        assert agent.poll() is None
    there = json.loads(hosts.b.run(["phaul", "status", ID, "--json"]).stdout)
    assert there["state"] == "discarded"
    for host in (hosts.a, hosts.b):
        host.run(["sh", "-c", "rm -rf /var/lib/phaul/*"])
