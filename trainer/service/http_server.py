"""The HTTP server: uvicorn with an answer to what is no HTTP or too large, and with a time limit
for the head of a request."""

from __future__ import annotations

import asyncio
import json
import socket
from ipaddress import ip_address

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 1 << 16
"""Of request line and headers."""
HEAD_S = 10.0
"""From the connection, or the first byte of a later request, to the end of its headers."""
DISCARDED_BYTES = 1 << 25
"""What is read of a refused request, so that its sender gets the answer and not a reset."""
CLOSE_S = 5.0


class BoundedHttp(H11Protocol):
    """A connection of a client."""

    _deadline: asyncio.TimerHandle | None = None
    _left_to_discard: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._left_to_discard is not None:
            self._left_to_discard -= len(data)
            if self._left_to_discard < 0:
                self.transport.abort()
            return
        super().data_received(data)
        waits_for_head = self.conn.their_state is h11.IDLE
        if not waits_for_head:
            self._cancel_deadline()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(HEAD_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answers a request that h11 cannot read: its head is too long, or it is no HTTP."""
        self._cancel_deadline()
        problem = {
            "error": msg,
            "value": None,
            "allowed": f"HTTP/1.1 with at most {HEAD_BYTES} bytes of URL and headers",
        }
        body = json.dumps(problem).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._left_to_discard = DISCARDED_BYTES
        self.loop.call_later(CLOSE_S, self.transport.abort)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: the address is unknown or in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = found[0]
        return socket.create_server(place[:2], family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"cannot listen on --host {host} --port {port}: {error}") from error


def is_loopback(server: socket.socket) -> bool:
    """True if only this machine reaches the socket."""
    return ip_address(server.getsockname()[0].partition("%")[0]).is_loopback


def address(server: socket.socket) -> str:
    """URL of a listening socket."""
    host, port = server.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """Settings of the HTTP server; requests in progress get five seconds when it stops."""
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )


def run_server(app: FastAPI, server: socket.socket) -> None:
    """Answers requests until SIGINT or SIGTERM."""
    uvicorn.Server(uvicorn_config(app)).run(sockets=[server])
