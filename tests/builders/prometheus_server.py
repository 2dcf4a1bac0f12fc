"""Starts a Prometheus on a free loopback port, and queries it."""

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

    def query(self, expr: str) -> list[Series]:
        """Evaluates a PromQL expression now."""
        return [
            Series(found["metric"], float(found["value"][1]))
            for found in self._get("query", query=expr)["result"]
        ]

    def firing(self, run: str) -> dict[str, str]:
        """Firing alerts of a run: names and summaries."""
        return {
            alert["labels"]["alertname"]: alert["annotations"]["summary"]
            for alert in self._get("alerts")["alerts"]
            if alert["state"] == "firing" and alert["labels"]["run"] == run
        }

    def _get(self, endpoint: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{endpoint}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]


def wait_until(condition: Callable[[], bool], description: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{description}: not within {WAIT_S:.0f} s"
        time.sleep(0.2)


@contextmanager
def prometheus(config: Path, data: Path) -> Iterator[Prometheus]:
    """Starts Prometheus with a configuration file; it stores its samples in `data`."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus (apt-get install prometheus)")
    log = data.with_suffix(".log")
    line = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*line, "--web.listen-address=127.0.0.1:0"], stderr=output, stdout=output
        )
    try:
        yield Prometheus(_url(process, log))
    finally:
        process.terminate()
        process.wait(30)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """URL of the server, read from its log once it is ready."""
    deadline = time.monotonic() + START_S
    while "Server is ready" not in (text := log.read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    port = re.search(r"Listening on\S* address=127\.0\.0\.1:(\d+)", text)
    assert port is not None, text
    return f"http://127.0.0.1:{port[1]}"
