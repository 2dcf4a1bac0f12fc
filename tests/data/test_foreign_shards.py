"""`tvr adopt`: shards that other tools wrote become a data set where they lie."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
from builders.batches import evaluation, training
from builders.clip_files import file_contents, numbered_video
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from tvr.data_prep.adoption import adopt as adopt_module
from tvr.data_prep.adoption.adopt import adopt_shards, find_tars
from tvr.data_prep.adoption.cli import adopt
from tvr.data_prep.adoption.index_tar import (
    ForeignTar,
    KnownSamples,
    Watcher,
    always_prefix,
    index_tar,
    key_of_sample,
)
from tvr.data_prep.adoption.tar_pool import TarWorker, index_tars
from tvr.data_prep.check.cli import stats, verify
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.dataset.foreign_samples import ForeignRules, translate_range
from tvr.data_prep.dataset.foreign_tar import sample_files
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.limited_process import ProcessLimits
from tvr.data_prep.packing.shard_record import ShardRecord
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample, ShardCorrupt, TooManyBadSamples
from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.video.decode import sample_frames
from tvr.data_prep.video.images import fit_square

RULES = ForeignRules()
VIDEOS = [numbered_video(8, first=10 * n) for n in range(6)]


def meta(key: str, **fields: Any) -> dict[str, Any]:
    """The JSON of video2dataset."""
    return {
        "url": f"https://example.org/{key}",
        "key": key,
        "status": "success",
        "error_message": None,
        "video_metadata": {"streams": []},
        "clips": [[0.0, 1.0]],
        **fields,
    }


def write_tar(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Writes samples as video2dataset does: webdataset's writer, whose dates need pax headers."""
    with open(path, "wb") as file, TarWriter(file) as writer:
        for sample in samples:
            writer.write(sample)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two archives: 4 good samples, and 4 bad ones for different reasons."""
    folder = tmp_path_factory.mktemp("source")
    keys = [f"00000_0000{n}" for n in range(5)]
    write_tar(
        folder / "00000.tar",
        [
            {"__key__": keys[0], "mp4": VIDEOS[0], "txt": "a  dog", "json": meta(keys[0])},
            {
                "__key__": keys[1],
                **{"mp4": b"no video" * 99, "txt": "x", "json": meta(keys[1])},
            },
            {
                "__key__": keys[2],
                **{"mp4": VIDEOS[2], "m4a": b"sound", "jpg": b"cover"},
                "json": meta(keys[2], caption="a cat", captions=["a cat", "one &amp; two"]),
            },
            {
                "__key__": keys[3],
                **{"txt": "gone", "json": meta(keys[3], status="failed_to_download")},
            },
            {"__key__": keys[4], "mp4": VIDEOS[3], "txt": " ", "json": meta(keys[4])},
        ],
    )
    write_tar(
        folder / "00001.tar",
        [
            {"__key__": "00001_00000", "webm": VIDEOS[4], "txt": "a bird"},
            {"__key__": "00001_00001", "mp4": VIDEOS[5], "txt": "a fish", "json": b"{"},
            {
                "__key__": "00001_00002",
                **{"mp4": VIDEOS[5], "txt": "a fish", "json": meta("x", video_id="fish")},
            },
        ],
    )
    (folder / "00000.parquet").write_bytes(b"other")
    (folder / "00000_stats.json").write_text("{}")
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "shards"))


@pytest.fixture(scope="module")
def adopted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after `tvr adopt` with two processes."""
    copy = tmp_path_factory.mktemp("adopted") / "shards"
    shutil.copytree(source, copy)
    assert adopt([str(copy), "--max-bad", "4", "--processes", "2"]) == 0
    return copy


