"""Training with hard batches: the same global batches after a restart and on any ranks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import jobs
from builders.tiny import damaged_data, tiny_config, with_ranks
from builders.worlds import SINGLE_RANK

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.hard_batches import caption_words
from tvr.data_prep.hard_batches.caption_vectors import CaptionVectors, open_vectors
from tvr.data_prep.hard_batches.caption_words import (
    SampleCaptions,
    find_word_vectors,
    read_captions,
    read_texts,
    write_word_vectors,
)
from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import BadSample
from tvr.trainer.config import Config, merged, to_json
from tvr.trainer.hard_batches.hard_epochs import HardEpochs
from tvr.trainer.hard_batches.sentence_vectors import write_sentence_vectors
from tvr.trainer.loop import train

BATCH, STEPS, NUM_TRAIN = 10, 11, 48
# Batches 4 and 9 hold the first samples of epochs 1 and 2.
FOUND_AT = [4, 9]


def config_of(folder: Path, **changes: Any) -> Config:
    base = {
        "data": {
            "hard_batches": 0.5,
            "hard_group": 2,
            "hard_every": 1,
            "test": None,
            "test_exchanged": None,
            "workers": 1,
        },
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": BATCH, "log_keys": True},
        "checkpoint": {"every": 1, "keep_last": STEPS},
    }
    return merged(merged(tiny_config(folder), base, where="test"), changes, where="test")


def vectors_of(data: Path, run_dir: Path, epoch: int) -> CaptionVectors:
    content = read_manifest(str(data / "train")).content
    return open_vectors(run_dir / "hard_batches" / "train" / f"epoch-{epoch:08d}", content)


def test_a_run_finds_hard_batches_anew_and_resumes(data: Path, tmp_path: Path) -> None:
    config = config_of(data)
    whole = tmp_path / "whole"
    train(config, whole)
    batches = jobs.global_batches(whole)
    assert [event["step"] for event in jobs.events(whole, "hard_batches")] == FOUND_AT
    first = [set(batches[step]) for step in range(1, 6)]
    assert len(set.union(*first[:4])) == 4 * BATCH
    assert set.union(*first) == set(read_manifest(str(data / "train")).samples.key.tolist())
    found = [vectors_of(data, whole, epoch).index for epoch in (0, 1, 2)]
    assert [index.source for index in found] == [
        "words of the captions",
        "text tower after 4 steps",
        "text tower after 9 steps",
    ]
    # From a checkpoint in an epoch, and from the one whose next step begins an epoch.
    for step in (4, 6):
        resumed = tmp_path / f"from-{step}"
        jobs.copy_run_at_step(step, whole, resumed)
        if step == 4:
            shutil.rmtree(resumed / "hard_batches" / "train" / "epoch-00000001")
        train(config, resumed)
        assert jobs.losses(resumed) == jobs.losses(whole)
        assert jobs.global_batches(resumed) == batches
        assert [vectors_of(data, resumed, epoch).index for epoch in (0, 1, 2)] == found

    damaged = tmp_path / "damaged"
    jobs.copy_run_at_step(6, whole, damaged)
    folder = damaged / "hard_batches" / "train"
    shutil.rmtree(folder / "epoch-00000001")
    with pytest.raises(ValueError, match=r"epoch-00000001: the caption vectors for .* are missing"):
        train(config, damaged)
    refused = config_of(data, data={"hard_group": 5})
    with pytest.raises(ValueError, match=r"data\.hard_group was 2, is 5 \(the order of the sam"):
        train(refused, damaged)
    too_small = config_of(data, data={"hard_batches": 0.1})
    with pytest.raises(ValueError, match="is less than one group"):
        train(too_small, tmp_path / "new")


def test_two_ranks_train_on_the_hard_batches_of_one(data: Path, tmp_path: Path) -> None:
    config = config_of(data, train={"steps": 6}, checkpoint={"every": 0})
    batches = []
    for ranks in (1, 2):
        file, run_dir = tmp_path / f"{ranks}.json", tmp_path / str(ranks)
        file.write_text(to_json(with_ranks(config, ranks)))
        assert jobs.run_forked(file, run_dir, ranks) == [0] * ranks
        batches.append({n: sorted(keys) for n, keys in jobs.global_batches(run_dir).items()})
    assert batches[0] == batches[1]
    both = [jobs.losses(tmp_path / str(ranks)) for ranks in (1, 2)]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5)
    one, two = (vectors_of(data, tmp_path / str(ranks), 1) for ranks in (1, 2))
    assert (one.texts == two.texts).all()
    # The weights of the two runs agree to rounding, and so do the vectors.
    assert abs(one.vectors.astype(int) - two.vectors.astype(int)).max() <= 1
    assert np.unique(one.vectors).size > 50


def test_bad_samples_are_in_no_group_and_a_store_that_is_down_ends_the_reading(
    data: Path, tmp_path: Path
) -> None:
    folder, _ = damaged_data(data, tmp_path / "set", rows=[1])
    reader = SampleReader(str(folder), num_frames=1, image_size=16)
    found = [sample.texts for sample in read_captions(reader)]
    # Threads with readers of their own give the same, in the same order.
    threads = [reader.for_another_thread() for _ in range(3)]
    assert [sample.texts for sample in read_captions(*threads)] == found
    assert sum(sum(each.pop_read_counts().values()) for each in threads) >= NUM_TRAIN - 1
    assert [row for row, texts in enumerate(found) if not texts] == [1]
    assert len(found) == NUM_TRAIN

    def down(row: int) -> dict[str, bytes]:
        raise BadSample(f"row {row}", "unavailable", "no route")

    reader.members = down
    with pytest.raises(
        OSError, match=r"captions for data\.hard_batches cannot be read: .*no route"
    ):
        list(read_captions(reader))
    manifest = replace(reader.manifest, beton=reader.manifest.shards[0])
    with pytest.raises(ValueError, match="which is a beton; train from the shards"):
        find_word_vectors("/data/set.beton", manifest, tmp_path / "vectors")


def test_captions_are_whole_before_the_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[list[str]]()

    def stop(folder: Path, *_: object, **__: object) -> None:
        seen.append(list(read_texts(folder, 0, 3)))
        raise KeyboardInterrupt

    samples = [SampleCaptions(f"v{n}", (f"caption {n}",)) for n in range(3)]
    with monkeypatch.context() as patched:
        patched.setattr(caption_words, "write_vectors", stop)
        with pytest.raises(KeyboardInterrupt):
            write_word_vectors(tmp_path, samples, content="digest")
    assert seen == [["caption 0", "caption 1", "caption 2"]]
    write_word_vectors(tmp_path, samples, content="digest")
    (tmp_path / "captions.jsonl").write_text('"caption 0"\n')
    with pytest.raises(ValueError, match=r"the sha256 of captions\.jsonl differs"):
        open_vectors(tmp_path, "digest")
    # Only the first rank compares hashes; the others notice a file that was cut.
    open_vectors(tmp_path, "digest", verify=False)
    with pytest.raises(ValueError, match="ends at caption 1 instead of 3"):
        list(read_texts(tmp_path, 0, 3))


def test_vectors_that_no_resume_needs_are_removed(data: Path, tmp_path: Path) -> None:
    config = config_of(data, checkpoint={"every": 0})
    run_dir = tmp_path / "run"
    hard = HardEpochs(config, run_dir, 0, SINGLE_RANK)
    random = np.random.default_rng(0)

    def encode(captions: Sequence[str]) -> np.ndarray:
        return random.normal(size=(len(captions), 8)).astype(np.float32)

    folder = run_dir / "hard_batches" / "train"
    for done in range(30):
        if hard.is_due(done):
            hard.find(done, encode)
            # A checkpoint in epoch 2 may be resumed from.
            (run_dir / "checkpoints" / "step-00000011").mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"epoch-{epoch:08d}" for epoch in (0, 2, 5, 6)]
    HardEpochs(config, run_dir, 11, SINGLE_RANK)


def test_sentence_vectors_are_centred_and_bad_samples_have_none(tmp_path: Path) -> None:
    texts = [(), *((f"caption {number}",) for number in range(600)), ("one", "two")]
    words, found = tmp_path / "words", tmp_path / "found"
    samples = [SampleCaptions(f"v{number}", own) for number, own in enumerate(texts)]
    write_word_vectors(words, samples, content="digest")
    random, sizes = np.random.default_rng(0), list[int]()
    by_text = {text: random.normal(3, 1, 64) for text in ("", *(t for own in texts for t in own))}

    def encode(captions: Sequence[str]) -> np.ndarray:
        sizes.append(len(captions))
        return np.array([by_text[text] for text in captions], np.float32)

    opened = open_vectors(words, "digest")
    write_sentence_vectors(found, words, opened, encode, SINGLE_RANK, source="a test")
    vectors = open_vectors(found, "digest")
    assert sizes == [256, 256, 91] * 2
    assert vectors.index.source == "a test"
    assert (vectors.starts == opened.starts).all()
    assert not vectors.vectors[0].any()
    raw = np.array([by_text[text] for own in texts for text in own or ("",)])
    raw -= raw.mean(0)
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True) * 20 * 8
    assert abs(vectors.vectors - expected.clip(-127, 127))[1:].max() <= 0.51
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "words"]
