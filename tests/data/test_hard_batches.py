"""Hard batches: similar captions meet in a global batch, and the order keeps all its promises."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvr.data_prep.hard_batches import grouping
from tvr.data_prep.hard_batches.caption_vectors import CaptionVectors, open_vectors
from tvr.data_prep.hard_batches.caption_words import SampleCaptions, words_of, write_word_vectors
from tvr.data_prep.hard_batches.grouping import Captions, grouped_order, hard_groups
from tvr.data_prep.hard_batches.hard_batches import (
    CaptionGroups,
    HardBatches,
    batch_of,
    batches_of_set,
    caption_groups,
    every_batch,
)
from tvr.data_prep.mixture import Mixture
from tvr.data_prep.reading.locality import RankShare
from tvr.data_prep.reading.mixed_sets import MixedOrder
from tvr.data_prep.reading.order import SampleOrder, caption_choice
from tvr.data_prep.records import hash_caption, hash_video_id

COLOURS = "red green blue grey black white brown pink".split()
SHAPES = "square disc star ring cross heart arrow moon".split()
CONTENT = "digest of the data set"


def shape_captions(count: int, seed: int = 0, videos: int | None = None) -> list[SampleCaptions]:
    """Captions such as the demo's: two coloured shapes, one or two captions a sample."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        texts = []
        for _ in range(1 + number % 2):
            a, b, c, d = random.integers(8, size=4).tolist()
            texts.append(f"a {COLOURS[a]} {SHAPES[b]} left of a {COLOURS[c]} {SHAPES[d]}.")
        samples.append(SampleCaptions(f"video{number % (videos or count)}", tuple(texts)))
    return samples


def vectors_of(folder: Path, samples: list[SampleCaptions]) -> CaptionVectors:
    write_word_vectors(folder, samples, content=CONTENT)
    return open_vectors(folder, CONTENT)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> CaptionVectors:
    return vectors_of(tmp_path_factory.mktemp("vectors") / "set", shape_captions(3000, videos=2500))


def hard_order(
    vectors: CaptionVectors, sizes: list[int], *, seed: int, batch: int, share: float, group: int
) -> SampleOrder:
    groups = CaptionGroups(
        {0: vectors},
        HardBatches(share=share, group=group),
        seed=seed,
        batch_starts=every_batch(batch),
    )
    return SampleOrder(sizes, seed, 2, groups)


shard_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(sum)
cases = {
    "sizes": shard_sizes,
    "seed": st.integers(0, 2**63 - 1),
    "batch": st.integers(1, 70),
    "share": st.floats(0.05, 1.0),
    "group": st.integers(2, 6),
    "epoch": st.integers(0, 10**6),
}


