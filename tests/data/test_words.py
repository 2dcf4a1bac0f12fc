"""Words of captions: agreement with manual tags, tf-idf weights, and the stored words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import make_dataset, write_clips
from hypothesis import example, given
from hypothesis import strategies as st

from tvr.data_prep.cli import pack
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.words import WordTagger, clean_captions
from tvr.data_prep.reading.loader import read_samples
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import Caption, Clip, WordKind

TAGGED_CAPTIONS = {
    "a man is playing guitar on stage": "(a) *man is *playing *guitar (on) *stage",
    "a dog runs past a red car": "(a) *dog *runs past (a) *red *car",
    "a woman's dog isn't running, it runs": "(a) *woman *dog is *running it *runs",
    "a cat sits on a table": "(a) *cat *sits (on) (a) *table",
    "the band plays a play": "the *band *plays (a) *play",
    "a hip-hop dancer spins on his own head": "(a) *hip-hop *dancer *spins (on) his own *head",
}


def clips(*captions_of_each: tuple[str, ...]) -> list[Clip]:
    return [
        Clip(key=f"k{index}", video="v.mp4", captions=captions, video_id=f"k{index}")
        for index, captions in enumerate(captions_of_each)
    ]


@pytest.fixture(scope="module")
def tagger() -> WordTagger:
    return WordTagger(clips(*((text,) for text in TAGGED_CAPTIONS)))


def marked(caption: Caption) -> str:
    """Returns a caption's words with *content and (droppable) marks."""
    forms = {WordKind.PLAIN: "{}", WordKind.CONTENT: "*{}", WordKind.DROPPABLE: "({})"}
    words = caption.known_words()
    return " ".join(forms[kind].format(caption.text[start:end]) for start, end, kind in words)


def test_agreement_with_manual_tags(tagger: WordTagger) -> None:
    lines = (Path(__file__).parent / "tagged_captions.txt").read_text(encoding="utf-8").splitlines()
    agreed = []
    for line in lines:
        tokens = line.split()
        text = " ".join(token.removeprefix("*") for token in tokens)
        starts = [0]
        for token in tokens[:-1]:
            starts.append(starts[-1] + len(token.removeprefix("*")) + 1)
        content = {
            start for start, token in zip(starts, tokens, strict=True) if token.startswith("*")
        }
        (caption,) = tagger.tag([text])
        words = caption.known_words()
        assert content <= {word.start for word in words}
        agreed += [(word.start in content) == (word.kind == WordKind.CONTENT) for word in words]
    assert (len(lines), len(agreed)) == (80, 568)
    assert sum(agreed) / len(agreed) > 0.98


@pytest.mark.parametrize(("text", "words"), list(TAGGED_CAPTIONS.items()))
def test_captions_of_one_data_set(tagger: WordTagger, text: str, words: str) -> None:
    # All 6 clips contain "a" (weight 0) and 3 contain "on": 1/7 ln(7/4) = 0.08 in 7 words. Words of
    # a single clip weigh 1/7 ln(7/2) = 0.18 and are not droppable: "is", "past", "his".
    (caption,) = tagger.tag([text])
    assert marked(caption) == words


def test_weights_count_all_captions_of_a_clip() -> None:
    same = ("the dog sleeps under the table",) * 7
    tagger = WordTagger(clips((*same, "there the dog sleeps"), ("the cat",), ("under the car",)))
    caption, *_, last = tagger.tag([*same, "there the dog sleeps"])
    # "there" weighs 1/46 ln(4/2) = 0.015, "under" 7/46 ln(4/3) = 0.044.
    assert marked(last) == "(there) (the) *dog *sleeps"
    assert marked(caption) == "(the) *dog *sleeps (under) (the) *table"
    alone = WordTagger(clips(("there the dog sleeps",), ("the cat",), ("a car",)))
    (caption,) = alone.tag(["there the dog sleeps"])
    assert marked(caption) == "there (the) *dog *sleeps"  # 1/4 ln(4/2) = 0.17


def test_at_most_five_forms_and_the_lightest_first() -> None:
    texts = ("he is in it with her and by them for us",)
    tagger = WordTagger(clips(texts, texts, texts, ("by them for us",)))
    (caption,) = tagger.tag(texts)
    # The last four weigh 0; the others weigh the same, so the first of them is the fifth.
    assert marked(caption) == "(he) is in it with her and (by) (them) (for) (us)"


def test_a_form_with_content_or_a_clitic_anywhere_is_not_droppable() -> None:
    texts = ("he can open the can and he's glad",)
    tagger = WordTagger(clips(texts, texts))
    (caption,) = tagger.tag(texts)
    assert marked(caption) == "he can *open (the) *can (and) he *glad"


def test_captions_are_stored_clean() -> None:
    texts = (" a&nbsp;cat \t&amp;amp;  a dog", "", "&#32;", "caf\u00e9")
    assert clean_captions(texts) == ("a cat & a dog", "caf\u00e9")


