"""Errors of requests: each becomes a status and a JSON object {error, value, allowed}."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tvr.data_prep.html_page import shown_text
from tvr.data_prep.records import BadSample, ShardCorrupt
from tvr.data_prep.storage.storage_errors import StorageUnavailable
from tvr.trainer.service.records import ErrorAnswer

SHOWN_CHARS = 200
RETRY_AFTER_S = 1
CLIENT_CLOSED = 499
log = logging.getLogger("tvr.service")


class Refusal(Exception):
    """A request that gets an error as its answer."""

    def __init__(
        self,
        status: int,
        error: str,
        *,
        value: object = None,
        allowed: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status, self.headers = status, headers
        self.problem = ErrorAnswer(
            error=shown_text(error),
            value=cut(value) if value is not None else None,
            allowed=allowed,
        )

    def response(self) -> JSONResponse:
        return JSONResponse(asdict(self.problem), self.status, self.headers)


class CutWhileSent(Exception):
    """A video became shorter after its length had been sent."""


def busy(what: str, allowed: str) -> Refusal:
    """503 with the time after which a client may ask again."""
    return Refusal(503, what, allowed=allowed, headers={"Retry-After": str(RETRY_AFTER_S)})


def cut(value: object) -> str:
    """A value as text without hidden characters, at most 200 characters of it."""
    text = shown_text(str(value))
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}... ({len(text)} characters)"


def refusal_of(error: Exception) -> Refusal:
    """The answer to an error of the index; an error without a known cause goes to the log."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, KeyError | IndexError):
        named = error.args[0] if error.args else ""
        return Refusal(404, "the index has no such video", value=named, allowed="its keys and rows")
    if isinstance(error, StorageUnavailable):
        return busy(f"the storage of the videos does not answer: {cut(error)}", "ask again")
    if isinstance(error, BadSample | FileNotFoundError | NotADirectoryError | PermissionError):
        return Refusal(410, "the video can no longer be read", value=error, allowed="other videos")
    if isinstance(error, ShardCorrupt):
        return Refusal(
            500,
            "a file of the index is damaged: restore it or build the index again, then restart",
            value=error,
        )
    if isinstance(error, ValueError):
        return Refusal(422, "this cannot be searched", value=error)
    log.error("a request failed", exc_info=error)
    return Refusal(500, f"internal error: {type(error).__name__}; the service's log says more")


def add_handlers(app: FastAPI) -> None:
    """Gives every error of the app the same form."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found: dict[str, Any] = error.errors()[0]
        name = ".".join(str(part) for part in found["loc"][1:])
        refusal = Refusal(
            422, f"{name}: {found['msg']}", value=found.get("input"), allowed="see /docs"
        )
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        value = request.method if error.status_code == 405 else request.url.path
        headers = dict(error.headers) if error.headers else None
        refusal = Refusal(
            error.status_code, str(error.detail), value=value, allowed="see /docs", headers=headers
        )
        return refusal.response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after the answer, so that the server logs it.
        return Refusal(500, f"internal error: {type(error).__name__}").response()
