"""The bench of evidence on tiny sizes: its rows, its folds, its pairing, and its statistics."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence import droid, plot, run
from evidence.droid_features import FRAME_WIDTH, TEXT_WIDTH, ClipFeatures
from evidence.droid_model import HeadShape, Rows, reduce_frames, train_model
from evidence.paired import compare, crossed_interval, mean_of, values_of
from evidence.results import Table, ranks_file, write_results
from evidence.rows import FIRST, FULL, ROWS, nested

from tvr.trainer.comparison.statistics import metrics
from tvr.trainer.config import merged

CLIPS, FRAMES, WORDS = 60, 3, 5
SHORT = {"train.steps": 3, "train.global_batch": 8, "train.micro_batch": 8}
EXISTING = (FIRST, "InfoNCE, att_wti (DMAE)", "NegNCE log", "NegNCE reference", FULL)


def features(seed: int = 0) -> ClipFeatures:
    """Random features whose caption and frames share a direction, two captions being equal."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(CLIPS, 8))
    captions = [f"caption {clip}" for clip in range(CLIPS)]
    captions[1] = captions[0].title() + "."

    def seen(width: int, *shape: int) -> np.ndarray:
        view = hidden @ rng.normal(size=(8, width))
        view = view.reshape(CLIPS, *(1 for _ in shape), width)
        return (view + 0.1 * rng.normal(size=(CLIPS, *shape, width))).astype(np.float16)

    mask = np.ones((CLIPS, WORDS), np.int8)
    mask[::2, -1] = 0
    sentences = seen(TEXT_WIDTH).astype(np.float32)
    return ClipFeatures(
        np.array([f"droid_{clip:04d}" for clip in range(CLIPS)]),
        np.array(captions),
        seen(FRAME_WIDTH, FRAMES, 7),
        seen(TEXT_WIDTH, WORDS),
        mask,
        sentences / np.linalg.norm(sentences, axis=1, keepdims=True),
    )


GROUPS = [f"day-{clip // 3}" for clip in range(CLIPS)]
SHAPE = HeadShape(components=32)
FOLDS = droid.Folds(features(), GROUPS, SHAPE)


def test_no_group_is_in_two_folds_and_folds_have_equal_sizes() -> None:
    sizes = [7, 1, 1, 4, 9, 2, 2, 2, 5, 3]
    groups = [f"g{name}" for name, size in enumerate(sizes) for _ in range(size)]
    fold = droid.folds_of(groups, 3)
    assert all(len(set(fold[np.array(groups) == name])) == 1 for name in set(groups))
    assert np.bincount(fold).tolist() == [12, 12, 12]
    assert droid.folds_of(groups, 3).tolist() == fold.tolist()


@pytest.mark.parametrize("row", EXISTING)
def test_rows_train_and_a_seed_repeats_bit_for_bit(row: str) -> None:
    once, again = (droid.cross_validate(FOLDS, {**ROWS[row], **SHORT}, 3) for _ in range(2))
    assert once.shape == (2, CLIPS)
    assert once.min() >= 1
    assert (once == again).all()


def test_training_finds_what_captions_and_frames_share() -> None:
    long = {**ROWS[FIRST], "train.steps": 40, "train.global_batch": 32, "train.micro_batch": 32}
    found = droid.cross_validate(FOLDS, long, 0)
    assert values_of(found[None])["recall_at_1"].mean() > 50  # chance is 8
    short = droid.cross_validate(FOLDS, {**long, "train.steps": 1}, 0)
    assert (
        values_of(short[None])["recall_at_1"].mean() < values_of(found[None])["recall_at_1"].mean()
    )


def test_inner_folds_never_see_the_outer_test_fold() -> None:
    settings = {**ROWS[FIRST], **SHORT}
    first = droid.cross_validate(droid.Folds(features(), GROUPS, SHAPE, inner=True), settings, 0)
    changed = features()
    fold = droid.folds_of(GROUPS)
    changed.frames[fold == 0] = 7.0
    again = droid.cross_validate(droid.Folds(changed, GROUPS, SHAPE, inner=True), settings, 0)
    # Fold 1 is the inner test while fold 0 is the outer one.
    assert (first[:, fold == 1] == again[:, fold == 1]).all()
    assert (first != again).any()


