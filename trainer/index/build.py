"""Builds the index of a feature set: coarse vectors, segment by segment.

A segment has the videos of some consecutive blocks of one data set. Segments do not depend on the
number of tasks. Each task builds every N-th segment, and skips those that are whole already. A data
set that is added to the features later brings segments of its own; the others stay as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import numpy as np

from tvr.data_prep.records import ShardCorrupt
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.features.stored_file import StoredFile, check_file, sha256_of, write_array
from tvr.trainer.index.candidates import flat
from tvr.trainer.index.coarse import video_vectors
from tvr.trainer.index.graph import NEIGHBOURS, build_graph
from tvr.trainer.index.layout import (
    BUILD_AGAIN,
    CENTROIDS,
    FOLDER,
    MANIFEST,
    SEGMENT,
    IndexHeader,
    IndexManifest,
    Method,
    ModelPlace,
    Segment,
    SegmentRecord,
    read_array,
    read_record,
    same,
    segment_name,
    to_json,
)
from tvr.trainer.index.optional_faiss import import_faiss
from tvr.trainer.index.segments import PlannedSegment, planned_segments

# Videos from which `auto` takes ivf. Below, comparing all vectors takes less time than re-ranking.
# hnsw is taken on request only: it takes five times as long to build as ivf, and searches about as
# fast (tests/benchmarks/two_stage_search.py).
IVF_FROM = 100_000
BLOCKS_PER_SEGMENT: dict[Method, int] = {"exact": 64, "ivf": 64, "hnsw": 256}
# Of ivf's centres: videos per centre that they are learned from, and rounds of k-means.
VIDEOS_PER_CENTRE, ROUNDS = 64, 10
ROWS_AT_ONCE = 4096
Report = Callable[[int, int], object]
"""Called with the videos done and all videos of the task."""


def build_index(
    features: FeatureSet,
    *,
    method: Method | Literal["auto"] = "auto",
    model: ModelPlace | None = None,
    task: tuple[int, int] = (0, 1),
    blocks_per_segment: int | None = None,
    report: Report | None = None,
) -> bool:
    """Builds this task's segments of an index, and publishes it if all segments are there.

    The same call again continues where one was stopped, or adds what was added to the features.

    Args:
        method: exact compares all vectors, ivf those of the nearest lists, hnsw follows a graph.
            auto keeps that of an index that is there; a new one is exact below 100,000 videos.
        model: Where the model is that encoded the features; None keeps the one of an index that is
            there.
        task: This task's number, from 0, and the number of tasks.
        blocks_per_segment: The same for all tasks and restarts; None = by method.

    Returns:
        False if segments of other tasks are still missing.

    Raises:
        ValueError: the folder holds an index of another method or of other features.
        ShardCorrupt: the features or the index are damaged.
        ImportError: FAISS is missing.
    """
    import_faiss()
    number, count = task
    if not 0 <= number < count:
        raise ValueError(f"task {number} of {count}: must be 0 to {count - 1}")
    if not len(features):
        raise ValueError(f"{features.folder} holds no videos: there is nothing to search")
    folder = features.folder / FOLDER
    header = _header(features, folder, method, blocks_per_segment)
    plan = planned_segments(features, header.blocks_per_segment)
    builder = _Builder(features, folder, header)
    own = plan[number::count]
    total, done = sum(each.videos for each in own), 0
    for each in own:
        if not builder.has(each):
            builder.build(each)
        done += each.videos
        if report is not None:
            report(done, total)
    return builder.publish(plan, model)


def chosen_method(videos: int) -> Method:
    """The method of `auto`."""
    return "exact" if videos < IVF_FROM else "ivf"


def _header(
    features: FeatureSet, folder: Path, method: str, blocks_per_segment: int | None
) -> IndexHeader:
    """The header of the index that is there; of a new one if there is none."""
    present = None
    if (folder / MANIFEST).exists():
        present = read_record(folder / MANIFEST, IndexManifest).header
    else:
        for record in sorted(folder.glob(f"set-*/segment-*/{SEGMENT}"))[:1]:
            present = read_record(record, SegmentRecord).header
    if method == "auto":
        method = chosen_method(len(features)) if present is None else present.method
    wanted = cast(Method, method)
    lists = 0
    if wanted == "ivf":
        # Four times the root of the number: a query compares about as many centres as vectors.
        lists = 1 << max(0, int(np.log2(4 * len(features) ** 0.5)))
        lists = max(1, min(lists, len(features) // 39))
        if present is not None and present.method == "ivf":
            lists = present.num_lists
    if blocks_per_segment is None:
        blocks_per_segment = BLOCKS_PER_SEGMENT[wanted]
        if present is not None:
            blocks_per_segment = present.blocks_per_segment
    header = IndexHeader(
        method=wanted,
        fingerprint=features.info.fingerprint,
        width=features.info.width,
        blocks_per_segment=blocks_per_segment,
        num_lists=lists,
        neighbours=NEIGHBOURS if wanted == "hnsw" else 0,
    )
    if present is not None:
        same(present, header, str(folder))
    return header


class _Builder:
    def __init__(self, features: FeatureSet, folder: Path, header: IndexHeader) -> None:
        self._features, self._folder, self._header = features, folder, header
        self._interaction = str(features.info.settings.get("interaction"))
        self._centroids: np.ndarray | None = None
        self._centroids_sha256: str | None = None
        if header.method == "ivf":
            self._centroids_sha256 = self._open_centroids()

    def has(self, planned: PlannedSegment) -> bool:
        """True if a segment is whole, which reads it; a damaged one is removed.

        Raises:
            ValueError: it was built from other features.
        """
        folder = self._place(planned)
        if not folder.exists():
            return False
        try:
            segment = self._record(planned)
            for name, stored in segment.files.items():
                check_file(folder / f"{name}.bin", stored, hashed=True, remedy=BUILD_AGAIN)
        except (ShardCorrupt, OSError):
            shutil.rmtree(folder)
            return False
        return True

    def build(self, planned: PlannedSegment) -> None:
        """Writes one segment; one that another process has just written stays."""
        folder = self._place(planned)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        # A builder that was killed left its own behind.
        for left in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        first = planned.first_row
        found = {"vectors": self._vectors(np.arange(first, first + planned.videos))}
        if self._centroids is not None:
            nearest = flat(self._centroids).search(found["vectors"], 1)[1][:, 0]
            found["lists"] = nearest.astype("<i4")
        elif self._header.method == "hnsw":
            found |= build_graph(found["vectors"], self._header.neighbours)
        files = {name: write_array(partial / f"{name}.bin", each) for name, each in found.items()}
        segment = Segment(
            source=planned.source,
            first_block=planned.first_block,
            end_block=planned.end_block,
            videos=planned.videos,
            features=planned.features,
            centroids=self._centroids_sha256,
            files=files,  # type: ignore[arg-type]
        )
        text = to_json(SegmentRecord(header=self._header, segment=segment))
        write_array(partial / SEGMENT, np.frombuffer(text, np.uint8))
        try:
            partial.rename(folder)
        except OSError:
            if not self.has(planned):
                raise
            shutil.rmtree(partial)

    def publish(self, plan: list[PlannedSegment], model: ModelPlace | None) -> bool:
        """Writes index.json if all segments are there."""
        if not all((self._place(each) / SEGMENT).is_file() for each in plan):
            return False
        path = self._folder / MANIFEST
        if model is None and path.exists():
            model = read_record(path, IndexManifest).model
        centroids = None
        if self._centroids is not None and self._centroids_sha256 is not None:
            centroids = StoredFile(num_bytes=self._centroids.nbytes, sha256=self._centroids_sha256)
        manifest = IndexManifest(
            header=self._header,
            model=model,
            centroids=centroids,
            segments=tuple(self._record(each) for each in plan),
        )
        write_atomically(path, to_json(manifest))
        return True

    def _place(self, planned: PlannedSegment) -> Path:
        return self._folder / planned.source / segment_name(planned.first_block)

    def _record(self, planned: PlannedSegment) -> Segment:
        path = self._place(planned) / SEGMENT
        record = read_record(path, SegmentRecord)
        same(record.header, self._header, str(path))
        segment = record.segment
        for name in ("source", "first_block", "end_block", "videos", "features"):
            if getattr(segment, name) != getattr(planned, name):
                raise ValueError(
                    f"{path}: {name}={getattr(segment, name)}, but the features have"
                    f" {getattr(planned, name)}: they are not those that it was built from; remove"
                    f" {self._folder} to build the index again"
                )
        if segment.centroids != self._centroids_sha256:
            raise ValueError(
                f"{path}: built with other centres than {CENTROIDS}; remove {self._folder} to"
                " build the index again"
            )
        return segment

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """Coarse vectors of some rows of the feature set."""
        found = np.empty((len(rows), self._header.width), np.float32)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            piece = slice(start, start + ROWS_AT_ONCE)
            videos = self._features.videos(rows[piece])
            found[piece] = video_vectors(videos, self._interaction).numpy()
        return found

    def _open_centroids(self) -> str:
        """Reads the centres, or learns them; of several tasks that learn, the first one's count."""
        path, header = self._folder / CENTROIDS, self._header
        if not path.exists():
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_array(partial, self._learned())
            try:
                os.link(partial, path)
            except FileExistsError:
                pass
            finally:
                partial.unlink()
        size = 4 * header.num_lists * header.width
        if path.stat().st_size != size:
            raise ShardCorrupt(f"{path}: must have {size} bytes; remove {self._folder}")
        if (self._folder / MANIFEST).exists():
            published = read_record(self._folder / MANIFEST, IndexManifest).centroids
            if published is not None:
                check_file(path, published, hashed=True, remedy=BUILD_AGAIN)
        stored = StoredFile(num_bytes=size, sha256=sha256_of(path))
        shape = (header.num_lists, header.width)
        self._centroids = read_array(path, stored, np.dtype("<f4"), shape)
        return stored.sha256

    def _learned(self) -> np.ndarray:
        faiss, header = import_faiss(), self._header
        count = min(len(self._features), VIDEOS_PER_CENTRE * header.num_lists)
        rows = np.linspace(0, len(self._features) - 1, count).astype(np.int64)
        sample = self._vectors(rows)
        settings = {"niter": ROUNDS, "seed": 1, "spherical": True, "verbose": False}
        learner = faiss.Kmeans(header.width, header.num_lists, **settings)
        learner.train(sample)
        return np.ascontiguousarray(learner.centroids, np.float32)
