"""Words of captions: which ones carry content, and which ones training may leave out.

Parts of speech are tagged once, when a data set is packed, by HanTa's English model, which its
wheel carries (BNC tags). How many of the 569 words of 80 hand-tagged captions
(tests/tagged_captions.txt: lower case, typos, clitics, verbs that are nouns elsewhere) are rightly
told to carry content or not, and captions a second on one core:

    HanTa 1.2.1                      99.6 %     4,000
    spaCy 3.8 with en_core_web_sm    99.3 %     1,500   (its model as third parties upload it)
    TextBlob 0.20, PatternTagger     98.2 %     2,000
    denckring-en-pos 0.6             97.9 %    20,000

A word is letters and digits, inner hyphens and apostrophes included, without a clitic at its end
("man" in "man's", "does" in "doesn't").
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

from HanTa.HanoverTagger import HanoverTagger

from tvr.data_prep.records import Caption, Clip, Word, WordKind

# Nouns, names, adjectives, full verbs. Forms of be, have and do, modals, determiners and pronouns
# have other tags, so that of the usual stop words only these remain.
CONTENT_TAGS = ("NN", "NP", "AJ", "VV")
STOP_WORDS = frozenset({"other", "others", "own", "same", "such"})

KEYWORD_WEIGHT = 0.1
MAX_DROPPABLE = 5

_TOKEN = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*|[^\w\s]|_")
_CLITIC = re.compile(r"(?<=\w)(?:n['\u2019]t|['\u2019](?:s|re|ve|m|ll|d))$", re.IGNORECASE)
# The tagger's time grows with the cube of a word's length.
_MAX_LETTERS = 40


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions as they are stored: HTML entities resolved (twice, as CLIP does), one space between
    words, empty ones left out."""
    texts = (" ".join(html.unescape(html.unescape(caption)).split()) for caption in captions)
    return tuple(text for text in texts if text)


class WordTagger:
    """Finds the words of a data set's captions; the same for the same clips on every machine.

    `clips` are those of the whole split, also where only a part of it is packed. The weight of a
    word in a clip is tf x idf: its share of all words in the clip's captions, times
    ln((1 + N) / (1 + n)) where n of N clips have it; a word of every clip weighs 0. Droppable are,
    in a caption, at most the five forms of lowest weight (the earliest of equals) among those below
    0.1 with no occurrence that carries content or a clitic. So fillers may go; content words and
    telling adverbs and prepositions stay. The authors have the same five and 0.1, but the idf of a
    Chinese table, to which all English words but a few fillers (weight 0) are equal: there, too,
    fillers go first, and few others go.
    """

    def __init__(self, clips: Iterable[Clip]) -> None:
        self._num_clips = 0
        self._clips_with: Counter[str] = Counter()
        for clip in clips:
            self._num_clips += 1
            self._clips_with.update(set(_forms(clean_captions(clip.captions))))

    def tag(self, texts: Sequence[str]) -> tuple[Caption, ...]:
        """One clip's captions, as `clean_captions` gives them, with their words."""
        counts = Counter(_forms(texts))
        weights = {form: self._weight(form, n / counts.total()) for form, n in counts.items()}
        return tuple(Caption(text=text, words=self._words(text, weights)) for text in texts)

    def _weight(self, form: str, share: float) -> float:
        return share * math.log((1 + self._num_clips) / (1 + self._clips_with[form]))

    def _words(self, text: str, weights: dict[str, float]) -> tuple[Word, ...]:
        tokens = list(_tokens(text))
        content = self._content(tokens)
        stay = {each.form for each, tells in zip(tokens, content, strict=True) if tells}
        stay |= {each.form for each in tokens if each.clitic}
        forms = dict.fromkeys(each.form for each in tokens if each.is_word)
        light = [form for form in forms if form not in stay and weights[form] < KEYWORD_WEIGHT]
        lightest = set(sorted(light, key=weights.__getitem__)[:MAX_DROPPABLE])
        return tuple(
            Word(each.start, each.end, _kind(tells, each.form in lightest))
            for each, tells in zip(tokens, content, strict=True)
            if each.is_word
        )

    def _content(self, tokens: Sequence[_Token]) -> list[bool]:
        parts = [part for each in tokens for part in (each.stem, each.clitic) if part]
        parts = [part.replace("\u2019", "'")[-_MAX_LETTERS:] for part in parts]
        tags = iter(_model().tag_sent(parts, taglevel=0, casesensitive=False))
        found = []
        for each in tokens:
            tag = next(tags)
            if each.clitic:
                next(tags)
            is_content = tag.startswith(CONTENT_TAGS) and each.form not in STOP_WORDS
            found.append(each.is_word and is_content)
        return found


def tagger_name() -> str:
    """The tagger and its version, on which the words found depend."""
    return f"HanTa {version('HanTa')}"


@cache
def _model() -> HanoverTagger:
    # Not a WordTagger's own, which goes to other processes: each loads the model, in 0.2 s.
    return HanoverTagger("morphmodel_en.pgz")


def _kind(content: bool, light: bool) -> WordKind:
    if content:
        return WordKind.CONTENT
    return WordKind.DROPPABLE if light else WordKind.PLAIN


class _Token(NamedTuple):
    start: int
    end: int
    stem: str
    clitic: str
    is_word: bool

    @property
    def form(self) -> str:
        """What equal words have in common."""
        return self.stem.casefold()


def _tokens(text: str) -> Iterator[_Token]:
    """Words and single other signs, the spaces left out."""
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        clitic = _CLITIC.search(match.group())
        if clitic is not None:
            end = start + clitic.start()
        after = clitic.group() if clitic is not None else ""
        yield _Token(start, end, text[start:end], after, text[start].isalnum())


def _forms(texts: Iterable[str]) -> Iterator[str]:
    return (each.form for text in texts for each in _tokens(text) if each.is_word)
