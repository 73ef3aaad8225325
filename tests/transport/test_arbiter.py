"""The arbiter's register in a real etcd: who is first has it, whatever is lost on the way."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import ValidationError

from phaul import arbiter
from phaul.arbiter import DISCARDED, OPEN, RESUMED, Arbiter
from phaul.config import ArbiterSettings
from phaul.errors import ArbiterError, OverruledError
from tests import etcd


def _free_port() -> int:
    """With the next one free, too."""
    for port in range(23700, 23900, 2):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    pytest.fail("no port is free")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArbiterSettings]:
    if etcd.missing():
        pytest.skip(etcd.missing())
    directory = tmp_path_factory.mktemp("etcd")
    certificates = etcd.Certificates.make(directory, "127.0.0.1")
    port = _free_port()
    command = certificates.server("127.0.0.1", port, f"{directory}/data")
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=directory) as server,
    ):
        found = ArbiterSettings.model_validate(certificates.settings(f"https://127.0.0.1:{port}"))
        deadline = time.monotonic() + 60
        while problem := arbiter.problem(found):
            assert server.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, problem
            time.sleep(0.1)
        yield found
        server.kill()


@pytest.fixture
def register(settings: ArbiterSettings, request: pytest.FixtureRequest) -> Iterator[Arbiter]:
    """A register that has been opened."""
    with closing(Arbiter(settings, request.node.name)) as made:
        made.open()
        yield made
        made.forget()


def another(settings: ArbiterSettings, register: Arbiter, **changes: object) -> Arbiter:
    """The same register as another process sees it."""
    made = Arbiter(settings.model_copy(update=changes), "")
    made._key = register._key
    return made


@pytest.mark.parametrize(("first", "second"), [(RESUMED, DISCARDED), (DISCARDED, RESUMED)])
def test_the_first_has_it(settings: ArbiterSettings, register: Arbiter, first: str, second: str) -> None:
    assert register.says() == OPEN
    with closing(another(settings, register)) as other:
        register.decide(first)
        with pytest.raises(OverruledError, match=first):
            other.decide(second)
        register.decide(first)  # as after an answer that was lost
        assert other.says() == first


def test_of_many_at_once_one_has_it(settings: ArbiterSettings, register: Arbiter) -> None:
    def decide(wanted: str) -> bool:
        with closing(another(settings, register)) as other:
            try:
                other.decide(wanted)
            except OverruledError:
                return False
            return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(decide, [RESUMED, DISCARDED] * 8))
    assert won in ([True, False] * 8, [False, True] * 8)


def test_what_is_not_there(settings: ArbiterSettings) -> None:
    """A register that was removed lets nobody go on: neither is it the source's, nor the destination's."""
    with closing(Arbiter(settings, "never-opened")) as found:
        assert found.says() is None
        with pytest.raises(OverruledError, match="forgotten"):
            found.decide(RESUMED)
        with pytest.raises(ArbiterError, match="knows nothing of this migration") as raised:
            found.decide(DISCARDED)
        assert not isinstance(raised.value, OverruledError)


def test_one_register_a_migration(settings: ArbiterSettings, register: Arbiter) -> None:
    with (
        closing(another(settings, register)) as other,
        pytest.raises(ArbiterError, match="knows this migration already"),
    ):
        other.open()


def test_the_operators_word(settings: ArbiterSettings, register: Arbiter) -> None:
    register.decide(RESUMED)
    register.overrule(DISCARDED)
    with pytest.raises(OverruledError):
        register.decide(RESUMED)


def test_a_connection_that_was_closed_meanwhile(register: Arbiter) -> None:
    assert register.says() == OPEN
    assert register._connection is not None
    register._connection.sock.shutdown(socket.SHUT_RDWR)
    register.decide(RESUMED)


def test_a_member_that_is_down_is_passed_over(settings: ArbiterSettings, register: Arbiter) -> None:
    down = f"https://127.0.0.1:{_free_port()}"
    with closing(another(settings, register, endpoints=(down, *settings.endpoints))) as other:
        assert other.says() == OPEN
        assert other._endpoint == 1


def test_strangers_are_not_let_in(settings: ArbiterSettings) -> None:
    assert arbiter.problem(settings.model_copy(update={"certificate": "", "key": ""}))
    assert "certificate verify failed" in arbiter.problem(settings.model_copy(update={"ca": ""}))


def test_nobody_answers(settings: ArbiterSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        slow = settings.model_copy(update={"endpoints": (f"https://127.0.0.1:{port}",), "timeout": 0.3})
        before = time.monotonic()
        assert "does not answer" in arbiter.problem(slow)
        assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"header": {}, "responses": 7}',
        "<html>",
        '{"header":{},"responses":[{"response_range":{"kvs":[{"value":"*"}]}}]}',
    ],
)
def test_what_is_no_answer_of_etcd(text: str) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = ArbiterSettings(endpoints=(f"http://127.0.0.1:{server.server_port}",))
        with closing(Arbiter(found, "x")) as register, pytest.raises(ArbiterError) as raised:
            register.decide(RESUMED)
        assert not isinstance(raised.value, OverruledError)
        server.shutdown()


@pytest.mark.parametrize("endpoint", ["etcd1:2379", "http://etcd1:2379", "https://", "ftp://x", "https://x/y"])
def test_endpoints_that_make_no_sense(endpoint: str) -> None:
    with pytest.raises(ValidationError):
        ArbiterSettings(endpoints=(endpoint,))


def test_a_row_tells_how_it_is_reached(settings: ArbiterSettings, register: Arbiter, tmp_path: Path) -> None:
    noted = json.loads(json.dumps(settings.model_dump(mode="json")))
    with closing(Arbiter.of_row(noted, "x")) as found:
        found._key = register._key
        assert found.says() == OPEN
    with pytest.raises(ArbiterError):
        Arbiter.of_row({"endpoints": 7}, "x")