@settings(max_examples=25)
@given(**cases)
def test_windows_keep_their_samples_and_positions_have_no_history(
    vectors: CaptionVectors,
    sizes: list[int],
    seed: int,
    batch: int,
    share: float,
    group: int,
    epoch: int,
) -> None:
    order = hard_order(vectors, sizes, seed=seed, batch=batch, share=share, group=group)
    plain = SampleOrder(sizes, seed, 2)
    total = sum(sizes)
    at, end = epoch * total, (epoch + 1) * total
    whole = order.locate_range(at, end)
    assert sorted(whole.sample.tolist()) == list(range(total))
    while at < end:
        window = plain.window_at(at)
        # Same samples, with their places, as without hard batches: so the same shards and ranks.
        before = {(each.sample, each.place) for each in plain.locate_range(at, window.end)}
        assert {(each.sample, each.place) for each in order.locate_range(at, window.end)} == before
        at = window.end
    for position in {epoch * total, epoch * total + total // 2, end - 1}:
        fresh = hard_order(vectors, sizes, seed=seed, batch=batch, share=share, group=group)
        assert fresh.locate(position) == whole[position - epoch * total]


@settings(max_examples=60)
@given(
    count=st.integers(0, 50),
    value=st.integers(1, 4),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    share=st.floats(0.05, 1.0),
    group=st.integers(2, 6),
    block=st.integers(4, 10),
    seed=st.integers(0, 9),
)
def test_the_new_order_is_the_contracts(
    count: int, value: int, sizes: list[int], share: float, group: int, block: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    bounds = np.cumsum([0, *sizes])
    bounds = np.append(bounds[bounds < count], count)
    captions = Captions(
        random.integers(-value, value + 1, (count, 3)).astype(np.int8),
        random.integers(12, size=count).astype(np.uint64),
        random.integers(20, size=count).astype(np.uint64),
    )
    starts = hard_groups(bounds, share, group)
    found = grouped_order(captions, starts, group, block)
    assert found.tolist() == order_by_contract(captions, bounds.tolist(), share, group, block)


def order_by_contract(
    captions: Captions, bounds: list[int], share: float, group: int, block: int
) -> list[int]:
    """The new order of a window, written as the contract is, with all neighbours of each seed."""
    starts = []
    for first, end in pairwise(bounds):
        slots = (end - first) // group
        hard = min(slots, int(share * (end - first) / group))
        starts += [first + i * slots // hard * group for i in range(hard)]
    vectors, texts, videos = (column.astype(int).tolist() for column in captions)
    count = len(texts)
    num_blocks = max(1, round(count / block))
    order = []
    for low, high in pairwise(count * n // num_blocks for n in range(num_blocks + 1)):
        own = [start for start in starts if low <= start and start + group <= high]
        free, placed = list(range(low, high)), dict[int, int]()
        for seed in range(low, min(high, low + grouping.TRIES * len(own))):
            members = [seed]

            def similarity(other: int, seed: int = seed) -> int:
                return sum(x * y for x, y in zip(vectors[seed], vectors[other], strict=True))

            for other in sorted(free, key=lambda other: -similarity(other)):
                is_negative = all(
                    texts[other] != texts[each] and videos[other] != videos[each]
                    for each in members
                )
                if is_negative and similarity(other) > 0 and len(members) < group:
                    members.append(other)
            if seed in free and len(members) > 1 and own:
                start = own.pop(0)
                placed |= {start + i: member for i, member in enumerate(members)}
                free = [each for each in free if each not in members]
                own_done = not own
                if own_done:
                    break
        rest = iter(free)
        order += [placed[at] if at in placed else next(rest) for at in range(low, high)]
    return order


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.floats(0.05, 1), st.integers(2, 8))
def test_the_cap_holds_in_every_batch(sizes: list[int], share: float, group: int) -> None:
    bounds = np.cumsum([0, *sizes])
    starts = hard_groups(bounds, share, group)
    assert (np.diff(starts) >= group).all()
    inside = np.searchsorted(bounds, starts, side="right") - 1
    assert (starts + group <= bounds[inside + 1]).all()
    held = np.bincount(inside, minlength=len(sizes)) * group
    assert (held <= share * np.array(sizes) + 1e-9).all()
    assert (held > share * np.array(sizes) - group - 1e-9).all()


def test_hard_groups_are_spread_over_a_batch() -> None:
    starts = hard_groups(np.array([0, 64, 128]), 0.25, 4)
    # Four micro-steps of 16 pairs: each has one group.
    assert (starts // 16).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("group", [2, 4, 8])
def test_similar_captions_meet(vectors: CaptionVectors, group: int) -> None:
    """Pairs of a batch whose captions have the same words and differ: 3.2 to 3.7 times as many."""
    sizes, batch = [500] * 6, 100
    hard = hard_order(vectors, sizes, seed=5, batch=batch, share=0.4, group=group)
    plain = SampleOrder(sizes, 5, 2)

    def hardest_pairs(order: SampleOrder) -> int:
        count = 0
        for first in range(0, 3000, batch):
            distinct = {
                TEXTS[sample][caption_choice(5, 0, sample, len(TEXTS[sample]))]
                for sample in order.locate_range(first, first + batch).sample.tolist()
            }
            same_words = Counter(tuple(sorted(words_of(text))) for text in distinct)
            count += sum(number * (number - 1) // 2 for number in same_words.values())
        return count

    assert hardest_pairs(hard) > 2.5 * hardest_pairs(plain) > 0


TEXTS = [sample.texts for sample in shape_captions(3000, videos=2500)]


def test_equal_captions_and_clips_of_one_video_are_never_grouped(tmp_path: Path) -> None:
    texts = ["A dog runs.", "a dog runs", "a dog runs far", "a dog sits", "dogs run", "a dog runs"]
    samples = [SampleCaptions(f"v{i // 2}", (texts[i % 6],)) for i in range(60)]
    samples[7] = SampleCaptions("", ())  # a bad sample
    vectors = vectors_of(tmp_path / "set", samples)
    found = vectors.of(np.arange(60), np.zeros(60, int))
    groups = grouping._groups(found, np.ones(60, bool), 20, 3)
    assert len(groups) >= 5
    for members in groups:
        assert 7 not in members
        assert len({hash_caption(samples[each].texts[0]) for each in members}) == len(members)
        assert len({samples[each].video_id for each in members}) == len(members)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 40))
@settings(max_examples=20)
def test_ranks_and_micro_batches_read_the_same_global_batches(
    vectors: CaptionVectors, ranks: int, micro_steps: int, step: int
) -> None:
    batch = 36
    order = hard_order(vectors, [40, 300, 60], seed=2, batch=batch, share=0.5, group=4)
    expected = order.locate_range(step * batch, (step + 1) * batch)
    fresh = hard_order(vectors, [40, 300, 60], seed=2, batch=batch, share=0.5, group=4)
    read = []
    for rank in range(ranks):
        micro_batch = batch // ranks // micro_steps
        share = RankShare(rank=rank, world_size=ranks, micro_batch=micro_batch, node=range(ranks))
        for micro_step in range(step * micro_steps, (step + 1) * micro_steps):
            read += share.samples(fresh, micro_step)
    assert sorted(position for position, _ in read) == list(range(step * batch, (step + 1) * batch))
    assert [each for _, each in sorted(read, key=lambda pair: pair[0])] == list(expected)


def test_several_sets_have_groups_of_their_own_and_one_cap(tmp_path: Path) -> None:
    samples = {"films": shape_captions(400, 1), "web": shape_captions(300, 2)}
    vectors = {name: vectors_of(tmp_path / name, own) for name, own in samples.items()}
    mixture, batch, share = Mixture({"films": 3.0, "web": 1.0}, 9), 48, 0.5
    groups = caption_groups(
        {name: {0: own} for name, own in vectors.items()},
        HardBatches(share=share, group=3),
        seed=9,
        global_batch=batch,
        mixture=mixture,
    )
    sizes = {"films": [100] * 4, "web": [60] * 5}
    orders = {
        name: SampleOrder(sizes[name], mixture.set_seed(number), 2, groups[name])
        for number, name in enumerate(mixture.names)
    }
    plain = [SampleOrder(sizes[name], mixture.set_seed(n), 2) for n, name in enumerate(sizes)]
    mixed, before = MixedOrder(mixture, list(orders.values())), MixedOrder(mixture, plain)
    first = mixed.locate_range(0, 530)
    # The first epoch of each set: each sample once, from the same sets at the same positions.
    assert ((first.sample < 400) == (before.locate_range(0, 530).sample < 400)).all()
    films = first.sample[first.sample < 400]
    assert len(set(films[:400].tolist())) == min(400, len(films))
    assert first.sample.tolist() != before.locate_range(0, 530).sample.tolist()
    for name in mixture.names:
        starts = batches_of_set(mixture, name, batch)(50, 900)
        expected = [mixture.drawn(k * batch)[name] for k in range(100)]
        assert starts.tolist() == [at for at in expected if 50 <= at < 900]
    # The captions of the second set are chosen by their number among all samples.
    own = np.arange(300)
    number, counts = 7, vectors["web"].num_captions(own)
    chosen = groups["web"]._choices(number, own, vectors["web"])
    assert chosen.tolist() == [
        caption_choice(9, number, 400 + row, int(counts[row])) for row in range(300)
    ]


@given(st.integers(0, 3000), st.integers(5, 300), st.floats(0.1, 10))
@settings(max_examples=30)
def test_the_batch_of_a_position_holds_it(position: int, batch: int, weight: float) -> None:
    mixture = Mixture({"films": weight, "web": 1.0}, 3)
    for name in mixture.names:
        number = batch_of(position, batch, mixture, name)
        first, end = (mixture.drawn(k * batch)[name] for k in (number, number + 1))
        assert first <= position < end
    assert batch_of(position, batch, None, "") == position // batch


def test_vectors_are_of_the_words_and_say_when_they_are_damaged(tmp_path: Path) -> None:
    folder, samples = tmp_path / "set", shape_captions(40)
    vectors = vectors_of(folder, samples)
    assert vectors.starts[-1] == sum(len(sample.texts) for sample in samples)
    assert vectors.texts[1] == hash_caption(samples[1].texts[0])
    assert vectors.videos[3] == hash_video_id("video3")
    lengths = np.linalg.norm(vectors.vectors.astype(float), axis=1)
    assert abs(lengths - 320).max() < 5
    again = vectors_of(tmp_path / "again", samples)
    assert again.index == vectors.index
    with pytest.raises(ValueError, match="its data set has other samples"):
        open_vectors(folder, "another one")
    raw = folder / "vectors.raw"
    content = bytearray(raw.read_bytes())
    content[100] ^= 1
    raw.write_bytes(content)
    with pytest.raises(ValueError, match=r"the sha256 of vectors.raw differs. Restore the files"):
        open_vectors(folder, CONTENT)
    (folder / "vectors.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(ValueError, match="cannot be used"):
        open_vectors(folder, CONTENT)


def test_similarity_estimates_the_cosine_of_tf_idf(tmp_path: Path) -> None:
    samples = [
        SampleCaptions(f"{i}", sample.texts[:1]) for i, sample in enumerate(shape_captions(300))
    ]
    vectors = vectors_of(tmp_path / "set", samples)
    words = [words_of(sample.texts[0]) for sample in samples]
    vocabulary = sorted({word for own in words for word in own})
    counts = np.array([[word in own for word in vocabulary] for own in words], float)
    weighted = counts * np.log(301 / (1 + counts.sum(0)))
    unit = weighted / np.linalg.norm(weighted, axis=1, keepdims=True)
    estimated = vectors.vectors.astype(float) @ vectors.vectors.T / 320**2
    difference = (estimated - unit @ unit.T)[~np.eye(300, dtype=bool)]
    assert abs(difference.mean()) < 0.03
    assert difference.std() < 1.2 / 16


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog, a Dog!", ["a", "dog"]),
        ("", []),
        ("猫が3匹", ["猫", "が", "3", "匹"]),
        ("Été d'hiver", ["été", "d", "hiver"]),
    ],
)
def test_words(caption: str, words: list[str]) -> None:
    assert words_of(caption) == words


@pytest.mark.parametrize(("share", "group"), [(0.0, 4), (1.1, 4), (0.5, 1)])
def test_bad_settings(share: float, group: int) -> None:
    with pytest.raises(ValueError, match=r"data\.hard_"):
        HardBatches(share=share, group=group)


def test_a_batch_must_hold_a_group() -> None:
    HardBatches(share=0.25, group=4).check(16)
    with pytest.raises(ValueError, match=r"less than one group of data\.hard_group=4"):
        HardBatches(share=0.25, group=4).check(15)