def test_an_index_is_made_beside_archives_that_stay_as_they_are(
    source: Path, adopted: Path
) -> None:
    before, after = file_contents(source), file_contents(adopted)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"manifest.json", "samples.rows", "bad.jsonl"}
    manifest = read_manifest(str(adopted))
    assert manifest.samples.key.tolist() == [
        *("00000_00000", "00000_00002", "00001_00000", "00001_00002"),
    ]
    assert manifest.samples.video_id.tolist() == [
        *("https://example.org/00000_00000", "https://example.org/00000_00002"),
        *("00001_00000", "fish"),
    ]
    assert manifest.samples.num_captions.tolist() == [1, 2, 1, 1]
    assert manifest.bad == {"missing_member": 1, "no_caption": 1, "unreadable": 2}
    bad = [json.loads(line) for line in (adopted / "bad.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["reason"]) for entry in bad] == [
        ("00000_00001", "unreadable"),
        ("00000_00003", "missing_member"),
        ("00000_00004", "no_caption"),
        ("00001_00001", "unreadable"),
    ]
    assert "status='failed_to_download' [00000.tar: 00000_00003, byte " in bad[1]["detail"]


def test_an_adopted_data_set_is_verified_described_and_read(
    adopted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify([str(adopted)]) == 0
    assert "4 samples in 2 shards" in capsys.readouterr().out
    assert stats([str(adopted), "--out", str(tmp_path / "page.html")]) == 0
    assert "4 of 4 samples read, 5 captions of 4 videos" in capsys.readouterr().out
    reader = SampleReader(str(adopted), num_frames=4, image_size=32)
    samples = [reader.read(row) for row in range(4)]
    assert [tuple(caption.text for caption in sample.captions) for sample in samples] == [
        *(("a dog",), ("a cat", "one & two"), ("a bird",), ("a fish",)),
    ]
    for sample, video in zip(samples, (VIDEOS[n] for n in (0, 2, 4, 5)), strict=True):
        frames, times_s = sample_frames(video, 4)
        assert (sample.frames == fit_square(frames, 32)).all()
        assert sample.frame_times_s == times_s


def test_training_and_evaluation_read_an_adopted_data_set(adopted: Path) -> None:
    batches = list(islice(training(str(adopted), global_batch=2, micro_batch=2), 2))
    keys = sorted(key for batch in batches for key in batch.keys)
    assert keys == ["00000_00000", "00000_00002", "00001_00000", "00001_00002"]
    assert not any(batch.replaced for batch in batches)
    texts = [text for batch in evaluation(str(adopted)) for text in batch.captions]
    assert texts == ["a dog", "a cat", "one & two", "a bird", "a fish"]


def test_processes_and_stores_give_the_same_index(adopted: Path, folder: Path) -> None:
    adopt_shards(str(folder), max_bad=4, processes=1)
    assert file_contents(folder) == file_contents(adopted)
    fs = fsspec.filesystem("memory")
    fs.put(str(folder / "00000.tar"), "/foreign/00000.tar")
    fs.put(str(folder / "00001.tar"), "/foreign/00001.tar")
    try:
        adopt_shards("memory://foreign", max_bad=4, processes=0)
        for name in ("manifest.json", "samples.rows", "bad.jsonl"):
            assert fs.cat(f"/foreign/{name}") == (folder / name).read_bytes()
        assert verify_dataset("memory://foreign").problems == ()
    finally:
        fs.rm("/foreign", recursive=True)


def test_verify_sees_a_changed_byte_of_an_adopted_archive(adopted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adopted, tmp_path / "copy"))
    content = bytearray((copy / "00001.tar").read_bytes())
    content[int(read_manifest(str(copy)).samples.offset[3]) + 3000] ^= 1
    (copy / "00001.tar").write_bytes(content)
    problems = verify_dataset(str(copy)).problems
    assert [problem.where for problem in problems] == ["00001.tar: 00001_00002", "00001.tar"]


def test_too_many_bad_samples_publish_nothing_and_a_larger_limit_resumes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt([str(folder), "--max-bad", "3", "--processes", "1"]) == 2
    assert "4 bad samples while adopting" in capsys.readouterr().err
    assert not (folder / "manifest.json").exists()
    assert sorted(path.name for path in folder.glob(".adopting/*")) == [
        "00000.tar.json",
        "00001.tar.json",
    ]
    read: list[str] = []

    def spy(url: str, tars: list[ForeignTar], *arguments: Any) -> Any:
        read.extend(tar.name for tar in tars)
        return index_tars(url, tars, *arguments)

    monkeypatch.setattr(adopt_module, "index_tars", spy)
    os.utime(folder / "00001.tar", (1, 1))  # as if it were another file
    assert adopt([str(folder), "--max-bad", "4", "--processes", "1"]) == 0
    assert read == ["00001.tar"]
    assert not (folder / ".adopting").exists()


def test_a_folder_is_adopted_again_only_on_request(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt([str(folder), "--max-bad", "4", "--processes", "1"]) == 0
    assert adopt([str(folder), "--max-bad", "4"]) == 2
    assert "is adopted already; --overwrite adopts it again" in capsys.readouterr().err
    write_tar(folder / "00002.tar", [{"__key__": "00002_0", "mp4": VIDEOS[1], "txt": "new"}])
    assert adopt([str(folder), "--max-bad", "4", "--processes", "1", "--overwrite"]) == 0
    assert read_manifest(str(folder)).num_samples == 5
    assert [path.name for path in folder.glob("samples*")] == ["samples-1.rows"]


def test_a_folder_that_cannot_be_adopted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*more: str) -> str:
        assert adopt([str(tmp_path), "--processes", "1", *more]) == 2
        return capsys.readouterr().err

    assert "no file *.tar" in error()
    (tmp_path / "0.tar.gz").write_bytes(b"")
    assert "decompress 0.tar.gz" in error()
    (tmp_path / "a b.tar").write_bytes(b"")
    assert "a b.tar: rename the file" in error()
    (tmp_path / "a b.tar").rename(tmp_path / "0.tar")
    assert "1 bad samples while adopting" in error()
    assert "no usable sample" in error("--max-bad", "1")
    assert "different names" in error("--captions", "txt", "txt")
    (tmp_path / "manifest.json").write_text('{"format_version": 3}')
    assert "a data set of tvr pack" in error("--overwrite")


def test_captions_come_from_the_named_sources(tmp_path: Path) -> None:
    fields = meta("k", title="a title", captions=["one", None, "two"])
    write_tar(tmp_path / "0.tar", [{"__key__": "0k", "mp4": VIDEOS[0], "txt": "t", "json": fields}])
    for captions, expected in (
        (("txt", "caption", "captions"), ("t", "one", "two")),
        (("title", "txt"), ("a title", "t")),
    ):
        adopt_shards(str(tmp_path), captions=captions, overwrite=True)
        sample = SampleReader(str(tmp_path), num_frames=1, image_size=8).read(0)
        assert tuple(caption.text for caption in sample.captions) == expected


def test_an_index_with_other_rules_is_refused(adopted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adopted, tmp_path / "copy"))
    fields = json.loads((copy / "manifest.json").read_text())
    good = {"captions": ["txt"], "tars": ""}
    for rules in (
        *({**good, "captions": []}, {**good, "captions": ["a\nb"]}, {**good, "captions": "txt"}),
        *({**good, "tars": 1}, {**good, "tars": "a\nb"}, {"captions": ["txt"]}, [1]),
    ):
        (copy / "manifest.json").write_text(json.dumps(fields | {"foreign": rules}))
        with pytest.raises(ShardCorrupt, match=r"captions|foreign|tars"):
            read_manifest(str(copy))


