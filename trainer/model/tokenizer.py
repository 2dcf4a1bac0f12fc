"""Tokenisers of Hugging Face folders, and CLIP's own or one learned from captions by its rules.

A caption's first and last token are those that the tokeniser adds, such as CLIP's start and end,
BERT's [CLS] and [SEP], or only an end. SigLIP 2 was trained on captions in lower case, which
Gemma's tokeniser keeps as they are: here it lowers them, as `Siglip2Tokenizer` of transformers does
(issue 43054 there). Token types are left out: a caption is one segment, and
encoders take all tokens as of the first one. Captions are padded at the end.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models, normalizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tvr.data_prep.records import Caption, WordKind
from tvr.trainer.versions.versions import (
    CLIP_END,
    CLIP_START,
    WORD_END,
    clip_tokenizer_class,
    new_clip_tokenizer,
    siglip2_tokenizer_class,
)

# Every byte within a word and at its end, the start and the end: no caption has unknown tokens.
SMALLEST_VOCABULARY = 2 * 256 + 2
CLIP_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
# The file's first line is a title, the next 48,894 lines are CLIP's merges, the rest is unused.
CLIP_MERGES = slice(1, 48_895)
CLIP_MAX_WORDS = 77
# Where a folder names SigLIP; the two generations differ in the vocabulary alone.
SIGLIP_KEYS = {
    "config.json": ("model_type",),
    "tokenizer_config.json": ("processor_class", "tokenizer_class"),
}
# One of these lets transformers find the tokeniser's class; vocab.txt is BERT's.
AUTO_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer as `collate` calls it; loader workers can pickle it."""

    backend: PreTrainedTokenizerBase
    max_words: int
    content_words: bool = False

    def __call__(self, captions: Sequence[Caption]) -> tuple[Tensor, Tensor]:
        """Tokenises captions.

        A caption of more than `max_words` tokens is cut and keeps its end token, whose feature is
        the sentence's.

        Returns:
            Token ids (A, T) and word mask (A, T), int64, with T = max_words. The mask is 0 on
            padding, 1 on the caption's tokens, its start and its end, and with `content_words` 2
            on the tokens of content words.

        Raises:
            ValueError: `content_words` is on, and a caption was packed without words.
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
        """Id of the start token.

        Raises:
            ValueError: the tokenizer has none, as SigLIP's.
        """
        if self.backend.bos_token is None:
            raise ValueError("the tokenizer has no bos_token, which towers from scratch need")
        return self.backend.get_vocab()[str(self.backend.bos_token)]

    @property
    def start_token_id(self) -> int | None:
        """Id of the token that begins a caption: BERT's is [CLS]; None where there is none."""
        start = self.backend.bos_token or self.backend.cls_token
        return None if start is None else self.backend.get_vocab()[str(start)]

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a caption: BERT's is [SEP]."""
        return self.backend.get_vocab()[str(self.backend.eos_token or self.backend.sep_token)]