def test_equal_captions_count_as_hits() -> None:
    found = features()
    found.frames[1] = found.frames[0]
    found.words[1], found.sentences[1] = found.words[0], found.sentences[0]
    found.word_mask[1] = found.word_mask[0]
    rows = Rows(found, np.arange(4), 1)
    assert rows.caption_ids[0] == rows.caption_ids[1] != rows.caption_ids[2]
    config = merged(droid.base(), nested({**ROWS[FIRST], **SHORT}), where="test")
    model = train_model(config, HeadShape(), rows)
    texts, videos = droid.ranks(model, config, rows)
    # Clips 0 and 1 are the same: without the merging, each is a tie of rank 2 at best.
    assert texts[0] == texts[1]
    assert videos[0] == videos[1]
    assert min(texts[0], videos[0]) == 1


def test_rows_of_a_seed_start_alike() -> None:
    rows, starts = Rows(features(), np.arange(CLIPS), 1), []
    for row in (FIRST, FULL):
        still = {**ROWS[row], **SHORT, "train.learning_rate": 1e-30, "train.weight_decay": 0.0}
        config = merged(droid.base(), nested(still), where="test")
        starts.append(train_model(config, HeadShape(), rows).state_dict())
    shared = starts[0].keys() & starts[1].keys()
    assert any(name.startswith("text_weight") for name in shared)
    for name in shared:
        torch.testing.assert_close(starts[0][name], starts[1][name], rtol=0, atol=1e-20)


def test_values_are_the_means_of_both_ways() -> None:
    ranks = np.random.default_rng(0).integers(1, 30, (2, 2, 50))
    found = values_of(ranks)
    for seed, k in product(range(2), (1, 5, 10)):
        expected = np.mean([metrics(way)[f"recall_at_{k}"] for way in ranks[seed]])
        assert found[f"recall_at_{k}"][seed].mean() == pytest.approx(expected)


def test_crossed_interval_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 30)) + rng.normal(size=(4, 1)) + 2 * rng.normal(size=(1, 30))
    clusters = np.array([f"c{query // 2}" for query in range(30)])
    members = [np.flatnonzero(clusters == name) for name in sorted(set(clusters))]
    means = []
    for _ in range(4000):
        seeds = rng.integers(4, size=4)
        drawn = np.concatenate([members[x] for x in rng.integers(15, size=15)])
        means.append(values[np.ix_(seeds, drawn)].mean())
    expected = np.percentile(means, [2.5, 97.5])
    found = crossed_interval(values, clusters, samples=20_000)
    # Each end of the loop has a standard error of 2 % of the width.
    assert found == pytest.approx(expected, abs=0.08 * (expected[1] - expected[0]))


def test_crossed_interval_covers_new_seeds_too() -> None:
    rng = np.random.default_rng(2)
    values = np.tile(rng.normal(size=(5, 1)), (1, 40))  # seeds differ, queries do not
    mean = mean_of(values, [str(x) for x in range(40)])
    assert mean.of_queries == pytest.approx((mean.value, mean.value))
    assert mean.interval[1] - mean.interval[0] > 0.5


def test_a_row_that_is_better_everywhere_wins_and_itself_does_not() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(2, 20, (3, 2, 80))
    better = np.where(rng.random((3, 2, 80)) < 0.3, 1, first)
    names = [str(x) for x in range(80)]
    won = compare(better, first, names)["recall_at_1"]
    assert won.value == pytest.approx(100 * (better == 1).mean())
    assert 0 < won.interval[0] < won.value < won.interval[1]
    assert compare(first, first, names)["recall_at_1"].interval == (0, 0)
    with pytest.raises(ValueError, match="no pairs"):
        compare(first[:2], first, names)


