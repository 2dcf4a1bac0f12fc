"""What the service asks of an index, what it answers, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tvr.trainer.evaluation.model_source import SourceModel
from tvr.trainer.features.feature_set import FeatureSet

MAX_QUERY_CHARS = 1_000
MAX_RESULTS = 100
MAX_URL_CHARS = 2_048
"""Of a data set."""
MAX_ROW = (1 << 53) - 1
"""Numbers above it are not exact in JSON."""


class FoundHit(Protocol):
    """A result of a search."""

    @property
    def rank(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def video(self) -> int: ...
    @property
    def similarity(self) -> float: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...


class PlayableMedia(Protocol):
    """A file that a browser can play, or its content."""

    @property
    def path(self) -> Path | None: ...
    @property
    def bytes(self) -> bytes | None: ...
    @property
    def content_type(self) -> str: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...


class SearchIndex(Protocol):
    """The part of `tvr.trainer.index.index.Index` that the service uses, from several threads."""

    @property
    def features(self) -> FeatureSet: ...
    @property
    def method(self) -> str: ...
    @property
    def rerank(self) -> int: ...
    @property
    def model(self) -> SourceModel: ...
    def __len__(self) -> int: ...
    def search(self, query: str, *, k: int = 10) -> Sequence[FoundHit]: ...
    def search_key(
        self, key: str, *, data: str | None = None, k: int = 10
    ) -> Sequence[FoundHit]: ...
    def frames(self, video: int) -> np.ndarray: ...
    def media(self, video: int) -> PlayableMedia: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of what one request, and all requests together, may take."""

    url_bytes: int = 49_152
    """Of path and query, encoded: every parameter at its limit fits, at 12 bytes a character."""
    discarded_bytes: int = 1 << 25
    """Of a request's body, which is read without being kept, so that its sender gets the answer."""
    discard_s: float = 5.0
    requests: int = 512
    """Requests in progress."""
    search_threads: int = 4
    search_queue: int = 64
    """Searches and explanations that wait for a thread."""
    search_s: float = 10.0
    """Time of a search from its arrival, and of an explanation."""
    file_threads: int = 4
    file_queue: int = 400
    """Pictures and videos that wait for a thread: a page of results asks for up to 100."""
    file_s: float = 20.0
    thumbnails: int = 4_096
    """Pictures that are kept in memory, about 10 kB each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundVideo:
    """A video that a search found."""

    rank: int
    """From 1."""
    key: str
    data: str
    """URL of the video's data set; keys are unique within one."""
    row: int
    """Number of the video in the index."""
    similarity: float | None
    """DMAE similarity, not scaled."""
    start_s: float | None
    """Where the clip begins in its file; null for a whole file."""
    end_s: float | None
    media: str
    """Relative URL of the video."""
    thumbnail: str
    """Relative URL of a JPEG."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundVideos:
    """Answer of a search."""

    method: str
    """How candidates are found: exact, ivf or hnsw."""
    candidates: int
    """Videos whose DMAE similarity is computed."""
    seconds: float
    hits: list[FoundVideo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """State of the service and its index."""

    status: str
    videos: int
    method: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """Why a request was refused or failed."""

    error: str
    value: str | None = None
    """The value that is not allowed, cut short."""
    allowed: str | None = None
