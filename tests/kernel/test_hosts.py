"""The hosts are what the other tests take them for, and leave nothing; the auditor sees what it is for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import PIPE, HostError, Hosts, attach, cgroups, lease
from tests.hosts.audit import audit, audit_hosts, machine_scope

HOLD_TCP_REPAIR = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
client.setsockopt(socket.IPPROTO_TCP, 19, 1)
sys.stdout.write("ready\\n")
sys.stdout.flush()
time.sleep(60)
"""


HOLD_PACKETS = """
import ctypes, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, 128)
    result = libc.syscall(321, command, buffer, 128)
    assert result >= 0, ctypes.get_errno()
    return result
let_pass = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0))
license = ctypes.create_string_buffer(b"GPL")
program = struct.pack("=IIQQ", 3, 2, ctypes.addressof(let_pass), ctypes.addressof(license)).ljust(68, b"\\0")
fd = bpf(5, program + struct.pack("=I", 46))
index = socket.if_nametoindex("eth0")
bpf(8, struct.pack("=IIII", index, fd, 46, 0))
packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("ready", flush=True)
signal.sigwait({signal.SIGTERM})
bpf(9, struct.pack("=IIII", index, fd, 46, 0))
"""


def test_hosts_reach_each_other_by_ssh_key(hosts: Hosts) -> None:
    for target in (hosts.b.address, hosts.b.address6, "host-b", "operator@host-b"):
        done = hosts.a.run(["ssh", "-o", "BatchMode=yes", target, "hostname; id -un"])
        assert done.stdout.split() == ["host-b", "operator" if "@" in target else "root"]


def test_phaul_is_found_on_every_host_and_over_ssh(hosts: Hosts) -> None:
    ask = "python -c 'import phaul, phaul_engine._native, os; print(os.path.dirname(phaul.__file__))'"
    local = hosts.a.run(["sh", "-c", ask]).stdout
    assert local.strip()
    assert hosts.a.run(["ssh", "host-b", ask]).stdout == local
    assert hosts.b.run(["ssh", "operator@host-a", ask]).stdout == local


def test_ssh_refuses_without_key(hosts: Hosts) -> None:
    done = hosts.a.run(["ssh", "-o", "BatchMode=yes", "-o", "PubkeyAuthentication=no", "host-b", "true"], check=False)
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_what_is_private_and_what_is_shared(hosts: Hosts) -> None:
    for directory in ("/tmp", "/run", "/var/lib", "/srv/own", "/dev/shm"):
        hosts.a.run(["touch", f"{directory}/only-a"])
        assert hosts.a.path(f"{directory}/only-a").exists()
        assert not hosts.b.path(f"{directory}/only-a").exists()
        hosts.a.run(["rm", f"{directory}/only-a"])
    hosts.a.run(["touch", "/srv/shared/token"])
    assert hosts.b.path("/srv/shared/token").stat().st_ino == (hosts.shared / "token").stat().st_ino


def test_clocks_differ_and_pids_do_not_meet(hosts: Hosts) -> None:
    ask = [sys.executable, "-S", "-c", "import time, os; print(time.monotonic(), os.getpid())"]
    monotonic_a, pid_a = hosts.a.run(ask).stdout.split()
    monotonic_b, pid_b = hosts.b.run(ask).stdout.split()
    assert float(monotonic_b) - float(monotonic_a) == pytest.approx(1_000_000, abs=60)
    assert 1000 <= int(pid_a) < 16000 <= int(pid_b)


def test_program_is_child_of_init_with_three_descriptors(hosts: Hosts) -> None:
    with hosts.a.popen(["sleep", "60"]) as process:
        status = hosts.a.path(f"/proc/{process.pid}/status").read_text()
        assert "PPid:\t1\n" in status
        fields = hosts.a.path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        assert int(fields[2]) == int(fields[3]) == process.pid
        descriptors = hosts.a.path(f"/proc/{process.pid}/fd")
        deadline = time.monotonic() + 5
        while sorted(os.listdir(descriptors)) != ["0", "1", "2"]:  # one more while it loads its libraries
            assert time.monotonic() < deadline, os.listdir(descriptors)
        assert Path(f"/proc/{process.outer_pid}/comm").read_text() == "sleep\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


def test_failing_programs_are_reported(hosts: Hosts) -> None:
    with pytest.raises(FileNotFoundError, match="/no/such"):
        hosts.a.popen(["/no/such"])
    with pytest.raises(subprocess.CalledProcessError) as caught:
        hosts.a.run(["sh", "-c", "echo why >&2; exit 3"])
    assert caught.value.returncode == 3
    assert "why" in caught.value.stderr
    with pytest.raises(TimeoutError), hosts.a.popen(["sleep", "60"]) as process:
        process.wait(0.05)


