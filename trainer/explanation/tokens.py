"""The tokens of a caption as a reader knows them."""

from __future__ import annotations

from typing import Any, NamedTuple

from tvr.trainer.model.tokenizer import Tokenizer


class TokenTexts(NamedTuple):
    """Texts of the T slots of a caption."""

    texts: tuple[str, ...]
    is_special: tuple[bool, ...]
    continues_word: tuple[bool, ...]


def token_texts(tokenizer: Tokenizer, caption: str) -> TokenTexts:
    """The caption's own letters for each token, and names for start, end and padding.

    A token of a part of a letter, in byte-pair encoding, is shown as the whole letter.
    """
    backend: Any = tokenizer.backend
    encoded = backend(
        [caption],
        padding="max_length",
        truncation=True,
        max_length=tokenizer.max_words,
        return_offsets_mapping=backend.is_fast,
    )
    ids: list[int] = encoded["input_ids"][0]
    names = {backend.pad_token_id: "[pad]"}
    # Some vocabularies pad with the end token.
    names |= {tokenizer.start_token_id: "[start]", tokenizer.eos_token_id: "[end]"}
    if not backend.is_fast:
        special = tuple(token in names for token in ids)
        texts = tuple(names.get(token) or str(backend.decode([token])).strip() for token in ids)
        return TokenTexts(texts, special, (False,) * len(ids))
    offsets: list[tuple[int, int]] = encoded["offset_mapping"][0]
    words = encoded.word_ids(0)
    special = tuple(start == end for start, end in offsets)
    texts = tuple(
        caption[start:end] if start < end else names.get(token, str(backend.decode([token])))
        for token, (start, end) in zip(ids, offsets, strict=True)
    )
    continues = tuple(
        row > 0 and words[row] is not None and words[row] == words[row - 1]
        for row in range(len(ids))
    )
    return TokenTexts(tuple(text.strip() or text for text in texts), special, continues)
