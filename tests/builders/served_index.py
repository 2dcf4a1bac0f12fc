"""A search service on a free port of the loopback interface, and an index in memory for faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from tvr.trainer.service.http_server import address, listening, uvicorn_config


@dataclass(frozen=True, kw_only=True)
class MemoryHit:
    rank: int
    key: str
    data: str
    video: int
    similarity: float
    start_s: float = 0.0
    end_s: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class MemoryMedia:
    path: Path | None
    bytes: bytes | None
    content_type: str = "video/mp4"
    start_s: float = 0.0
    end_s: float = float("inf")


@dataclass
class MemoryIndex:
    """Finds the keys with most letters of the query. `before` runs before each search."""

    keys: list[str]
    media_of: Callable[[int], Any] = lambda video: MemoryMedia(path=None, bytes=bytes(range(256)))
    before: Callable[[], object] = lambda: None
    method: str = "exact"
    rerank: int = 200
    searched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.features: Any = SimpleNamespace(
            keys=self.keys, info=SimpleNamespace(model="memory"), folder=Path("/nowhere")
        )
        self.model: Any = None

    def __len__(self) -> int:
        return len(self.keys)

    def search(self, query: str, *, k: int = 10) -> list[MemoryHit]:
        self.before()
        self.searched.append(query)
        scores = [len(set(query) & set(key)) / len(set(key)) for key in self.keys]
        best = sorted(range(len(self)), key=lambda video: -scores[video])[:k]
        return [
            MemoryHit(
                rank=rank, key=self.keys[video], data="set", video=video, similarity=scores[video]
            )
            for rank, video in enumerate(best, 1)
        ]

    def search_key(self, key: str, *, data: str | None = None, k: int = 10) -> list[MemoryHit]:
        if key not in self.keys or data not in (None, "set"):
            raise KeyError(key)
        return self.search(key, k=k)

    def frames(self, video: int) -> np.ndarray:
        return np.full((3, 24, 32, 3), 40 * video % 256, np.uint8)

    def media(self, video: int) -> Any:
        return self.media_of(video)


class MemoryExplainer:
    """An explanation that repeats its arguments."""

    def explain(self, index: Any, caption: str, video: int) -> dict[str, Any]:
        return {"caption": caption, "video": video}

    def page(self, index: Any, caption: str, video: int, title: str) -> str:
        return f"<!doctype html><title>{video}</title>"


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serves an app from a thread with the service's own HTTP server; yields its URL."""
    with listening("127.0.0.1", 0) as server:
        running = uvicorn.Server(uvicorn_config(app))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [server]})
        thread.start()
        try:
            while not running.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield address(server)
        finally:
            running.should_exit = True
            thread.join()
