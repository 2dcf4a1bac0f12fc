"""Captions to token ids: CLIP's byte-pair encoding, with its own vocabulary or one trained here."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, trainers
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from tvr.data_prep.records import Caption, WordKind

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Every byte, inside a word and at its end, start and end: no caption has an unknown token.
SMALLEST_VOCABULARY = 2 * 256 + 2
CLIP_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
# The file holds more merges than CLIP uses: its first line is a title, the next 48,894 are CLIP's.
CLIP_MERGES = slice(1, 48_895)
CLIP_MAX_WORDS = 77


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer, called the way `collate` wants it; loader workers can pickle it."""

    backend: PreTrainedTokenizerBase
    max_words: int
    content_words: bool = False

    def __call__(self, captions: Sequence[Caption]) -> tuple[Tensor, Tensor]:
        """Token ids (A, T) and word_mask (A, T), int64, T = max_words.

        The mask is 1 on the caption's tokens, its start and its end, and with `content_words` 2 on
        the tokens of content words. A longer caption is cut and keeps its end token, whose feature
        is the sentence's.

        Raises ValueError with `content_words` for a caption packed without words.
        """
        if not captions:
            empty = torch.zeros(0, self.max_words, dtype=torch.int64)
            return empty, empty.clone()
        encoded = self.backend(
            [caption.text for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=self.max_words,
            return_offsets_mapping=self.content_words,
        )
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        mask = torch.tensor(encoded["attention_mask"], dtype=torch.int64)
        if self.content_words:
            mask += torch.tensor(
                [
                    _on_content(caption, offsets)
                    for caption, offsets in zip(captions, encoded["offset_mapping"], strict=True)
                ]
            )
        return ids, mask

    @property
    def vocab_size(self) -> int:
        return len(self.backend)

    @property
    def bos_token_id(self) -> int:
        """Raises ValueError where captions have no start, as SigLIP's."""
        if self.backend.bos_token is None:
            raise ValueError("the tokenizer has no bos_token, which towers from scratch need")
        return self.backend.get_vocab()[str(self.backend.bos_token)]

    @property
    def eos_token_id(self) -> int:
        return self.backend.get_vocab()[str(self.backend.eos_token)]


def _on_content(caption: Caption, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens share a character with a content word. Offsets are characters of the text as it
    was given, whatever the normaliser did to it; start, end and padding have none."""
    content = bytearray(len(caption.text))
    for word in caption.known_words():
        if word.kind == WordKind.CONTENT:
            content[word.start : word.end] = bytes([1]) * (word.end - word.start)
    return [any(content[start:end]) for start, end in offsets]


def load_tokenizer(folder: str | Path, max_words: int, *, content_words: bool = False) -> Tokenizer:
    """The tokenizer of a local Hugging Face folder; nothing is downloaded.

    Raises ValueError for a folder without a tokenizer, one without an end or padding token, one
    that cannot tell its tokens' characters where `content_words` needs them, and a `max_words`
    with no room for a word.
    """
    # Ids are made in loader workers too; the library's own threads and a fork do not mix.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if max_words < 3:
        raise ValueError(f"max_words={max_words} must be at least 3: start, one token, end")
    folder = Path(folder)
    if (folder / "tokenizer_config.json").is_file():
        try:
            backend = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except ImportError as error:
            raise ValueError(
                f"the tokenizer in {folder} needs more packages (SigLIP's: pip install "
                f"'tvr[siglip]'): {error}"
            ) from None
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    else:
        raise ValueError(
            f"tokenizer folder {folder} holds neither tokenizer_config.json nor vocab.json and "
            "merges.txt; give a Hugging Face tokenizer's local folder"
        )
    for role in ("eos_token", "pad_token"):
        if getattr(backend, role) is None:
            raise ValueError(f"the tokenizer in {folder} has no {role}; the model needs one")
    if content_words and not backend.is_fast:
        raise ValueError(
            f"the tokenizer in {folder} does not tell its tokens' characters, which "
            "data.content_words needs; give a folder with tokenizer.json"
        )
    return Tokenizer(backend, max_words, content_words)


def train_tokenizer(
    captions: Iterable[str], folder: str | Path, *, vocab_size: int, max_words: int
) -> Tokenizer:
    """Learns at most `vocab_size` tokens from captions by CLIP's rules, saved to `folder`."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {SMALLEST_VOCABULARY}: every byte twice, "
            "start and end"
        )
    # CLIP's own normaliser and splitter, so that the trained folder reads text as CLIP's does.
    rules = CLIPTokenizer().backend_tokenizer
    learner = BackendTokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = rules.normalizer
    learner.pre_tokenizer = rules.pre_tokenizer
    letters = _byte_letters()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        end_of_word_suffix=WORD_END,
        initial_alphabet=letters,
        # Merges of equal counts go by the ids of their parts. The library numbers the letters that
        # end a word in the order of a hash table, which differs from run to run, unless told.
        special_tokens=[letter + WORD_END for letter in letters],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    if not merges:
        raise ValueError("the captions hold no word of two letters; give captions with text")
    return _save(merges[: vocab_size - SMALLEST_VOCABULARY], folder, max_words)


def clip_tokenizer(folder: str | Path, *, max_words: int = CLIP_MAX_WORDS) -> Tokenizer:
    """CLIP's own tokenizer (49,408 tokens), saved to `folder` from the installed open_clip."""
    # Found, not imported: open_clip imports torchvision, which need not be there.
    spec = find_spec("open_clip")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(place, CLIP_MERGES_FILE) for place in places]
    found = [file for file in files if file.is_file()]
    if not found:
        raise ValueError(
            f"CLIP's vocabulary file {CLIP_MERGES_FILE} is not installed; it comes with "
            "`pip install open_clip_torch`"
        )
    with gzip.open(found[0], "rt", encoding="utf-8") as lines:
        pairs = [line.split() for line in lines.read().split("\n")[CLIP_MERGES]]
    return _save([(left, right) for left, right in pairs], folder, max_words)


def _save(merges: list[tuple[str, str]], folder: str | Path, max_words: int) -> Tokenizer:
    backend = CLIPTokenizer(
        vocab=_vocabulary(merges),
        # Annotated as list[str] upstream, and passed to a class that wants pairs.
        merges=cast(Any, merges),
        model_max_length=max_words,
    )
    backend.save_pretrained(folder)
    return load_tokenizer(folder, max_words)


def _vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Ids in CLIP's order: bytes, bytes that end a word, merges, start, end (the largest id)."""
    letters = _byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += [left + right for left, right in merges]
    return {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}


def _byte_letters() -> list[str]:
    """One printable letter per byte: the byte's own where it has one, else the next beyond 255."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(own)
    return [chr(code) for code in own] + [chr(256 + index) for index in range(others)]
