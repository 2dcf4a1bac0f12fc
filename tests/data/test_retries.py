"""Errors of storage clients by kind, and waits between retries, with fake clients and clocks."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tvr.data_prep.storage.retries import (
    ATTEMPTS,
    FIRST_WAIT_S,
    LATER_ATTEMPTS,
    LONGEST_WAIT_S,
    TOTAL_S,
    Retries,
)
from tvr.data_prep.storage.storage_errors import (
    StorageDenied,
    StorageUnavailable,
    is_passing_error,
    translate_error,
)


class ClientError(Exception):
    """Like botocore's: no OSError, and the store's answer in `response`."""

    def __init__(self, code: str, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"An error occurred ({code})")
        answer = {"HTTPStatusCode": status, "HTTPHeaders": headers or {}}
        self.response = {"Error": {"Code": code}, "ResponseMetadata": answer}


class ResponseError(Exception):
    """Like aiohttp's: `status` and `headers`."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"status {status}")
        self.status, self.headers = status, headers or {}


class HttpError(Exception):
    """Like gcsfs's: the status in `code`, as a number."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class NoCredentialsError(Exception):
    """Like botocore's, which sends no request."""


ClientError.__module__ = NoCredentialsError.__module__ = "botocore.exceptions"
ResponseError.__module__ = "aiohttp.client_exceptions"
HttpError.__module__ = "gcsfs.retry"


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@dataclass
class FakeTime:
    """A clock that only waits advance."""

    now_s: float = 0.0
    waits: list[float] = field(default_factory=list)

    def sleep(self, wait_s: float) -> None:
        self.waits.append(wait_s)
        self.now_s += wait_s

    def retries(self, seed: int = 0) -> Retries:
        return Retries(sleep=self.sleep, now=lambda: self.now_s, random=random.Random(seed))


def failing(error: BaseException, times: float = float("inf")) -> Callable[[], str]:
    calls = 0

    def call() -> str:
        nonlocal calls
        calls += 1
        if calls <= times:
            raise error
        return "content"

    return call


KINDS: list[tuple[str, str, BaseException]] = [
    ("no such key", "gone", ClientError("NoSuchKey", 404)),
    ("a file not found", "gone", FileNotFoundError(errno.ENOENT, "no")),
    ("status 404", "gone", ResponseError(404)),
    ("access denied", "denied", ClientError("AccessDenied", 403)),
    ("no credentials", "denied", NoCredentialsError("unable to locate credentials")),
    ("translated 403", "denied", caused_by(PermissionError("no"), ClientError("403", 403))),
    ("bad request", "denied", ResponseError(400)),
    ("a folder", "denied", IsADirectoryError(errno.EISDIR, "a folder")),
    ("EINVAL", "denied", OSError(errno.EINVAL, "invalid argument")),
    ("status 429", "throttled", ResponseError(429)),
    ("gcsfs 429", "throttled", HttpError(429)),
    ("slow down", "throttled", caused_by(OSError(errno.EBUSY, "x"), ClientError("SlowDown", 503))),
    ("throttled with 400", "throttled", ClientError("ThrottlingException", 400)),
    ("503 with a wait", "throttled", ResponseError(503, {"Retry-After": "3"})),
    ("status 503", "transient", ResponseError(503)),
    ("gcsfs 500", "transient", HttpError(500)),
    ("status 408", "transient", ResponseError(408)),
    ("a time-out", "transient", TimeoutError()),
    ("a reset connection", "transient", ConnectionResetError(errno.ECONNRESET, "reset")),
    ("a stale handle", "transient", OSError(errno.ESTALE, "stale")),
    ("a medium's error", "transient", OSError(errno.EIO, "input/output error")),
    ("internal error", "transient", ClientError("InternalError", 200)),
]


