"""`tvr stats`: statistics against a naive count, and the samples that the page shows."""

from __future__ import annotations

import base64
import json
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from builders.clip_files import make_dataset, read_number, write_clips
from builders.html_page import Page
from builders.http_store import serve_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tvr.data_prep.check import cli as check_cli
from tvr.data_prep.check.distribution import Distribution
from tvr.data_prep.check.stats import (
    DatasetStatistics,
    FactsAccumulator,
    SampleFacts,
    dataset_statistics,
    read_facts,
    shared_captions,
)
from tvr.data_prep.check.stats_page import shown_samples, stats_page
from tvr.data_prep.dataset.manifest import Manifest, SampleTable, Shard, read_manifest
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.storage.storage import Storage


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("frames"), 13)


def statistics_of(url: str, **settings: Any) -> DatasetStatistics:
    manifest = read_manifest(url)
    return dataset_statistics(manifest, read_facts(url, manifest, **settings))


facts = st.builds(
    SampleFacts,
    row=st.just(0),
    video_id=st.sampled_from("uvw"),
    captions=st.lists(st.sampled_from(["a", "b c", "d e f"]), min_size=1, max_size=3).map(tuple),
    duration_s=st.floats(0, 100, width=32),
    frame_rate_hz=st.sampled_from([0.0, 23.976, 25.0]),
    width=st.integers(1, 50),
    height=st.integers(1, 50),
)


def manifest_of(samples: list[tuple[SampleFacts, int]]) -> Manifest:
    """A manifest of samples with these lengths, three per shard; one clip was refused."""
    shard = np.arange(len(samples), dtype=np.int32) // 3
    length = np.array([length for _, length in samples])
    zeros = np.zeros(len(samples), dtype=np.int64)
    return Manifest(
        layout="video",
        num_frames=0,
        short_side=None,
        num_captions=sum(len(each.captions) for each, _ in samples),
        num_empty_captions=4,
        bad={"unreadable": 1},
        shards=tuple(
            Shard(
                name=f"{number}",
                num_samples=int((shard == number).sum()),
                shard_bytes=int(length[shard == number].sum()) + 1024,
                sha256="",
            )
            for number in range(int(shard[-1]) + 1)
        ),
        samples=SampleTable(
            key=np.array([f"c{row}" for row in range(len(samples))]),
            video_id=np.array([each.video_id for each, _ in samples]),
            shard=shard,
            offset=zeros,
            length=length,
            crc32=zeros,
            num_captions=np.array([len(each.captions) for each, _ in samples]),
            content=zeros,
        ),
    )


