"""A headless Chromium for tests of pages, controlled through its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
TIMEOUT_S = 120.0


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Runs the browser with an empty profile; skips the test if Chromium is not installed."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    to_read, to_send = os.pipe()
    to_receive, to_write = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4.
    line = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
    flags = (*FLAGS, f"--user-data-dir={profile}", "about:blank")
    process = subprocess.Popen(
        ["bash", "-c", line, program, *flags],
        pass_fds=(to_read, to_write),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield Browser(to_send, to_receive)
    finally:
        process.terminate()
        process.wait()
        os.close(to_send)
        os.close(to_receive)


class Browser:
    """A client of the Chrome DevTools Protocol."""

    def __init__(self, to_send: int, to_receive: int) -> None:
        self._to_send, self._to_receive = to_send, to_receive
        self._rest = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; earlier events go to `events`."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to_send, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path | str) -> Tab:
        """Opens a file, or the page at a URL, in a new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        tab = Tab(self, attached["sessionId"])
        for domain in ("Page", "Network", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.prefer("light")
        tab.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        return tab

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._to_receive, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


class Tab:
    """One open page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def value(self, expression: str) -> Any:
        """Evaluates a JavaScript expression; awaits it if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Waits until the expression is true, and returns its value."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"{expression} did not become true: {self.errors()}"
            time.sleep(0.05)
        return found

    def prefer(self, scheme: Literal["light", "dark"]) -> None:
        """Sets the reader's preferred colour scheme."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def errors(self) -> list[dict[str, Any]]:
        """Returns errors of the page's script and violations of its security policy."""
        return self._events(lambda method: method in ("Runtime.exceptionThrown", "Log.entryAdded"))

    def requested(self) -> list[str]:
        """Returns every URL that the page or its frames requested."""
        sent = self._events(lambda method: method == "Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def picture(self, width: int, height: int) -> bytes:
        """Returns a PNG of the page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        time.sleep(0.5)
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _events(self, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and wanted(event["method"])
        ]
