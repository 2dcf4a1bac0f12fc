"""Retries of a store's requests: exponential waits with full jitter, bounded in number and time.

A store that throttles or restarts fails for all ranks at once. Waits that are equal on all ranks
would repeat the same burst, so each wait is drawn uniformly from zero to its bound.

Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter ("full jitter").
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tvr.data_prep.storage.storage_errors import (
    StorageFailure,
    is_storage_error,
    raised_error,
    translate_error,
)

ATTEMPTS = 14
# A network file system waits in the kernel before it gives an error, so a few seconds suffice.
LOCAL_ATTEMPTS = 6
# After a call that failed to the end: the reads of a batch must not wait for minutes each.
LATER_ATTEMPTS = 6
# The bounds of the waits are 0.5, 1, 2, 4, 8, 16, 30, 30, ... seconds. 14 attempts wait for
# two minutes on average and for four at most, which covers the restart of a server.
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
# No new attempt begins later than this after the first one.
TOTAL_S = 240.0

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Retries:
    """Calls a function again after errors that pass.

    The random numbers come from the operating system: seeded ones would be equal in the loader
    workers of all ranks, and drawing from the global generator would change a run.
    """

    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    """Clock in seconds."""
    random: random.Random = field(default_factory=random.SystemRandom)
    count: int = 0
    """Retries so far."""
    is_down: bool = False
    """True from a call that failed to the end until one that succeeds."""

    def call(
        self, function: Callable[[], Result], path: str, attempts: int | None = None
    ) -> Result:
        """Calls `function` until it succeeds, up to `attempts` times.

        Args:
            function: Sends one request.
            path: The file, for messages.
            attempts: None = ATTEMPTS, or LATER_ATTEMPTS while the store is down.

        Raises:
            FileNotFoundError: the file is gone.
            StorageDenied: the store refuses the request.
            StorageUnavailable: the last attempt failed for the moment, too.
        """
        usual = min(ATTEMPTS, LATER_ATTEMPTS) if self.is_down else ATTEMPTS
        allowed = usual if attempts is None else attempts
        began_s, attempt = self.now(), 1
        while True:
            try:
                result = function()
            except Exception as error:
                if not is_storage_error(error):
                    raise
                failure = translate_error(error)
                wait_s = self._wait_s(attempt, failure)
                is_late = self.now() + wait_s - began_s > TOTAL_S
                if not failure.is_passing or attempt >= allowed or is_late:
                    self.is_down |= failure.is_passing and attempts is None
                    translated = raised_error(path, error, failure)
                    if translated is error:
                        raise
                    raise translated from error
                # fsspec's own frame refers to the error, which refers to every frame of the stack:
                # without this, abandoned readers stay until the garbage collector runs.
                error.__traceback__ = None
                self._log(path, attempt, error)
            else:
                self.is_down = False
                return result
            # Outside of the handler, which would keep the error during the wait.
            self.sleep(wait_s)
            attempt += 1

    def _wait_s(self, attempt: int, failure: StorageFailure) -> float:
        bound = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
        # The store's own wait is a lower bound; the jitter keeps its clients apart after it.
        return (failure.retry_after_s or 0.0) + self.random.uniform(0.0, bound)

    def _log(self, path: str, attempt: int, error: BaseException) -> None:
        """Logs the retries 1, 2, 4, 8, ... of this process, so that the log stays short."""
        self.count += 1
        if self.count & (self.count - 1) == 0:
            log.warning(
                "%s: attempt %d failed, trying again (retry %d of this process): %s: %s",
                path,
                attempt,
                self.count,
                type(error).__name__,
                error,
            )