def test_an_index_may_lie_in_another_folder(
    source: Path, adopted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_contents(source)
    out = tmp_path / "index"
    command = [str(source), "--out", str(out), "--max-bad", "4", "--processes", "0"]
    assert adopt(command) == 0
    assert file_contents(source) == before
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", "samples.rows", "bad.jsonl"}
    assert (out / "samples.rows").read_bytes() == (adopted / "samples.rows").read_bytes()
    assert verify([str(out)]) == 0
    assert stats([str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert "4 of 4 samples read" in capsys.readouterr().out
    texts = [text for batch in evaluation(str(out)) for text in batch.captions]
    assert texts == ["a dog", "a cat", "one & two", "a bird", "a fish"]
    # An index from elsewhere must not make this machine read its own files.
    fs = fsspec.filesystem("memory")
    fs.put(str(out), "/hostile", recursive=True)
    try:
        with pytest.raises(ShardCorrupt, match=r"tars=.* must be a URL, because the index"):
            read_manifest("memory://hostile")
    finally:
        fs.rm("/hostile", recursive=True)


# ------------------------------------------------------------------ archives


def archive(*members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of plain files, without the end of an archive."""
    content = b""
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        content += info.tobuf(form) + data + bytes(-len(data) % 512)
    return content


SPARSE = {"GNU.sparse.realsize": "9"}


def special(name: str, kind: bytes, form: int = tarfile.GNU_FORMAT, **more: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in more.items():
        setattr(info, field, value)
    return info.tobuf(form)


def found(content: bytes) -> list[tuple[str, list[str], str]]:
    """(name, extensions, problem) of the samples of an archive."""
    samples = sample_files(lambda at, length: content[at : at + length], len(content))
    return [(sample.name, sorted(sample.members), sample.problem[:7]) for sample in samples]


LONG = "folder/" + "x" * 300


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize(
    "name", ["a", "./a", "b/a", LONG, "\u8996\u983b", "c d (1)"], ids=lambda n: ascii(n)[:20]
)
def test_any_name_in_an_archive_is_found(name: str, form: int) -> None:
    content = archive((f"{name}.MP4", b"1"), (f"{name}.txt", b"2"), form=form) + bytes(1024)
    assert found(content) == [(name.removeprefix("./"), ["mp4", "txt"], "")]


def test_what_is_no_sample_is_passed_over() -> None:
    content = (
        special("./", tarfile.DIRTYPE)
        + special("pax_global_header", tarfile.XGLTYPE)
        + archive(("README", b"x"), ("._a.mp4", b"x"), ("__meta__.info__", b"x"), ("a.mp4", b"1"))
        + bytes(1024)
        + archive(("b.mp4", b"1"))  # archives joined with cat
    )
    assert found(content) == [("a", ["mp4"], ""), ("b", ["mp4"], "")]


def test_damage_costs_the_damaged_samples_only() -> None:
    whole = archive(*((f"{n}.{kind}", b"1" * 600) for n in "abcd" for kind in ("mp4", "txt")))
    at = whole.index(b"b.mp4")
    assert found(whole[:at] + b"\xff" * 300 + whole[at + 300 :]) == [
        *(("a", ["mp4", "txt"], ""), ("", [], "bytes 3"), ("b", ["txt"], "")),
        *(("c", ["mp4", "txt"], ""), ("d", ["mp4", "txt"], "")),
    ]
    assert found(whole[:-512])[-2:] == [("d", ["mp4"], ""), ("", [], "bytes 1")]
    assert found(b"<html>no archive</html>") == [("", [], "bytes 0")]


@pytest.mark.parametrize(
    "content",
    [
        special("a.mp4", tarfile.SYMTYPE, linkname="/etc/passwd"),
        special("a.mp4", tarfile.LNKTYPE, linkname="b.mp4"),
        special("a.mp4", tarfile.FIFOTYPE),
        special("a.mp4", tarfile.CHRTYPE),
        special("a.mp4", tarfile.GNUTYPE_SPARSE),
        special("a.mp4", tarfile.REGTYPE, form=tarfile.PAX_FORMAT, pax_headers=SPARSE),
        archive(("../a.mp4", b"1")),
        archive(("/a.mp4", b"1")),
        archive(("x/../../a.mp4", b"1")),
        archive(("a.mp4", b"1"), ("a.mp4", b"2")),
        archive(("a.mp4", b"1"), ("b.mp4", b"2")),
        special("a.mp4", tarfile.REGTYPE, size=1 << 40),
        special("a.mp4", tarfile.XHDTYPE, size=1 << 30),
        b"\xff" * 1024,
        b"",
    ],
    ids=[
        *("symlink", "hardlink", "fifo", "device", "sparse", "pax sparse", "parent", "absolute"),
        *("nested parent", "twice", "two samples", "size", "long header", "no tar", "nothing"),
    ],
)
def test_hostile_archives_are_bad_samples(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(BadSample) as caught:
        translate_range(content, "k", RULES)
    assert caught.value.reason in ("unreadable", "missing_member")
    # Indexing never takes such a file for a good sample, and never fails.
    (tmp_path / "0.tar").write_bytes(content)
    tar = ForeignTar(name="0.tar", num_bytes=len(content), version="", always_prefix=False)
    record = index_tar(Storage(str(tmp_path)), tar, RULES, KnownSamples(), Watcher())
    assert not record.files
    assert record.bad


@settings(max_examples=50)
@given(st.data())
def test_any_damage_gives_samples_or_bad_samples(data: st.DataObject) -> None:
    content = bytearray(archive(("a.mp4", b"1" * 900), ("a.txt", b"2"), ("b.mp4", b"3")))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    ends = [0]
    read = bytes(content)
    for sample in sample_files(lambda at, length: read[at : at + length], len(read)):
        assert ends[-1] <= sample.start < sample.end <= len(read)
        ends.append(sample.end)
    try:
        members = translate_range(read, "k", RULES)
    except BadSample:
        return
    assert len(members["mp4"]) <= len(read)


@pytest.mark.parametrize(
    "fields",
    [b"[1]", b"[" * 100_000, b"\xff", json.dumps({"caption": {"a": 1}}).encode()],
    ids=["list", "deep", "not UTF-8", "caption"],
)
def test_hostile_json_of_another_tool_is_a_bad_sample(fields: bytes) -> None:
    content = archive(("a.mp4", b"1"), ("a.json", fields), ("a.txt", b"x"))
    with pytest.raises(BadSample) as caught:
        translate_range(content, "k", RULES)
    assert caught.value.reason == "unreadable"


def test_a_caption_of_half_a_character_is_a_bad_sample() -> None:
    content = archive(("a.mp4", b"1"), ("a.json", b'{"caption": "\\ud800"}'))
    with pytest.raises(BadSample, match="surrogates"):
        translate_range(content, "k", RULES)


# ---------------------------------------------------------------------- keys


def tar(name: str, *, prefix: bool = False) -> ForeignTar:
    return ForeignTar(name=name, num_bytes=0, version="", always_prefix=prefix)


def test_keys_are_the_names_of_samples_and_unique_in_a_folder(tmp_path: Path) -> None:
    assert key_of_sample("00000_00012", tar("00000.tar")) == "00000_00012"
    assert key_of_sample("000000012", tar("00000.tar")) == "000000012"
    assert key_of_sample("cat", tar("a.tar")) == "a_cat"
    odd = {
        key_of_sample(name, tar("s.tar"))
        for name in ("a b", "a_b", "a/b", "\u8996", "\u983b", "x" * 90, "x" * 91)
    }
    assert len(odd) == 7
    assert max(map(len, odd)) <= 80
    assert always_prefix({"1.tar", "12.tar"})
    assert not always_prefix({"01.tar", "12.tar"})
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [{"__key__": "1", "mp4": VIDEOS[0], "txt": "x"}])
    manifest = adopt_shards(str(tmp_path))
    assert manifest.samples.key.tolist() == ["a_1", "b_1"]
    # Without a JSON, each name is a video of its own, and verify sees that they are the same.
    assert [problem.what[:22] for problem in verify_dataset(str(tmp_path)).problems] == [
        "same content as a_1, b"
    ]


def test_two_samples_of_one_name(tmp_path: Path) -> None:
    sample = {"__key__": "0", "mp4": VIDEOS[0], "txt": "x"}
    write_tar(tmp_path / "0.tar", [sample, {**sample, "__key__": "1"}, sample])
    with pytest.raises(TooManyBadSamples, match="a second sample of this name; the first begins"):
        adopt_shards(str(tmp_path))


# ----------------------------------------------------------------- processes


def test_a_process_that_is_killed_costs_no_good_sample(tmp_path: Path) -> None:
    """Each process is stopped in its first video, and killed: the next one goes on."""
    for number in range(2):
        name = f"0{number}"
        write_tar(
            tmp_path / f"{name}.tar",
            [
                {"__key__": f"{name}_{n}", "mp4": numbered_video(250, first=n), "txt": "x"}
                for n in range(3)
            ],
        )
    tars = find_tars(str(tmp_path))
    expected = dict(index_tars(str(tmp_path), tars, RULES, 1))
    before = set(psutil.Process().children(recursive=True))
    killed = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed.is_set():
            for child in set(psutil.Process().children(recursive=True)) - before:
                if child.cpu_times().user > 0.01:
                    child.send_signal(signal.SIGKILL)
                    killed.set()
                    return
            time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    found = {each.name: record for each, record in index_tars(str(tmp_path), tars, RULES, 2)}
    killer.join()
    assert killed.is_set()
    for each, record in expected.items():
        assert found[each.name].bad == record.bad == ()
        assert found[each.name].files[0].shard == record.files[0].shard


@pytest.fixture
def two_videos(tmp_path: Path) -> Iterator[TarWorker]:
    """A process that decodes the first of two videos of an archive."""
    long = {"__key__": "0_long", "mp4": numbered_video(2000), "txt": "x"}
    write_tar(tmp_path / "0.tar", [long, {"__key__": "0_short", "mp4": VIDEOS[0], "txt": "y"}])
    (archive_file,) = find_tars(str(tmp_path))
    worker = TarWorker(str(tmp_path), RULES, ProcessLimits(), 1 << 30, tmp_path / "journal")
    worker.submit(archive_file)
    yield worker
    worker.process.stop()


def wait_until_it_decodes(worker: TarWorker, journal: Path) -> None:
    while not journal.read_bytes().startswith(b"0 begin"):
        assert worker.receive() is None


def record_of(worker: TarWorker) -> ShardRecord:
    while (done := worker.receive()) is None:
        pass
    return done[1]


def test_a_video_that_takes_too_long_twice_is_a_bad_sample(
    two_videos: TarWorker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = two_videos
    for _ in range(2):
        wait_until_it_decodes(worker, tmp_path / "journal")
        os.kill(worker.process.pid or 0, signal.SIGSTOP)
        while worker.process.connection.poll():  # what it sent before
            assert worker.receive() is None
        worker.expire(time.monotonic())
        assert worker.tar is not None
        worker.expire(worker.process.deadline_s)
    record = record_of(worker)
    assert [(entry.key, entry.reason) for entry in record.bad] == [("0_long", "timed_out")]
    assert "[0.tar: 0_long, byte 0]" in record.bad[0].detail
    assert record.files[0].shard.num_samples == 1
    assert caplog.text.count("a new one goes on") == 2


def test_a_video_that_kills_its_process_twice_is_a_bad_sample(
    two_videos: TarWorker, tmp_path: Path
) -> None:
    worker = two_videos
    for signal_number in (signal.SIGKILL, signal.SIGSEGV):
        wait_until_it_decodes(worker, tmp_path / "journal")
        os.kill(worker.process.pid or 0, signal_number)
        first = worker.process.pid
        while worker.process.pid == first:
            assert worker.receive() is None
    record = record_of(worker)
    assert [(entry.key, entry.reason) for entry in record.bad] == [("0_long", "unreadable")]
    assert "ended with SIGSEGV" in record.bad[0].detail


def test_an_archive_that_becomes_shorter_is_named(folder: Path) -> None:
    tars = find_tars(str(folder))
    with open(folder / "00000.tar", "r+b") as file:
        file.truncate(1024)
    with pytest.raises(ValueError, match=r"00000\.tar: ends at byte 1024, had"):
        list(index_tars(str(folder), tars, RULES, 1))


def test_the_bytes_of_an_archive_are_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []
    read_range = Storage.read_range

    def spy(self: Storage, name: str, start: int, end: int) -> bytes:
        ranges.append((start, end))
        return read_range(self, name, start, end)

    monkeypatch.setattr(Storage, "read_range", spy)
    monkeypatch.setattr("tvr.data_prep.adoption.index_tar.CHUNK_BYTES", 1000)
    (first, _) = find_tars(str(folder))
    record = index_tar(Storage(str(folder)), first, RULES, KnownSamples(), Watcher())
    assert ranges[0][0] == 0
    assert [start for start, _ in ranges[1:]] == [end for _, end in ranges[:-1]]
    assert ranges[-1][1] == first.num_bytes
    content = io.BytesIO((folder / "00000.tar").read_bytes())
    with tarfile.open(fileobj=content) as archive_file:
        names = {name.partition(".")[0] for name in archive_file.getnames()}
    assert len(names) == record.files[0].shard.num_samples + len(record.bad)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_video_cut_short_is_a_bad_sample(tmp_path: Path, container: str) -> None:
    whole = numbered_video(60, gop=10, faststart=container == "mp4", container=container)
    cut = whole[: len(whole) * 3 // 4]
    samples = (
        {"__key__": f"0{n}", "mp4": video, "txt": "x"} for n, video in enumerate((cut, whole))
    )
    write_tar(tmp_path / "0.tar", samples)
    manifest = adopt_shards(str(tmp_path), max_bad=1, processes=0)
    assert (manifest.samples.key.tolist(), manifest.bad) == (["01"], {"unreadable": 1})
