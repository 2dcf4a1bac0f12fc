"""Features on disk: what is written comes back, and nothing damaged is read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.exhaustive import further
from builders.file_damage import cut, flip

from tvr.data_prep.records import Replacement, ShardCorrupt
from tvr.trainer.config import ModelConfig
from tvr.trainer.evaluation.stored_features import evaluate_features
from tvr.trainer.features import writer as writing
from tvr.trainer.features.feature_set import (
    DataSource,
    FeatureHeader,
    FeatureSet,
    FeatureWriter,
    StoredType,
    VideoSource,
)
from tvr.trainer.features.stored_file import StoredFile
from tvr.trainer.model.model import Features

WIDTH, FRAMES, WORDS, BLOCKS = 8, 3, 4, 3
HEADER = FeatureHeader(
    model="a model",
    fingerprint="a" * 64,
    settings={"interaction": "att_wti", "neighbour_frames": True, "num_frames": FRAMES},
    stored="fp32",
    num_frames=FRAMES,
    num_words=WORDS,
    width=WIDTH,
    has_logits=True,
)
SOURCE = DataSource(url="data/test", kind="packed", content="b" * 64, num_blocks=BLOCKS)


def unit(*shape: int, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=-1, keepdim=True)


def block(number: int, videos: int = 4, captions: int = 6) -> Features:
    return Features(
        sentence=unit(captions, WIDTH, seed=10 * number),
        words=unit(captions, WORDS, WIDTH, seed=10 * number + 1),
        word_mask=torch.tensor([[2, 1, 1, 0]] * captions),
        frames=unit(videos, FRAMES, WIDTH, seed=10 * number + 2),
        frame_mask=torch.tensor([[1, 1, 0]] * videos),
        word_logits=unit(captions, WORDS, seed=10 * number + 3),
        frame_logits=unit(videos, FRAMES, seed=10 * number + 4),
        margin_hinge=None,
    )


def write_block(writer: FeatureWriter, number: int) -> None:
    writer.write(
        number,
        block(number),
        keys=[f"v{number}_{row}" for row in range(4)],
        captions=[f"caption {number} {row} \u2713" for row in range(6)],
        caption_video=torch.tensor([0, 0, 1, 2, 2, 3]),
        sources=[VideoSource(row=4 * number + row) for row in range(4)],
        frame_times=np.full((4, FRAMES), number),
        left_out=[Replacement(position=99, key="bad", reason="unreadable", detail="x")]
        if number == 1
        else [],
    )


def write_set(folder: Path, stored: StoredType = "fp32", source: DataSource = SOURCE) -> FeatureSet:
    writer = FeatureWriter(folder, replace(HEADER, stored=stored), source)
    for number in range(BLOCKS):
        write_block(writer, number)
    assert writer.publish()
    return FeatureSet.open(folder, verify=True)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features") / "set"
    write_set(folder)
    return folder


@pytest.mark.parametrize(
    ("stored", "error", "dtype"),
    [
        ("fp32", 0.0, torch.float32),
        ("fp16", 2**-11, torch.float16),
        ("int8", 0.5 / 127 + 1e-6, torch.float32),
    ],
    ids=["fp32", "fp16", "int8"],
)
def test_vectors_come_back_within_the_stated_error(
    tmp_path: Path, stored: StoredType, error: float, dtype: torch.dtype
) -> None:
    found = write_set(tmp_path, stored)
    rows = torch.tensor([17, 0, 7])
    texts, videos = found.texts(rows), found.videos(slice(3, 9))
    own = [block(number) for number in range(BLOCKS)]
    sentence = torch.cat([each.sentence for each in own])[rows]
    words = torch.cat([each.words for each in own])[rows]
    frames = torch.cat([each.frames for each in own])[3:9]
    for given, expected in (
        (texts.sentence, sentence),
        (texts.words, words),
        (videos.frames, frames),
    ):
        assert given.dtype == dtype
        assert (given.float() - expected).abs().max() <= error
    logits = torch.cat([each.frame_logits for each in own if each.frame_logits is not None])
    assert torch.equal(videos.frame_logits, logits[3:9])  # type: ignore[arg-type]
    assert texts.word_mask.tolist() == [[2, 1, 1, 0]] * 3
    assert len(videos.sentence) == len(texts.frames) == 0


def test_names_and_sources_come_back(written: Path) -> None:
    found = FeatureSet.open(written)
    assert (len(found), found.num_captions) == (12, 18)
    assert found.keys[5] == "v1_1"
    assert found.captions[-1] == "caption 2 5 \u2713"
    assert found.caption_video.tolist()[6:12] == [4, 4, 5, 6, 6, 7]
    data, video = found.source(5)
    assert (data, video.row, video.file) == (SOURCE, 5, "")
    assert found.frame_times(5) == [1.0] * FRAMES
    assert found.left_out_reasons == {"unreadable": 1}
    features, caption_video = found.lazy_features(3, 9)
    assert len(features.frames) == 6
    assert caption_video.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert torch.equal(features.sentence[:2], found.texts([5, 6]).sentence)


def test_evaluation_from_files_equals_that_from_memory(written: Path) -> None:
    found = FeatureSet.open(written)
    own = Features(
        *(
            None if x[0] is None else torch.cat(x)
            for x in zip(*(block(number) for number in range(BLOCKS)), strict=True)
        )
    )
    memory = evaluate_features(own, found.caption_video, model=ModelConfig())
    files = evaluate_features(found)
    assert files.metrics == memory.metrics
    assert [query["rank"] for query in files.queries] == [q["rank"] for q in memory.queries]
    assert (files.videos, files.captions, len(files.left_out)) == (12, 18, 1)


def test_no_file_stays_open_or_mapped(written: Path) -> None:
    # A million videos have some 17,000 files; many systems allow a process 1,024.
    before = os.listdir("/proc/self/fd")
    found = FeatureSet.open(written)
    found.videos([7, 1])
    assert os.listdir("/proc/self/fd") == before
    assert str(written) not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_cut_or_replaced_while_the_set_is_open_is_named(
    written: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    found = FeatureSet.open(copy)
    (path,) = copy.glob("set-*/block-00000001/frames.bin")
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 1)  # a mapped page would read as zeros, or kill the process
    assert len(found.videos([4]).frames) == 1
    with pytest.raises(ShardCorrupt, match=rf"frames.bin: {len(whole) - 1} bytes instead of"):
        found.videos([7])
    path.write_bytes(whole)
    found.videos([7])
    path.with_name("other").write_bytes(whole)
    path.with_name("other").rename(path)
    with pytest.raises(ShardCorrupt, match=r"frames\.bin: replaced since it was opened"):
        found.videos([7])
    path.unlink()
    with pytest.raises(ShardCorrupt, match=r"frames\.bin: gone since it was opened"):
        found.videos([7])


def test_two_writers_give_the_bytes_of_one_in_any_order(written: Path, tmp_path: Path) -> None:
    first, second = (FeatureWriter(tmp_path, HEADER, SOURCE) for _ in range(2))
    write_block(second, 2)
    write_block(first, 1)
    assert not first.publish()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        FeatureSet.open(tmp_path)
    write_block(second, 0)
    assert second.publish()
    assert first.publish()
    assert content(tmp_path) == content(written)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
import test_feature_set as t
from tvr.trainer.features import writer
calls, limit = 0, int(sys.argv[2])
real = writer.write_array
def write(path, array):
    global calls
    calls += 1
    if calls == limit:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, array)
writer.write_array = write
own = t.FeatureWriter(Path(sys.argv[1]), t.HEADER, t.SOURCE)
for number in range(t.BLOCKS):
    if not own.has(number):
        t.write_block(own, number)
if sys.argv[3] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
own.publish()
"""


