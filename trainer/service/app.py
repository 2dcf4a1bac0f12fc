"""The search service: an index over HTTP, with one page for people. The door of the package."""

# Annotations are evaluated here: FastAPI reads them, and in `create_app` they need the limits.
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlencode

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tvr.data_prep.html_page import page_template
from tvr.trainer.explanation.explanation import Explanation, explain, explanation_page
from tvr.trainer.service.files import (
    IndexFiles,
    Layouts,
    Thumbnails,
    open_video,
    ranged_response,
)
from tvr.trainer.service.guard import Guard, ServiceMetrics
from tvr.trainer.service.problems import Refusal, add_handlers
from tvr.trainer.service.records import (
    MAX_QUERY_CHARS,
    MAX_RESULTS,
    MAX_ROW,
    MAX_URL_CHARS,
    ErrorAnswer,
    FoundHit,
    FoundVideo,
    FoundVideos,
    Health,
    Limits,
    SearchIndex,
)
from tvr.trainer.service.work_pool import WorkPool

T = TypeVar("T")
# A visible character: no white space, no control, no mark that only steers the display.
VISIBLE = r"[^\s\x00-\x1f\x7f-\xa0\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
Text = Annotated[str, Query(max_length=MAX_QUERY_CHARS, pattern=VISIBLE)]
AnyText = Annotated[str, Query(max_length=MAX_QUERY_CHARS)]
Count = Annotated[int, Query(ge=1, le=MAX_RESULTS, description="Number of results.")]
Row = Annotated[int, PathParameter(ge=0, le=MAX_ROW, description="Row in the index.")]
RowQuery = Annotated[int, Query(ge=0, le=MAX_ROW, description="Row in the index.")]
Key = Annotated[str, Query(min_length=1, max_length=MAX_QUERY_CHARS)]
Data = Annotated[
    str,
    Query(
        max_length=MAX_URL_CHARS,
        description="URL of the video's data set, needed if several have the key.",
    ),
]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
DEFAULT_RESULTS = 12
COUNTS = (6, 12, 24, 48, 96)
# An explanation is a document of its own, whose pictures and style lie inside.
EXPLANATION_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
MEANINGS = {
    404: "The index has no such video.",
    410: "The video can no longer be read.",
    413: "The request has a body.",
    414: "The URL is too long.",
    416: "The range lies outside of the video.",
    422: "A parameter is not allowed.",
    500: "A file of the index is damaged.",
    503: "Too many requests wait; ask again after Retry-After seconds.",
    504: "The request takes too long.",
}