def _on_content(caption: Caption, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Marks the tokens that share a character with a content word.

    Offsets count characters of the original text, before normalisation. Start, end and padding
    have empty offsets.
    """
    content = bytearray(len(caption.text))
    for word in caption.known_words():
        if word.kind == WordKind.CONTENT:
            content[word.start : word.end] = bytes([1]) * (word.end - word.start)
    return [any(content[start:end]) for start, end in offsets]


def load_tokenizer(folder: str | Path, max_words: int, *, content_words: bool = False) -> Tokenizer:
    """Loads the tokenizer of a local Hugging Face folder; nothing is downloaded.

    Raises:
        ValueError: the folder holds no tokenizer, or one without an end or padding token;
            `content_words` is on, and it cannot map tokens to characters; or `max_words` is too
            small for a word.
    """
    # Loader workers tokenise too, and the library's own threads do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if max_words < 3:
        raise ValueError(f"max_words={max_words} must be at least 3: start, one token, end")
    folder = Path(folder)
    has_clip_files = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    # tokenizer.json alone names no end and no padding.
    is_named = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    if any((folder / name).is_file() for name in AUTO_FILES) and (is_named or not has_clip_files):
        try:
            backend = _auto_tokenizer(folder)
        except ImportError as error:
            raise ValueError(
                f"the tokenizer in {folder} needs more packages (SigLIP's: pip install "
                f"'tvr[siglip]'): {error}"
            ) from None
    elif has_clip_files:
        backend = clip_tokenizer_class().from_pretrained(folder, local_files_only=True)
    else:
        raise ValueError(
            f"tokenizer folder {folder} holds neither {', '.join(AUTO_FILES)} nor vocab.json and "
            "merges.txt; give a Hugging Face tokenizer's local folder"
        )
    for role, found in (
        ("eos_token", backend.eos_token or backend.sep_token),
        ("pad_token", backend.pad_token),
    ):
        if found is None:
            raise ValueError(f"the tokenizer in {folder} has no {role}; the model needs one")
    # Gemma's pads at the start by default; the masks of the model allow both, CLIP's end does not.
    backend.padding_side = backend.truncation_side = "right"
    if content_words and not backend.is_fast:
        raise ValueError(
            f"the tokenizer in {folder} cannot map tokens to characters, which "
            "data.content_words needs; give a folder with tokenizer.json"
        )
    return Tokenizer(backend, max_words, content_words)


def _auto_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not _is_siglip(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if (folder / "tokenizer.json").is_file() and (own := siglip2_tokenizer_class()) is not None:
        backend: Any = own.from_pretrained(folder, local_files_only=True)
    else:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # SigLIP's own tokeniser, which is not a fast one, lowers by itself.
    if backend.is_fast:
        rules = backend.backend_tokenizer
        before = [] if rules.normalizer is None else [rules.normalizer]
        if not before or before[0].normalize_str("A") != before[0].normalize_str("a"):
            rules.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    return backend


def _is_siglip(folder: Path) -> bool:
    """True if the folder says that its tokeniser is for a SigLIP, of either generation."""
    for name, keys in SIGLIP_KEYS.items():
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            if any(str(content.get(key)).lower().startswith("siglip") for key in keys):
                return True
    return False


def train_tokenizer(
    captions: Iterable[str], folder: str | Path, *, vocab_size: int, max_words: int
) -> Tokenizer:
    """Learns a byte-pair vocabulary from captions by CLIP's rules and saves it to `folder`.

    Args:
        vocab_size: Upper limit of the vocabulary, at least SMALLEST_VOCABULARY.

    Raises:
        ValueError: `vocab_size` is too small, or no caption has a word of two letters.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {SMALLEST_VOCABULARY}: every byte twice, "
            "start and end"
        )
    # CLIP's own normaliser and pre-tokeniser, so that the result splits text as CLIP does.
    rules = new_clip_tokenizer().backend_tokenizer
    learner = BackendTokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = rules.normalizer
    learner.pre_tokenizer = rules.pre_tokenizer
    letters = _byte_letters()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        end_of_word_suffix=WORD_END,
        initial_alphabet=letters,
        # Merges of equal counts are ordered by the ids of their parts. Without this list the
        # library numbers word-final letters in hash order, which differs between runs.
        special_tokens=[letter + WORD_END for letter in letters],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]
    if not merges:
        raise ValueError("the captions hold no word of two letters; give captions with text")
    return _save(merges[: vocab_size - SMALLEST_VOCABULARY], folder, max_words)


def clip_tokenizer(folder: str | Path, *, max_words: int = CLIP_MAX_WORDS) -> Tokenizer:
    """Saves CLIP's own tokenizer (49,408 tokens) to `folder`, from the installed open_clip.

    Raises:
        ValueError: open_clip is not installed.
    """
    # The package is located, not imported: open_clip imports torchvision, which may be missing.
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
    backend = new_clip_tokenizer(_vocabulary(merges), merges, model_max_length=max_words)
    backend.save_pretrained(folder)
    return load_tokenizer(folder, max_words)


def _vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Numbers tokens in CLIP's order: bytes, word-final bytes, merges, start, end (largest id)."""
    letters = _byte_letters()
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += [left + right for left, right in merges]
    ends = (CLIP_START, CLIP_END)
    return {token: index for index, token in enumerate(dict.fromkeys([*tokens, *ends]))}


def _byte_letters() -> list[str]:
    """Maps each byte to a printable letter: its own if it has one, else the next beyond 255."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(own)
    return [chr(code) for code in own] + [chr(256 + index) for index in range(others)]
