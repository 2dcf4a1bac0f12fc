"""`tvr embed`, `tvr index` and `tvr search` on real clips, and the Python door."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.clip_files import numbered_video
from builders.pretrained import save_clip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, NUM_FRAMES, make_tiny_data

from tvr.data_prep.reading.loader import read_samples
from tvr.data_prep.records import ShardCorrupt
from tvr.launchers.cli import main
from tvr.trainer.index.index import Index
from tvr.trainer.index.media import video_file
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.tokenizer import load_tokenizer

README = Path(__file__).parents[2] / "trainer" / "index" / "README.md"


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


def test_the_commands_and_the_snippet_of_the_readme_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text().partition("## From my videos to a search page\n")[2]
    section = section.partition("\n## ")[0]
    (commands,) = re.findall(r"^```bash\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data / "clip", "models/clip")
    Path("videos").mkdir()
    for number, name in enumerate(("one", "two", "three")):
        Path(f"videos/{name}.mp4").write_bytes(numbered_video(6, first=90 * number))
    outputs = []
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words[0] == "tvr"
        if words[1] == "serve":  # does not end; pages/test_search_page.py runs it
            continue
        assert main(words[1:]) == 0, capsys.readouterr().err
        outputs.append(capsys.readouterr().out)
    assert outputs[1] == "features/videos: 3 videos, exact\n"
    by_text, by_video, by_key = outputs[2:]
    assert len(by_text.splitlines()) == 4
    assert by_video.splitlines()[1].split()[2:] == ["one", str(tmp_path / "videos" / "one.mp4")]
    assert {hit["key"] for hit in json.loads(by_key)} == {"two", "three"}
    namespace: dict[str, Any] = {}
    exec(compile(snippet, str(README), "exec"), namespace)
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert len(namespace["others"]) == 2


def test_an_exact_index_that_has_grown_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(data / "features")]) == 0
    assert "would be faster" not in capsys.readouterr().err
    monkeypatch.setattr("tvr.trainer.index.build.IVF_FROM", 10)
    assert main(["index", str(data / "features")]) == 0
    assert "ivf would be faster now: remove" in capsys.readouterr().err
    with Index.open(data / "features") as index:
        assert index.method == "exact"
        assert len(index.search("a circle")) == 10  # the model is still named


def test_another_model_is_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(data / "clip", other)
    words = load_tokenizer(data / "tokenizer", MAX_WORDS)
    with torch.no_grad():
        save_clip(other, words, width=16, image_size=IMAGE_SIZE, patch_size=4)
    for line in (
        ["search", str(data / "features"), "a circle", "--model", str(other)],
        ["index", str(data / "features"), "--model", str(other)],
    ):
        assert main(line) == 2
        assert "is not the model that encoded" in capsys.readouterr().err
    line = ["search", str(data / "features"), "a circle", "--model", str(data / "test")]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert f"the model that encoded {data / 'features'}, {data / 'clip'}" in error
    assert "name the one that did with --model" in error
    assert main(["search", str(data / "test"), "a circle"]) == 2
    assert "is a packed data set, and holds no features" in capsys.readouterr().err
    for more, message in (
        ([], "give one of QUERY"),
        (["a", "--key", "b"], "give one of QUERY"),
        (["a", "--data", "b"], "--data b needs --key"),
        (["a", "--checkpoint", "best"], "needs --model"),
        (["--key", "nothing"], "no video with the key 'nothing'"),
        (["--video", str(tmp_path / "nothing.mp4")], "nothing.mp4 cannot be searched for"),
        (["--video", str(Path(__file__))], "cannot be searched for"),
        (["a", "-k", "0"], "k=0 must be"),
        (["  "], "no visible character"),
    ):
        assert main(["search", str(data / "features"), *more]) == 2
        assert message in capsys.readouterr().err


def test_texts_may_be_searched_from_several_threads(data: Path) -> None:
    queries = [f"a {colour} circle moves {way}" for colour in ("red", "blue") for way in "abcd"]
    with Index.open(data / "features") as index:
        alone = [[hit.video for hit in index.search(query)] for query in queries]
    with Index.open(data / "features") as index, ThreadPoolExecutor(4) as pool:
        found = [[hit.video for hit in hits] for hits in pool.map(index.search, queries)]
    assert found == alone


def test_content_words_of_a_query_are_found(data: Path) -> None:
    with Index.open(data / "features") as index:
        model = index.model
        index._model = replace(model, tokenizer=replace(model.tokenizer, content_words=True))
        seen = []
        index.search_features = lambda texts, **_: seen.append(texts) or []  # type: ignore[method-assign]
        index.search("a red circle moves to the left")
    mask = seen[0].word_mask[0]
    assert set(mask.tolist()) >= {1, 2}


@pytest.mark.parametrize(
    "file",
    [
        "../outside.mp4",
        "link.mp4",
        "notes.txt",
        "more",
        "",
        "/etc/passwd",
        "a.mp4/../../x",
        "a\0.mp4",
    ],
)
def test_only_video_files_below_the_folder_are_opened(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    (folder / "notes.txt").write_text("secret")
    (tmp_path / "outside.mp4").write_bytes(b"secret")
    (folder / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    with pytest.raises(ShardCorrupt, match="is no video file in"):
        video_file(folder, file)
    with pytest.raises(FileNotFoundError, match="the video is gone"):
        video_file(folder, "more/gone.mp4")


def test_a_data_set_that_changed_is_refused(data: Path, tmp_path: Path) -> None:
    with Index.open(data / "features") as index:
        first = index.row("a") + 3
        with pytest.raises(ShardCorrupt, match=r"is not .* any more"):
            index._videos._reader(index.features.source(5)[0], 5, index.features.keys[first])


def test_settings_under_which_a_picture_takes_gigabytes_are_refused(
    data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "features", tmp_path / "features")
    path = tmp_path / "features" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["header"]["settings"] |= {"num_frames": 12, "image_size": 8192}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardCorrupt, match=r"image_size=8192: .* would take 2415919104 bytes"):
        Index.open(tmp_path / "features")