def test_a_killed_writer_goes_on_to_the_same_bytes(written: Path, tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    for limit in (5, 30, 1000):  # in the first part, in the second, before the manifest
        line = [sys.executable, "-c", KILLED, str(tmp_path), str(limit), "kill", *paths]
        ended = subprocess.run(line, capture_output=True, timeout=120, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        assert not (tmp_path / "manifest.json").exists()
    writer = FeatureWriter(tmp_path, HEADER, SOURCE)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("set-*/block-*/*.bin")}
    assert all(writer.has(number) for number in range(BLOCKS))
    assert writer.publish()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert content(tmp_path) == content(written)


def test_another_data_set_is_added_and_the_old_files_stay(tmp_path: Path) -> None:
    write_set(tmp_path)
    before = content(tmp_path)
    other = replace(SOURCE, url="data/more", content="c" * 64)
    found = write_set(tmp_path, source=other)
    assert len(found) == 24
    assert [each.url for each in found.sources] == ["data/test", "data/more"]
    after = content(tmp_path)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: value for name, value in before.items() if name != "manifest.json"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "d" * 64}, "another model"),
        ({"stored": "int8"}, "stored=fp32, not int8"),
        ({"settings": HEADER.settings | {"num_frames": 9}}, "num_frames=3, not 9"),
    ],
    ids=["weights", "type", "settings"],
)
def test_features_of_another_kind_are_not_mixed(
    written: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureWriter(written, replace(HEADER, **change), SOURCE)  # type: ignore[arg-type]


def test_a_changed_data_set_of_the_same_address_is_refused(written: Path) -> None:
    with pytest.raises(ValueError, match="as it was before"):
        FeatureWriter(written, HEADER, replace(SOURCE, content="e" * 64))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize(
    "name", ["frames", *further("words", "keys", "caption_video", "captions_ends")]
)
def test_damaged_files_are_named(
    written: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    damage(next(copy.glob(f"set-*/block-00000001/{name}.bin")))
    with pytest.raises(ShardCorrupt, match=rf"block-00000001/{name}\.bin: "):
        FeatureSet.open(copy, verify=True)
    writer = FeatureWriter(copy, HEADER, SOURCE)
    assert [writer.has(number) for number in range(BLOCKS)] == [True, False, True]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("sets", 0, "parts", 0, "name"), "../../etc"),
        (("sets", 0, "parts", 0, "name"), "block-00000001"),
        (("sets", 0, "parts", 0, "videos"), 1 << 40),
        (("sets", 0, "parts", 0, "videos"), 5),
        (("sets", 0, "parts", 0, "captions"), True),
        (("sets", 0, "parts", 0, "files", "keys", "num_bytes"), -1),
        (("sets", 0, "parts", 0, "files", "../x"), {}),
        (("sets", 0, "content"), "../../../../etc"),
        (("sets", 0, "parts"), {}),
        (("header", "width"), 1 << 30),
        (("header", "stored"), "pickle"),
        (("header", "settings"), {"a": []}),
        (("version",), 2),
        (("sets",), None),
    ],
    ids=str,
)
def test_hostile_manifests_are_refused(
    written: Path, tmp_path: Path, where: tuple[str | int, ...], value: object
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    place = manifest
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardCorrupt, match=r"manifest\.json: damaged or edited"):
        FeatureSet.open(copy)


def test_a_cut_manifest_is_refused(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    cut(copy / "manifest.json")
    os.truncate(copy / "manifest.json", 100)
    with pytest.raises(ShardCorrupt, match=r"manifest\.json: damaged"):
        FeatureSet.open(copy)


def test_two_jobs_may_make_the_same_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (FeatureWriter(tmp_path, HEADER, SOURCE) for _ in range(2))
    array, begun = writing.write_array, list[Path]()

    def write(path: Path, values: np.ndarray) -> StoredFile:
        if not begun:
            begun.append(path)
            write_block(two, 0)  # the other job writes the same part meanwhile
        return array(path, values)

    monkeypatch.setattr(writing, "write_array", write)
    write_block(one, 0)
    assert begun
    assert one.has(0)
    folder = tmp_path / SOURCE.name
    assert [path.name for path in folder.iterdir()] == ["block-00000000"]
    # What a killed writer left goes when it is old.
    left = folder / ".block-00000001.0123.partial"
    left.mkdir()
    write_block(one, 1)
    assert left.exists()
    os.utime(left, (0, 0))
    shutil.rmtree(folder / "block-00000001")
    write_block(one, 1)
    assert not left.exists()
