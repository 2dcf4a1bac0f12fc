"""Serves a folder over HTTP on the loopback interface, with byte ranges and injected failures."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fsspec.implementations.http import HTTPFileSystem


class HttpStorage:
    """State of the server: its requests, and the rule by which they fail.

    `fails` gets the number of a request, from 1, and returns True if it fails with `status`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.fails: Callable[[int], bool] = lambda number: False
        self.status = 503
        self.requests: list[str] = []
        self._lock = threading.Lock()

    def fail_every_third_of_a_file(self) -> None:
        """Fails every third request of each file, so that parallel readers all see failures."""

        def fails(number: int) -> bool:
            name = self.requests[number - 1]
            return self.requests[:number].count(name) % 3 == 0

        self.fails = fails

    def answer(self, name: str, byte_range: str | None) -> tuple[int, bytes]:
        """Returns the status and body of the response to a request."""
        with self._lock:
            self.requests.append(name)
            number = len(self.requests)
        if self.fails(number):
            return self.status, b""
        file = self.folder / name
        if not file.is_file():
            return 404, b""
        content = file.read_bytes()
        if byte_range is None:
            return 200, content
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", byte_range)
        assert match is not None, byte_range
        first, last = (int(group) for group in match.groups())
        return (206, content[first : last + 1]) if first < len(content) else (416, b"")


@contextmanager
def serve_folder(folder: Path) -> Iterator[HttpStorage]:
    """Serves a folder while the context is open."""
    store = HttpStorage(folder)

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # the headers and the body are two packets

        def do_GET(self) -> None:
            status, content = store.answer(self.path.lstrip("/"), self.headers["Range"])
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        store.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield store
        finally:
            HTTPFileSystem.clear_instance_cache()
            server.shutdown()
            thread.join()
