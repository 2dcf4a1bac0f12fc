"""Several training sets in one run: their order, their batches, and their budgets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from builders.batches import Row, damage_sample, rows_of, training
from builders.clip_files import make_dataset, write_clips
from hypothesis import given, settings
from hypothesis import strategies as st

from tvr.data_prep.budget import set_budgets, within_budget
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.mixture import BLOCK, Mixture
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.augment import Augmentation
from tvr.data_prep.reading.loader import read_sample
from tvr.data_prep.reading.mixed_sets import MixedOrder
from tvr.data_prep.reading.node_cache import CacheFolder
from tvr.data_prep.reading.order import SampleOrder
from tvr.data_prep.records import (
    Batch,
    Replacement,
    TooManyBadSamples,
    TrainingSet,
    hash_video_id,
    set_of_key,
)

# torch warns if there are more workers than cores; the order must not depend on the cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZES = {"films": 13, "web": 9}
WEIGHTS = {"films": 1.0, "web": 2.0}
GLOBAL_BATCH = 8

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two sets of different layouts with the same keys."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        "films": make_dataset(folder / "films", SIZES["films"]),
        "web": make_dataset(folder / "web", SIZES["web"], layout="video"),
    }


def sets_of(urls: dict[str, str], **max_bad: int) -> list[TrainingSet]:
    return [
        TrainingSet(name=name, url=url, weight=WEIGHTS[name], max_bad=max_bad.get(name, 0))
        for name, url in urls.items()
    ]


def mixed(urls: dict[str, str], **changes: Any) -> Iterator[Batch]:
    """Training batches of the two sets."""
    limits = {name: changes.pop(name) for name in SIZES if name in changes}
    return training(cast(Any, sets_of(urls, **limits)), **changes)


def first_rows(urls: dict[str, str], steps: int, **changes: Any) -> list[Row]:
    """Rows of the first steps of one rank, in the order of positions."""
    return rows_of(list(islice(mixed(urls, **changes), 4 * steps)))


def copied(url: str, out: Path) -> str:
    """A copy of a local data set, to damage."""
    out.mkdir()
    for path in Path(url).iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    return str(out)


# ------------------------------------------------------------------ order


@settings(max_examples=40)
@given(
    shard_sizes,
    shard_sizes,
    st.floats(0.1, 10.0),
    st.integers(0, 2**63 - 1),
    st.integers(0, 3 * BLOCK),
    st.integers(0, 120),
)
def test_a_position_of_the_mixture_is_one_of_a_sets_own_order(
    first: list[int], second: list[int], weight: float, seed: int, start: int, length: int
) -> None:
    mixture = Mixture({"a": 1.0, "b": weight}, seed)
    orders = [
        SampleOrder(sizes, mixture.set_seed(number), window_shards=2)
        for number, sizes in enumerate((first, second))
    ]
    order = MixedOrder(mixture, orders)
    found = order.locate_range(start, start + length)
    assert len(found) == length
    for position, location in zip(range(start, start + length), found, strict=True):
        number, own = mixture.locate(position)
        expected = orders[number].locate(own)
        assert location == order.locate(position)
        assert (location.epoch, location.index, location.place) == (
            expected.epoch,
            expected.index,
            expected.place,
        )
        assert location.shard == expected.shard + number * len(first)
        assert location.sample == expected.sample + number * sum(first)
        other = order.substitute(position, 1)
        assert (other.sample >= sum(first)) == (number == 1)
        assert other.sample == orders[number].substitute(own, 1).sample + number * sum(first)


def test_the_windows_in_use_are_those_of_every_set() -> None:
    mixture = Mixture({"a": 1.0, "b": 3.0}, 5)
    orders = [SampleOrder([4] * 6, mixture.set_seed(number), 2) for number in (0, 1)]
    order = MixedOrder(mixture, orders)
    for start, stop in ((0, 1), (0, 16), (17, 18), (500, 540), (9000, 9001)):
        found = order.windows_in_use(start, stop)
        expected: tuple[list, list] = ([], [])
        for number, name in enumerate(mixture.names):
            first, end = (mixture.drawn(position)[name] for position in (start, stop))
            # A set that this stretch does not read is read soon.
            own = orders[number].windows_in_use(first, max(end, first + 1))
            for here, windows in zip(expected, own, strict=True):
                here += [
                    ((window.shards + 6 * number).tolist(), window.first, window.starts.tolist())
                    for window in windows
                ]
        for windows, here in zip(found, expected, strict=True):
            assert here == [(w.shards.tolist(), w.first, w.starts.tolist()) for w in windows]
        used = {shard for shards, *_ in expected[0] for shard in shards}
        assert set(order.locate_range(start, stop).shard.tolist()) <= used


# ---------------------------------------------------------------- batches


def test_batches_do_not_depend_on_ranks_workers_or_restarts(urls: dict[str, str]) -> None:
    expected = first_rows(urls, 6)
    assert [position for position, *_ in expected] == list(range(6 * GLOBAL_BATCH))
    assert first_rows(urls, 6, workers=2) == expected
    assert first_rows(dict(reversed(urls.items())), 6) == expected
    assert first_rows(urls, 2, start_step=4) == expected[4 * GLOBAL_BATCH :]
    assert first_rows(urls, 6, cache_bytes=1 << 20) == expected
    for world_size, workers in ((2, 0), (4, 1)):
        micro_batch = GLOBAL_BATCH // world_size
        ranks = [
            mixed(
                urls,
                rank=rank,
                world_size=world_size,
                micro_batch=micro_batch,
                workers=workers,
                start_step=1,
            )
            for rank in range(world_size)
        ]
        rows = [row for _ in range(5) for rank in ranks for row in rows_of([next(rank)])]
        assert sorted(rows) == expected[GLOBAL_BATCH:]


def test_each_set_has_its_own_epochs_and_its_share(urls: dict[str, str]) -> None:
    keys = [key for _, key, *_ in first_rows(urls, 12)]
    mixture = Mixture(WEIGHTS, 7)
    drawn = mixture.drawn(len(keys))
    for number, (name, size) in enumerate(SIZES.items()):
        own = [key for key in keys if set_of_key(key) == name]
        assert len(own) == drawn[name]
        order = SampleOrder(read_manifest(urls[name]).shard_sizes, mixture.set_seed(number))
        assert own == [f"{name}/c{order.locate(at).sample:02d}" for at in range(len(own))]
        assert len(own) > 2 * size
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


def test_a_single_set_reads_the_stream_of_a_run_without_a_mixture(urls: dict[str, str]) -> None:
    plain = rows_of(list(islice(training(urls["films"]), 20)))
    alone = first_rows({"films": urls["films"]}, 5)
    assert [(at, f"films/{key}", *rest) for at, key, *rest in plain] == alone


def test_equal_keys_and_videos_of_two_sets_differ(urls: dict[str, str]) -> None:
    batches = list(islice(mixed(urls), 40))
    ids = {
        key: video
        for batch in batches
        for key, video in zip(batch.keys, batch.video_ids.tolist(), strict=True)
    }
    assert {"films/c03", "web/c03"} <= set(ids)
    assert ids == {key: hash_video_id(key) for key in ids}
    assert len(set(ids.values())) == sum(SIZES.values())
    # Of either layout, the frames are those of the sample.
    for batch in batches[:4]:
        for key, frames in zip(batch.keys, batch.frames, strict=True):
            name, own = key.split("/")
            read = read_sample(urls[name], own, num_frames=4, image_size=16).frames
            assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), read)


def test_captions_of_two_sets_are_drawn_apart(urls: dict[str, str]) -> None:
    texts: dict[str, list[str]] = {}
    for _, key, caption, _ in first_rows(urls, 60):
        texts.setdefault(key, []).append(caption.partition(" of ")[0])
    both = [(texts[f"films/c{n:02d}"], texts[f"web/c{n:02d}"]) for n in (2, 5, 8)]  # 3 captions
    assert all(len(set(films)) > 1 and len(set(web)) > 1 for films, web in both)
    assert any(films[: len(web)] != web[: len(films)] for films, web in both)


def test_remote_sets_share_a_shard_cache(urls: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    remote = {}
    for name, layout in (("films", "frames"), ("web", "video")):
        remote[name] = f"memory://{tmp_path.name}/{name}"
        clips = write_clips(tmp_path / "clips", SIZES[name])
        pack_shards(clips, remote[name], layout=layout, num_frames=4, samples_per_shard=5)
    cache = CacheFolder(path=str(tmp_path / "cache"), max_bytes=1 << 30)
    assert first_rows(remote, 6, shard_cache=cache) == first_rows(urls, 6)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3 + 2


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_replaced_from_its_set_and_counts_for_it(
    urls: dict[str, str], tmp_path: Path, workers: int
) -> None:
    sound = first_rows(urls, 6)
    damaged = urls | {"films": copied(urls["films"], tmp_path / "films")}
    damage_sample(Path(damaged["films"]), 2)
    batches = list(islice(mixed(damaged, films=1, workers=workers), 24))
    replaced = [entry for batch in batches for entry in batch.replaced]
    assert {entry.key for entry in replaced} == {"films/c02"}
    positions = {entry.position for entry in replaced}
    assert positions == {position for position, key, *_ in sound if key == "films/c02"}
    for before, after in zip(sound, rows_of(batches), strict=True):
        assert after == before or before[0] in positions
        assert set_of_key(after[1]) == set_of_key(before[1])
        assert after[1] != "films/c02"
    message = r"1 bad samples in the set films, .*films on rank 0, max_bad=0 allowed"
    with pytest.raises(TooManyBadSamples, match=message):
        list(islice(mixed(damaged, web=5, workers=workers), 24))
    # Only the known samples of its own set count for a budget.
    known = {"web/c00": "checksum", "films/c09": "checksum"}
    list(islice(mixed(damaged, films=2, web=1, known_bad=known), 24))
    with pytest.raises(TooManyBadSamples, match="2 bad samples in the set films"):
        list(islice(mixed(damaged, films=1, web=1, known_bad=known), 24))


def test_samples_of_another_set_do_not_end_a_row_of_failures() -> None:
    def batch(position: int, key: str, bad: str = "", reason: str = "checksum") -> Any:
        replaced = Replacement(position=position, key=bad, reason=reason, detail="cut")
        return SimpleNamespace(
            positions=torch.tensor([position]), keys=(key,), replaced=(replaced,) if bad else ()
        )

    def run(*batches: Any) -> int:
        sets = [TrainingSet(name=name, url=f"/{name}", max_bad=9) for name in ("a", "b")]
        budgets = set_budgets(sets, "on rank 1", 2, max_unavailable_in_a_row=1)
        return len(list(within_budget(batches, budgets, 1)))

    b_fails = [batch(2 * n, "b/good", f"b/{n}") for n in range(3)]
    a_is_fine, b_is_fine = batch(1, "a/c"), batch(3, "b/c")
    assert run(b_fails[0], b_fails[1], b_is_fine, b_fails[2]) == 4
    with pytest.raises(TooManyBadSamples, match=r"3 bad samples in the set b, /b on rank 1, 3 in"):
        run(b_fails[0], a_is_fine, b_fails[1], a_is_fine, b_fails[2])
    away = [batch(at, "b/good", "b/x", "unavailable") for at in (0, 5)]
    assert run(away[0], b_is_fine, away[1]) == 3
    with pytest.raises(TooManyBadSamples, match=r"2 reads in a row failed .* in the set b, /b"):
        run(away[0], a_is_fine, away[1])
    # A position that stayed empty ends the stream by the budget of its set.
    empty = SimpleNamespace(
        positions=torch.tensor([], dtype=torch.long),
        keys=(),
        replaced=(Replacement(position=0, key="a/q", reason="checksum", detail=""),),
    )
    with pytest.raises(TooManyBadSamples, match="1 bad samples in the set a, /a"):
        run(empty)


# ----------------------------------------------------------------- errors


def test_a_set_without_words_is_named(urls: dict[str, str], tmp_path: Path) -> None:
    tagged = make_dataset(tmp_path / "tagged", SIZES["films"], words=True)
    message = rf"data\.word_drop needs the words of captions, and {urls['web']} was"
    with pytest.raises(ValueError, match=message):
        mixed(urls | {"films": tagged}, word_drop=True)


def test_errors_name_the_set(urls: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the weight 0 of training set films .* above 0"):
        training(cast(Any, [TrainingSet(name="films", url=urls["films"], weight=0, max_bad=0)]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mixed(urls | {"web": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match=r"data\.cache_mib.*of .*web"):
        mixed(urls, cache_bytes=1000, augmentation=Augmentation(frame_sampling="random"))
