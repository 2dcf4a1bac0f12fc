"""A real S3 server on the loopback interface (moto), and a proxy before it that injects faults.

Both are configured for s3fs by environment variables alone, so that ranks, loader workers and
packing tasks see them, too:

    with serve_s3() as server, server.environment(monkeypatch):
        StorageFolder("s3://bucket/checkpoints")
        with fault_proxy(server) as proxy, proxy.environment(monkeypatch):
            proxy.fail = every(3, unavailable())
            StorageFolder("s3://bucket/checkpoints")  # every third request fails
"""

from __future__ import annotations

import http.client
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from builders.server_process import server_port
from fsspec.implementations.local import LocalFileSystem

BUCKET = "bucket"
REQUEST_TIMEOUT_S = 60.0
# Threads in the process of a test would hold its interpreter lock, and outlive no kill.
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the parent closes it, or ends
"""


@dataclass
class S3Endpoint:
    """An address that s3fs can be pointed to."""

    url: str

    @contextmanager
    def environment(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Points s3fs of this process, and of the ones it starts, to this server."""
        with monkeypatch.context() as patch:
            for name, value in self.variables().items():
                patch.setenv(name, value)
            forget_clients()
            try:
                yield
            finally:
                forget_clients()

    def variables(self) -> dict[str, str]:
        """The environment variables for other processes."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            # No settings or keys of the user who runs the tests.
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }


@dataclass
class S3Server(S3Endpoint):
    """The server; it begins with one empty bucket."""

    def clear(self) -> None:
        """Removes all objects, and creates the bucket."""
        self._send("POST", "/moto-api/reset")
        self._send("PUT", f"/{BUCKET}")

    def keys(self, prefix: str = "") -> list[str]:
        """Sorted keys of all objects of the bucket, as the server itself lists them."""
        import xml.etree.ElementTree as ElementTree

        found: list[str] = []
        token = ""
        while True:
            fields = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}
            fields |= {"continuation-token": token} if token else {}
            answer = self._send("GET", f"/{BUCKET}?{urllib.parse.urlencode(fields)}")
            root = ElementTree.fromstring(answer)
            names = [each for each in root.iter() if each.tag.endswith("}Key")]
            found += [urllib.parse.unquote_plus(each.text or "") for each in names]
            tokens = [e.text for e in root.iter() if e.tag.endswith("}NextContinuationToken")]
            if not tokens or not tokens[0]:
                return sorted(found)
            token = tokens[0]

    def read(self, key: str) -> bytes:
        """Content of an object."""
        return self._send("GET", f"/{BUCKET}/{urllib.parse.quote(key)}")

    def write(self, key: str, content: bytes) -> None:
        """Replaces an object, as another process or a damaged disk would."""
        self._send("PUT", f"/{BUCKET}/{urllib.parse.quote(key)}", content)

    def remove(self, key: str) -> None:
        """Removes an object."""
        self._send("DELETE", f"/{BUCKET}/{urllib.parse.quote(key)}")

    def _send(self, method: str, path: str, content: bytes | None = None) -> bytes:
        # The server compares no signature, but finds the service by the header's words.
        headers = {
            "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/x",
            "Content-Type": "application/octet-stream",  # not a form, which the server would parse
        }
        request = urllib.request.Request(
            f"{self.url}{path}", data=content, method=method, headers=headers
        )
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
            return answer.read()


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """Runs the server in a process of its own, which ends with the block or with this process."""
    try:
        with server_port(SERVER) as port:
            server = S3Server(f"http://127.0.0.1:{port}")
            server.clear()
            yield server
    finally:
        forget_clients()


def forget_clients() -> None:
    """Makes s3fs of this process read the environment again."""
    try:
        import s3fs
    except ImportError:
        return
    s3fs.S3FileSystem.clear_instance_cache()
    LocalFileSystem.clear_instance_cache()


@dataclass(frozen=True)
class Request:
    """A request at the proxy."""

    number: int
    """From 1, over all requests."""
    method: str
    path: str
    """Bucket and key."""
    query: str

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and ("list-type=" in self.query or "prefix=" in self.query)


@dataclass(frozen=True)
class Answer:
    """An answer of the server."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True)
