"""`tvr embed`, `tvr index` and `tvr search` on real clips, and the Python door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders.clip_files import numbered_video
from builders.pretrained import save_clip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, NUM_FRAMES, make_tiny_data

from tvr.data_prep.reading.loader import read_samples
from tvr.launchers.cli import main
from tvr.trainer.index.index import Index
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a folder of videos and a packed set, embedded into one feature set and indexed."""
    folder = tmp_path_factory.mktemp("search")
    make_tiny_data(folder, num_train=10)
    words = load_tokenizer(folder / "tokenizer", MAX_WORDS)
    save_clip(folder / "clip", words, width=16, image_size=IMAGE_SIZE)
    (folder / "videos" / "more").mkdir(parents=True)
    for name, first in (("a.mp4", 1), ("b.mp4", 90), ("more/c.mp4", 200)):
        (folder / "videos" / name).write_bytes(numbered_video(6, first=first))
    for source in ("videos", "test"):
        line = ["embed", str(folder / "clip"), "--data", str(folder / source)]
        line += ["--out", str(folder / "features"), "--num-frames", str(NUM_FRAMES)]
        assert main(line) == 0
    assert main(["index", str(folder / "features"), "--model", str(folder / "clip")]) == 0
    return folder


def test_search_prints_the_ranking_of_the_similarity(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Index.open(data / "features") as index:
        texts = index.model.encode_texts(["a red circle moves left"])
        settings = index.model.config.model
        scores = similarity_rows(texts, index.features.videos(), settings)[0]
        best = scores.argsort(descending=True).tolist()
        keys = [index.features.keys[row] for row in best]
    line = ["search", str(data / "features"), "a  red circle\tmoves left"]
    assert main([*line, "--json", "-k", "13"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [hit["key"] for hit in found] == keys
    assert [hit["similarity"] for hit in found] == pytest.approx(scores[best].tolist(), abs=1e-6)
    assert {hit["file"] for hit in found} == {None, "a.mp4", "b.mp4", "more/c.mp4"}
    assert main([*line, "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "similarity", "key", "video", "cut"]
    assert [row.split()[2] for row in lines[1:]] == keys[:3]


def test_a_file_finds_itself_and_a_key_finds_others(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", str(data / "features"), "--json", "-k", "2"]
    assert main([*line, "--video", str(data / "videos" / "b.mp4")]) == 0
    by_file = json.loads(capsys.readouterr().out)
    assert (by_file[0]["key"], by_file[0]["data"]) == ("b", str(data / "videos"))
    assert by_file[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert main([*line, "--key", "b"]) == 0
    by_key = json.loads(capsys.readouterr().out)
    assert by_key[0]["key"] == by_file[1]["key"]
    assert by_key[0]["similarity"] == pytest.approx(by_file[1]["similarity"], abs=1e-3)


def test_frames_and_media_of_each_kind_come_back(data: Path) -> None:
    with Index.open(data / "features") as index:
        assert len(index) == 13
        row = index.row("c")
        media = index.media(row)
        assert (media.path, media.content_type) == (data / "videos/more/c.mp4", "video/mp4")
        assert index.frames(row).shape == (NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
        hits = index.search_frames(index.frames(row), k=1)
        assert hits[0].video == row
        key = index.features.keys[5]
        (sample,) = read_samples(
            str(data / "test"), [key], num_frames=NUM_FRAMES, image_size=IMAGE_SIZE
        )
        assert np.array_equal(index.frames(5), sample.frames)
        media = index.media(5)
        assert media.path is None
        assert (media.bytes or b"")[:4] == b"RIFF"
        assert media.content_type == "image/webp"
        with pytest.raises(IndexError, match="rows 0 to 12"):
            index.media(13)
