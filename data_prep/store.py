"""Reads the files of a data set; a remote store that fails for a moment is asked again, with
back-off."""

from __future__ import annotations

import logging
import os
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
)

# Waits of 0.5, 1, 2 and 4 seconds, without jitter: a read that fails costs the same on every rank.
ATTEMPTS = 5
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 8.0

# Packages whose errors fsspec's file systems let through although they are no OSErrors.
CLIENTS = frozenset({"aiohttp", "botocore", "gcsfs"})
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# Client errors by their number, but these two mean "later": request timeout, too many requests.
PASSING = frozenset({408, 429})
PAST_THE_END = 416

log = logging.getLogger(__name__)


class Store:
    """The files under one URL, a folder or any fsspec file system; serves on after a fork."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pid = os.getpid()
        self._fs: Any
        self._fs, self._root = url_to_fs(url)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.num_retries = 0

    def path(self, name: str) -> str:
        """Where a file lies, for the file system and for messages."""
        return f"{self._root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """A whole file. Raises as `read_range`."""
        return self._read(name, None, None, ATTEMPTS)

    def read_range(self, name: str, start: int, end: int, attempts: int | None = None) -> bytes:
        """Bytes start to end of a file, or what there is of them.

        Raises:
            FileNotFoundError: there is no such file; asked once.
            OSError: all else that the store answers, after `attempts` (none: ATTEMPTS) if it might
                have passed. The clients' own errors come as OSErrors, too.
        """
        content = self._read(name, start, end, ATTEMPTS if attempts is None else attempts)
        if len(content) > end - start:
            raise OSError(
                f"{self.path(name)}: asked for {end - start} bytes, got {len(content)}: this store"
                " ignores byte ranges"
            )
        return content

    def _read(self, name: str, start: int | None, end: int | None, attempts: int) -> bytes:
        retrying = Retrying(
            stop=stop_after_attempt(1 if self.is_local else attempts),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=retry_if_exception(_may_pass),
            before_sleep=lambda state: self._log(name, state),
            reraise=True,
        )
        try:
            # Not through open(): over HTTP that asks for the size first, and calls every failure
            # thereof a missing file.
            return retrying(self._file_system().cat_file, self.path(name), start=start, end=end)
        except FileNotFoundError:
            raise
        except Exception as error:
            if not _is_of_store(error):
                raise
            if _status(error) == PAST_THE_END:
                return b""
            raise OSError(f"{self.path(name)}: {type(error).__name__}: {error}") from error

    def _file_system(self) -> Any:
        if self._pid != os.getpid():
            # Connections and event loops do not survive a fork; fsspec makes a new instance here.
            self._fs, self._pid = url_to_fs(self._url)[0], os.getpid()
        return self._fs

    def _log(self, name: str, state: RetryCallState) -> None:
        """The retries 1, 2, 4, 8, ... of this process: a store that fails often fills no log."""
        error = state.outcome.exception() if state.outcome else None
        if error is not None:
            # The traceback and tenacity's state hold each other, and with them every frame above:
            # abandoned streams would live on until the garbage collector finds them.
            error.__traceback__ = None
        self.num_retries += 1
        if self.num_retries & (self.num_retries - 1) == 0:
            log.warning(
                "%s: attempt %d failed, trying again (retry %d of this process): %s: %s",
                self.path(name),
                state.attempt_number,
                self.num_retries,
                type(error).__name__,
                error,
            )


def _is_of_store(error: BaseException) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & CLIENTS)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, PERMANENT) or not _is_of_store(error):
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in PASSING


def _status(error: BaseException) -> int | None:
    """The HTTP status, under the name that the client gives it."""
    for name in ("status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status
    return None
