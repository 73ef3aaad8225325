"""A host loses power at any step, and comes back in another boot: never two copies, and none only where the host took
it along; what is in doubt is ended by `phaul resolve`."""

from __future__ import annotations

import json
import signal
from functools import partial

import pytest

from phaul.migration import Role
from tests.faults.scene import RUN, Scene, every_run, wait_hung
from tests.faults.test_killed import POINTS
from tests.hosts import Host, Hosts
from tests.subjects.programs import start_echo_client, wait_until

OWN = every_run(
    (Role.SOURCE, "after send COMMIT"),
    (Role.DESTINATION, "before row PARKED-RESUMED"),
    (Role.DESTINATION, "after row PARKED-RESUMED"),
)
OTHER = every_run((Role.DESTINATION, "before row PARKED-RESUMED"))
LOST, IN_DOUBT = 50, 40
STATUS = {  # of `phaul migrate` itself, where the destination goes down there and then
    (Role.DESTINATION, "before row PARKED-RESUMED"): (IN_DOUBT, "in-doubt"),
    (Role.DESTINATION, "after row PARKED-RESUMED"): (LOST, "lost"),
}


def resolve(host: Host, migration: str, *options: str) -> int:
    """The exit status of `phaul resolve` there, whose JSON says the same."""
    done = host.run(["phaul", "resolve", migration, "--json", *options], check=False)
    outcomes = {0: ("migrated", "stayed"), IN_DOUBT: ("in-doubt",), LOST: ("lost",)}
    assert done.returncode in outcomes, f"{done.returncode} {done.stdout}{done.stderr}"
    assert json.loads(done.stdout)["outcome"] in outcomes[done.returncode], done
    return done.returncode


def finish(scene: Scene, crashed: Host) -> None:
    """What an operator does, and what must be true then."""
    hosts = scene.hosts
    survivor = hosts.other(crashed)
    for role in (Role.SOURCE, Role.DESTINATION) if crashed is hosts.a else (Role.DESTINATION, Role.SOURCE):
        wait_until(partial(abandoned, scene, role), f"nobody works on the {role}", 150.0)
        for row in scene.rows(role):
            if row["ended"]:
                continue
            status = resolve(scene.host(role), str(row["migration"]))
            if status and role is Role.SOURCE and hosts.a.alive(scene.server.pid):
                assert crashed is hosts.b, "the frozen copy is in doubt only where the other host went down"
                assert resolve(hosts.a, str(row["migration"]), "--keep", "source", "--assert", "dead") == 0, (
                    scene.told()
                )
    for row in scene.rows(Role.DESTINATION) if crashed is hosts.b else ():
        if not row["ended"]:  # the source has decided, and tells it
            resolve(hosts.a, str(row["migration"]))
    over = list(survivor.path(RUN).glob("*.sock"))
    wait_until(lambda: not any(path.exists() for path in over), "nobody is at work", 150.0)
    places = [host for host in (hosts.a, hosts.b) if host.alive(scene.server.pid)]
    assert places in ([], [survivor]), scene.told()
    if not places:
        assert took_it_along(scene, crashed), scene.told()
        hosts.client.kill(scene.client.pid, signal.SIGKILL)
        for address in (f"{hosts.service}/{hosts.service_prefix}", f"{hosts.service6}/64"):
            if not any(address in host.addresses() for host in (hosts.a, hosts.b)):  # it went with the program
                hosts.a.run(["ip", "address", "add", address, "dev", hosts.a.device])
    else:
        scene.server.moved_to(survivor)
        if crashed is hosts.b and took_it_along(scene, crashed):
            serves_others(scene, survivor)
        else:
            scene.client.goes_on("requests", 20.0)
            scene.client.finish()
            scene.server.finish()


def serves_others(scene: Scene, survivor: Host) -> None:
    """The copy of the moment of the move, which the operator asked for: its connections went on without it and are
    reset, which this server counts as an error; whoever connects anew is served."""
    scene.hosts.client.kill(scene.client.pid, signal.SIGKILL)
    anew = start_echo_client(scene.hosts.client, scene.hosts.service, connections=4)
    anew.goes_on("requests", 20.0)
    anew.finish()
    survivor.kill(scene.server.pid, signal.SIGKILL)


def owned(scene: Scene, role: Role) -> bool:
    return any(row["owned"] and not row["ended"] for row in scene.rows(role))


def abandoned(scene: Scene, role: Role) -> bool:
    return not owned(scene, role)


def took_it_along(scene: Scene, crashed: Host) -> bool:
    """The copy that ran, or the only one, was there."""
    if crashed is scene.hosts.a:
        return all(row["state"] != "resumed" for row in scene.rows(Role.DESTINATION))
    return any(row["state"] in ("resumed", "released") for row in scene.rows(Role.DESTINATION))


def crash_at(hosts: Hosts, role: Role, point: str, crashed: Host) -> None:
    scene = Scene.begin(hosts)
    scene.arm(role, point, "hang")
    process = scene.start()
    agent = wait_hung(scene.host(role), process)
    scene.disarm()
    crashed.crash()
    if scene.host(role) is not crashed:
        scene.host(role).kill(agent, signal.SIGCONT)
    if crashed is hosts.b:
        migration = scene.answer(process, 120.0)
        scene.words.append(str(migration))
        told = migration.exit_status, migration.outcome
        assert told == STATUS.get((role, point), told), scene.told()
    finish(scene, crashed)
    scene.clear()


@pytest.mark.parametrize(("role", "point"), OWN(POINTS), ids=lambda one: str(one).replace(" ", "-"))
def test_a_host_that_goes_down(hosts: Hosts, role: Role, point: str) -> None:
    crash_at(hosts, role, point, hosts.a if role is Role.SOURCE else hosts.b)


@pytest.mark.parametrize(("role", "point"), OTHER(POINTS), ids=lambda one: str(one).replace(" ", "-"))
def test_the_other_host_goes_down(hosts: Hosts, role: Role, point: str) -> None:
    crash_at(hosts, role, point, hosts.b if role is Role.SOURCE else hosts.a)
