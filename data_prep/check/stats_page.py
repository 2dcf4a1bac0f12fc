"""The page of `tvr stats`: one self-contained HTML file that describes a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from tvr.data_prep.check.captions import LONG_WORDS
from tvr.data_prep.check.check_shard import Problem
from tvr.data_prep.check.distribution import Distribution, readable
from tvr.data_prep.check.histograms import histogram_svg
from tvr.data_prep.check.sequential_reads import ReadMeter, SequentialShard, read_members
from tvr.data_prep.check.stats import DatasetStatistics
from tvr.data_prep.dataset.manifest import Manifest
from tvr.data_prep.dataset.sample_codec import parse_meta
from tvr.data_prep.html_page import page_template, picture_strip
from tvr.data_prep.records import BadSample
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.video.decode import sample_frames
from tvr.data_prep.video.frame_sampling import segment_frames
from tvr.data_prep.video.images import decode_jpeg

PICTURE_HEIGHT = 120
MAX_LEAKS = 100
# Offsets within three equal segments that select the first, the middle and the last frame.
FIRST_MIDDLE_LAST = (0.0, 0.5, 1 - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A sample to display."""

    key: str
    captions: tuple[str, ...]
    pictures: str
    """Data URL of a strip of frames; empty if the sample could not be read."""
    problem: str
    """Why the sample could not be read; empty if it was."""


def shown_samples(url: str, manifest: Manifest, count: int) -> list[ShownSample]:
    """Reads `count` samples, evenly spaced over the data set, for display."""
    store, shown = Storage(manifest.files_url(url)), []
    for row in segment_frames(manifest.num_samples, count) if count else ():
        key = str(manifest.samples.key[row])
        shard = manifest.file_of_shard(int(manifest.samples.shard[row]))
        captions: tuple[str, ...] = ()
        pictures = problem = ""
        try:
            file = SequentialShard(store, shard, ReadMeter(0, None), read_ahead=0)
            members = read_members(file, manifest, row)
            captions = parse_meta(key, members).texts
            pictures = picture_strip(_pictures(key, members), PICTURE_HEIGHT)
        except (BadSample, OSError) as error:
            problem = str(error)
        shown.append(ShownSample(key=key, captions=captions, pictures=pictures, problem=problem))
    return shown


def stats_page(
    name: str,
    statistics: DatasetStatistics,
    shown: Sequence[ShownSample],
    leaks: Mapping[str, Sequence[Problem]],
) -> str:
    """Renders the page.

    Args:
        name: Title of the page.
        statistics: Statistics of the data set.
        shown: Samples to display.
        leaks: For each other data set, the samples in common with it.
    """
    return page_template(Path(__file__).parent, "stats.html.jinja").render(
        name=name,
        statistics=statistics,
        captions=statistics.captions,
        long_words=LONG_WORDS,
        readable=readable,
        shown=shown,
        charts=list(_charts(statistics)),
        rows=[(title, unit, values) for title, unit, _, values in _distributions(statistics)],
        leaks=leaks,
        max_leaks=MAX_LEAKS,
    )


def _pictures(key: str, members: dict[str, bytes]) -> list[Image.Image]:
    if "mp4" in members:
        frames, _ = sample_frames(members["mp4"], 3, offsets=FIRST_MIDDLE_LAST, key=key)
        return [Image.fromarray(frame) for frame in frames]
    names = parse_meta(key, members).jpegs
    chosen = [names[index] for index in segment_frames(len(names), 3, FIRST_MIDDLE_LAST)]
    return [Image.fromarray(decode_jpeg(members[n], key=key, member=n)) for n in chosen]


def _distributions(statistics: DatasetStatistics) -> Iterator[tuple[str, str, str, Distribution]]:
    """Yields (title, unit, counted objects, values) of each distribution."""
    candidates = (
        ("Caption length", "words", "captions", statistics.captions.words),
        ("Captions per video", "captions", "videos", statistics.captions_per_video),
        ("Duration", "s", "samples", statistics.duration_s),
        ("Frame rate", "frames/s", "samples", statistics.frame_rate_hz),
        ("Short side of the source", "pixels", "samples", statistics.short_side),
        ("Aspect ratio of the source", "width / height", "samples", statistics.aspect),
        ("Sample size", "bytes", "samples", statistics.sample_bytes),
        ("Samples per shard", "samples", "shards", statistics.samples_per_shard),
    )
    for title, unit, counted, values in candidates:
        if values is not None:
            yield title, unit, counted, values


def _charts(statistics: DatasetStatistics) -> Iterator[tuple[str, Markup]]:
    for title, unit, counted, values in _distributions(statistics):
        if values.most == values.least:
            continue  # the table shows a constant well enough
        svg = histogram_svg(values, name=title, x_label=unit, y_label=counted)
        # Safe: the drawing contains only numbers and the titles above.
        yield title, Markup(svg)