@pytest.mark.parametrize(("kind", "error"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_every_client_error_has_one_kind(kind: str, error: BaseException) -> None:
    assert translate_error(error).kind == kind
    time = FakeTime()
    wanted: dict[str, Any] = {"gone": FileNotFoundError, "denied": StorageDenied}
    with pytest.raises(wanted.get(kind, StorageUnavailable)):
        time.retries().call(failing(error), "bucket/key")
    is_passing = kind in ("throttled", "transient")
    assert bool(time.waits) == is_passing == is_passing_error(error)


@pytest.mark.parametrize(
    "error",
    [
        ResponseError(416),
        caused_by(OSError(errno.EINVAL, "invalid"), ClientError("InvalidRange", 416)),
        OSError(errno.EINVAL, "The requested range is not satisfiable"),
    ],
)
def test_a_range_past_the_end_is_recognised(error: BaseException) -> None:
    failure = translate_error(error)
    assert failure.is_past_the_end
    assert not failure.is_passing


def test_bugs_are_not_storage_errors() -> None:
    time = FakeTime()
    with pytest.raises(KeyError):
        time.retries().call(failing(KeyError("x")), "bucket/key")
    assert not time.waits
    assert not is_passing_error(KeyError("x"))


def test_an_unrelated_handled_error_is_no_cause() -> None:
    error = ResponseError(503)
    error.__context__ = FileNotFoundError("of another file")
    assert translate_error(error).kind == "transient"


def test_waits_are_drawn_up_to_doubling_bounds() -> None:
    bounds = [min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**n) for n in range(ATTEMPTS - 1)]
    drawn = []
    for seed in range(200):
        time = FakeTime()
        with pytest.raises(StorageUnavailable, match="bucket/key: ResponseError: status 503"):
            time.retries(seed).call(failing(ResponseError(503)), "bucket/key")
        assert len(time.waits) == ATTEMPTS - 1
        assert all(0 <= wait <= bound for wait, bound in zip(time.waits, bounds, strict=True))
        drawn.append(time.waits)
    # Full jitter: the ranks of a job spread over the whole of each bound.
    for number, bound in enumerate(bounds):
        waits = sorted(waits[number] for waits in drawn)
        assert waits[0] < 0.1 * bound
        assert waits[-1] > 0.9 * bound
        assert len(set(waits)) == len(waits)
    assert sum(bounds) > 60  # longer than the restart of a server


def test_later_calls_are_short_while_the_store_is_down() -> None:
    time = FakeTime()
    retries, error = time.retries(), ResponseError(503)
    numbers = []
    for call in (failing(error), failing(error), failing(error, times=2), failing(error)):
        before = len(time.waits)
        try:
            retries.call(call, "x")
        except StorageUnavailable:
            pass
        numbers.append(len(time.waits) - before)
    assert numbers == [ATTEMPTS - 1, LATER_ATTEMPTS - 1, 2, ATTEMPTS - 1]


def test_two_processes_draw_different_waits_by_default() -> None:
    # Loader workers of all ranks have equally seeded generators.
    waits = []
    for _ in range(2):
        random.seed(0)
        time = FakeTime()
        retries = Retries(sleep=time.sleep, now=lambda time=time: time.now_s)
        state = random.getstate()
        assert retries.call(failing(ResponseError(503), times=3), "x") == "content"
        assert random.getstate() == state
        waits.append(time.waits)
    assert waits[0] != waits[1]


@pytest.mark.parametrize(
    "error",
    [
        ResponseError(429, {"Retry-After": "20"}),
        ClientError("SlowDown", 503, {"retry-after": "20"}),
        caused_by(OSError(errno.EBUSY, "x"), ClientError("SlowDown", 503, {"retry-after": "20"})),
    ],
)
def test_the_store_may_ask_for_a_longer_wait(error: BaseException) -> None:
    time = FakeTime()
    assert time.retries().call(failing(error, times=2), "x") == "content"
    assert [20 <= wait <= 20 + FIRST_WAIT_S * 2 for wait in time.waits] == [True, True]
    assert time.waits[0] != time.waits[1]  # clients stay apart after the wait


def test_a_date_to_retry_after_is_read() -> None:
    later = translate_error(ResponseError(503, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}))
    assert later.retry_after_s is not None
    assert later.retry_after_s > 0
    past = translate_error(ResponseError(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}))
    assert past.retry_after_s == 0
    assert translate_error(ResponseError(503, {"Retry-After": "soon"})).retry_after_s is None


def test_the_time_of_all_attempts_is_bounded() -> None:
    time = FakeTime()
    error = ResponseError(429, {"Retry-After": str(int(TOTAL_S) + 1)})
    with pytest.raises(StorageUnavailable):
        time.retries().call(failing(error), "x")
    assert time.waits == []  # the store's wait would end too late

    def slow() -> str:
        time.now_s += TOTAL_S / 3
        raise ResponseError(503)

    with pytest.raises(StorageUnavailable):
        time.retries().call(slow, "x")
    assert len(time.waits) == 2
