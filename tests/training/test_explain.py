"""`explain` and `tvr explain`: what they return adds up to the similarity, and can be read."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import heat_map
import numpy as np
import pytest
import torch
from builders.heat_map import HeatMap
from builders.pretrained import save_clip, save_siglip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, NUM_FRAMES, tiny_config

from tvr.data_prep.demo_clips import demo_scenes, scene_captions
from tvr.data_prep.html_page import page_template
from tvr.data_prep.records import Caption, Word, WordKind
from tvr.kernels.numerics import unit
from tvr.kernels.partial import select_tokens
from tvr.launchers.cli import main
from tvr.trainer.evaluation import model_source
from tvr.trainer.evaluation.embed import embed
from tvr.trainer.evaluation.model_source import SourceModel, load_source
from tvr.trainer.explanation import page
from tvr.trainer.explanation.explanation import NOTHING, Explanation, explain, explanation_page
from tvr.trainer.explanation.hardest import (
    HardNegative,
    hard_negatives,
    hardest_json,
    hardest_table,
    movements,
    negatives_of_features,
)
from tvr.trainer.explanation.videos import sample_of
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import build_model
from tvr.trainer.model.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
CAPTION = "a small red circle moves left, then a large blue square moves up"


def source_of(folder: Path, **overrides: Any) -> SourceModel:
    """An untrained model with these settings."""
    config = tiny_config(folder, **overrides)
    tokenizer = load_tokenizer(folder / "tokenizer", MAX_WORDS)
    tokenizer = replace(tokenizer, content_words=config.data.content_words)
    torch.manual_seed(3)
    model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
    return SourceModel(
        model=model.eval(),
        tokenizer=tokenizer,
        config=config,
        mean_of_frames=False,
        name="untrained",
        step=None,
        weights="0",
    )


@pytest.fixture(scope="module")
def source(data: Path) -> SourceModel:
    return source_of(data)


@pytest.fixture(scope="module")
def clip(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain CLIP."""
    folder = tmp_path_factory.mktemp("plain") / "clip"
    tokenizer = load_tokenizer(data / "tokenizer", MAX_WORDS)
    save_clip(folder, tokenizer, width=16, image_size=IMAGE_SIZE)
    return folder