def create_app(
    index: SearchIndex,
    folders: Iterable[Path],
    *,
    limits: Limits | None = None,
    hosts: frozenset[str] | None = LOOPBACK_NAMES,
) -> FastAPI:
    """Builds the service of an open index.

    Args:
        index: The index, whose methods are called from several threads.
        folders: Folders with the index's files, whose sizes `/healthz` compares.
        limits: Bounds of requests.
        hosts: Names under which the service answers (the Host header); None for any.
    """
    limits = limits or Limits()
    searches = WorkPool(
        "search",
        threads=limits.search_threads,
        queue=limits.search_queue,
        timeout_s=limits.search_s,
    )
    files = WorkPool(
        "video", threads=limits.file_threads, queue=limits.file_queue, timeout_s=limits.file_s
    )
    watched, thumbnails = IndexFiles(folders), Thumbnails(index, limits.thumbnails)
    layouts = Layouts(index)
    metrics = ServiceMetrics(lambda: len(index), lambda: searches.admitted)
    page = page_template(Path(__file__).parent, "search.html.jinja")
    api_page = page_template(Path(__file__).parent, "api.html.jinja")
    style = page_template(Path(__file__).parent, "service.css.jinja").render()

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[None]:
        yield
        searches.close()
        files.close()

    app = FastAPI(
        title="tvr search",
        description="Searches an index of videos by text and by example, and explains results.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=closing,
    )
    app.add_middleware(Guard, limits=limits, metrics=metrics, hosts=hosts)
    add_handlers(app)

    async def found(request: Request, search: Callable[[], Sequence[FoundHit]]) -> FoundVideos:
        began = time.perf_counter()
        hits = await searches.run(request, search)
        return FoundVideos(
            method=index.method,
            candidates=index.rerank,
            seconds=time.perf_counter() - began,
            hits=[_found_video(hit) for hit in hits],
        )

    @app.get("/search", responses=_problems(422, 500, 503, 504))
    async def search(request: Request, q: Text, k: Count = DEFAULT_RESULTS) -> FoundVideos:
        """Videos that fit the text q, best first."""
        return await found(request, lambda: index.search(q, k=k))

    @app.get("/similar", responses=_problems(404, 422, 500, 503, 504))
    async def similar(
        request: Request, key: Key, data: Data = "", k: Count = DEFAULT_RESULTS
    ) -> FoundVideos:
        """Videos like the stored video of this key, best first."""
        return await found(request, lambda: index.search_key(key, data=data or None, k=k))

    @app.get(
        "/videos/{row}/media",
        response_class=Response,
        responses=_problems(404, 410, 416, 422, 500, 503, 504)
        | {200: _content("video/*", "image/*"), 206: _content("video/*", "image/*")},
    )
    async def media(request: Request, row: Row) -> Response:
        """The video itself; a Range header gives a part of it."""
        _check_row(row, index)
        opened = await files.run(request, lambda: open_video(index, row))
        return ranged_response(*opened, request.headers.get("range"))

    @app.get(
        "/videos/{row}/thumbnail.jpg",
        response_class=Response,
        responses=_problems(404, 410, 422, 500, 503, 504) | {200: _content("image/jpeg")},
    )
    async def thumbnail(request: Request, row: Row) -> Response:
        """A frame from the middle of the video."""
        _check_row(row, index)
        content = await files.run(request, lambda: thumbnails.jpeg(row))
        return Response(content, headers={"Cache-Control": "no-cache"}, media_type="image/jpeg")

    @app.get("/explain", responses=_problems(404, 410, 422, 500, 503, 504))
    async def explanation(request: Request, q: Text, row: RowQuery) -> dict[str, Any]:
        """Why a video fits the text q: similarities of words and frames, and their weights."""
        _check_row(row, index)
        return await searches.run(request, lambda: _explained(index, q, row)[0].to_json())

    @app.get(
        "/explain/page",
        response_class=Response,
        responses=_problems(404, 410, 422, 500, 503, 504) | {200: _content("text/html")},
    )
    async def explanation_html(request: Request, q: Text, row: RowQuery) -> HTMLResponse:
        """The explanation as a page."""
        _check_row(row, index)

        def work() -> str:
            found, frames = _explained(index, q, row)
            return explanation_page(found, frames, title=index.features.keys[row])

        content = await searches.run(request, work)
        return HTMLResponse(content, headers={"Content-Security-Policy": EXPLANATION_POLICY})

    @app.get("/healthz", responses=_problems(500, 503, 504))
    async def healthz(request: Request) -> Health:
        """Whether the files of the index are whole."""
        await files.run(request, watched.check)
        return Health(
            status="ok",
            videos=len(index),
            method=index.method,
            model=index.features.info.model,
        )

    @app.get(
        "/metrics", response_class=Response, responses=_problems() | {200: _content("text/plain")}
    )
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def search_page(
        request: Request,
        q: AnyText = "",
        like: AnyText = "",
        data: Data = "",
        k: Count = DEFAULT_RESULTS,
    ) -> HTMLResponse:
        result, problem, status, headers = None, None, 200, None
        pictures = frozenset[str]()
        try:
            if like:
                result = await found(
                    request, lambda: index.search_key(like, data=data or None, k=k)
                )
            elif q.strip():
                result = await found(request, lambda: index.search(q, k=k))
            if result is not None:
                hits = result.hits
                pictures = await files.run(request, lambda: layouts.pictures(hits))
        except Refusal as refusal:
            problem, status, headers = refusal.problem, refusal.status, refusal.headers
        html = page.render(
            query=q,
            like=like,
            count=k,
            videos=len(index),
            model=index.features.info.model,
            result=result,
            pictures=pictures,
            problem=problem,
            max_chars=MAX_QUERY_CHARS,
            counts=sorted({k, *COUNTS}),
            link=_link,
        )
        return HTMLResponse(html, status, headers)

    @app.get("/style.css", include_in_schema=False)
    async def style_sheet() -> Response:
        return Response(style, media_type="text/css")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        # FastAPI's own page loads its script from another host.
        return HTMLResponse(api_page.render(api=app.openapi()))

    return app


def _explained(index: SearchIndex, text: str, video: int) -> tuple[Explanation, np.ndarray]:
    """The explanation, and the video's frames (F, H, W, 3) uint8, which are its pictures."""
    frames = index.frames(video)
    times = index.features.frame_times(video)
    return explain(index.model, text, frames, frame_times=times), frames


def _check_row(row: int, index: SearchIndex) -> None:
    rows = len(index.features.keys)
    if row >= rows:
        raise Refusal(
            404,
            "the index has no such video",
            value=f"row {row}",
            allowed=f"rows 0 to {rows - 1}",
        )


def _found_video(hit: FoundHit) -> FoundVideo:
    start_s, end_s = _finite(hit.start_s), _finite(hit.end_s)
    # Players read the cut of a longer file from the fragment.
    cut = f"#t={start_s or 0:.3f}" if start_s or end_s is not None else ""
    cut += "" if end_s is None else f",{end_s:.3f}"
    return FoundVideo(
        rank=hit.rank,
        key=hit.key,
        data=hit.data,
        row=hit.video,
        similarity=_finite(hit.similarity),
        start_s=start_s,
        end_s=end_s,
        media=f"videos/{hit.video}/media{cut}",
        thumbnail=f"videos/{hit.video}/thumbnail.jpg",
    )


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def _link(path: str, **parameters: str | int | None) -> str:
    given = {name: value for name, value in parameters.items() if value is not None}
    return f"{path}?{urlencode(given)}"


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    every = (413, 414, *statuses)
    return {status: {"model": ErrorAnswer, "description": MEANINGS[status]} for status in every}


def _content(*types: str) -> dict[str, Any]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "The content.", "content": {name: schema for name in types}}