@given(
    st.lists(st.tuples(facts, st.integers(1, 9).map(lambda n: 512 * n)), min_size=1, max_size=9),
    st.integers(0, 9),
)
def test_statistics_equal_a_naive_count(
    samples: list[tuple[SampleFacts, int]], border: int
) -> None:
    first, rest = FactsAccumulator(), FactsAccumulator()
    for index, (each, _) in enumerate(samples):
        (first if index < border else rest).add(each)
    rest.unread["checksum"] += 1
    first.merge(rest)
    found = dataset_statistics(manifest_of(samples), first)
    all_facts = [each for each, _ in samples]
    assert found.num_samples == found.num_read == len(samples)
    assert found.num_videos == len({each.video_id for each in all_facts})
    texts = [text for each in all_facts for text in each.captions]
    assert (found.num_captions, found.captions.num_captions) == (len(texts), len(texts))
    assert found.num_bytes == sum(length for _, length in samples) + 1024 * -(-len(samples) // 3)
    per_video = Counter[str]()
    for each in all_facts:
        per_video[each.video_id] += len(each.captions)
    assert_summarises(found.captions_per_video, list(per_video.values()))
    assert_summarises(found.captions.words, [len(text.split()) for text in texts])
    assert_summarises(found.duration_s, [each.duration_s for each in all_facts])
    assert_summarises(found.frame_rate_hz, [each.frame_rate_hz for each in all_facts])
    assert_summarises(found.short_side, [min(each.width, each.height) for each in all_facts])
    assert_summarises(found.aspect, [each.width / each.height for each in all_facts])
    assert_summarises(found.sample_bytes, [length for _, length in samples])
    assert_summarises(
        found.samples_per_shard, [len(samples[at : at + 3]) for at in range(0, len(samples), 3)]
    )
    assert (found.refused, found.unread) == ({"unreadable": 1}, {"checksum": 1})


def assert_summarises(found: Distribution | None, values: list[Any]) -> None:
    assert found is not None
    assert (found.count, found.least, found.most) == (len(values), min(values), max(values))
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert sum(found.counts) + found.num_beyond == len(values)


def test_statistics_of_packed_clips(url: str) -> None:
    found = statistics_of(url)
    assert (found.num_samples, found.num_read, found.num_videos) == (13, 13, 13)
    for values, expected in (
        (found.duration_s, 0.4),
        (found.frame_rate_hz, 10),
        (found.short_side, 32),
        (found.aspect, 2),
    ):
        assert values is not None
        assert (values.count, values.least, values.most) == (13, expected, expected)
    assert found.captions.num_captions == found.num_captions == 25
    assert found.samples_per_shard is not None
    assert (found.samples_per_shard.count, found.samples_per_shard.least) == (3, 3)


def test_selected_samples_are_evenly_spaced_and_read_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[tuple[str, int, int]] = []
    read_range = Storage.read_range

    def recorded(self: Storage, name: str, start: int, end: int, *more: Any) -> bytes:
        if name.endswith(".tar"):
            requested.append((name, start, end))
        return read_range(self, name, start, end, *more)

    monkeypatch.setattr(Storage, "read_range", recorded)
    reported: list[tuple[int, int]] = []
    found = statistics_of(url, samples=3, jobs=1, on_bytes=lambda *each: reported.append(each))
    samples = read_manifest(url).samples
    assert [(name, start, end - start) for name, start, end in requested] == [
        (f"shard-00000{row // 5}.tar", int(samples.offset[row]), int(samples.length[row]))
        for row in (2, 6, 10)
    ]
    assert (found.num_read, found.num_samples, found.captions.num_captions) == (3, 13, 6)
    assert reported[-1] == (sum(end - start for _, start, end in requested),) * 2
    assert "describe 3 samples, evenly spaced over all 13" in text_of(found, url)
    with pytest.raises(ValueError, match="samples=0 must be 1 or more"):
        statistics_of(url, samples=0)


def test_a_store_that_fails_every_third_read_gives_the_same_statistics(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvr.data_prep.storage.retries.FIRST_WAIT_S", 0)
    expected = statistics_of(url)
    with serve_folder(Path(url)) as store:
        store.fail_every_third_of_a_file()
        assert statistics_of(store.url, jobs=3) == expected
        shown = shown_samples(store.url, read_manifest(store.url), 4)
    assert shown == shown_samples(url, read_manifest(url), 4)


def text_of(statistics: DatasetStatistics, url: str) -> str:
    shown = shown_samples(url, read_manifest(url), 2)
    return Page(stats_page("name", statistics, shown, {})).text


def assert_self_contained(html: str) -> None:
    """Asserts that a page has no script, no external reference, and no broken internal one."""
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.findall(r"https?:|@import", html)
    targets = re.findall(r"url\(([^)]*)\)", html)
    targets += [str(value) for _, some in page.tags for key, value in some.items() if "href" in key]
    assert targets
    assert all(target.startswith("#") for target in targets)
    sources = [str(image["src"]) for image in page.named("img")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert {target[1:] for target in targets} <= set(names)


def pictures(source: str) -> list[int]:
    """The numbers shown by a strip of three pictures of 64 x 32."""
    strip = np.asarray(Image.open(BytesIO(base64.b64decode(source.partition(",")[2]))))
    assert strip.shape == (32, 3 * 64 + 2, 3)
    return [read_number(strip[:, left : left + 64]) for left in (0, 65, 130)]


@pytest.mark.parametrize("layout", ["frames", "video"])
def test_the_page_shows_first_middle_and_last_frames(tmp_path: Path, layout: str) -> None:
    url = make_dataset(tmp_path, 9, layout=layout)
    out = tmp_path / "page.html"
    assert check_cli.stats([url, "--out", str(out), "--pictures", "3"]) == 0
    html = out.read_text()
    assert_self_contained(html)
    images = Page(html).named("img")
    # The four frames of clip i show the numbers from 8 i.
    assert [pictures(str(image["src"])) for image in images] == [
        [8 * clip, 8 * clip + 2, 8 * clip + 3] for clip in (1, 4, 7)
    ]
    assert [image["alt"] for image in images] == [f"frames of sample c0{i}" for i in (1, 4, 7)]
    for clip in (1, 4, 7):
        assert f"c0{clip} caption 0 of clip {clip}" in " ".join(Page(html).text.split())
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]


CAPTIONS = (
    ("A man plays.", "someone sings"),
    ("a man  plays",),
    ("A MAN PLAYS!", "<b>x</b>"),
    ("<b>X</b>", "a dog"),
    ("nobody",),
)


@pytest.fixture(scope="module")
def equal_captions(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five videos of one frame, three of which have the same caption."""
    folder = tmp_path_factory.mktemp("equal")
    clips = [
        replace(clip, captions=captions)
        for clip, captions in zip(write_clips(folder, len(CAPTIONS)), CAPTIONS, strict=True)
    ]
    url = str(folder / "data")
    pack_shards(clips, url, layout="frames", num_frames=1, samples_per_shard=2)
    return url


def test_captions_of_several_videos_are_listed_and_predicted(
    equal_captions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, report = tmp_path / "page.html", tmp_path / "stats.json"
    line = [equal_captions, "--out", str(page), "--pictures", "0"]
    assert check_cli.stats([*line, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["most_shared"] == [
        {"text": "A man plays.", "num_videos": 3, "key": "c00"},
        {"text": "<b>x</b>", "num_videos": 2, "key": "c02"},
    ]
    captions = found["captions"]
    assert [captions[name] for name in ("num_captions", "num_shared", "num_sharing")] == [8, 2, 5]
    # Of the ten pairs of videos: 0-1, 0-2, 1-2 by the first caption, and 2-3 by the other.
    probability = (1 / 2 + 1 / 4 + 1 / 2 + 1 / 4) / 10
    assert captions["equal_probability"] == pytest.approx(probability)
    whole, rest = divmod(found["batch"], 5)
    both = whole**2 + 2 * whole * rest / 5 + rest * (rest - 1) / 20
    assert found["batch"] == 1024
    assert found["equal_pairs_in_batch"] == pytest.approx(10 * both * probability)
    printed = capsys.readouterr().out
    assert "captions that another video has as well: 5 (62.50 %); 62,914 pairs" in printed
    text = " ".join(Page(page.read_text()).text.split())
    assert "equal to one of another video 5 (62.50 %)" in text
    assert "A man plays.3c00 <b>x</b>2c02" in text
    assert "<b>x</b>" not in page.read_text()
    assert check_cli.stats([*line, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_sample_that_cannot_be_read_again_leaves_its_caption_empty(
    equal_captions: str, tmp_path: Path
) -> None:
    copy = str(tmp_path / "copy")
    shutil.copytree(equal_captions, copy)
    manifest = read_manifest(copy)
    read = read_facts(copy, manifest)
    (tmp_path / "copy" / "shard-000000.tar").unlink()
    first, second = shared_captions(copy, manifest, read)
    assert (first.text, first.num_videos, first.key) == ("", 3, "c00")
    assert (second.text, second.key) == ("<b>x</b>", "c02")


def test_charts_show_only_values_that_vary(url: str) -> None:
    page = Page(stats_page("name", statistics_of(url), [], {}))
    labels = [svg["aria-label"] for svg in page.named("svg")]
    assert labels == ["Captions per video", "Samples per shard"]
    assert "Frame rate" in page.text


def test_refused_and_unreadable_samples_are_counted(url: str, tmp_path: Path) -> None:
    damaged = str(tmp_path / "damaged")
    shutil.copytree(url, damaged)
    (tmp_path / "damaged" / "shard-000000.tar").unlink()
    second = tmp_path / "damaged" / "shard-000001.tar"
    second.write_bytes(second.read_bytes()[:-3000])
    manifest = replace(read_manifest(damaged), bad={"no_frames": 7})
    found = dataset_statistics(manifest, read_facts(damaged, manifest))
    assert found.unread == {"checksum": 1, "missing_shard": 5}
    assert found.num_read == 7
    shown = shown_samples(damaged, manifest, 13)
    assert [sample.key for sample in shown if sample.problem] == [
        *(f"c0{row}" for row in range(5)),
        "c09",
    ]
    page = Page(stats_page("name", found, shown, {}))
    assert len(page.named("img")) == 7
    for wanted in ("missing_shard", "checksum", "no_frames", "the file is truncated"):
        assert wanted in page.text
    everything = FactsAccumulator()
    everything.unread["missing_shard"] = 13
    text = text_of(dataset_statistics(manifest, everything), damaged)
    assert "Duration" not in text


def test_all_text_from_the_data_is_escaped(url: str) -> None:
    hostile = '<script>alert("x")</script>'
    (sample,) = shown_samples(url, read_manifest(url), 1)
    bad = replace(sample, key=hostile, captions=(hostile,), problem=hostile)
    html = stats_page(hostile, statistics_of(url), [bad], {hostile: []})
    assert "<script" not in html
    assert Page(html).text.count("alert") == 6


def test_the_command_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    copy = str(tmp_path / "copy")
    shutil.copytree(url, copy)
    (tmp_path / "copy" / "shard-000002.tar").unlink()
    assert check_cli.stats([copy, "--out", str(out), "--against", url]) == 0
    printed = capsys.readouterr()
    assert f"{copy}: 10 of 13 samples read, 25 captions of 13 videos; see {out}" in printed.out
    assert "3 samples could not be read" in printed.out
    assert f"samples in common with {url}: 13 pairs" in printed.out
    assert printed.err == ""
    text = Page(out.read_text()).text
    assert "Pairs of equal samples: 13" in text
    assert "same key and video_id and content as c00" in text
    assert check_cli.stats([url, "--pictures", "-1"]) == 2
    assert check_cli.stats([url, "--jobs", "0"]) == 2
    assert check_cli.stats([str(tmp_path / "none")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2][:12] for line in errors[:2]] == ["pictures=-1 ", "jobs=0 must "]
    assert len(errors) == 3


def with_long_last_frame(video: bytes, seconds: int) -> bytes:
    """The same packets, of which the last one is said to be shown for so many seconds."""
    written = BytesIO()
    with av.open(BytesIO(video)) as source, av.open(written, "w", "mp4") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        assert packets[-1].time_base is not None
        packets[-1].duration = int(seconds / packets[-1].time_base)
        for packet in packets:
            packet.stream = stream
            copy.mux(packet)
    return written.getvalue()


def test_the_times_of_the_frames_count_not_those_of_the_container(tmp_path: Path) -> None:
    """Two videos of 12 frames, 10 a second; by its header one lasts 4.1 s, at 2.9 a second."""
    (tmp_path / "videos").mkdir()
    clips = write_clips(tmp_path / "videos", 2, num_frames=12)
    lying = Path(clips[1].video)
    lying.write_bytes(with_long_last_frame(lying.read_bytes(), 3))
    url = str(tmp_path / "data")
    pack_shards(clips, url, layout="video", processes=0)
    with tarfile.open(next((tmp_path / "data").glob("*.tar"))) as shard:
        noted = [shard.extractfile(each) for each in shard if each.name.endswith(".json")]
        stated = [json.load(each)["duration_s"] for each in noted if each is not None]
    assert sorted(stated) == pytest.approx([1.2, 4.1])
    found = statistics_of(url)
    for values, expected in ((found.duration_s, 1.2), (found.frame_rate_hz, 10)):
        assert values is not None
        assert (values.count, values.least, values.most) == (2, expected, expected)
