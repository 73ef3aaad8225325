"""Every option of `phaul migrate` that changes how a program moves, on a program that moves with it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest

from tests.hosts import Hosts
from tests.hosts.migrate import migrate, moving_service
from tests.migration.conftest import Mover
from tests.subjects.programs import Subject, start_heap, wait_until


@pytest.fixture
def small(hosts: Hosts) -> Iterator[Subject]:
    """A heap of 8 MiB written at 10 MB/s on host a; afterwards it must pass, wherever it is."""
    subject = start_heap(hosts.a, heap_mib=8)
    yield subject
    subject.finish()


def test_the_result_comes_once_and_last(mover: Mover, small: Subject) -> None:
    """`tests.hosts.migrate.parse` refuses anything else; here is what stands in it."""
    result = mover.move(small).result
    assert set(result) == {"event", "outcome", "pid", "downtime_ms", "total_ms", "rounds", "bytes_sent", "reason"}
    assert (result["pid"], result["reason"]) == (small.pid, "")
    assert result["bytes_sent"] == sum(one["bytes"] for one in result["rounds"]) > 0
    assert 0 < result["downtime_ms"] < result["total_ms"]


def test_the_downtime_of_both_sides_is_told(mover: Mover, small: Subject) -> None:
    migration = mover.move(small)
    phases = [(one["side"], one["phase"]) for one in migration.of("phase")]
    assert phases[0] == ("source", "freeze")
    assert [phase for side, phase in phases if side == "destination"][-2:] == ["detach", "resume"]
    there = sum(one["ms"] for one in migration.of("phase") if one["side"] == "destination")
    assert there < migration.downtime_ms


def test_without_json_the_summary_is_printed_once(hosts: Hosts, small: Subject) -> None:
    done = hosts.a.run(["phaul", "migrate", str(small.pid), f"root@{hosts.b.address}", "--yes"])
    small.moved_to(hosts.b)
    assert done.stdout.count("migrated to ") == 1
    assert done.stdout.count("  downtime ") == 1
    assert "  resume " in done.stdout


def test_verify_compares_all_memory(mover: Mover, small: Subject) -> None:
    mover.move(small, ["--verify"])


@pytest.mark.parametrize("options", [["--compress", "none"], ["--compress", "zstd:3", "--streams", "1"]])
def test_compression(mover: Mover, small: Subject, options: list[str]) -> None:
    sent = mover.move(small, options).rounds[0]
    assert (sent["bytes"] > 4096 * sent["pages"]) is ("none" in options)


def test_streams_go_through_ssh_with_tunnel(mover: Mover, small: Subject) -> None:
    """The page port is closed by a rule on the destination: only SSH gets through."""
    host = mover.hosts.b
    rule = [
        "INPUT",
        "-i",
        "eth0",
        "-p",
        "tcp",
        "!",
        "--dport",
        "22",
        "-m",
        "conntrack",
        "--ctstate",
        "NEW",
        "-j",
        "DROP",
    ]
    host.run(["iptables", "-A", *rule])
    try:
        mover.move(small, ["--tunnel", "--streams", "2"])
    finally:
        host.run(["nft", "flush", "ruleset"])


def test_stop_copy_sends_everything_in_the_freeze(mover: Mover, small: Subject) -> None:
    migration = mover.move(small, ["--stop-copy"])
    assert len(migration.rounds) <= 1


def test_bandwidth_is_kept_to(mover: Mover, small: Subject) -> None:
    migration = mover.move(small, ["--bandwidth", "4M", "--compress", "none", "--max-downtime", "10s"])
    first = migration.rounds[0]
    assert first["bytes"] / (first["ms"] / 1000) < 4.6e6


def test_rounds_end_at_their_limit(mover: Mover, hosts: Hosts) -> None:
    """A writer that is faster than the link never converges: it stays, in no more rounds than were given."""
    subject = start_heap(hosts.a, heap_mib=32, rate_mb=100)
    options = ["--max-rounds", "3", "--bandwidth", "20M", "--compress", "none", "--max-downtime", "1ms"]
    migration = mover.try_to_move(subject.pid, hosts.a, options)
    assert migration.outcome == "stayed"
    assert "does not converge" in migration.reason
    assert len(migration.rounds) <= 3
    subject.finish()


def test_a_program_is_slowed_down_until_it_converges(mover: Mover, hosts: Hosts) -> None:
    subject = start_heap(hosts.a, heap_mib=16, rate_mb=40)
    options = ["--auto-converge", "--bandwidth", "20M", "--compress", "none", "--max-downtime", "200ms"]
    migration = mover.move(subject, options)
    assert migration.of("throttled")
    subject.finish()


def test_images_are_kept(mover: Mover, small: Subject) -> None:
    mover.move(small, ["--keep-images", "/srv/shared/kept"])
    source = mover.hosts.a
    done = source.run(["phaul", "images", "verify", "/srv/shared/kept", "--json"], check=False)
    names = os.listdir(source.path("/srv/shared/kept"))
    source.run(["rm", "-r", "/srv/shared/kept"])
    assert json.loads(done.stdout) == {"problems": []}
    assert "pages-1.img" in names


def test_a_missing_executable_is_sent(mover: Mover) -> None:
    """Same path, owner, mode and content; where it differs nothing is overwritten (test_preflight)."""
    source, destination = mover.hosts.a, mover.hosts.b
    source.run(["sh", "-c", "mkdir -p /srv/own/bin && cp /bin/sleep /srv/own/bin/doze"])
    source.run(["sh", "-c", "chmod 751 /srv/own/bin/doze && chown 1:2 /srv/own/bin/doze"])
    process = source.popen(["/srv/own/bin/doze", "600"])
    migration = mover.try_to_move(process.pid, source, ["--ship", "missing"])
    assert migration.outcome == "migrated", str(migration)
    seen = [
        host.run(["sh", "-c", "stat -c '%a %u %g %s' /srv/own/bin/doze; sha256sum /srv/own/bin/doze"]).stdout
        for host in (source, destination)
    ]
    assert seen[0] == seen[1]
    destination.kill(process.pid)
    for host in (source, destination):
        host.run(["rm", "-r", "/srv/own/bin"])


def test_connections_that_are_not_to_move_refuse_it(mover: Mover, echo: tuple[Subject, Subject]) -> None:
    server, client = echo
    migration = mover.try_to_move(server.pid, mover.hosts.a, ["--tcp", "refuse", *moving_service(mover.hosts)])
    assert migration.outcome == "refused"
    assert "a connection at" in migration.reason
    client.goes_on("requests")


def test_a_dry_run_touches_nothing(mover: Mover, small: Subject) -> None:
    """Exit status 0, outcome `stayed`: it could move, and stayed."""
    hosts = mover.hosts
    before = hosts.a.path(f"/proc/{small.pid}/cgroup").read_text()
    words = ["phaul", "migrate", str(small.pid), f"root@{hosts.b.address}", "--dry-run", "--json"]
    done = hosts.a.run(words)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["outcome"], result["reason"]) == ("stayed", "dry run: nothing stands in the way")
    assert hosts.a.path(f"/proc/{small.pid}/cgroup").read_text() == before
    assert not hosts.b.alive(small.pid)
    small.goes_on()


def test_an_interrupt_leaves_it_at_the_source(mover: Mover, hosts: Hosts) -> None:
    """Ctrl-C in a round: exit status 130, and the program is released within a second."""
    subject = start_heap(hosts.a, heap_mib=64)
    words = ["phaul", "migrate", str(subject.pid), f"root@{hosts.b.address}", "--bandwidth", "4M", "--compress", "none"]
    with hosts.a.popen([*words, "--json", "--yes"], stdout="/tmp/events") as process:
        wait_until(lambda: "round-started" in hosts.a.path("/tmp/events").read_text(), "a round", 45.0)
        process.send_signal(2)
        begun = time.monotonic()
        assert process.wait(10) == 130
    assert time.monotonic() - begun < 2
    result = json.loads(hosts.a.path("/tmp/events").read_text().splitlines()[-1])
    assert result["outcome"] == "cancelled"
    hosts.a.run(["rm", "/tmp/events"])
    subject.goes_on()
    subject.finish()


def test_it_moves_when_the_terminal_and_ssh_are_gone(mover: Mover, hosts: Hosts) -> None:
    """The agents need neither once a round runs: phaul is killed, and its SSH connection with it."""
    subject = start_heap(hosts.a, heap_mib=16)
    words = ["phaul", "migrate", str(subject.pid), f"root@{hosts.b.address}", "--bandwidth", "8M", "--compress", "none"]
    with hosts.a.popen([*words, "--json", "--yes", "--max-downtime", "5s"], stdout="/tmp/events") as process:
        wait_until(lambda: "round-started" in hosts.a.path("/tmp/events").read_text(), "a round", 45.0)
        process.send_signal(9)
    wait_until(lambda: hosts.b.alive(subject.pid) and not hosts.a.alive(subject.pid), "it has moved", 10.0)
    hosts.a.run(["rm", "/tmp/events"])
    subject.moved_to(hosts.b)
    subject.goes_on()
    subject.finish()


def test_a_dead_agent_is_explained(mover: Mover, hosts: Hosts) -> None:
    """An agent killed in a round: it stays, and the reason names the file with its last words."""
    subject = start_heap(hosts.a, heap_mib=32)
    words = ["phaul", "migrate", str(subject.pid), f"root@{hosts.b.address}", "--bandwidth", "4M", "--compress", "none"]
    with hosts.a.popen([*words, "--json", "--yes"], stdout="/tmp/events") as process:
        wait_until(lambda: "round-started" in hosts.a.path("/tmp/events").read_text(), "a round", 45.0)
        row = json.loads(hosts.a.run(["phaul", "status", "--json"]).stdout)
        hosts.a.kill(row["owner"]["pid"])
        assert process.wait(15) == 30
    reason = json.loads(hosts.a.path("/tmp/events").read_text().splitlines()[-1])["reason"]
    assert "killed by SIGKILL" in reason or "/run/phaul/" in reason, reason
    wait_until(lambda: not list(hosts.b.path("/run/phaul").glob("*.sock")), "the end of the destination's keeper")
    hosts.a.run(["sh", "-c", "rm /tmp/events /run/phaul/*.log"])
    hosts.b.run(["sh", "-c", "rm -f /run/phaul/*.log"])
    subject.goes_on()
    subject.finish()


def test_several_addresses_and_a_taken_one(mover: Mover, hosts: Hosts, small: Subject) -> None:
    assert migrate(small.pid, hosts.a, hosts.b, ["--move-address", f"{hosts.a.address}/24@eth0"]).exit_status == 20
