"""Writes stats.html, one page that needs nothing else: what a data set holds, to look at."""

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
MOST_LEAKS = 100
# The first frame, the middle one and, a share just below 1 of the last third, the last.
FIRST_MIDDLE_LAST = (0.0, 0.5, 1 - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """A sample to look at: its pictures as one data URL, or why there are none."""

    key: str
    captions: tuple[str, ...]
    pictures: str
    problem: str


def shown_samples(url: str, manifest: Manifest, count: int) -> list[ShownSample]:
    """`count` samples spread evenly over the data set: the middles of as many equal parts."""
    store, shown = Storage(url), []
    for row in segment_frames(manifest.num_samples, count) if count else ():
        key = str(manifest.samples.key[row])
        shard = manifest.file_of_shard(int(manifest.samples.shard[row]))
        captions: tuple[str, ...] = ()
        pictures = problem = ""
        try:
            members = read_members(
                SequentialShard(store, shard, ReadMeter(0, None), ahead=0), manifest, row
            )
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
    """The page. `leaks` are those with each other data set that this one was held against."""
    return page_template(Path(__file__).parent, "stats.html.jinja").render(
        name=name,
        statistics=statistics,
        captions=statistics.captions,
        long_words=LONG_WORDS,
        readable=readable,
        shown=shown,
        charts=list(_charts(statistics)),
        rows=[(title, unit, values) for title, unit, _, values in _measured(statistics)],
        leaks=leaks,
        most_leaks=MOST_LEAKS,
    )


def _pictures(key: str, members: dict[str, bytes]) -> list[Image.Image]:
    if "mp4" in members:
        frames, _ = sample_frames(members["mp4"], 3, offsets=FIRST_MIDDLE_LAST, key=key)
        return [Image.fromarray(frame) for frame in frames]
    names = parse_meta(key, members).jpegs
    chosen = [names[index] for index in segment_frames(len(names), 3, FIRST_MIDDLE_LAST)]
    return [Image.fromarray(decode_jpeg(members[n], key=key, member=n)) for n in chosen]


def _measured(statistics: DatasetStatistics) -> Iterator[tuple[str, str, str, Distribution]]:
    """Title, unit, what is counted, values."""
    each = (
        ("Caption length", "words", "captions", statistics.captions.words),
        ("Captions of a video", "captions", "videos", statistics.captions_per_video),
        ("Duration", "s", "samples", statistics.duration_s),
        ("Frame rate", "frames/s", "samples", statistics.frame_rate_hz),
        ("Short side of the source", "pixels", "samples", statistics.short_side),
        ("Aspect of the source", "width / height", "samples", statistics.aspect),
        ("Size of a sample", "bytes", "samples", statistics.sample_bytes),
        ("Samples in a shard", "samples", "shards", statistics.samples_per_shard),
    )
    for title, unit, of_what, values in each:
        if values is not None:
            yield title, unit, of_what, values


def _charts(statistics: DatasetStatistics) -> Iterator[tuple[str, Markup]]:
    for title, unit, of_what, values in _measured(statistics):
        if values.most == values.least:
            continue  # the table says it all
        svg = histogram_svg(values, name=title, x_label=unit, of_what=of_what)
        # Our own drawing of numbers: nothing in it to escape.
        yield title, Markup(svg)