def test_cgroups_of_a_host_can_freeze_and_kill(hosts: Hosts) -> None:
    script = "mkdir /sys/fs/cgroup/x && echo $$ > /sys/fs/cgroup/x/cgroup.procs && exec sleep 60"
    process = hosts.a.popen(["sh", "-c", script])
    group = hosts.a.path("/sys/fs/cgroup/x")
    while not (group / "cgroup.procs").exists() or not (group / "cgroup.procs").read_text():
        time.sleep(0.005)
    (group / "cgroup.freeze").write_text("1")
    while "frozen 1" not in (group / "cgroup.events").read_text():
        time.sleep(0.005)
    assert any("cgroup x" in line and "frozen" in line for line in hosts.a.audit())
    (group / "cgroup.kill").write_text("1")
    assert process.wait(5) == -signal.SIGKILL
    group.rmdir()


def test_service_address_moves(hosts: Hosts) -> None:
    service = f"{hosts.service}/{hosts.service_prefix}"
    assert service in hosts.a.addresses()
    hosts.a.run(["ip", "addr", "del", service, "dev", "eth0"])
    assert any("service address" in line for line in audit_hosts(hosts))
    hosts.b.run(["ip", "addr", "add", service, "dev", "eth0"])
    assert not audit_hosts(hosts)
    hosts.reset()
    assert service in hosts.a.addresses()
    assert service not in hosts.b.addresses()


def test_auditor_sees_what_is_left_on_a_host(hosts: Hosts) -> None:
    host = hosts.b
    assert not host.audit()
    for command in (
        "mkdir /sys/fs/cgroup/phaul-1",
        "ip tuntap add dev tap7 mode tap",
        "tc qdisc add dev eth0 clsact",
        "tc filter add dev eth0 ingress bpf bytecode '1,6 0 0 0' flowid 1:1",
        "mkdir -p /var/lib/phaul && touch /var/lib/phaul/row /tmp/stray",
    ):
        host.run(["sh", "-c", command])
    repair = host.popen([sys.executable, "-S", "-c", HOLD_TCP_REPAIR], stdout=PIPE)
    assert repair.stdout is not None
    assert repair.stdout.readline() == b"ready\n"
    sleeper = host.popen(["sleep", "60"])
    text = "\n".join(host.audit())
    for expected in (
        "cgroup phaul-1",
        "link tap7 is left",
        "link eth0 has an ingress or clsact qdisc",
        "link eth0 has filter ingress: bpf",
        "/var/lib/phaul/row",
        "/tmp/stray",
        f"of process {repair.pid} is in TCP repair",
        f"process {sleeper.pid} (sleep) still runs",
    ):
        assert expected in text
    host.run(["tc", "qdisc", "del", "dev", "eth0", "clsact"])
    hosts.reset()
    assert sleeper.wait(1) == repair.wait(1) == -signal.SIGKILL
    assert not host.audit()


def test_auditor_sees_what_holds_packets(hosts: Hosts) -> None:
    with hosts.b.popen([sys.executable, "-S", "-c", HOLD_PACKETS], stdout=PIPE, stderr="/srv/own/log") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", hosts.b.path("/srv/own/log").read_text()
        text = "\n".join(hosts.b.audit())
        assert "link eth0 has TCX ingress: 1 programs" in text
        assert "packet socket (protocol 0003" in text
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_auditor_sees_a_traced_process() -> None:
    code = (
        "import ctypes, os, sys, time\n"
        "pid = os.fork() or time.sleep(60)\n"
        "ctypes.CDLL(None).ptrace(0x4206, pid, None, None)\n"
        "print(pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True) as tracer:
        assert tracer.stdout is not None
        tracee = int(tracer.stdout.readline())
        try:
            found = audit(machine_scope(cgroups.own_cgroup()))
            assert any(f"task {tracee} is traced by {tracer.pid}" in line for line in found)
        finally:
            tracer.kill()
            os.kill(tracee, signal.SIGKILL)


def test_hosts_of_a_killed_owner_are_swept(hosts: Hosts) -> None:
    name = f"killed-{os.getpid()}"
    code = f"from tests.hosts import up; hosts = up({name!r}); print('up', flush=True); import time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        group = attach(name).lease.cgroup
        assert len(cgroups.members(group)) >= 9
        assert name not in lease.sweep()
        owner.kill()
    assert name in lease.sweep()
    assert not group.exists()
    with pytest.raises(HostError):
        attach(name)


def test_reset_stays_off_what_is_mounted(hosts: Hosts) -> None:
    """A checkout under /tmp is bound into the hosts' /tmp: emptying that must not reach it."""
    (hosts.shared / "kept").write_text("kept")
    hosts.a.run(["sh", "-c", "mkdir -p /tmp/deep/mounted /tmp/gone; mount --bind /srv/shared /tmp/deep/mounted"])
    hosts.a.reset()
    assert (hosts.shared / "kept").read_text() == "kept"
    assert not hosts.a.path("/tmp/gone").exists()
    hosts.a.run(["umount", "/tmp/deep/mounted"])
    hosts.a.reset()
    assert not hosts.a.path("/tmp/deep").exists()
