"""The frames of a video as the model sees them, from a file or from a packed data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tvr.data_prep.annotations.clip_keys import key_of
from tvr.data_prep.html_page import picture_strip
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample, Sample
from tvr.data_prep.video.decoders import frame_sampler
from tvr.data_prep.video.images import fit_square
from tvr.trainer.evaluation.model_source import SourceModel

Strips = Callable[[str], str | None]
"""Key of a video -> its frames side by side as a data URL; None if it cannot be read."""


def frames_of_file(source: SourceModel, path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Decodes the frames that the model takes from a video file, and their times in seconds.

    Raises:
        FileNotFoundError: no such file.
        BadSample: the file cannot be decoded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such video: {path}")
    data, side = source.config.data, source.image_size
    return frame_sampler(data.decoder)(
        str(path),
        source.num_frames,
        key=key_of(path.name),
        finish=lambda picture: fit_square(picture[None], side)[0],
        spacing=data.frame_spacing,
    )


def open_set(source: SourceModel, url: str) -> SampleReader:
    """Opens a packed data set with the sizes of the model."""
    return SampleReader(
        url,
        num_frames=source.num_frames,
        image_size=source.image_size,
        decoder=source.config.data.decoder,
        frame_spacing=source.config.data.frame_spacing,
    )


def sample_of(source: SourceModel, url: str, key: str) -> Sample:
    """Reads one sample of a packed data set.

    Raises:
        ValueError: the set has no such key.
    """
    reader = open_set(source, url)
    for row in range(len(reader)):
        if reader.key(row) == key:
            return reader.read(row)
    raise ValueError(f"{url} has no sample of key {key!r}; its first one is {reader.key(0)!r}")


def test_set_of(source: SourceModel, url: str | None) -> str:
    """The given data set, or the test set of the model's run.

    Raises:
        ValueError: none is given, and the model belongs to no run with a test set.
    """
    found = url or source.config.data.test
    if found is None:
        raise ValueError(f"{source.name} has no test set of its own: give --data SET")
    return found


def strips_of(source: SourceModel, url: str) -> Strips:
    """Pictures of the videos of a packed data set."""
    reader = open_set(source, url)
    rows = {reader.key(row): row for row in range(len(reader))}

    def strip(key: str) -> str | None:
        try:
            frames = reader.read(rows[key]).frames
        except (BadSample, KeyError):
            return None
        return picture_strip([Image.fromarray(frame) for frame in frames])

    return strip
