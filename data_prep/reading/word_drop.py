"""Drops uninformative words from a caption, drawn anew each time training reads the caption."""

from __future__ import annotations

import numpy as np

from tvr.data_prep.reading.order import uniforms
from tvr.data_prep.records import Caption, Word, WordKind


def drop_words(caption: Caption, seed: int, position: int) -> Caption:
    """Removes k randomly chosen droppable word forms, each with all its occurrences.

    k is uniform in 0 ... min(droppable forms, half of all forms, rounded down), so at least half of
    the forms stay. The result is a pure function of (seed, stream position, caption).

    Raises:
        ValueError: the caption was packed without words.
    """
    words = caption.known_words()
    forms = {_form(caption, word): word.kind for word in words}
    droppable = [form for form, kind in forms.items() if kind == WordKind.DROPPABLE]
    draws = uniforms("words", seed, position, 1 + len(droppable))
    max_dropped = min(len(droppable), len(forms) // 2)
    chosen = np.argsort(draws[1:], kind="stable")[: int(draws[0] * (max_dropped + 1))]
    return _without(caption, words, {droppable[index] for index in chosen})


def _form(caption: Caption, word: Word) -> str:
    """Case-folded text of a word; equal for all occurrences of the word."""
    return caption.text[word.start : word.end].casefold()


def _without(caption: Caption, words: tuple[Word, ...], forms: set[str]) -> Caption:
    """Removes words and the space after each, or the space before at the caption's end."""
    text, kept, copied = "", [], 0
    for word in words:
        text += caption.text[copied : word.start]
        copied = word.end
        if _form(caption, word) not in forms:
            end = len(text) + word.end - word.start
            kept.append(word._replace(start=len(text), end=end))
            text += caption.text[word.start : word.end]
        elif (not text or text.endswith(" ")) and caption.text.startswith(" ", copied):
            copied += 1
    return Caption(text=(text + caption.text[copied:]).rstrip(), words=tuple(kept))
