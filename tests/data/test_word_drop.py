"""Word drop: the dropped words, their frequency, and the same draws for any ranks and restarts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from builders.batches import training
from builders.clip_files import make_dataset, write_clips
from hypothesis import given
from hypothesis import strategies as st

from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.augment import drop_words
from tvr.data_prep.reading.order import caption_choice
from tvr.data_prep.records import Batch, Caption, Clip, Word, WordKind, hash_caption
from tvr.trainer.model.tokenizer import Tokenizer, train_tokenizer

# torch warns if there are more workers than cores; the order must not depend on the cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def caption(marked: str) -> Caption:
    """Parses a text whose words are marked as *content or (droppable)."""
    text, words = "", []
    for part in marked.split():
        kind = WordKind.DROPPABLE if part[0] == "(" else WordKind(int(part[0] == "*"))
        bare = re.sub(r"[(*)]", "", part)
        text += " " if text else ""
        words.append(Word(len(text), len(text) + len(bare.rstrip(",")), kind))
        text += bare
    return Caption(text=text, words=tuple(words))


def dropped(marked: str, num_positions: int = 400) -> Counter[str]:
    whole = caption(marked)
    return Counter(drop_words(whole, 3, position).text for position in range(num_positions))


def test_a_word_is_dropped_with_all_its_occurrences_and_one_space() -> None:
    assert set(dropped("(A) *dog (and) (a) *cat, (and) *birds")) == {
        "A dog and a cat, and birds",
        "dog and cat, and birds",
        "A dog a cat, birds",
        "dog cat, birds",
    }
    assert set(dropped("*hands (on), (off)")) == {"hands on, off", "hands , off", "hands on,"}


def test_plain_and_content_words_are_never_dropped() -> None:
    for text in dropped("(the) *cat sits under (a) *table"):
        assert [word for word in text.split() if word not in ("the", "a")] == [
            "cat",
            "sits",
            "under",
            "table",
        ]


@pytest.mark.parametrize(
    ("marked", "most"),
    [
        ("(a) (b) (c) *d *e *f *g *h", 3),  # three droppable forms
        ("(a) (b) (c) (d) *e", 2),  # half of five forms
        ("(a) (a) (a) (b)", 1),  # half of two forms: occurrences do not count
        ("(a)", 0),
        ("*dogs *run", 0),
    ],
)
def test_the_number_of_dropped_words_is_uniform(marked: str, most: int) -> None:
    whole, draws = caption(marked), 6000
    forms = set(whole.text.split())
    num_dropped = Counter(
        len(forms) - len({*drop_words(whole, 1, position).text.split()})
        for position in range(draws)
    )
    assert set(num_dropped) == set(range(most + 1))
    expected = draws / (most + 1)
    assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in num_dropped.values())


def test_each_droppable_word_is_dropped_equally_often() -> None:
    counts = Counter(
        word
        for text, n in dropped("(a) (b) (c) *d *e *f", 6000).items()
        for word in text.split() * n
    )
    assert counts["d"] == counts["e"] == counts["f"] == 6000
    # k is uniform in 0 ... 3 and drops each word with probability k / 3: half of the time.
    assert all(abs(counts[word] - 3000) < 4 * math.sqrt(1500) for word in "abc")


@given(
    st.lists(
        st.tuples(st.text("abAB1", min_size=1, max_size=2), st.sampled_from("(* ")), max_size=8
    ),
    st.integers(0, 2**40),
)
def test_at_least_half_of_the_forms_stay_and_spans_are_correct(
    parts: list[tuple[str, str]], position: int
) -> None:
    marks: dict[str, str] = {}  # a form has one kind in a caption
    for word, mark in parts:
        marks.setdefault(word.casefold(), mark)
    all_words = [word for word, _ in parts]
    whole = caption(" ".join(marks[word.casefold()].strip() + word for word in all_words))
    less = drop_words(whole, 5, position)
    kept = [less.text[word.start : word.end] for word in less.known_words()]
    assert kept == less.text.split()
    dropped_forms = set(marks) - {word.casefold() for word in kept}
    assert kept == [word for word in all_words if word.casefold() not in dropped_forms]
    assert 2 * len(dropped_forms) <= len(marks)
    assert all(marks[form] == "(" for form in dropped_forms)


def test_the_draw_depends_on_seed_and_position() -> None:
    whole = caption("(a) *b (c) *d (e) *f (g) *h")

    def texts(seed: int) -> list[str]:
        return [drop_words(whole, seed, position).text for position in range(50)]

    assert texts(1) == texts(1) != texts(2)
    # Golden values: changing them changes the data of resumed runs.
    assert texts(1)[:4] == ["b c d f h", "a b d f g h", "b d f g h", "b d f g h"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Clip]]:
    folder = tmp_path_factory.mktemp("drop")
    clips = write_clips(folder, 9)
    url = str(folder / "data")
    pack_shards(clips, url, layout="frames", num_frames=1, samples_per_shard=4, words=True)
    return url, clips


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["caption of clip"] * 9
    trained = train_tokenizer(texts, folder, vocab_size=600, max_words=8)
    return Tokenizer(trained.backend, trained.max_words, content_words=True)


def stream(url: str, tokenizer: Tokenizer, **changes: Any) -> Iterator[Batch]:
    settings = {"global_batch": 6, "micro_batch": 6, "num_frames": 1, "image_size": 8}
    return training(url, tokenize=tokenizer, **({"word_drop": True} | settings | changes))


def rows(batches: list[Batch]) -> dict[int, tuple[str, str, list[int], list[int]]]:
    return {
        position: (key, text, ids, mask)
        for batch in batches
        for position, key, text, ids, mask in zip(
            batch.positions.tolist(),
            batch.keys,
            batch.captions,
            batch.token_ids.tolist(),
            batch.word_mask.tolist(),
            strict=True,
        )
    }


def test_draws_are_the_same_for_any_ranks_workers_and_restarts(
    data: tuple[str, list[Clip]], tokenizer: Tokenizer
) -> None:
    url, _ = data
    expected = rows(list(islice(stream(url, tokenizer), 6)))
    assert sorted(expected) == list(range(36))
    for workers in (0, 1):
        two = [
            batch
            for rank in range(2)
            for batch in islice(
                stream(url, tokenizer, rank=rank, world_size=2, micro_batch=3, workers=workers), 6
            )
        ]
        assert rows(two) == expected
    resumed = rows(list(islice(stream(url, tokenizer, start_step=2, workers=2), 4)))
    assert resumed == {position: row for position, row in expected.items() if position >= 12}


def test_each_epoch_draws_anew_from_the_chosen_caption(
    data: tuple[str, list[Clip]], tokenizer: Tokenizer
) -> None:
    url, clips = data
    texts: dict[str, set[str]] = {}
    batches = list(islice(stream(url, tokenizer), 60))
    ids_of = {
        position: caption_id
        for batch in batches
        for position, caption_id in zip(
            batch.positions.tolist(), batch.caption_ids.tolist(), strict=True
        )
    }
    for position, (key, text, _, mask) in rows(batches).items():
        sample = int(key.removeprefix("c"))
        captions = clips[sample].captions
        whole = captions[caption_choice(7, position // 9, sample, len(captions))]
        assert set(text.split()) <= set(whole.split())
        assert {"caption", "clip"} <= set(text.split())
        assert mask[:2] == [1, 2]  # the start, "caption"
        assert mask.count(2) == 2  # "caption" and "clip"
        texts.setdefault(key, set()).add(text)
        assert ids_of[position] == hash_caption(whole)  # whichever words were dropped
    # The droppable forms, common to all clips, are "0" (twice in this caption) and "of".
    assert texts["c00"] == {
        "caption 0 of clip 0",
        "caption 0 clip 0",
        "caption of clip",
        "caption clip",
    }
    plain = rows(list(islice(stream(url, tokenizer, word_drop=False), 2)))
    assert all(text in clips[int(key[1:])].captions for key, text, _, _ in plain.values())


def test_a_data_set_without_words_is_refused_at_the_call(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    url = make_dataset(tmp_path, 2)
    with pytest.raises(ValueError, match=r"data\.word_drop needs .* packed without words"):
        stream(url, tokenizer)
    with pytest.raises(ValueError, match="caption 'a b': packed without words"):
        drop_words(Caption(text="a b"), 0, 0)