class Fault:
    """What happens to a request.

    `status`: the proxy answers, and the server never gets the request. `cut`: the server's answer
    ends in the middle of its body, and the connection closes. `lose`: the server does what was
    asked, and the connection closes without an answer. `wait_s`: the first byte of the answer comes
    so much later.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    code: str = "InternalError"
    cut: bool = False
    lose: bool = False
    wait_s: float = 0.0


Rule = Callable[[Request], Fault | None]


def unavailable() -> Fault:
    """503, as of a server that restarts."""
    return Fault(status=503, code="ServiceUnavailable")


def throttled(retry_after_s: int = 0) -> Fault:
    """429 with Retry-After."""
    headers = {"Retry-After": str(retry_after_s)}
    return Fault(status=429, headers=headers, code="TooManyRequests")


def every(number: int, *faults: Fault) -> Rule:
    """Every n-th request fails, by each of the faults in turn."""

    def rule(request: Request) -> Fault | None:
        turn, rest = divmod(request.number, number)
        return None if rest else faults[(turn - 1) % len(faults)]

    return rule


def burst(first: int, last: int, fault: Fault) -> Rule:
    """All requests of these numbers fail."""
    return lambda request: fault if first <= request.number <= last else None


class FaultProxy(S3Endpoint):
    """Passes requests on to a server, except where `fail` names a fault."""

    def __init__(self, url: str, server: S3Endpoint) -> None:
        super().__init__(url)
        self.fail: Rule = lambda request: None
        self.requests: list[Request] = []
        self.num_faults = 0
        self._server = server
        self._lock = threading.Lock()
        self._stale: dict[str, Answer] | None = None

    @contextmanager
    def stale_listings(self) -> Iterator[None]:
        """During the block a repeated listing gets the answer that its first request got."""
        self._stale = {}
        try:
            yield
        finally:
            self._stale = None

    def reset(self) -> None:
        """Forgets the requests so far, so that numbers begin at 1 again."""
        with self._lock:
            self.requests.clear()
            self.num_faults = 0

    def handle(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[Answer | None, Fault | None]:
        """The answer to a request (None: none at all), and its fault."""
        path, _, query = target.partition("?")
        with self._lock:
            request = Request(len(self.requests) + 1, method, path, query)
            self.requests.append(request)
            fault = self.fail(request)
            self.num_faults += fault is not None
        if fault is not None and fault.status is not None:
            text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
            answer_headers = [("Content-Type", "application/xml"), *fault.headers.items()]
            return Answer(fault.status, answer_headers, text.encode()), fault
        stale = self._stale
        if stale is not None and request.is_listing and target in stale:
            return stale[target], fault
        answer = self._pass_on(method, target, headers, body)
        if stale is not None and request.is_listing:
            stale[target] = answer
        return (None if fault is not None and fault.lose else answer), fault

    def _pass_on(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        address = urllib.parse.urlsplit(self._server.url)
        connection = http.client.HTTPConnection(
            address.hostname or "", address.port, timeout=REQUEST_TIMEOUT_S
        )
        try:
            connection.request(method, target, body=body or None, headers=headers)
            answer = connection.getresponse()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("transfer-encoding", "connection", "content-length")
            ]
            if method == "HEAD":
                kept.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return Answer(answer.status, kept, answer.read())
        finally:
            connection.close()


@contextmanager
def fault_proxy(server: S3Endpoint) -> Iterator[FaultProxy]:
    """Runs a proxy before the server while the block is open; it fails nothing at first."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.connection.settimeout(REQUEST_TIMEOUT_S)

        def answer(self) -> None:
            body = self.read_body()
            hop_by_hop = ("connection", "transfer-encoding", "content-length", "expect")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in hop_by_hop}
            answer, fault = proxy.handle(self.command, self.path, headers, body)
            if fault is not None and fault.wait_s:
                time.sleep(fault.wait_s)
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault is not None and fault.cut and answer.body:
                self.wfile.write(answer.body[: len(answer.body) // 2])
                self.close_connection = True
                return
            self.wfile.write(answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def read_body(self) -> bytes:
            if "chunked" not in (self.headers.get("Transfer-Encoding") or "").lower():
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = bytearray()
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return bytes(body)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        # A client that closes its connection is no error of the proxy.
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as listener:
        proxy = FaultProxy(f"http://127.0.0.1:{listener.server_port}", server)
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            forget_clients()
            listener.shutdown()
            thread.join()
