"""Work of requests on a bounded number of threads, with a bounded queue and a time limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from tvr.trainer.service.problems import CLIENT_CLOSED, Refusal, busy, refusal_of

T = TypeVar("T")


class WorkPool:
    """Runs functions on threads for the coroutines of one event loop.

    A thread cannot be stopped. Work that takes too long keeps its thread, and its place in the
    count, until it ends; its request is answered before.
    """

    def __init__(self, what: str, *, threads: int, queue: int, timeout_s: float) -> None:
        self.what = what
        self._most, self._threads, self._timeout_s = threads + queue, threads, timeout_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"tvr-{what}")
        self._lock = threading.Lock()
        self._admitted = 0

    @property
    def admitted(self) -> int:
        """Pieces of work that run or wait."""
        return self._admitted

    async def run(self, request: Request, work: Callable[[], T]) -> T:
        """Waits for the work's result.

        Raises:
            Refusal: the queue is full (503), the time is over before the work began (503) or before
                it ended (504), the client closed its connection, or the work failed.
        """
        with self._lock:
            if self._admitted >= self._most:
                raise busy(
                    f"too many {self.what} requests wait",
                    f"{self._threads} at a time, {self._most - self._threads} waiting",
                )
            self._admitted += 1
        future = self._executor.submit(work)
        future.add_done_callback(self._leave)
        result = asyncio.wrap_future(future)
        result.add_done_callback(_seen)
        hang_up = asyncio.ensure_future(_hung_up(request))
        try:
            done, _ = await asyncio.wait(
                {result, hang_up}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            hang_up.cancel()
            has_begun = not future.cancel()
        if result in done:
            try:
                return result.result()
            except Exception as error:
                raise refusal_of(error) from error
        if hang_up in done:
            raise Refusal(CLIENT_CLOSED, "the client closed the connection")
        limit = f"{self._timeout_s:g} s"
        if has_begun:
            raise Refusal(504, f"the {self.what} request takes too long", allowed=limit)
        raise busy(f"no thread became free for the {self.what} request", limit)

    def close(self) -> None:
        """Drops what waits."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _leave(self, future: Future[T]) -> None:
        with self._lock:
            self._admitted -= 1


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _seen(result: asyncio.Future[T]) -> None:
    # Nobody awaits the result of abandoned work; asyncio would print its exception.
    if not result.cancelled():
        result.exception()
