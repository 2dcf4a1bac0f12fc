"""Reads files from any store, one that fails for a moment again and with back-off; writes them
whole or not at all."""

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

PARTIAL = ".partial"

log = logging.getLogger(__name__)


class Storage:
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
        return self._read(self.path(name), None, None, ATTEMPTS)

    def read_root(self) -> bytes:
        """The file at the URL itself. Raises as `read_range`."""
        return self._read(self._root, None, None, ATTEMPTS)

    def read_range(self, name: str, start: int, end: int, attempts: int | None = None) -> bytes:
        """Bytes start to end of a file, or what there is of them.

        Raises:
            FileNotFoundError: there is no such file; asked once.
            OSError: all else that the store answers, after `attempts` (none: ATTEMPTS) if it might
                have passed. The clients' own errors come as OSErrors, too.
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
            retry=retry_if_exception(_may_pass),
            before_sleep=lambda state: self._log(path, state),
            reraise=True,
        )
        try:
            # Not through open(): over HTTP that asks for the size first, and calls every failure
            # thereof a missing file.
            return retrying(self._file_system().cat_file, path, start=start, end=end)
        except FileNotFoundError:
            raise
        except Exception as error:
            if not _is_of_store(error):
                raise
            if _status(error) == PAST_THE_END:
                return b""
            raise OSError(f"{path}: {type(error).__name__}: {error}") from error

    def _file_system(self) -> Any:
        if self._pid != os.getpid():
            # Connections and event loops do not survive a fork; fsspec makes a new instance here.
            self._fs, self._pid = url_to_fs(self._url)[0], os.getpid()
        return self._fs

    def _log(self, path: str, state: RetryCallState) -> None:
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
                path,
                state.attempt_number,
                self.num_retries,
                type(error).__name__,
                error,
            )


def partial_name(path: str) -> str:
    """A temporary name for a file; no two writers have the same."""
    return f"{path}.{uuid.uuid4().hex}{PARTIAL}"


def write_file(fs: Any, path: str, content: bytes) -> None:
    """Writes a file of an fsspec file system beside its place, then renames it."""
    partial = partial_name(path)
    try:
        fs.pipe_file(partial, content)
        fs.mv(partial, path)
    except BaseException:
        with suppress(OSError):
            fs.rm_file(partial)
        raise


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
