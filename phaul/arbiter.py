"""An arbiter: one register for each migration, in an etcd that both hosts reach, so that a cut link needs no human.

The source makes the register, `open`, before it freezes anything. Whoever changes it first, by compare-and-set, has
decided: the destination to `resumed` before its row says RESUMED, or a source that gets no answer to `discarded`. What
these words mean for the copies is the state machine's business (phaul.migration); here is only the register.

etcd is spoken to through its JSON gateway (the v3 API over HTTP; etcd.io, "gRPC gateway"), with client certificates. A
change that was not answered may have been made; asked once more, it is found as ours.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import ssl
import time
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import ValidationError

from phaul.config import ArbiterSettings
from phaul.errors import ArbiterError, OverruledError

OPEN, RESUMED, DISCARDED = "open", "resumed", "discarded"
_MAX_ANSWER = 1 << 20  # bytes


class Arbiter:
    """The register of one migration. Not to be used by two threads at once."""

    def __init__(self, settings: ArbiterSettings, migration: str) -> None:
        self._settings = settings
        self._key = _encoded(f"{settings.prefix}{migration}")
        self._connection: http.client.HTTPConnection | None = None
        self._endpoint = 0  # the one that answered last
        self._tls: ssl.SSLContext | None = None

    @classmethod
    def of_row(cls, noted: dict[str, Any], migration: str) -> Self:
        """As a journal's row has it."""
        try:
            return cls(ArbiterSettings.model_validate(noted), migration)
        except ValidationError as error:
            raise ArbiterError("the journal does not say how the arbiter is reached") from error

    def open(self) -> None:
        """Make the register. ArbiterError if that cannot be, or there is one."""
        compare = {"key": self._key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        put = {"request_put": {"key": self._key, "value": _encoded(OPEN)}}
        if not self._exchange({"compare": [compare], "success": [put], "failure": [self._range()]})[0]:
            raise ArbiterError("the arbiter knows this migration already", advice="try again")

    def says(self) -> str | None:
        """What the register holds; None if there is none."""
        return self._exchange({"compare": [], "success": [self._range()], "failure": []})[1]

    def decide(self, wanted: str) -> None:
        """Change `open` to `wanted`, in one round trip on a connection that stands. OverruledError if the register says
        something else; ArbiterError if it cannot be known."""
        compare = {"key": self._key, "target": "VALUE", "result": "EQUAL", "value": _encoded(OPEN)}
        put = {"request_put": {"key": self._key, "value": _encoded(wanted)}}
        changed, found = self._exchange({"compare": [compare], "success": [put], "failure": [self._range()]})
        if changed or found == wanted:
            return
        if found is None and wanted == DISCARDED:
            raise ArbiterError("the arbiter knows nothing of this migration (any more)")
        raise OverruledError("the arbiter has forgotten it" if found is None else f"the arbiter says {found}")

    def overrule(self, value: str) -> None:
        """By the operator's word: whatever was there."""
        put = {"request_put": {"key": self._key, "value": _encoded(value)}}
        self._exchange({"compare": [], "success": [put], "failure": []})

    def forget(self) -> None:
        """Remove the register: all is over, and whoever comes too late finds nothing to claim."""
        delete = {"request_delete_range": {"key": self._key}}
        self._exchange({"compare": [], "success": [delete], "failure": []})

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _range(self) -> dict[str, Any]:
        return {"request_range": {"key": self._key}}

    def _exchange(self, transaction: dict[str, Any]) -> tuple[bool, str | None]:
        """Whether the comparison held, and what a range found. Every endpoint is tried once, the connection that stands
        once more: it may have been closed since it was used."""
        body = json.dumps(transaction).encode()
        problems = []
        settings = self._settings
        deadline = time.monotonic() + settings.timeout
        count = len(settings.endpoints)
        tries = [self._endpoint] * (self._connection is not None) + [(self._endpoint + n) % count for n in range(count)]
        for number in tries:
            try:
                answer = self._post(number, body, deadline)
                self._endpoint = number
                return _understood(answer)
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                self.close()
                problems.append(f"{self._settings.endpoints[number]}: {_reason(error)}")
        raise ArbiterError(f"the arbiter does not answer: {'; '.join(dict.fromkeys(problems))}")

    def _post(self, number: int, body: bytes, deadline: float) -> dict[str, Any]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {self._settings.timeout:g} s")
        if self._connection is None or number != self._endpoint:
            self.close()
            self._connection = self._connect(number, left)
        if self._connection.sock is not None:
            self._connection.sock.settimeout(left)
        self._connection.request("POST", "/v3/kv/txn", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read(_MAX_ANSWER)
        if answer.status != http.HTTPStatus.OK:
            raise ValueError(f"status {answer.status}: {content[:200].decode(errors='replace')}")
        found = json.loads(content)
        if not isinstance(found, dict):
            raise TypeError("an answer that is no object")
        return found

    def _connect(self, number: int, timeout: float) -> http.client.HTTPConnection:
        url = urlsplit(self._settings.endpoints[number])
        assert url.hostname is not None
        connection: http.client.HTTPConnection
        if url.scheme == "http":
            connection = http.client.HTTPConnection(url.hostname, url.port or 2379, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(
                url.hostname, url.port or 2379, timeout=timeout, context=self._context()
            )
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            settings = self._settings
            tls = ssl.create_default_context(cafile=settings.ca or None)
            tls.minimum_version = ssl.TLSVersion.TLSv1_2
            if settings.certificate:
                tls.load_cert_chain(settings.certificate, settings.key or None)
            self._tls = tls
        return self._tls


def problem(settings: ArbiterSettings) -> str:
    """Why an arbiter cannot be used from here; empty if it can."""
    arbiter = Arbiter(settings, "-")
    try:
        with contextlib.closing(arbiter):
            arbiter.says()
    except ArbiterError as error:
        return str(error)
    return ""


def _understood(answer: dict[str, Any]) -> tuple[bool, str | None]:
    """Proto3 leaves out what is false or empty."""
    if "header" not in answer:
        raise ValueError("an answer that is not etcd's")
    for response in answer.get("responses", ()):
        found = response.get("response_range", response.get("responseRange"))
        for pair in (found or {}).get("kvs", ()):
            return bool(answer.get("succeeded")), base64.b64decode(pair.get("value", ""), validate=True).decode("ascii")
    return bool(answer.get("succeeded")), None


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
