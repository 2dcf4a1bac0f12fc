"""Serves the metrics of a running process to Prometheus.

The response is rendered in the request's thread, at most once a second.
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

from tvr.data_prep.exporter.target_host import AUTO, bracketed, target_host
from tvr.launchers.atomic_write import write_atomically

CACHE_S = 1.0
# Time that a scraped process stays at its end for a final scrape.
LINGER_S = 8.0
HOST_RULE = "__meta_tvr_host"
"""Label that says by which rule a target's host was chosen. Prometheus shows it, but stores no
label that begins with `__`."""


class PortInUse(ValueError):
    """Another process uses the port now; another node or a later start may succeed."""


class MetricsEndpoint:
    """Serves metrics over HTTP, on any path, until it is closed.

    Args:
        render: Returns the metrics in Prometheus text format.
        address: Interface to listen on; "" and "0.0.0.0" mean all.
        port: Port to listen on; 0 means any free port.
        host: Host in the target's address, as in `target_host`.

    Raises:
        PortInUse: another process uses the port.
        ValueError: the address does not belong to this machine, or the port is out of range.
    """

    def __init__(
        self, render: Callable[[], bytes], address: str, port: int, host: str = AUTO
    ) -> None:
        self._render = render
        self._lock = threading.Lock()
        self._rendered_at, self._rendered = -CACHE_S, b""
        self._close_by = 0.0
        self._scraped, self._is_final, self._final_scraped = (threading.Event() for _ in range(3))
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_final = endpoint._is_final.is_set()
                content = endpoint.content()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE_LATEST)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                (endpoint._final_scraped if is_final else endpoint._scraped).set()

            def log_message(self, format: str, *args: object) -> None:
                """Does nothing: lines of scrapes would fill the job's log."""

        try:
            self._server = _Server((address, port), Handler)
        except (OSError, OverflowError) as error:
            is_in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            raise (PortInUse if is_in_use else ValueError)(
                f"metrics cannot be served at {address or '*'}:{port} of {socket.gethostname()}"
                f" ({error}); choose another address or port, or port 0 for any free port"
            ) from None
        name, self.host_rule = target_host(address, host)
        self.target = f"{bracketed(name)}:{self._server.server_port}"
        """HOST:PORT, as Prometheus names the target."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def content(self) -> bytes:
        """Returns the metrics in text format, at most CACHE_S old."""
        with self._lock:
            now = time.monotonic()
            if now - self._rendered_at >= CACHE_S:
                self._rendered_at, self._rendered = now, self._render()
            return self._rendered

    def mark_final(self) -> None:
        """Declares the current values final; starts the wait of `close` for a final scrape."""
        with self._lock:
            self._rendered_at = -CACHE_S
            self._close_by = time.monotonic() + LINGER_S
            self._is_final.set()

    def close(self) -> None:
        """Stops serving.

        An endpoint that was ever scraped waits for a scrape of the final values, at most LINGER_S
        after `mark_final`.
        """
        if not self._is_final.is_set():
            self.mark_final()
        if self._scraped.is_set():
            self._final_scraped.wait(max(0.0, self._close_by - time.monotonic()))
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
        # HTTPServer.server_bind would look up the host's full name in DNS.
        TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Does nothing: the client closed the connection."""


def job_label(folder: str | Path) -> str:
    """Returns the value of the label `run`: PARENT/NAME of the job's output folder or URL.

    NAME alone is ambiguous: every demo writes a folder `run`.
    """
    path = str(folder)
    if "://" not in path:
        path = Path(path).resolve().as_posix()
    return "/".join(path.split("://")[-1].rstrip("/").split("/")[-2:])


def write_scrape_target(path: Path, target: str, labels: Mapping[str, str]) -> None:
    """Writes a target file for Prometheus's file-based service discovery."""
    groups = [{"targets": [target], "labels": dict(labels)}]
    write_atomically(path, (json.dumps(groups) + "\n").encode())
