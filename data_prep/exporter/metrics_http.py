"""Where Prometheus finds the metrics of a process while it runs, and a file of the last values.

The text is made once a second at most, however often it is asked for, by the thread that answers.
"""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer

from prometheus_client import CONTENT_TYPE_LATEST

from tvr.launchers.atomic_write import write_atomically

FRESH_S = 1.0
# So long a process that was ever asked waits at its end for the last values to be fetched.
LINGER_S = 8.0
EVERYWHERE = ("", "0.0.0.0", "::")


class PortInUse(ValueError):
    """Another process serves there now, which need not be so elsewhere or later."""


class MetricsEndpoint:
    """Serves `text()` over HTTP, any path, until it is closed."""

    def __init__(self, text: Callable[[], bytes], address: str, port: int) -> None:
        """Port 0: any that is free.

        Raises:
            PortInUse: another process has it.
            ValueError: the address is not this machine's, or there is no such port.
        """
        self._text = text
        self._lock = threading.Lock()
        self._made_at, self._made = -FRESH_S, b""
        self._end_by = 0.0
        self._asked, self._closing, self._told_last = (threading.Event() for _ in range(3))
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_last = endpoint._closing.is_set()
                content = endpoint.content()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE_LATEST)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                (endpoint._told_last if is_last else endpoint._asked).set()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: a line for each scrape would be among the job's own."""

        try:
            self._server = _Server((address, port), Handler)
        except (OSError, OverflowError) as error:
            is_taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            raise (PortInUse if is_taken else ValueError)(
                f"metrics cannot be served at {address or '*'}:{port} of {socket.gethostname()}"
                f" ({error}); give another address or port, or port 0 for any that is free"
            ) from None
        host = socket.gethostname() if address in EVERYWHERE else address
        self.target = f"{host}:{self._server.server_port}"
        """As Prometheus names it."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def content(self) -> bytes:
        """The text, at most a second old."""
        with self._lock:
            now = time.monotonic()
            if now - self._made_at >= FRESH_S:
                self._made_at, self._made = now, self._text()
            return self._made

    def mark_final(self) -> None:
        """From now on what is told are the last values."""
        with self._lock:
            self._made_at = -FRESH_S
            self._end_by = time.monotonic() + LINGER_S
            self._closing.set()

    def close(self) -> None:
        """Ends it; if somebody ever asked, once the last values are fetched too, or LINGER_S after
        the first word that they are the last."""
        if not self._closing.is_set():
            self.mark_final()
        if self._asked.is_set():
            self._told_last.wait(max(0.0, self._end_by - time.monotonic()))
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for the host's full name.
        TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: who asked went away."""


def job_label(folder: str | Path) -> str:
    """What its metrics are called, as the label `run`: PARENT/NAME of the folder, or URL, that it
    writes. The names alone meet: every demo writes a folder `run`."""
    where = str(folder)
    if "://" not in where:
        where = Path(where).resolve().as_posix()
    return "/".join(where.split("://")[-1].rstrip("/").split("/")[-2:])


def write_scrape_target(path: Path, target: str, labels: Mapping[str, str]) -> None:
    """A file for Prometheus's file_sd."""
    groups = [{"targets": [target], "labels": dict(labels)}]
    write_atomically(path, (json.dumps(groups) + "\n").encode())
