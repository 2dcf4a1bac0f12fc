"""Word masks have value 2 exactly on the tokens of content words, in training and evaluation."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_files import plain_captions
from builders.tiny import make_tiny_data, tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tvr.data_prep.packing.words import WordTagger
from tvr.data_prep.reading.augment import drop_words
from tvr.data_prep.records import Caption, Clip, Word, WordKind
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.data import training_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.evaluate import evaluate
from tvr.trainer.evaluation.saved_run import evaluate_run, load_run
from tvr.trainer.model.model import model_inputs
from tvr.trainer.model.tokenizer import Tokenizer, clip_tokenizer, train_tokenizer

CAPTIONS = [
    "a man is playing the guitar on a stage",
    "the man's dog isn't playing",
    "small red circles, then large blue squares",
]
MAX_WORDS = 40
ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))


def small_tokenizer(folder: Path) -> Tokenizer:
    return train_tokenizer(4 * CAPTIONS, folder, vocab_size=600, max_words=MAX_WORDS)


def clip_vocabulary_tokenizer(folder: Path) -> Tokenizer:
    return clip_tokenizer(folder, max_words=MAX_WORDS)


needs_clip = pytest.mark.skipif(
    find_spec("open_clip") is None, reason="open_clip_torch with CLIP's vocabulary is not installed"
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(small_tokenizer, id="small"),
        pytest.param(clip_vocabulary_tokenizer, id="clip", marks=needs_clip),
    ],
)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return replace(request.param(tmp_path_factory.mktemp("tokenizer")), content_words=True)


def caption_of(words: list[tuple[str, bool]]) -> Caption:
    """Joins words with spaces; words marked True are content words."""
    spans, text = [], ""
    for word, is_content in words:
        text += " " if text else ""
        spans.append(Word(len(text), len(text) + len(word), WordKind(int(is_content))))
        text += word
    return Caption(text=text, words=tuple(spans))


# All characters except spaces and control characters: letters, marks, digits, emoji.
visible = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=6)


words = st.one_of(visible, st.sampled_from(" ".join(CAPTIONS).split()))


@given(st.lists(st.tuples(words, st.booleans()), min_size=1, max_size=7))
@example(
    [("\u0130STANBUL", True), ("cafe\u0301", False), ("\ufb01sh", True), ("\U0001f600", False)]
)
@example([("e\u0301", True), ("\u0301x", False), ("\u1100\u1161\u11a8", True), ("\u212b", False)])
@settings(max_examples=200)
def test_two_is_exactly_on_the_tokens_of_content_words(
    tokenizer: Tokenizer, words: list[tuple[str, bool]]
) -> None:
    # Tokens of each word encoded separately, which needs no offsets.
    pieces = [tokenizer.backend.encode(word, add_special_tokens=False) for word, _ in words]
    ids, mask = tokenizer([caption_of(words)])
    expected = [
        2 if is_content else 1
        for (_, is_content), some in zip(words, pieces, strict=True)
        for _ in some
    ]
    max_tokens = MAX_WORDS - 2
    together = [piece for some in pieces for piece in some][:max_tokens]
    assert ids[0, 1 : 1 + len(together)].tolist() == together
    padding = [0] * (max_tokens - len(together))
    assert mask[0].tolist() == [1, *expected[:max_tokens], 1, *padding]


@pytest.mark.parametrize("position", range(6))
def test_masks_follow_the_words_after_word_drop(tokenizer: Tokenizer, position: int) -> None:
    clip = Clip(key="k", video="v.mp4", captions=tuple(CAPTIONS), video_id="k")
    caption = drop_words(WordTagger([clip]).tag(CAPTIONS)[0], 0, position)
    ids, mask = tokenizer([caption])
    two = ids[0][mask[0] == 2].tolist()
    assert tokenizer.backend.decode(two).split() == ["man", "playing", "guitar", "stage"]


def test_the_mask_has_twos_only_with_content_words_and_needs_words(tokenizer: Tokenizer) -> None:
    caption = caption_of([("red", True), ("or", False)])
    with_content, without = tokenizer([caption]), replace(tokenizer, content_words=False)([caption])
    assert torch.equal(with_content[0], without[0])
    assert torch.equal(with_content[1].clamp(max=1), without[1])
    assert (int(with_content[1].max()), int(without[1].max())) == (2, 1)
    with pytest.raises(ValueError, match="caption 'red': packed without words"):
        tokenizer(plain_captions("red"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tiny_data(folder, num_train=12, words=True)
    return folder


def train(config: Config, run_dir: Path) -> tuple[int, str]:
    run_dir.with_suffix(".json").write_text(to_json(config))
    line = ["--config", str(run_dir.with_suffix(".json")), "--run-dir", str(run_dir)]
    with redirect_stderr(io.StringIO()) as stderr:
        return tvr_train(line), stderr.getvalue()


def test_each_setting_reaches_the_loss(data: Path, tmp_path: Path) -> None:
    losses = set()
    for drop, content in product((False, True), repeat=2):
        chosen: dict[str, Any] = {"word_drop": drop, "content_words": content, "test": None}
        config = tiny_config(data, data=chosen | {"test_exchanged": None}, train={"steps": 1})
        run_dir = tmp_path / f"{drop}-{content}"
        assert train(config, run_dir)[0] == 0
        events = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
        losses |= {event["loss"] for event in events if event["event"] == "step"}
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)


def test_evaluation_counts_content_words_as_training_does(data: Path, tmp_path: Path) -> None:
    settings = {"word_drop": True, "content_words": True, "max_words": 40}
    config = tiny_config(data, data=settings, train={"steps": 2})
    assert train(config, tmp_path / "run")[0] == 0
    stored = json.loads((tmp_path / "run" / "evaluation.json").read_text())["queries"]
    assert evaluate_run(tmp_path / "run", None).queries == stored
    model, tokenizer, _ = load_run(tmp_path / "run", config)
    without = evaluate(model.eval(), config, replace(tokenizer, content_words=False), ALONE)
    # The captions are complete, and the similarities differ.
    assert [query["caption"] for query in without.queries] == [query["caption"] for query in stored]
    assert without.queries != stored
    batch = next(training_batches(config.data, config.model, config.train, tokenizer, ALONE))
    assert set(batch.word_mask.unique().tolist()) == {0, 1, 2}
    frames, frame_mask, ids, mask = model_inputs(batch, ALONE.device)
    with torch.no_grad():
        twice, once = (model(frames, frame_mask, ids, m) for m in (mask, mask.clamp(max=1)))
    assert torch.equal(twice.words, once.words)  # the text tower ignores the kind of a token
    assert torch.equal(twice.sentence, once.sentence)
    assert torch.equal(twice.word_mask, mask)


@pytest.mark.parametrize("setting", ["word_drop", "content_words"])
def test_a_data_set_without_words_ends_the_run_at_its_start(
    setting: str, data: Path, tmp_path: Path
) -> None:
    make_tiny_data(tmp_path / "bare", num_train=12)
    name = "test" if setting == "content_words" else "train"
    paths = {name: str(tmp_path / "bare" / name)}
    config = tiny_config(data, data={setting: True, "test_exchanged": None} | paths)
    code, message = train(config, tmp_path / "run")
    assert code == 2
    assert message.startswith(f"tvr train: error: data.{setting} needs the words of captions, and ")
    assert f"bare/{name} was packed without words; pack the data set again with" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
