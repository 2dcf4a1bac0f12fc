"""Translates errors of storage clients into four kinds, once, for every reader and writer.

fsspec's file systems raise what their clients raise: OSErrors with or without an errno, HTTP
errors with a status, errors of botocore, aiohttp, google and azure that are no OSErrors, and
translations that keep the client's error only as their cause. The kinds are what a caller acts on:

- gone: the file does not exist. A retry does not help.
- denied: the store refuses the request, and would refuse it again.
- throttled: the store asks for fewer requests.
- transient: the store, or the way to it, fails for the moment.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

FailureKind = Literal["gone", "denied", "throttled", "transient"]

# Packages whose errors come from a storage client although they are no OSErrors.
CLIENT_PACKAGES = frozenset(
    {
        "aiobotocore",
        "aiohttp",
        "azure",
        "botocore",
        "gcsfs",
        "google",
        "http",
        "httpx",
        "requests",
        "s3fs",
        "urllib3",
    }
)
# The same request to the same file system fails again.
PERMANENT_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EBADF,
        errno.EFBIG,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENODEV,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.ENOTSUP,
        errno.ENXIO,
        errno.EPERM,
        errno.EROFS,
        errno.EXDEV,
    }
)
# s3fs gives EBUSY for SlowDown; the others are the process's own limits, which pass.
THROTTLED_ERRNOS = frozenset({errno.EAGAIN, errno.EBUSY})
GONE_STATUSES = frozenset({404, 410})
# HTTP client errors (4xx) are permanent except these and the throttled ones.
TRANSIENT_STATUSES = frozenset({408, 425})
TOO_MANY_REQUESTS = 429
RANGE_NOT_SATISFIABLE = 416
# Codes by which stores name a throttled request; some send them with status 400, 403 or 503.
THROTTLED_CODES = re.compile(
    r"SlowDown|Throttl\w+|RequestLimitExceeded|RequestThrottled\w*|TooManyRequests\w*|ServerBusy"
    r"|(user|project)?[rR]ateLimitExceeded|BandwidthLimitExceeded|ProvisionedThroughputExceeded\w*"
)
TRANSIENT_CODES = re.compile(
    r"RequestTimeout\w*|InternalError|ServiceUnavailable|OperationAborted|RequestTimeTooSkewed"
    r"|OperationTimedOut|backendError|ConditionalRequestConflict"
)
GONE_CODES = re.compile(r"NoSuch\w+|NotFound|BlobNotFound|ContainerNotFound")
# Errors by which clients refuse to send a request at all.
DENIED_NAMES = re.compile(
    r"\w*Credentials?Error|\w*CredentialsNotFound\w*|ParamValidationError|Invalid[Uu][Rr][LlIi]\w*"
    r"|NoRegionError|UnauthorizedSSOTokenError|TokenRetrievalError|NonHttpUrl\w*"
)
MAX_CAUSES = 8


class StorageUnavailable(OSError):
    """The store failed for the moment, after all retries; the same request may succeed later."""


class StorageDenied(PermissionError):
    """The store refuses the request, and would refuse the same request again."""


@dataclass(frozen=True, slots=True)
class StorageFailure:
    """What an error of a storage client means."""

    kind: FailureKind
    status: int | None = None
    """HTTP status; None if the client gave none."""
    retry_after_s: float | None = None
    """Time that the store asks to wait for; None if it names none."""

    @property
    def is_passing(self) -> bool:
        """True if a later attempt at the same request may succeed."""
        return self.kind in ("throttled", "transient")

    @property
    def is_past_the_end(self) -> bool:
        """True if the requested byte range begins at or after the end of the file."""
        return self.status == RANGE_NOT_SATISFIABLE


def is_storage_error(error: BaseException) -> bool:
    """True for OSErrors, time-outs and errors of storage clients; False for programming errors."""
    if isinstance(error, OSError | asyncio.TimeoutError | EOFError):
        return True
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(packages & CLIENT_PACKAGES)


def translate_error(error: BaseException) -> StorageFailure:
    """Finds the kind of a storage error from its whole chain of causes."""
    chain = list(_causes(error))
    status = next((found for each in chain if (found := _status(each)) is not None), None)
    codes = [code for each in chain for code in _codes(each)]
    if status is None and _is_past_the_end(chain, codes):
        status = RANGE_NOT_SATISFIABLE
    waits = [wait for each in chain if (wait := _retry_after_s(each)) is not None]
    return StorageFailure(_kind(chain, status, codes), status, waits[0] if waits else None)


def raised_error(path: str, error: BaseException, failure: StorageFailure) -> OSError:
    """Builds the error that callers see for a client's error.

    Returns:
        FileNotFoundError if the file is gone, StorageDenied, or StorageUnavailable.
    """
    if isinstance(error, FileNotFoundError):
        return error
    message = f"{path}: {type(error).__name__}: {error}"
    if failure.kind == "gone":
        return FileNotFoundError(message)
    return StorageDenied(message) if failure.kind == "denied" else StorageUnavailable(message)


def is_passing_error(error: BaseException) -> bool:
    """True for a storage error after which a later attempt may succeed; False for a bug."""
    if isinstance(error, StorageUnavailable):
        return True
    if isinstance(error, StorageDenied | FileNotFoundError) or not is_storage_error(error):
        return False
    return translate_error(error).is_passing


def _kind(chain: list[BaseException], status: int | None, codes: list[str]) -> FailureKind:
    if any(THROTTLED_CODES.fullmatch(code) for code in codes):
        return "throttled"
    if any(TRANSIENT_CODES.fullmatch(code) for code in codes):
        return "transient"
    if any(isinstance(error, FileNotFoundError) for error in chain):
        return "gone"
    if any(GONE_CODES.fullmatch(code) for code in codes):
        return "gone"
    if status is not None:
        return _kind_of_status(status, has_retry_after=_asks_to_wait(chain))
    if any(DENIED_NAMES.fullmatch(type(error).__name__) for error in chain):
        return "denied"
    # The innermost errno is the cause: ssl and aiohttp wrap it.
    numbers = [error.errno for error in chain if isinstance(error, OSError) and error.errno]
    if numbers and numbers[-1] in PERMANENT_ERRNOS:
        return "denied"
    if numbers and numbers[-1] in THROTTLED_ERRNOS:
        return "throttled"
    if any(isinstance(e, PermissionError | IsADirectoryError | NotADirectoryError) for e in chain):
        return "denied"
    return "transient"


def _kind_of_status(status: int, *, has_retry_after: bool) -> FailureKind:
    if status in GONE_STATUSES:
        return "gone"
    if status == TOO_MANY_REQUESTS or (status == 503 and has_retry_after):
        return "throttled"
    is_final = 400 <= status < 500 and status not in TRANSIENT_STATUSES
    return "denied" if is_final else "transient"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    current: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if current is None:
            return
        yield current
        # Not the context: an error may be raised while another one, unrelated, is handled.
        current = current.__cause__


def _is_past_the_end(chain: list[BaseException], codes: list[str]) -> bool:
    if any(code in ("InvalidRange", "416") for code in codes):
        return True
    # Some clients translate the store's answer to EINVAL and keep only its text.
    return any(
        isinstance(error, OSError)
        and error.errno == errno.EINVAL
        and "range is not satisfiable" in str(error).lower()
        for error in chain
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status; clients store it as `status`, `status_code` or `code`, or in a response."""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        # Not a bool; google's is an enumeration of int.
        if isinstance(value, int) and 100 <= value < 600:
            return int(value)
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # requests, azure
        value = getattr(response, "status_code", None)
    return int(value) if isinstance(value, int) else None


def _codes(error: BaseException) -> Iterator[str]:
    """The names by which a store calls an error, such as SlowDown."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        yield str(response.get("Error", {}).get("Code", ""))
    # Where there is a status, `code` only repeats it; aiohttp warns about its use.
    names = ("error_code", "reason", *(() if hasattr(error, "status") else ("code",)))
    for name in names:
        value = getattr(error, name, None)
        if isinstance(value, str):
            yield value


def _headers(error: BaseException) -> Mapping[str, Any]:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    else:
        found = getattr(error, "headers", None) or getattr(response, "headers", None)
    try:
        return {str(name).lower(): value for name, value in dict(found or {}).items()}
    except (TypeError, ValueError):
        return {}


def _asks_to_wait(chain: list[BaseException]) -> bool:
    return any("retry-after" in _headers(error) for error in chain)


def _retry_after_s(error: BaseException) -> float | None:
    """Reads `Retry-After`: seconds, or a date."""
    value = str(_headers(error).get("retry-after", "")).strip()
    if not value:
        return None
    if value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
