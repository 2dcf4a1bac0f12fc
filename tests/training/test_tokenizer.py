"""Tokenisers: CLIP's rules, masks, truncation, files for Hugging Face classes, errors."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from builders.clip_files import plain_captions
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tvr.trainer.model.tokenizer import (
    SMALLEST_VOCABULARY,
    Tokenizer,
    clip_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

CAPTIONS = [
    "a small red circle moves left",
    "a large blue square moves right, then a small red circle moves up",
    "two green triangles move slowly",
] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, path, vocab_size=600, max_words=12)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, 12)


def test_frequent_words_become_one_token(tokenizer: Tokenizer) -> None:
    words = tokenizer.backend.tokenize("a small red circle moves")
    assert words == ["a</w>", "small</w>", "red</w>", "circle</w>", "moves</w>"]


def test_mask_covers_start_words_and_end(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(plain_captions("a red circle", ""))
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (2, 12)
    assert mask.tolist() == [[1] * 5 + [0] * 7, [1] * 2 + [0] * 10]
    assert ids[0, 0] == ids[1, 0] == tokenizer.bos_token_id
    # Padding is the end token again, as in CLIP: the first one ends the caption.
    assert (ids[0, 4:] == tokenizer.eos_token_id).all()
    assert not (ids[0, 1:4] == tokenizer.eos_token_id).any()


def test_truncation_keeps_the_end(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(plain_captions("red circle " * 20))
    assert mask.tolist() == [[1] * 12]
    assert ids[0, -1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[0, :-1]


def test_no_captions_make_an_empty_batch(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer([])
    assert ids.shape == mask.shape == (0, 12)


def test_ids_are_contiguous_and_end_with_start_and_end(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.backend.get_vocab()
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))
    assert SMALLEST_VOCABULARY < tokenizer.vocab_size <= 600
    assert tokenizer.bos_token_id == tokenizer.vocab_size - 2
    assert tokenizer.eos_token_id == tokenizer.vocab_size - 1
    assert set(ByteLevel.alphabet()) <= set(vocabulary)


@pytest.mark.parametrize(
    ("written", "same_as"),
    [
        ("A  RED\tCircle", "a red circle"),
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_spelling_variants_give_the_same_ids(
    written: str, same_as: str, tokenizer: Tokenizer
) -> None:
    assert torch.equal(tokenizer(plain_captions(written))[0], tokenizer(plain_captions(same_as))[0])


@given(st.text(max_size=30))
def test_no_text_has_an_unknown_token(text: str) -> None:
    # The unknown token is the end token, which would end a caption early.
    tokenizer = _any_tokenizer()
    words = tokenizer.backend.encode(text, add_special_tokens=False)
    specials = text.lower().count("<|startoftext|>") + text.lower().count("<|endoftext|>")
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert sum(word in ends for word in words) <= specials


_CACHE: dict[str, Tokenizer] = {}


def _any_tokenizer() -> Tokenizer:
    # hypothesis calls a test many times and refuses function-scoped fixtures.
    if "any" not in _CACHE:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _CACHE["any"] = train_tokenizer(CAPTIONS, folder, vocab_size=520, max_words=12)
    return _CACHE["any"]


def test_equal_captions_give_equal_files(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(CAPTIONS), tmp_path, vocab_size=600, max_words=12)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("load", [AutoTokenizer, PreTrainedTokenizerFast])
def test_hugging_face_reads_the_folder(load: type, folder: Path, tokenizer: Tokenizer) -> None:
    theirs = load.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    ids = theirs(CAPTIONS[1], padding="max_length", max_length=12, truncation=True)["input_ids"]
    assert ids == tokenizer(plain_captions(CAPTIONS[1]))[0][0].tolist()
    assert theirs.model_max_length == 12


def test_vocabulary_and_merges_files_are_enough(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    ids, mask = load_tokenizer(tmp_path, 12)(plain_captions(*CAPTIONS))
    assert torch.equal(ids, tokenizer(plain_captions(*CAPTIONS))[0])
    assert torch.equal(mask, tokenizer(plain_captions(*CAPTIONS))[1])


def test_pickles_to_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy(plain_captions(*CAPTIONS))[0], tokenizer(plain_captions(*CAPTIONS))[0])
    assert (copy.max_words, copy.vocab_size) == (tokenizer.max_words, tokenizer.vocab_size)


def test_errors_name_the_cause(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent holds neither tokenizer_config\.json"):
        load_tokenizer(tmp_path / "absent", 12)
    with pytest.raises(ValueError, match="max_words=2 must be at least 3"):
        load_tokenizer(folder, 2)
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 514"):
        train_tokenizer(CAPTIONS, tmp_path, vocab_size=100, max_words=12)
    with pytest.raises(ValueError, match="captions hold no word"):
        train_tokenizer([], tmp_path, vocab_size=600, max_words=12)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_padding_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="has no pad_token"):
        load_tokenizer(tmp_path, 12)


def test_a_missing_clip_vocabulary_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvr.trainer.model.tokenizer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        clip_tokenizer(tmp_path)


@pytest.mark.skipif(
    find_spec("open_clip") is None, reason="open_clip_torch, which has CLIP's vocabulary, is absent"
)
def test_clip_tokens_equal_those_of_the_published_models(tmp_path: Path) -> None:
    tokenizer = clip_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 49_408
    ids, mask = tokenizer(plain_captions("a photo of a cat"))
    assert ids.shape == (1, 77)
    assert ids[0, : mask.sum()].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