def test_results_hold_what_the_table_shows(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    keys = [f"k{x}" for x in range(20)]
    ranks = {row: rng.integers(1, 9, (2, 2, 20)) for row in (FIRST, FULL)}
    more = {row: {"train_s": [1.0, 2.0]} for row in ranks}
    table = Table("tiny", {row: [0, 1] for row in ranks}, keys, keys, ranks, more, {})
    path = tmp_path / "tiny.json"
    write_results(table, path)
    summary = json.loads(path.read_text())
    assert [x["row"] for x in summary["rows"]] == [FIRST, FULL]
    assert summary["rows"][0]["against_first"] is None
    with np.load(ranks_file(path)) as stored:
        again = {row: stored[f"ranks: {row}"].astype(int) for row in ranks}
    for row, entry in zip(ranks, summary["rows"], strict=True):
        expected = 100 * (again[row] == 1).mean()
        assert entry["means"]["recall_at_1"]["value"] == pytest.approx(expected, abs=1e-3)
    difference = summary["rows"][1]["against_first"]["recall_at_1"]["value"]
    assert difference == pytest.approx(
        100 * np.diff([(x == 1).mean() for x in ranks.values()])[0], abs=1e-3
    )
    assert FULL in table.text()


def test_run_skips_finished_rows_of_droid1k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = {key: {"group": group} for key, group in zip(features().keys, GROUPS, strict=True)}
    monkeypatch.setattr(droid, "prepare", lambda source, folder: features())
    monkeypatch.setattr(droid, "meta_of", lambda source: meta)
    monkeypatch.setitem(run.ROWS, FIRST, {**ROWS[FIRST], **SHORT})  # type: ignore[arg-type]
    job = (tmp_path, tmp_path, tmp_path / "out", (FIRST, 0))
    found = run._droid_row(*job)
    monkeypatch.setattr(droid, "cross_validate", lambda *_: pytest.fail("it was finished"))
    assert run._droid_row(*job) == found


def test_plot_shows_both_sets(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    keys, found = [f"k{x}" for x in range(12)], {}
    for name in ("shapes", "droid1k"):
        ranks = {row: rng.integers(1, 9, (2, 2, 12)) for row in (FIRST, FULL)}
        more = {row: {"train_s": [1.0, 2.0]} for row in ranks}
        found[name] = Table(
            name, {row: [0, 1] for row in ranks}, keys, keys, ranks, more, {}
        ).summary()
    assert plot.draw(found, tmp_path / "evidence.png") > 10_000


def test_components_are_those_of_the_training_clips() -> None:
    first, second = (Rows(features(), np.arange(40), 1) for _ in range(2))
    test, other = Rows(features(), np.arange(40, 60), 1), Rows(features(1), np.arange(40, 60), 1)
    plain = first.frames.flatten(0, 1).clone()
    reduce_frames(first, test, HeadShape(components=8, whitening=1.0))
    reduce_frames(second, other, HeadShape(components=8, whitening=1.0))
    torch.testing.assert_close(first.frames, second.frames)
    found = first.frames.flatten(0, 1)
    # Whitened: each component has deviation 1, and none goes with another.
    torch.testing.assert_close(found.T @ found / len(found), torch.eye(8), rtol=0, atol=1e-3)
    values = torch.linalg.svdvals(plain - plain.mean(0))[:8]
    kept = HeadShape(components=8, whitening=0.0)
    again = Rows(features(), np.arange(40), 1)
    reduce_frames(again, Rows(features(), np.arange(40, 60), 1), kept)
    sizes = torch.linalg.svdvals(again.frames.flatten(0, 1))
    torch.testing.assert_close(sizes / sizes[0], values / values[0], rtol=1e-3, atol=1e-3)


def test_rows_with_fewer_seeds_are_paired_by_seed() -> None:
    rng = np.random.default_rng(6)
    keys = [f"k{x}" for x in range(15)]
    first = rng.integers(1, 9, (3, 2, 15))
    found = run._table(
        "tiny",
        keys,
        keys,
        {(FULL, 1): first[1] + 1, **{(FIRST, seed): first[seed] for seed in (2, 1, 0)}},
        {(row, seed): {"train_s": 1.0} for row, seed in product((FIRST, FULL), range(3))},
        {},
    )
    assert found.seeds == {FIRST: [2, 1, 0], FULL: [1]}
    difference = found.against_first(FULL)
    assert difference is not None
    assert difference["mean_rank"].interval == (1, 1)
