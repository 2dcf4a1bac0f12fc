"""Encodes a packed data set or a folder of videos into a feature set.

Videos are divided into blocks, which do not depend on the number of tasks. Each task encodes every
N-th block, and skips those that are whole already.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from tvr.data_prep.annotations.clip_keys import hashed_key, key_of, name_hash
from tvr.data_prep.annotations.video_lookup import SUFFIXES
from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.manifest import MANIFEST_NAME
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import TRANSIENT_REASONS, BadSample, Caption, Replacement
from tvr.data_prep.video.decoders import frame_sampler
from tvr.data_prep.video.images import fit_square
from tvr.trainer.evaluation.model_source import SourceModel
from tvr.trainer.features.feature_set import (
    DataSource,
    FeatureHeader,
    FeatureWriter,
    StoredType,
    VideoSource,
)
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.model.model import Features

VIDEOS_PER_BLOCK = 1024
Report = Callable[[int, int, int], object]
"""Called with the videos done, all videos of the task, and those that were left out."""


@dataclass(frozen=True, slots=True)
class _Video:
    key: str
    captions: tuple[Caption, ...]
    frames: np.ndarray
    times_s: tuple[float, ...]


class _Videos(Protocol):
    """Videos by number."""

    data: DataSource

    def __len__(self) -> int: ...
    def key(self, row: int) -> str: ...
    def read(self, row: int) -> _Video: ...
    def source(self, row: int) -> VideoSource: ...


def embed(
    source: SourceModel,
    data: str,
    out: Path | str,
    *,
    stored: StoredType = "fp16",
    task: tuple[int, int] = (0, 1),
    max_bad: int = 100,
    videos_per_block: int = VIDEOS_PER_BLOCK,
    report: Report | None = None,
) -> bool:
    """Encodes this task's blocks of a data set, and publishes the set if all blocks are there.

    The same call again continues where one was stopped.

    Args:
        source: The model.
        data: URL of a packed data set, or local folder of video files, which has no captions.
        out: Folder of the feature set, which may hold other data sets of the same model.
        stored: Type in which vectors are stored.
        task: This task's number, from 0, and the number of tasks.
        max_bad: Allowed number of videos that cannot be read, in this task.
        videos_per_block: Videos of a part; the same for all tasks and restarts.

    Returns:
        False if blocks of other tasks are still missing.

    Raises:
        ValueError: the model has several tokens a frame; `out` holds features of another model, of
            other settings, or of an earlier state of the data.
        TooManyBadSamples: more than `max_bad` videos are unreadable, or the storage is down.
    """
    if (cells := source.config.model.tokens_per_frame) > 1:
        raise ValueError(
            f"{source.name} was trained with model.tokens_per_frame={cells}: stored features, and"
            " so search, hold one vector a frame; evaluate the data set itself"
        )
    number, count = task
    if not 0 <= number < count:
        raise ValueError(f"task {number} of {count}: must be 0 to {count - 1}")
    videos = _open(source, data, videos_per_block)
    writer = FeatureWriter(out, _header(source, stored), videos.data)
    budget = BadSampleBudget(max_bad, f"while embedding {data}", max_unavailable_in_a_row=1)
    starts = list(range(0, len(videos), videos_per_block))[number::count]
    total = sum(min(videos_per_block, len(videos) - start) for start in starts)
    done = 0
    for start in starts:
        rows = range(start, min(start + videos_per_block, len(videos)))
        if not writer.has(start // videos_per_block):
            _write_block(source, videos, rows, writer, start // videos_per_block, budget)
        done += len(rows)
        if report is not None:
            report(done, total, budget.by_reason.total())
    return writer.publish()


def _write_block(
    source: SourceModel,
    videos: _Videos,
    rows: range,
    writer: FeatureWriter,
    block: int,
    budget: BadSampleBudget,
) -> None:
    parts: list[Features] = []
    keys: list[str] = []
    captions: list[str] = []
    caption_video: list[int] = []
    sources: list[VideoSource] = []
    times: list[list[float]] = []
    left_out: list[Replacement] = []
    batch = source.config.train.micro_batch  # as in the evaluation, which gives the same features
    for start in range(rows.start, rows.stop, batch):
        read: list[_Video] = []
        for row in range(start, min(start + batch, rows.stop)):
            try:
                found = videos.read(row)
            except BadSample as bad:
                budget.record_bad(bad.key, bad.reason, bad.detail)
                if bad.reason in TRANSIENT_REASONS:
                    # It may be readable when the storage answers: the part must not lack it.
                    raise budget.exhausted_error() from bad
                left_out.append(
                    Replacement(position=row, key=bad.key, reason=bad.reason, detail=bad.detail)
                )
                continue
            budget.record_good()
            read.append(found)
            caption_video += [len(keys)] * len(found.captions)
            keys.append(found.key)
            captions += [caption.text for caption in found.captions]
            sources.append(videos.source(row))
            times.append(_times(found, writer.header.num_frames, source))
        if read:
            parts.append(_encoded(source, read, writer.header))
    writer.write(
        block,
        concat_features(parts) if parts else None,
        keys=keys,
        captions=captions,
        caption_video=torch.tensor(caption_video, dtype=torch.int64),
        sources=sources,
        frame_times=np.array(times).reshape(len(keys), writer.header.num_frames),
        left_out=left_out,
    )


def _encoded(source: SourceModel, videos: Sequence[_Video], header: FeatureHeader) -> Features:
    features = source.encode_frames([video.frames for video in videos], batch=len(videos))
    captions = [caption for video in videos for caption in video.captions]
    if captions:
        texts = source.encode_texts(captions, batch=len(captions))
        return features._replace(
            sentence=texts.sentence,
            words=texts.words,
            word_mask=texts.word_mask,
            word_logits=texts.word_logits,
        )
    # As many words and as wide as those of other batches.
    empty = features.frames.new_empty(0, header.num_words, header.width)
    return features._replace(
        sentence=empty[:, 0],
        words=empty,
        word_mask=empty[..., 0].long(),
        word_logits=empty[..., 0] if header.has_logits else None,
    )


def _times(video: _Video, num_frames: int, source: SourceModel) -> list[float]:
    """Seconds of each stored frame; the middle of the video for a mean of its frames."""
    times = list(video.times_s)
    if source.mean_of_frames:
        times = [sum(times) / len(times)] if times else []
    return (times + [float("nan")] * num_frames)[:num_frames]


def _header(source: SourceModel, stored: StoredType) -> FeatureHeader:
    probe = source.encode_texts(["a"])
    return FeatureHeader(
        model=source.name,
        fingerprint=source.fingerprint,
        settings=source.settings,
        stored=stored,
        num_frames=1 if source.mean_of_frames else source.num_frames,
        num_words=probe.words.shape[1],
        width=probe.words.shape[2],
        has_logits=probe.word_logits is not None,
    )


def _open(source: SourceModel, data: str, videos_per_block: int) -> _Videos:
    folder = Path(data)
    if "://" not in data and folder.is_dir() and not (folder / MANIFEST_NAME).exists():
        return _VideoFolder(source, folder, videos_per_block)
    return _PackedSet(source, data, videos_per_block)


class _PackedSet:
    """The videos of a packed data set."""

    def __init__(self, source: SourceModel, url: str, videos_per_block: int) -> None:
        self._reader = SampleReader(
            url,
            num_frames=source.num_frames,
            image_size=source.image_size,
            decoder=source.config.data.decoder,
            frame_spacing=source.config.data.frame_spacing,
        )
        content = hashlib.sha256(self._reader.manifest.content.encode()).hexdigest()
        blocks = -(-len(self._reader) // videos_per_block)
        # A search may run in another folder.
        place = url if "://" in url else str(Path(url).absolute())
        self.data = DataSource(url=place, kind="packed", content=content, num_blocks=blocks)

    def __len__(self) -> int:
        return len(self._reader)

    def key(self, row: int) -> str:
        return self._reader.key(row)

    def read(self, row: int) -> _Video:
        sample = self._reader.read(row)
        return _Video(sample.key, sample.captions, sample.frames, sample.frame_times_s)

    def source(self, row: int) -> VideoSource:
        return VideoSource(row=row)


class _VideoFolder:
    """The video files of a local folder and its sub-folders, in the order of their paths."""

    def __init__(self, source: SourceModel, folder: Path, videos_per_block: int) -> None:
        self._folder, self._source = folder, source
        self._sample = frame_sampler(source.config.data.decoder)
        self._files = sorted(
            (Path(root) / name).relative_to(folder).as_posix()
            for root, _, names in os.walk(folder)
            for name in names
            if name.lower().endswith(SUFFIXES)
        )
        if not self._files:
            raise ValueError(
                f"{folder} holds neither a packed data set nor a video file ({', '.join(SUFFIXES)})"
            )
        found = hashlib.sha256()
        for name in self._files:
            found.update(f"{(folder / name).stat().st_size} {name}\n".encode())
        blocks = -(-len(self._files) // videos_per_block)
        self.data = DataSource(
            url=str(folder.absolute()), kind="videos", content=found.hexdigest(), num_blocks=blocks
        )
        self._keys = _unique_keys(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def key(self, row: int) -> str:
        return self._keys[row]

    def read(self, row: int) -> _Video:
        side = self._source.image_size
        frames, times_s = self._sample(
            str(self._folder / self._files[row]),
            self._source.num_frames,
            key=self._keys[row],
            finish=lambda picture: fit_square(picture[None], side)[0],
            spacing=self._source.config.data.frame_spacing,
        )
        return _Video(self._keys[row], (), frames, times_s)

    def source(self, row: int) -> VideoSource:
        return VideoSource(file=self._files[row])


def _unique_keys(files: Sequence[str]) -> list[str]:
    """A key of each file's name; files of one name in several folders get a hash of their path."""
    keys, taken = [], set()
    for file in files:
        key = key_of(file)
        if key in taken:
            key = hashed_key(key, name_hash(file))
        taken.add(key)
        keys.append(key)
    return keys
