"""Finds the words of captions: content words, and words that word drop may remove.

Packing tags parts of speech once, with HanTa's English model (BNC tags), which is part of HanTa's
wheel. Accuracy of "content word or not" on the 569 words of 80 hand-tagged captions
(tests/data/tagged_captions.txt: lower case, typos, clitics, verbs that are nouns elsewhere), and
captions a second on one core:

    HanTa 1.2.1                      99.6 %     4,000
    spaCy 3.8 with en_core_web_sm    99.3 %     1,500   (its model as third parties upload it)
    TextBlob 0.20, PatternTagger     98.2 %     2,000
    denckring-en-pos 0.6             97.9 %    20,000

A word consists of letters and digits and may contain hyphens and apostrophes. A clitic at its end
does not belong to it ("man" in "man's", "does" in "doesn't").
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from typing import NamedTuple

from HanTa.HanoverTagger import HanoverTagger

from tvr.data_prep.caption_text import clean_captions
from tvr.data_prep.packing.word_counts import WordCounter, WordCounts
from tvr.data_prep.records import Caption, Clip, Word, WordKind

# Nouns, names, adjectives, full verbs. Forms of be, have and do, modals, determiners and pronouns
# have other tags, so only these of the usual stop words have a content tag.
CONTENT_TAGS = ("NN", "NP", "AJ", "VV")
STOP_WORDS = frozenset({"other", "others", "own", "same", "such"})

KEYWORD_WEIGHT = 0.1
MAX_DROPPABLE = 5

_TOKEN = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*|[^\w\s]|_")
_CLITIC = re.compile(r"(?<=\w)(?:n['\u2019]t|['\u2019](?:s|re|ve|m|ll|d))$", re.IGNORECASE)
# The tagger's time grows with the cube of a word's length.
_MAX_LETTERS = 40


class WordTagger:
    """Finds the words of a data set's captions, with the same result on every machine.

    The weight of a word in a clip is tf x idf: the word's share of all words in the clip's
    captions, times ln((1 + N) / (1 + n)) if n of N clips contain it. A word of every clip has
    weight 0.

    In each caption, at most five word forms are droppable: those of the lowest weight below 0.1
    (the earliest among equals) of which no occurrence is a content word or has a clitic. Word drop
    thus removes fillers, and keeps content words and informative adverbs and prepositions.

    The authors use the same limits, five and 0.1, with the idf of a Chinese table. That table gives
    weight 0 to a few English fillers and equal weights to all other English words, so it also
    drops fillers first, and few other words.

    Args:
        clips: Clips of the whole split, also if only a part of it is packed; or their counts.
    """

    def __init__(self, clips: Iterable[Clip] | WordCounts) -> None:
        if isinstance(clips, WordCounts):
            self._clips_with = clips
            return
        counter = WordCounter()
        for clip in clips:
            counter.add(word_forms(clip.captions))
        self._clips_with = counter.finish()

    def tag(self, texts: Sequence[str]) -> tuple[Caption, ...]:
        """Returns one clip's captions with their words; `texts` come from `clean_captions`."""
        counts = Counter(_forms(texts))
        weights = {form: self._weight(form, n / counts.total()) for form, n in counts.items()}
        return tuple(Caption(text=text, words=self._words(text, weights)) for text in texts)

    def _weight(self, form: str, share: float) -> float:
        return share * math.log((1 + self._clips_with.num_clips) / (1 + self._clips_with[form]))

    def _words(self, text: str, weights: dict[str, float]) -> tuple[Word, ...]:
        tokens = list(_tokens(text))
        content = self._is_content(tokens)
        kept = {token.form for token, is_content in zip(tokens, content, strict=True) if is_content}
        kept |= {token.form for token in tokens if token.clitic}
        forms = dict.fromkeys(token.form for token in tokens if token.is_word)
        light = [form for form in forms if form not in kept and weights[form] < KEYWORD_WEIGHT]
        droppable = set(sorted(light, key=weights.__getitem__)[:MAX_DROPPABLE])
        return tuple(
            Word(token.start, token.end, _kind(is_content, token.form in droppable))
            for token, is_content in zip(tokens, content, strict=True)
            if token.is_word
        )

    def _is_content(self, tokens: Sequence[_Token]) -> list[bool]:
        """Returns for each token whether it is a content word."""
        parts = [part for token in tokens for part in (token.stem, token.clitic) if part]
        parts = [part.replace("\u2019", "'")[-_MAX_LETTERS:] for part in parts]
        tags = iter(_model().tag_sent(parts, taglevel=0, casesensitive=False))
        content = []
        for token in tokens:
            tag = next(tags)
            if token.clitic:
                next(tags)
            has_content_tag = tag.startswith(CONTENT_TAGS) and token.form not in STOP_WORDS
            content.append(token.is_word and has_content_tag)
        return content


def word_forms(captions: Iterable[str]) -> Iterator[str]:
    """Yields the forms of a clip's words, as `_forms` does, for counting those of millions."""
    for text in clean_captions(captions):
        for token in _TOKEN.findall(text):
            if form := _form(token):
                yield form


def tagger_name() -> str:
    """Returns the tagger's name and version, on which the words depend."""
    return f"HanTa {version('HanTa')}"


@cache
def _model() -> HanoverTagger:
    # Not a field of WordTagger, which is sent to other processes: each loads the model in 0.2 s.
    return HanoverTagger("morphmodel_en.pgz")


def _kind(is_content: bool, is_droppable: bool) -> WordKind:
    if is_content:
        return WordKind.CONTENT
    return WordKind.DROPPABLE if is_droppable else WordKind.PLAIN


class _Token(NamedTuple):
    start: int
    end: int
    stem: str
    clitic: str
    is_word: bool

    @property
    def form(self) -> str:
        """Case-folded stem, by which words are compared."""
        return self.stem.casefold()


def _tokens(text: str) -> Iterator[_Token]:
    """Yields words and single other characters; skips white space."""
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        clitic = _CLITIC.search(match.group())
        if clitic is not None:
            end = start + clitic.start()
        after = clitic.group() if clitic is not None else ""
        yield _Token(start, end, text[start:end], after, text[start].isalnum())


@lru_cache(maxsize=1 << 17)
def _form(token: str) -> str:
    """Returns the form of a match of _TOKEN; "" for one that is no word."""
    return next(_forms([token]), "")


def _forms(texts: Iterable[str]) -> Iterator[str]:
    return (token.form for text in texts for token in _tokens(text) if token.is_word)
