"""The first stage: the videos whose coarse vectors are nearest to that of a query, from FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvr.data_prep.records import ShardCorrupt
from tvr.trainer.index.graph import open_graph
from tvr.trainer.index.layout import (
    CENTROIDS,
    IndexManifest,
    arrays,
    read_array,
)
from tvr.trainer.index.optional_faiss import import_faiss

# Of 50,000 planted videos, whose vectors fill 512 dimensions more evenly than real ones, and 200
# candidates: reading a quarter of ivf's lists loses 0.9 % of the right videos that the exact
# candidates hold, an eighth 3 %, a sixteenth 7 %. A graph that keeps 8 vectors for each candidate
# loses 0.7 %, with 4 it loses 2 %, with 2 it loses 6 %.
LISTS_READ, LEAST_LISTS = 4, 32
LEAST_KEPT, KEPT_PER_CANDIDATE = 128, 8


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """A segment of `exact` or `hnsw`."""

    first_row: int
    """Row in the feature set of its first video."""
    videos: int
    vectors: Any
    """(n, D) fp32 of `exact`; of `hnsw` a FAISS index, which holds them."""


class Candidates:
    """Coarse vectors of all segments, ready to be searched; safe to use from several threads.

    All vectors are in memory: 4 D bytes a video, 8 more with `ivf`, about 270 more with `hnsw`.

    Args:
        folder: Folder of the index.
        first_rows: Row in the feature set of each segment's first video.
        verify: Also hashes the vectors; all other arrays are hashed in any case.

    Raises:
        ShardCorrupt: a file is missing, cut short or damaged; names it.
        ImportError: FAISS is missing.
    """

    def __init__(
        self, folder: Path, manifest: IndexManifest, first_rows: Sequence[int], *, verify: bool
    ) -> None:
        self._faiss = import_faiss()
        header = self._header = manifest.header
        self._segments: list[OpenSegment] = []
        self._lists: Any = self._empty_lists(folder, manifest) if header.method == "ivf" else None
        for segment, first in zip(manifest.segments, first_rows, strict=True):
            place = folder / segment.source / segment.name
            found = {}
            for name, (kind, shape) in arrays(header, segment.videos).items():
                stored = segment.files[name]  # type: ignore[index]
                shape = (stored.num_bytes // kind.itemsize,) if shape is None else shape
                hashed = verify or name != "vectors"
                found[name] = read_array(place / f"{name}.bin", stored, kind, shape, hashed=hashed)
            if not segment.videos:
                continue
            vectors = found["vectors"]
            if header.method == "ivf":  # FAISS copies them
                self._add_to_lists(found, first, place)
                continue
            if header.method == "hnsw":
                vectors = open_graph(vectors, found, header.neighbours, place)
            self._segments.append(OpenSegment(first, segment.videos, vectors))

    def search(self, vector: np.ndarray, count: int) -> np.ndarray:
        """Rows (n,) in the feature set of the n <= `count` nearest videos, nearest first.

        Args:
            vector: (D,) fp32, of unit length.
        """
        query = np.ascontiguousarray(vector, np.float32)[None]
        if self._header.method == "ivf":
            return self._search_lists(query, count)
        scores, rows = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
        for segment in self._segments:
            most = min(count, segment.videos)
            if self._header.method == "exact":
                found = self._nearest(query, segment.vectors, most)
            else:
                kept = max(LEAST_KEPT, KEPT_PER_CANDIDATE * most)
                settings = self._faiss.SearchParametersHNSW(efSearch=kept)
                found = segment.vectors.search(query, most, params=settings)
            valid = found[1][0] >= 0
            scores.append(found[0][0][valid])
            rows.append(found[1][0][valid] + segment.first_row)
        return _best(np.concatenate(scores), np.concatenate(rows), count)

    def _nearest(
        self, query: np.ndarray, vectors: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._faiss.knn(query, vectors, count, metric=self._faiss.METRIC_INNER_PRODUCT)

    def _search_lists(self, query: np.ndarray, count: int) -> np.ndarray:
        lists = self._header.num_lists
        # Lists that hold twice the wanted candidates on average, if these are many.
        many = 2 * count * lists // max(self._lists.ntotal, 1)
        read = min(lists, max(LEAST_LISTS, lists // LISTS_READ, many))
        settings = self._faiss.SearchParametersIVF(nprobe=read)
        scores, rows = self._lists.search(query, min(count, self._lists.ntotal), params=settings)
        valid = rows[0] >= 0
        return _best(scores[0][valid], rows[0][valid], count)

    def _empty_lists(self, folder: Path, manifest: IndexManifest) -> Any:
        faiss, header, stored = self._faiss, self._header, manifest.centroids
        assert stored is not None  # `read_record` has checked it
        shape = (header.num_lists, header.width)
        centroids = flat(read_array(folder / CENTROIDS, stored, np.dtype("<f4"), shape))
        index = faiss.IndexIVFFlat(centroids, *shape[::-1], faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        return index

    def _add_to_lists(self, found: dict[str, np.ndarray], first: int, place: Path) -> None:
        lists = found["lists"].astype(np.int64)
        if lists.min() < 0 or lists.max() >= self._header.num_lists:
            raise ShardCorrupt(
                f"{place / 'lists.bin'}: lists must be 0 to {self._header.num_lists - 1}"
            )
        rows = np.arange(first, first + len(lists))
        pointers = (self._faiss.swig_ptr(array) for array in (found["vectors"], rows, lists))
        self._lists.add_core(len(lists), *pointers)


def flat(vectors: np.ndarray) -> Any:
    """A FAISS index that compares a query with all vectors, which it copies."""
    faiss = import_faiss()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    return index


def _best(scores: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    order = np.lexsort((rows, -scores))[:count]
    return rows[order]
