"""Value 2 of a word mask: exactly on the tokens of content words, in training and evaluation."""

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
from tvr.data_prep.reading.word_drop import drop_words
from tvr.data_prep.records import Caption, Clip, Word, WordKind
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.data import training_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.evaluate import evaluate
from tvr.trainer.evaluation.saved_run import evaluate_run, load_run
from tvr.trainer.model.model import model_inputs
from tvr.trainer.model.tokenizer import Tokenizer, clip_tokenizer, train_tokenizer

SAID = [
    "a man is playing the guitar on a stage",
    "the man's dog isn't playing",
    "small red circles, then large blue squares",
]
MAX_WORDS = 40
ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))


def small(folder: Path) -> Tokenizer:
    return train_tokenizer(4 * SAID, folder, vocab_size=600, max_words=MAX_WORDS)


def clips_own(folder: Path) -> Tokenizer:
    return clip_tokenizer(folder, max_words=MAX_WORDS)


needs_clip = pytest.mark.skipif(
    find_spec("open_clip") is None, reason="open_clip_torch, which has CLIP's vocabulary, is absent"
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(small, id="small"), pytest.param(clips_own, id="clip", marks=needs_clip)],
)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return replace(request.param(tmp_path_factory.mktemp("tokenizer")), content_words=True)


def of(words: list[tuple[str, bool]]) -> Caption:
    """The words with one space between them; those marked true are content."""
    spans, text = [], ""
    for word, tells in words:
        text += " " if text else ""
        spans.append(Word(len(text), len(text) + len(word), WordKind(int(tells))))
        text += word
    return Caption(text=text, words=tuple(spans))


# Everything but spaces and control characters: letters of all scripts, marks, digits, emoji.
visible = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=6)


words = st.one_of(visible, st.sampled_from(" ".join(SAID).split()))


@given(st.lists(st.tuples(words, st.booleans()), min_size=1, max_size=7))
@example(
    [("\u0130STANBUL", True), ("cafe\u0301", False), ("\ufb01sh", True), ("\U0001f600", False)]
)
@example([("e\u0301", True), ("\u0301x", False), ("\u1100\u1161\u11a8", True), ("\u212b", False)])
@settings(max_examples=200)
def test_two_is_exactly_on_the_tokens_of_content_words(
    tokenizer: Tokenizer, words: list[tuple[str, bool]]
) -> None:
    # The words' tokens, each word encoded by itself: no offsets in this.
    pieces = [tokenizer.backend.encode(word, add_special_tokens=False) for word, _ in words]
    ids, mask = tokenizer([of(words)])
    expected = [
        2 if tells else 1 for (_, tells), some in zip(words, pieces, strict=True) for _ in some
    ]
    room = MAX_WORDS - 2
    together = [piece for some in pieces for piece in some][:room]
    assert ids[0, 1 : 1 + len(together)].tolist() == together
    padding = [0] * (room - len(together))
    assert mask[0].tolist() == [1, *expected[:room], 1, *padding]


@pytest.mark.parametrize("position", range(6))
def test_spans_follow_the_words_that_word_drop_leaves(tokenizer: Tokenizer, position: int) -> None:
    clip = Clip(key="k", video="v.mp4", captions=tuple(SAID), video_id="k")
    caption = drop_words(WordTagger([clip]).tag(SAID)[0], 0, position)
    ids, mask = tokenizer([caption])
    two = ids[0][mask[0] == 2].tolist()
    assert tokenizer.backend.decode(two).split() == ["man", "playing", "guitar", "stage"]


def test_the_mask_is_of_ones_unless_asked_and_needs_words(tokenizer: Tokenizer) -> None:
    caption = of([("red", True), ("or", False)])
    asked, plainly = tokenizer([caption]), replace(tokenizer, content_words=False)([caption])
    assert torch.equal(asked[0], plainly[0])
    assert torch.equal(asked[1].clamp(max=1), plainly[1])
    assert (int(asked[1].max()), int(plainly[1].max())) == (2, 1)
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
    plainly = evaluate(model.eval(), config, replace(tokenizer, content_words=False), ALONE)
    # Captions are whole, and the similarities others.
    assert [query["caption"] for query in plainly.queries] == [query["caption"] for query in stored]
    assert plainly.queries != stored
    batch = next(training_batches(config, tokenizer, ALONE))
    assert set(batch.word_mask.unique().tolist()) == {0, 1, 2}
    frames, frame_mask, ids, mask = model_inputs(batch, ALONE.device)
    with torch.no_grad():
        twice, once = (model(frames, frame_mask, ids, m) for m in (mask, mask.clamp(max=1)))
    assert torch.equal(twice.words, once.words)  # to the tower a token is a token
    assert torch.equal(twice.sentence, once.sentence)
    assert torch.equal(twice.word_mask, mask)


@pytest.mark.parametrize("setting", ["word_drop", "content_words"])
def test_a_data_set_without_words_ends_the_run_before_it_begins(
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