def video(frames: int = NUM_FRAMES, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (frames, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def similarity_of(source: SourceModel, caption: Caption, frames: np.ndarray) -> float:
    texts, videos = source.encode_texts([caption]), source.encode_frames([frames])
    return float(similarity_rows(texts, videos, source.config.model))


@pytest.mark.parametrize("frames", [1, 2, NUM_FRAMES])
@pytest.mark.parametrize("interaction", ["ti", "wti", "att_ti", "att_wti"])
@pytest.mark.parametrize("matching", ["two_way", "words_to_frames"])
def test_the_terms_add_up_to_the_similarity(
    data: Path, matching: str, interaction: str, frames: int
) -> None:
    content = interaction == "att_wti"
    source = source_of(
        data,
        model={
            "interaction": interaction,
            "matching": matching,
            "neighbour_frames": frames != 2,
        },
        data={"content_words": content},
    )
    words = (Word(8, 11, WordKind.CONTENT), Word(12, 18, WordKind.CONTENT))
    caption = Caption(text=CAPTION, words=words if content else None)
    found = explain(source, caption, video(frames))
    expected = similarity_of(source, caption, video(frames))
    assert found.score == pytest.approx(expected, abs=1e-6)
    assert sum(found.parts.values()) == pytest.approx(expected, abs=1e-6)
    assert found.similarity.shape == (len(found.words), frames)
    assert found.reads_words == (interaction[:3] == "att")
    assert bool(found.word_terms.any()) == found.reads_words
    one_way = matching == "words_to_frames"
    assert found.frames_choose != one_way
    for values in (found.frame_weights, found.sentence_frame_terms):
        assert bool(values.any()) != one_way
    assert found.to_json()["matching"] == matching
    if content:
        # Words of double weight count twice: their softmax is that of the whole caption.
        texts = source.encode_texts([caption])
        assert texts.word_logits is not None
        count = len(found.words)
        doubled = texts.word_mask[0, :count]
        assert doubled.max() == 2
        shares = texts.word_logits[0, :count].softmax(0) * doubled
        assert found.word_weights.tolist() == pytest.approx(shares.tolist(), abs=1e-6)
        # In a plain text the content words are found: more than the two above.
        plain = explain(source, CAPTION, video(frames))
        assert plain.word_weights.sum() > found.word_weights.sum() > 1
    check_indices(found)


def check_indices(found: Explanation) -> None:
    """Compares the choices with the table of similarities."""
    frames = found.similarity.shape[1]
    padded = frames < NUM_FRAMES
    for row, best in zip(found.similarity, found.best_frame, strict=True):
        if best == NOTHING:
            assert padded
            assert (row <= 0).all()
        else:
            assert row[best] == row.max()
    for frame, best in enumerate(found.best_word):
        if best == NOTHING:
            assert (found.similarity[:, frame] <= 0).all()
        else:
            assert found.similarity[best, frame] == found.similarity[:, frame].max()
    helped = found.neighbour_frame != NOTHING
    assert (found.neighbour_weight[helped] > 0).all()
    assert not found.neighbour_weight[~helped].any()
    assert (found.neighbour_frame != np.arange(frames)).all()


def test_features_and_frames_give_the_same(source: SourceModel) -> None:
    times = [0.5, 1.5, 2.5]
    by_frames = explain(source, CAPTION, video(), frame_times=times)
    features = source.encode_frames([video()])
    by_features = explain(source, CAPTION, features, frame_times=times)
    assert by_frames.to_json() == by_features.to_json()
    assert by_frames.frame_times.tolist() == times
    two = source.encode_frames([video(), video(seed=1)])
    with pytest.raises(ValueError, match="features of 2 videos"):
        explain(source, CAPTION, two)
    with pytest.raises(ValueError, match="no visible character"):
        explain(source, " ", video())
    with pytest.raises(ValueError, match="2 frame times for 3 frames"):
        explain(source, CAPTION, video(), frame_times=[0.1, 0.2])


def test_json_is_plain_and_finite(source: SourceModel) -> None:
    found = explain(source, CAPTION, video(2), frame_times=[0.25, float("nan")])
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["frame_times"] == [0.25, None]
    assert sum(content["parts"].values()) == pytest.approx(content["score"], abs=1e-6)
    assert len(content["words"]) == len(content["similarity"]) == len(content["word_weights"])
    assert content["best_frame"] == found.best_frame.tolist()


def test_tokens_are_the_captions_own_letters(source: SourceModel) -> None:
    found = explain(source, "A Red   circle, d\u00e9j\u00e0 vu", video())
    assert (found.words[0], found.words[-1]) == ("[start]", "[end]")
    assert found.is_special == (True, *[False] * (len(found.words) - 2), True)
    # The small vocabulary has no token of the whole word.
    assert found.words[1:6] == ("A", "Re", "d", "circle", ",")
    assert found.continues_word[:6] == (False, False, False, True, False, False)
    assert set("".join(found.words[6:-1])) == set("d\u00e9j\u00e0vu")
    cut = explain(source, "a red circle " * 20, video())
    assert len(cut.words) == MAX_WORDS
    assert cut.words[-1] == "[end]"


def test_tpm_cls_selector_is_that_of_the_training(data: Path, source: SourceModel) -> None:
    found = explain(source, CAPTION, video(2))
    assert found.masked_words is not None
    assert found.masked_frames is not None
    texts, videos = source.encode_texts([CAPTION]), source.encode_frames([video(2)])
    model, threshold = source.model, source.config.loss.mask_threshold
    assert model.word_predictor is not None
    assert model.frame_predictor is not None
    with torch.no_grad():
        of_words = model.word_predictor(videos.frames, texts.words)
        of_frames = model.frame_predictor(texts.sentence[:, None], videos.frames)
    kept = select_tokens(texts.words, of_words, threshold)[1][0]
    assert (~kept[: len(found.words)]).tolist() == found.masked_words.tolist()
    kept = select_tokens(videos.frames, of_frames, threshold)[1][0]
    assert (~kept[:2]).tolist() == found.masked_frames.tolist()
    assert found.masked_words.any()
    fewer = replace(source, tokenizer=replace(source.tokenizer, max_words=9))
    assert explain(fewer, CAPTION, video()).masked_words is None  # the predictors take 20 words
    without = explain(source_of(data, loss={"tpm_cl": 0}), CAPTION, video())
    assert without.masked_words is None
    assert without.masked_frames is None
    assert without.to_json()["masked_words"] is None


def test_siglip_and_plain_models(clip: Path, tmp_path: Path) -> None:
    source = load_source(clip, num_frames=4)
    found = explain(source, CAPTION, video(4), frame_times=[1, 2, 3, 4])
    assert found.similarity.shape[1] == 1  # the mean of the frames
    assert found.frame_times.tolist() == [2.5]
    assert found.score == pytest.approx(float(found.sentence_similarity[0]), abs=1e-6)
    single = explain(load_source(clip, num_frames=4, interaction="att_ti"), CAPTION, video(4))
    assert single.similarity.shape[1] == 4
    save_siglip(tmp_path, ["a red circle", CAPTION], max_words=16, image_size=IMAGE_SIZE)
    found = explain(load_source(tmp_path, num_frames=2), "a red circle", video(2))
    assert "circle" in "".join(found.words)
    assert "\u2581" not in "".join(found.words)
    assert found.words[-1] == "[end]"


def test_the_command_writes_page_and_numbers(
    data: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["explain", str(clip)]
    written, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    flags = ["--out", str(written), "--json", str(numbers)]
    clips = sorted((data / "clips" / "test").glob("*.mp4"))
    assert main([*line, "a red circle", "--video", str(clips[0]), *flags]) == 0
    assert str(written) in capsys.readouterr().out
    assert "a red circle" in written.read_text()
    content = json.loads(numbers.read_text())
    source = load_source(clip)
    assert content["model"] == source.name
    assert sum(content["parts"].values()) == pytest.approx(content["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["a"], "give --video FILE, or --key KEY"),
        (["a", "--video", "x.mp4", "--key", "k"], "give --video FILE, or --key KEY"),
        (["--video", "x.mp4"], "needs a CAPTION"),
        (["a", "--video", "x.mp4"], "no such video"),
        (["--key", "k"], "has no test set of its own"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str],
    error: str,
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain", str(clip), *arguments]) == 2
    assert error in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_sample_brings_its_caption(data: Path, tmp_path: Path) -> None:
    source = source_of(data)
    sample = sample_of(source, str(data / "test"), "test-00002")
    found = explain(source, sample.captions[0], sample.frames, frame_times=sample.frame_times_s)
    assert found.caption == sample.captions[0].text
    assert np.isfinite(found.frame_times).all()
    with pytest.raises(ValueError, match="has no sample of key 'nope'"):
        sample_of(source, str(data / "test"), "nope")


def test_the_heat_map_shows_the_frames_that_hold_the_word(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames with a part of the word's own vector, at random places: the page marks one of them.

    `benchmarks/heat_map.py` asks the same of a trained model.
    """
    source = source_of(data, data={"num_frames": 6}, loss={"tpm_cl": 0})
    monkeypatch.setattr(page, "page_template", cache(page_template))
    draw = torch.Generator().manual_seed(1)
    pictures = video(6)
    plain = source.encode_frames([pictures])
    slot = explain(source, CAPTION, plain).words.index("circle")
    word = source.encode_texts([CAPTION]).words[0, slot]
    hits = 0
    for _ in range(50):
        noise = unit(torch.randn(6, len(word), generator=draw))
        noise = unit(noise - (noise @ word)[:, None] * word)
        visible = torch.rand(6, generator=draw) < 0.5
        visible[int(torch.randint(6, (1,), generator=draw))] = True
        frames = unit(noise + visible[:, None] * 0.5 * word)
        found = explain(source, CAPTION, plain._replace(frames=frames[None]))
        marks = HeatMap(explanation_page(found, pictures, title="query"))
        hits += bool(visible[marks.marked("circle")])
    assert hits == 50


def test_hardest_captions_and_their_movement(data: Path, tmp_path: Path) -> None:
    url = str(data / "test")
    first, second = source_of(data), source_of(data, model={"interaction": "ti"})
    before, after = hard_negatives(first, url), hard_negatives(second, url)
    assert len(before) == len(after) == 10
    # The same by one table of all pairs.
    embed(first, url, tmp_path / "features", stored="fp32")
    stored = FeatureSet.open(tmp_path / "features")
    table = similarity_rows(stored.texts(), stored.videos(), first.config.model)
    right = table[torch.arange(10), stored.caption_video]
    wrong = table.scatter(1, stored.caption_video[:, None], -10).max(1)
    for row, each in enumerate(before):
        assert each.caption == stored.captions[row]
        assert each.similarity == pytest.approx(float(right[row]), abs=1e-6)
        assert each.wrong_similarity == pytest.approx(float(wrong.values[row]), abs=1e-6)
        assert each.rank == 1 + int((table[row] > right[row]).sum())
        assert each.wrong_key != each.key
        assert (each.lead > 0) == (each.rank > 1)
    moved = movements(before, after)
    assert [each.after for each in moved] == after
    content = hardest_json(after, 3, moved)
    leads = [each["lead"] for each in content["hardest"]]
    assert leads == sorted((each.lead for each in after), reverse=True)[:3]
    gained = len(content["newly_won"]) - len(content["newly_lost"])
    assert content["first"] == content["before"]["first"] + gained
    assert sum(each.is_won for each in moved) == len(content["newly_won"])
    hidden = replace(after[0], caption="red\x1b[2J")
    assert "red\\u001b[2J" in hardest_table([hidden], 1)  # a terminal would clear its screen
    lines = hardest_table(after, 3, moved).splitlines()
    assert len(lines) == 5
    assert lines[2].endswith(
        f"[{content['hardest'][0]['key']}; {content['hardest'][0]['wrong_key']}]"
    )


def test_a_video_with_the_same_caption_is_not_wrong(source: SourceModel) -> None:
    videos = source.encode_frames([video(seed=row) for row in range(9)])

    def found(captions: list[str]) -> tuple[list[HardNegative], torch.Tensor]:
        texts = source.encode_texts(captions)
        rows = torch.arange(len(captions))
        features = texts._replace(
            frames=videos.frames[rows],
            frame_mask=videos.frame_mask[rows],
            frame_logits=None if videos.frame_logits is None else videos.frame_logits[rows],
        )
        model = source.config.model
        negatives = negatives_of_features(
            features, rows, model=model, captions=captions, keys=[f"v{row}" for row in rows]
        )
        return negatives, similarity_rows(features, features, model)

    # More equal captions than candidates that are looked at by default.
    negatives, table = found(["a red circle"] * 8 + ["a cross"])
    assert [each.wrong_key for each in negatives[:8]] == ["v8"] * 8
    wrong = [each.wrong_similarity for each in negatives[:8]]
    assert wrong == pytest.approx(table[:8, 8].tolist(), abs=1e-6)
    assert negatives[8].wrong_key == f"v{int(table[8, :8].argmax())}"
    assert found(["a red circle"] * 2)[0] == []


def test_the_command_lists_the_hardest_captions(
    data: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    line = ["explain", str(clip), "--hardest", "2", "--out", str(written), "--json", str(numbers)]
    assert main(line) == 2
    assert "has no test set of its own" in capsys.readouterr().err
    line += ["--data", str(data / "test"), "--num-frames", str(NUM_FRAMES)]
    assert main(line) == 0
    content = json.loads(numbers.read_text())
    assert (content["captions"], len(content["hardest"])) == (10, 2)
    assert "10 captions" in capsys.readouterr().out
    assert content["hardest"][0]["caption"] in written.read_text()
    assert written.read_text().count("data:image/jpeg") == 4
    for more, error in (
        (["--key", "k"], "takes no --key"),
        (["--between", "1", "2"], "has no checkpoint"),
        (["--between", "1", "2", "--checkpoint", "best"], "leave out --checkpoint best"),
    ):
        assert main([*line, *more]) == 2
        assert error in capsys.readouterr().err
    assert main(["explain", str(clip), "a", "--between", "1", "2"]) == 2
    assert "needs --hardest" in capsys.readouterr().err
    assert main(["explain", str(clip), "a", "--hardest", "0"]) == 2


def test_two_checkpoints_of_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with the models of two steps in place of a run's checkpoints."""
    at_step = {step: source_of(data, train={"seed": step}) for step in (100, 300)}
    for weight in at_step[300].model.parameters():
        weight.data.add_(0.05 * torch.randn(weight.shape))
    asked: list[Any] = []

    def load(folder: Path, choice: Any, *, num_frames: int | None) -> SourceModel:
        asked.append(choice)
        return at_step[choice]

    monkeypatch.setattr(model_source, "load_source", load)
    written, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    flags = ["--out", str(written), "--json", str(numbers)]
    monkeypatch.setattr("tvr.trainer.evaluation.cli.SECONDS_BETWEEN_LINES", 0.0)
    assert main(["explain", "run", "--hardest", "3", "--between", "100", "300", *flags]) == 0
    assert sorted(asked) == [100, 300]
    content = json.loads(numbers.read_text())
    assert content["steps"] == [100, 300]
    for step, found in ((300, content), (100, content["before"])):
        expected = hard_negatives(at_step[step], str(data / "test"))
        assert found["first"] == sum(each.rank == 1 for each in expected)
        leads = sorted((each.lead for each in expected), reverse=True)[:3]
        assert [each["lead"] for each in found["hardest"]] == pytest.approx(leads)
    assert content["hardest"] != content["before"]["hardest"]
    for pair in content["newly_won"]:
        assert pair["before"]["rank"] > 1 == pair["after"]["rank"]
    for pair in content["newly_lost"]:
        assert pair["before"]["rank"] == 1 < pair["after"]["rank"]
    assert content["newly_won"] or content["newly_lost"]
    assert "Newly lost" in written.read_text()
    shown = capsys.readouterr()
    assert "newly won" in shown.out
    assert shown.err.count("encoded ") == 2  # one block for each checkpoint
    # A sample of the run's own test set, with its own caption.
    assert main(["explain", "run", "--key", "test-00004", "--checkpoint", "300", *flags]) == 0
    sample = sample_of(at_step[300], str(data / "test"), "test-00004")
    content = json.loads(numbers.read_text())
    assert content["caption"] == sample.captions[0].text
    assert content["frame_times"] == pytest.approx(sample.frame_times_s)


def test_the_readme_states_the_result_of_the_heat_map_benchmark(tmp_path: Path) -> None:
    """The word "circle" peaks on a frame with the circle in at least 80 % of 50 queries."""
    result = json.loads((ROOT / "tests/benchmarks/results/heat_map.json").read_text())
    readme = (ROOT / "trainer/explanation/README.md").read_text()
    assert result["queries"] == 50
    assert [row["frames_with_circle"] for row in result["rows"]] == [6, 3, 1]
    for row in result["rows"][1:]:
        assert row["circle"] >= 80
        numbers = [row[name] for name in ("chance", "circle", "other_shape", "sentence")]
        shown = " | ".join(f"{number:.0f} %" for number in numbers)
        assert f"| {row['frames_with_circle']} of 6 | {shown} |" in readme
    # The benchmark itself, with an untrained model whose vocabulary has all words of the demo.
    scenes = demo_scenes(1, 60, 0)["test"]
    captions = [text for scene in scenes for text in scene_captions(scene)]
    train_tokenizer(captions, tmp_path / "tokenizer", vocab_size=768, max_words=MAX_WORDS)
    row = heat_map.measured(
        source_of(tmp_path), scenes, 1 / 3, argparse.Namespace(queries=2, seed=0)
    )
    assert row["chance"] == pytest.approx(33.3)
    assert row["circle"] in (0, 50, 100)


def test_the_readmes_snippet_runs(
    data: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a").symlink_to(clip)
    (tmp_path / "clip.mp4").symlink_to(min((data / "clips" / "test").glob("*.mp4")))
    text = (ROOT / "trainer/explanation/README.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    exec(compile(snippet, "README.md", "exec"), {})
    assert HeatMap((tmp_path / "page.html").read_text()).rows[1][0] == "[start]"
