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
from builders.pretrained import save_clip
from fastapi import FastAPI

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.demo_clips import ANNOTATIONS, draw_scenes, scene_captions, write_clips
from tvr.data_prep.packing.pack import pack_shards
from tvr.trainer.evaluation.embed import embed
from tvr.trainer.evaluation.model_source import load_source
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.index.index import ModelPlace, build_index
from tvr.trainer.model.tokenizer import train_tokenizer
from tvr.trainer.service.http_server import address, listening, uvicorn_config

FRAMES, SIDE = 6, 64


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


def demo_index(folder: Path) -> Path:
    """Embeds and indexes eight video files and a packed set of four clips; returns the index.

    The packed set stores frames, which a browser shows as moving pictures. The model is a tiny CLIP
    with random weights, compared word by word.
    """
    scenes = draw_scenes(12, seed=3, excluded=set())
    for _ in write_clips(
        folder / "clips", scenes, prefix="clip", seed=3, workers=1, all_wordings=True
    ):
        pass
    (folder / "videos").mkdir()
    for path in sorted((folder / "clips").glob("*.mp4"))[:8]:
        path.rename(folder / "videos" / path.name)
    clips = read_annotations(str(folder / "clips" / ANNOTATIONS))
    packed = [clip for clip in clips if clip.key >= "clip-00008"]
    pack_shards(packed, str(folder / "packed"), layout="frames", num_frames=FRAMES, short_side=SIDE)
    texts = [caption for scene in scenes for caption in scene_captions(scene)]
    words = train_tokenizer(texts, folder / "words", vocab_size=560, max_words=20)
    save_clip(folder / "clip", words, width=16, image_size=SIDE)
    source = load_source(folder / "clip", num_frames=FRAMES, interaction="att_ti")
    for name in ("videos", "packed"):
        embed(source, str(folder / name), folder / "features")
    place = ModelPlace(path=str(folder / "clip"), step=None)
    build_index(FeatureSet.open(folder / "features"), model=place)
    return folder / "features"


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