# By code points, so that a reader sees what is there.
CLEANED = [
    ("caf\u0065\u0301 \u212b", "caf\u00e9 \u00c5"),  # NFD, and a sign that NFC replaces
    ("a\x00cat\x07 \x1b[31m\x7f\x85sits", "a cat [31m sits"),
    ("\ufeffa cat", "a cat"),
    ("a\u200bcat", "a cat"),
    ("a \u202ecat\u202c \u2066sits\u2069 \u200f", "a cat sits"),
    ("cat\u00adwalk \u2060x\ufffe", "catwalk x"),
    ("\u0645\u06cc\u200c\u0631\u0648\u062f", "\u0645\u06cc\u200c\u0631\u0648\u062f"),  # Persian
    ("\U0001f469\u200d\U0001f680 \u2764\ufe0f", "\U0001f469\u200d\U0001f680 \u2764\ufe0f"),
    ("\u0939\u093f\u0928\u094d\u0926\u0940", "\u0939\u093f\u0928\u094d\u0926\u0940"),  # Hindi
    ("a \ue000", "a \ue000"),
    ("...", "..."),
    ("\u6771\u4eac", "\u6771\u4eac"),
    ("\U000323b0", "\U000323b0"),  # may be a letter of a later Unicode version
    (" \t\n\u00a0\u3000\u2003", ""),
    ("\u200b\u200c\u200d\u2060\ufeff", ""),
    ("\u0301\u0308", ""),
    ("\x00\x01\x7f\x9f", ""),
    ("\u202a\u202e\u2069", ""),
    ("\ue000\U000f0000", ""),
    ("\u3164\u115f\u2800", ""),
    ("\ufffc\ufffd\uffff", ""),
    ("&#8203;&amp;nbsp;", ""),
]


@pytest.mark.parametrize(("text", "expected"), CLEANED)
def test_what_a_caption_shows_is_stored(text: str, expected: str) -> None:
    assert clean_captions([text, "x"]) == ((expected, "x") if expected else ("x",))
    assert clean_captions([expected]) == ((expected,) if expected else ())


@given(st.text(max_size=60))
@example("n't 's _ -- don\u2019t 10-year-olds' \u0130stanbul \ufb01sh \u4f60\u597d " + "z" * 3000)
def test_any_text_gives_words_in_order(text: str) -> None:
    texts = clean_captions([text])
    for caption in _any_tagger().tag(texts):
        end = 0
        for word in caption.known_words():
            assert end <= word.start < word.end <= len(caption.text)
            assert caption.text[word.start].isalnum()
            assert caption.text[word.end - 1].isalnum()
            end = word.end
    assert _any_tagger().tag(texts) == _any_tagger().tag(texts)


_CACHE: dict[str, WordTagger] = {}


def _any_tagger() -> WordTagger:
    # hypothesis refuses function-scoped fixtures, because it calls a test many times.
    return _CACHE.setdefault("any", _CACHE.get("any") or WordTagger(clips(("a man",))))


def test_packing_stores_the_words_of_the_tagger(tmp_path: Path) -> None:
    written = write_clips(tmp_path, 4)
    settings: dict[str, Any] = {"layout": "frames", "num_frames": 1, "samples_per_shard": 2}
    pack_shards(written, str(tmp_path / "alone"), words=True, **settings)
    for task in range(2):  # each task weighs words over the clips of both
        several = {"processes": 2, "task": task, "num_tasks": 2}
        pack_shards(written, str(tmp_path / "several"), words=True, **several, **settings)
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        alone, several = ((tmp_path / name / shard).read_bytes() for name in ("alone", "several"))
        assert alone == several
    url = str(tmp_path / "several")
    assert read_manifest(url).tagger == "HanTa 1.2.1"
    samples = read_samples(url, [clip.key for clip in written], num_frames=1, image_size=8)
    tagger = WordTagger(written)
    assert [sample.captions for sample in samples] == [
        tagger.tag(clip.captions) for clip in written
    ]
    assert [marked(caption) for caption in samples[3].captions] == ["*caption (0) (of) *clip 3"]


def test_pack_tags_words_by_default(tmp_path: Path) -> None:
    write_clips(tmp_path, 2)
    lines = [{"video": f"c0{index}.mp4", "caption": "a red car"} for index in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = ["--annotations", str(tmp_path / "a.jsonl"), "--layout", "frames", "--num-frames", "1"]
    assert pack([*common, "--out", str(tmp_path / "with")]) == 0
    assert pack([*common, "--out", str(tmp_path / "without"), "--no-words"]) == 0
    for name, tagger, words in (
        ("with", "HanTa 1.2.1", [[[0, 1, 2], [2, 5, 1], [6, 9, 1]]]),
        ("without", None, None),
    ):
        url = str(tmp_path / name)
        assert read_manifest(url).tagger == tagger
        stored = json.loads(SampleReader(url, num_frames=1, image_size=8).members(0)["json"])
        assert (stored["captions"], stored["words"]) == (["a red car"], words)


def test_without_a_tagger_captions_have_no_words(tmp_path: Path) -> None:
    (sample,) = read_samples(make_dataset(tmp_path, 1), ["c00"], num_frames=1, image_size=8)
    assert [caption.words for caption in sample.captions] == [None]
    with pytest.raises(ValueError, match=r"clip 0': packed without words; .* --words"):
        sample.captions[0].known_words()
