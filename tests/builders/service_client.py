"""A client of the search service that sends what it is told to."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROUTES = ("/search", "/similar", "/videos/{row}/media", "/videos/{row}/thumbnail.jpg", "/explain")
ROUTES += ("/explain/page", "/healthz", "/metrics")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/json", self
        found = json.loads(self.body)
        assert set(found) == {"error", "value", "allowed"}
        assert len(self.body) < 1000
        return found


def get(url: str, path: str, method: str = "GET", **options: Any) -> Answer:
    """Sends a request as it is: a client would normalise the path."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, path, **options)
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def metric(url: str, line: str) -> float:
    text = get(url, "/metrics").body.decode()
    return next((float(each.split()[-1]) for each in text.splitlines() if each.startswith(line)), 0)


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
