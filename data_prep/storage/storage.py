"""Reads through fsspec with retries and exponential back-off; writes atomically.

Only this sub-package knows about storage back-ends and their errors.
"""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
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

# Waits of 0.5, 1, 2 and 4 seconds, without jitter, so that a failing read takes the same time on
# every rank.
ATTEMPTS = 5
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 8.0

# fsspec's file systems pass on errors of these packages that are not OSErrors.
CLIENT_PACKAGES = frozenset({"aiohttp", "botocore", "gcsfs"})
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# HTTP client errors (4xx) are permanent except these two: request timeout, too many requests.
TRANSIENT_STATUSES = frozenset({408, 429})
RANGE_NOT_SATISFIABLE = 416

PARTIAL_SUFFIX = ".partial"

log = logging.getLogger(__name__)


class Storage:
    """Reads files below one URL: a local folder or any fsspec file system.

    An instance works in forked processes too.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._pid = os.getpid()
        self._fs: Any
        self._fs, self._root = url_to_fs(url)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.num_retries = 0

    def path(self, name: str) -> str:
        """Returns the path of a file, as the file system and error messages name it."""
        return f"{self._root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """Reads a whole file. Raises as `read_range`."""
        return self._read(self.path(name), None, None, ATTEMPTS)

    def read_root(self) -> bytes:
        """Reads the file at the URL itself. Raises as `read_range`."""
        return self._read(self._root, None, None, ATTEMPTS)

    def read_range(self, name: str, start: int, end: int, attempts: int | None = None) -> bytes:
        """Reads the bytes [start, end) of a file; fewer where the file ends before `end`.

        Args:
            attempts: Attempts at a transient error; None means ATTEMPTS.

        Raises:
            FileNotFoundError: the file does not exist. This error is not retried.
            OSError: any other failure of the storage, including client errors that are not
                OSErrors. Transient errors are retried first.
        """
        path = self.path(name)
        content = self._read(path, start, end, ATTEMPTS if attempts is None else attempts)
        if len(content) > end - start:
            raise OSError(
                f"{path}: asked for {end - start} bytes, got {len(content)}: this store"
                " ignores byte ranges"
            )
        return content

    def _read(self, path: str, start: int | None, end: int | None, attempts: int) -> bytes:
        retrying = Retrying(
            stop=stop_after_attempt(1 if self.is_local else attempts),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            retry=retry_if_exception(_is_transient),
            before_sleep=lambda state: self._log_retry(path, state),
            reraise=True,
        )
        try:
            # open() would first request the size over HTTP, and report any failure of that request
            # as a missing file.
            return retrying(self._file_system().cat_file, path, start=start, end=end)
        except FileNotFoundError:
            raise
        except Exception as error:
            if not _is_storage_error(error):
                raise
            if _http_status(error) == RANGE_NOT_SATISFIABLE:
                return b""
            raise OSError(f"{path}: {type(error).__name__}: {error}") from error

    def _file_system(self) -> Any:
        if self._pid != os.getpid():
            # Connections and event loops do not survive a fork; fsspec creates a new instance.
            self._fs, self._pid = url_to_fs(self._url)[0], os.getpid()
        return self._fs

    def _log_retry(self, path: str, state: RetryCallState) -> None:
        """Logs the retries 1, 2, 4, 8, ... of this process, so that the log stays short."""
        error = state.outcome.exception() if state.outcome else None
        if error is not None:
            # The traceback and tenacity's state form a reference cycle that holds every frame of
            # the stack; without this, abandoned readers stay until the garbage collector runs.
            error.__traceback__ = None
        self.num_retries += 1
        if self.num_retries & (self.num_retries - 1) == 0:
            log.warning(
                "%s: attempt %d failed, trying again (retry %d of this process): %s: %s",
                path,
                state.attempt_number,
                self.num_retries,
                type(error).__name__,
                error,
            )


def partial_name(path: str) -> str:
    """Returns a temporary name for a file, different for each writer."""
    return f"{path}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"


def write_file(fs: Any, path: str, content: bytes) -> None:
    """Writes a file of an fsspec file system atomically.

    The content goes to a temporary file in the same folder, which is then renamed to `path`.
    """
    partial = partial_name(path)
    try:
        fs.pipe_file(partial, content)
        fs.mv(partial, path)
    except BaseException:
        with suppress(OSError):
            fs.rm_file(partial)
        raise


def _is_storage_error(error: BaseException) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & CLIENT_PACKAGES)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, PERMANENT_ERRORS) or not _is_storage_error(error):
        return False
    status = _http_status(error)
    return status is None or not 400 <= status < 500 or status in TRANSIENT_STATUSES


def _http_status(error: BaseException) -> int | None:
    """Returns the HTTP status; clients store it as `status` or `code`."""
    for name in ("status", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int):
            return status
    return None
