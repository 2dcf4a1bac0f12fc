"""Stands before the app: bounds of a request, headers of an answer, and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tvr.trainer.service.problems import CutWhileSent, Refusal, busy, log
from tvr.trainer.service.records import Limits

# Nothing from elsewhere, no script, no frame; links and videos of the service itself.
POLICY = (
    "default-src 'none'; img-src 'self' data:; media-src 'self'; style-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ServiceMetrics:
    """Metrics of one service, in a registry of its own."""

    def __init__(self, videos: Callable[[], int], searches: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tvr_service_requests",
            "Requests that were answered, by route and status; 499: the client hung up.",
            ("route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "tvr_service_request_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("route",),
            buckets=BUCKETS,
            registry=self.registry,
        )
        in_flight = Gauge(
            "tvr_service_searches_in_flight",
            "Searches and explanations that run or wait for a thread.",
            registry=self.registry,
        )
        in_flight.set_function(searches)
        size = Gauge("tvr_service_index_videos", "Videos of the index.", registry=self.registry)
        size.set_function(videos)


class Guard:
    """ASGI middleware; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: ServiceMetrics,
        hosts: frozenset[str] | None,
    ) -> None:
        self._app, self._limits, self._metrics, self._hosts = app, limits, metrics, hosts
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._requests += 1
        try:
            refusal = await self._refusal(scope, receive)
            app = self._app if refusal is None else refusal.response()
            await app(scope, receive, send_guarded)
        except CutWhileSent as error:
            log.warning("%s", error)  # the server closes the connection
        finally:
            self._requests -= 1
            # The pattern of the route: a path that a client invents must not become a label.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _refusal(self, scope: Scope, receive: Receive) -> Refusal | None:
        limits, headers = self._limits, Headers(scope=scope)
        if self._requests > limits.requests:
            return busy("too many requests", f"{limits.requests} at a time")
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size > limits.url_bytes:
            return Refusal(
                414,
                "the URL is too long",
                value=f"{size} bytes",
                allowed=f"{limits.url_bytes} bytes",
            )
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            # A foreign page could otherwise read results through a name that it points here.
            return Refusal(
                421,
                "the service does not answer under this name",
                value=headers.get("host"),
                allowed=f"{', '.join(sorted(self._hosts))}; or see --allow-host",
            )
        length = headers.get("content-length", "0")
        if length != "0" or "transfer-encoding" in headers:
            if "expect" not in headers:
                await self._discard(receive)
            return Refusal(
                413, "no request of this service has a body", value=f"{length} bytes", allowed="0"
            )
        return None

    async def _discard(self, receive: Receive) -> None:
        """Reads a body, so that a client that first sends all of it also gets the answer."""
        left = self._limits.discarded_bytes
        try:
            async with asyncio.timeout(self._limits.discard_s):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            return


def _host(header: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
