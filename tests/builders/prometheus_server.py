"""A Prometheus on a free port of the loopback interface, and questions to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

START_S, WAIT_S = 60.0, 240.0


class Series(NamedTuple):
    labels: dict[str, str]
    value: float


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, expr: str) -> list[Series]:
        """What a query gives now."""
        return [
            Series(found["metric"], float(found["value"][1]))
            for found in self._get("query", query=expr)["result"]
        ]

    def firing(self, run: str) -> dict[str, str]:
        """Names of a run's alerts that fire, with what they say."""
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in self._get("alerts")["alerts"]
            if alert["state"] == "firing" and alert["labels"]["run"] == run
        }

    def _get(self, what: str, **asked: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S:.0f} s"
        time.sleep(0.2)


@contextmanager
def prometheus(config: Path, data: Path) -> Iterator[Prometheus]:
    """Started with a configuration file; stores its samples in `data`."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus (apt-get install prometheus)")
    log = data.with_suffix(".log")
    line = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}"]
    with log.open("w") as told:
        process = subprocess.Popen(
            [*line, "--web.listen-address=127.0.0.1:0"], stderr=told, stdout=told
        )
    try:
        yield Prometheus(_url(process, log))
    finally:
        process.terminate()
        process.wait(30)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """From its log, once it answers."""
    deadline = time.monotonic() + START_S
    while "Server is ready" not in (text := log.read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    port = re.search(r"Listening on\S* address=127\.0\.0\.1:(\d+)", text)
    assert port is not None, text
    return f"http://127.0.0.1:{port[1]}"
