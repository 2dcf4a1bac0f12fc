"""Evaluation: equal to the definition, and the same on any number of ranks.

Unreadable samples are left out and reported.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.spawn import spawn
from builders.tiny import make_tiny_data, tiny_config
from torch import Tensor

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import Batch, Caption, TooManyBadSamples
from tvr.kernels import reference
from tvr.kernels.ranking import retrieval_metrics
from tvr.trainer.config import Config
from tvr.trainer.data import ordered_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.evaluate import evaluate
from tvr.trainer.evaluation.options import EvaluationOptions
from tvr.trainer.loop import train
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features, TextVideoModel, build_model, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.records import Evaluation, results_table

CPU = torch.device("cpu")
ALONE = World(rank=0, world_size=1, device=CPU)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tiny_data(folder, num_train=10)
    # Two videos only: too few for three ranks.
    clips = read_annotations(str(folder / "clips" / "test" / "captions.jsonl"))
    pack_shards(clips[:2], str(folder / "two"), layout="frames", num_frames=3, short_side=16)
    # Fewer clips than the test set: the ranks divide it at other places.
    clips = read_annotations(str(folder / "clips" / "exchanged" / "captions.jsonl"))
    pack_shards(clips[4:], str(folder / "six"), layout="frames", num_frames=3, short_side=16)
    damage(folder / "test", folder / "test-damaged", rows=(2, 9))
    damage(folder / "exchanged", folder / "exchanged-damaged", rows=(2, 5))
    return folder


def damage(source: Path, url: Path, *, rows: tuple[int, ...]) -> None:
    """Copies a data set of one shard and flips a byte in each of these samples."""
    shutil.copytree(source, url)
    offsets = read_manifest(str(url)).samples.offset
    shard = url / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    for row in rows:
        content[int(offsets[row]) + 600] ^= 1
    shard.write_bytes(content)


def setting(folder: Path, *, micro_batch: int = 4, **data: Any) -> Config:
    """`tiny_config` with captions of different lengths: none is truncated."""
    return tiny_config(folder, data={"max_words": 40} | data, train={"micro_batch": micro_batch})


def untrained(config: Config) -> tuple[TextVideoModel, Tokenizer]:
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    torch.manual_seed(4)
    model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
    return model.eval(), tokenizer


def evaluated(config: Config, world: World = ALONE) -> Evaluation:
    model, tokenizer = untrained(config)
    return evaluate(model, config, tokenizer, world)


def whole_set(url: str, config: Config, tokenizer: Tokenizer) -> Batch:
    large = replace(config.train, micro_batch=1000, global_batch=1000)
    (batch,) = ordered_batches(url, config.data, config.model, large, tokenizer, ALONE)
    return batch


def by_definition(config: Config, split: str) -> tuple[Batch, Tensor]:
    """A whole split as one batch, and its similarity by the reference kernel."""
    model, tokenizer = untrained(config)
    batch = whole_set(split, config, tokenizer)
    with torch.no_grad():
        features = model(*model_inputs(batch, CPU))
        similarity = reference.dmae_similarity(
            features.sentence,
            features.words,
            features.frames,
            features.word_mask,
            features.frame_mask,
            interaction=config.model.interaction,
            matching=config.model.matching,
            word_logits=features.word_logits,
            frame_logits=features.frame_logits,
        )
    return batch, similarity


@pytest.mark.parametrize("matching", ["two_way", "words_to_frames"])
def test_evaluation_equals_the_definition(data: Path, matching: str) -> None:
    config = setting(data)
    config = replace(config, model=replace(config.model, matching=matching))
    result = evaluated(config)
    batch, similarity = by_definition(config, str(data / "test"))
    assert (result.videos, result.captions, result.left_out) == (10, 10, ())
    assert result.data == str(data / "test")
    assert result.metrics == retrieval_metrics(similarity, batch.caption_video)
    assert_queries(result, batch, similarity)
    exchanged, _ = by_definition(config, str(data / "exchanged"))
    assert exchanged.keys == batch.keys
    wins = binding_by_definition(config, data)
    assert result.binding_accuracy == pytest.approx(100 * float(wins.double().mean()))


def assert_queries(result: Evaluation, batch: Batch, similarity: Tensor) -> None:
    assert [query["caption"] for query in result.queries] == list(batch.captions)
    for query, row, video in zip(
        result.queries, similarity, batch.caption_video.tolist(), strict=True
    ):
        assert query["key"] == batch.keys[video]
        assert query["rank"] == 1 + int((row > row[video]).sum())
        best = row.sort(descending=True)
        assert [found["key"] for found in query["top"]] == [
            batch.keys[column] for column in best.indices[:5].tolist()
        ]
        values = torch.tensor([found["similarity"] for found in query["top"]])
        assert torch.allclose(values, best.values[:5], atol=1e-6)


def binding_by_definition(config: Config, data: Path) -> Tensor:
    """(10,) bool: does a test caption score higher with its own clip than with the counterpart?"""
    model, tokenizer = untrained(config)
    test, twins = (
        whole_set(str(data / split), config, tokenizer) for split in ("test", "exchanged")
    )
    with torch.no_grad():
        own, other = (
            model(batch.frames, batch.frame_mask, test.token_ids, test.word_mask)
            for batch in (test, twins)
        )
        similar = [
            reference.dmae_similarity(
                own.sentence,
                own.words,
                features.frames,
                own.word_mask,
                features.frame_mask,
                interaction=config.model.interaction,
                matching=config.model.matching,
                word_logits=own.word_logits,
                frame_logits=features.frame_logits,
            ).diagonal()
            for features in (own, other)
        ]
    return similar[0] > similar[1]


def test_each_caption_of_a_video_is_a_query(data: Path) -> None:
    config = setting(data, test=str(data / "train"), test_exchanged=None)
    result = evaluated(config)
    batch, similarity = by_definition(config, str(data / "train"))
    assert (result.videos, result.captions) == (10, 30)
    assert result.metrics == retrieval_metrics(similarity, batch.caption_video)
    assert result.metrics.text_to_video.queries == 30
    assert result.metrics.video_to_text.queries == 10
    assert result.binding_accuracy is None
    assert_queries(result, batch, similarity)


def test_paragraphs_join_the_captions_of_a_video(data: Path) -> None:
    config = setting(data, test=str(data / "train"), test_exchanged=None, max_words=77)
    model, tokenizer = untrained(config)
    plain, joined = (
        evaluate(model, config, tokenizer, ALONE, EvaluationOptions(paragraphs=each))
        for each in (False, True)
    )
    assert (plain.captions, joined.captions, joined.videos) == (30, 10, 10)
    assert (plain.protocol["name"], joined.protocol["name"]) == ("multi_caption", "paragraph")
    first = [query["caption"] for query in plain.queries[:3]]
    assert joined.queries[0]["caption"] == " ".join(first)
    assert joined.queries[0]["key"] == plain.queries[0]["key"]
    # The query is that text itself: encoded alone, it is as similar.
    batch = whole_set(str(data / "train"), config, tokenizer)
    ids, mask = tokenizer([Caption(text=" ".join(first))])
    with torch.no_grad():
        own = model(batch.frames, batch.frame_mask, ids, mask)
    top = joined.queries[0]["top"][0]
    scores = similarity_rows(own, own, config.model)[0]
    assert top["similarity"] == pytest.approx(float(scores.max()), abs=1e-5)


def evaluate_on_rank(rank: int, world_size: int, folder: Path) -> tuple[list[Evaluation], str]:
    """Evaluations with few and many batches per rank, and the error for a set that is too small."""
    torch.set_num_threads(1)
    world = World(rank=rank, world_size=world_size, device=CPU)
    results = []
    # 10 videos on 3 ranks: 3, 3 and 4. With batches of 3 the last rank has one batch more.
    for config in (
        setting(folder, micro_batch=3),
        setting(folder, micro_batch=100),
        setting(folder, micro_batch=3, test=str(folder / "train"), test_exchanged=None),
        damaged(folder, micro_batch=3),
        setting(folder, micro_batch=3, test_exchanged=str(folder / "six")),
    ):
        results.append(evaluated(config, world))
    config = setting(folder, test=str(folder / "two"), test_exchanged=None)
    try:
        evaluated(config, world)
    except ValueError as error:
        return results, str(error)
    return results, "none"


def test_three_ranks_give_the_same_result_as_one(data: Path) -> None:
    alone, message = evaluate_on_rank(0, 1, data)
    assert message == "none"
    for rank, (results, message_on_rank) in enumerate(spawn(evaluate_on_rank, 3, data)):
        assert message_on_rank == f"{data / 'two'} has too few readable videos for 3 ranks"
        for ours, theirs in zip(results, alone, strict=True):
            assert ours.summary() == theirs.summary()
            if rank:
                assert ours.queries == ours.video_queries == []
                continue
            assert ours.video_queries == theirs.video_queries
            for query, same in zip(ours.queries, theirs.queries, strict=True):
                assert (query["caption"], query["key"]) == (same["caption"], same["key"])
                assert query["rank"] == same["rank"]
                for found, expected in zip(query["top"], same["top"], strict=True):
                    assert found["key"] == expected["key"]
                    assert found["similarity"] == pytest.approx(expected["similarity"], abs=1e-6)


class OracleModel:
    """Encodes a caption and its own clip as the same unit vector, and each other clip as another.

    With `prefers="exchanged"` it confuses each test clip with its counterpart.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, *, prefers: str = "test") -> None:
        test, twins = (
            whole_set(str(url), config, tokenizer)
            for url in (config.data.test, config.data.test_exchanged)
        )
        self.slot: dict[bytes, int] = {}
        liked, other = (test, twins) if prefers == "test" else (twins, test)
        for slot, frames in enumerate([*liked.frames, *other.frames]):
            self.slot[frames.numpy().tobytes()] = slot
        for slot, token_ids in enumerate([*test.token_ids, *twins.token_ids]):
            self.slot[token_ids.numpy().tobytes()] = slot
        self.width = 2 * len(test.keys)
        assert len(self.slot) == 2 * self.width  # no two clips or captions are alike

    def __call__(
        self, frames: Tensor, frame_mask: Tensor, token_ids: Tensor, word_mask: Tensor
    ) -> Features:
        videos, texts = self.vectors(frames), self.vectors(token_ids)
        return Features(
            sentence=texts,
            words=texts[:, None].expand(-1, word_mask.shape[1], -1),
            word_mask=word_mask,
            frames=videos[:, None].expand(-1, frame_mask.shape[1], -1),
            frame_mask=frame_mask,
            word_logits=torch.zeros(word_mask.shape),
            frame_logits=torch.zeros(frame_mask.shape),
            margin_hinge=None,
        )

    def vectors(self, rows: Tensor) -> Tensor:
        slots = [self.slot[row.numpy().tobytes()] for row in rows]
        return torch.eye(self.width)[slots]


def test_oracle_model_gets_perfect_scores(data: Path) -> None:
    config = setting(data)
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    result = evaluate(OracleModel(config, tokenizer), config, tokenizer, ALONE)
    for direction in (result.metrics.text_to_video, result.metrics.video_to_text):
        assert (direction.recall_at_1, direction.median_rank, direction.mean_rank) == (100, 1, 1)
    assert result.binding_accuracy == 100.0
    assert [query["top"][0]["key"] for query in result.queries] == [
        query["key"] for query in result.queries
    ]
    fooled = evaluate(OracleModel(config, tokenizer, prefers="exchanged"), config, tokenizer, ALONE)
    assert fooled.binding_accuracy == 0.0


def test_tie_counts_half(data: Path) -> None:
    config = setting(data, test_exchanged=str(data / "test"))
    assert evaluated(config).binding_accuracy == 50.0


def damaged(folder: Path, *, micro_batch: int = 4) -> Config:
    """Test clips 2 and 9 and counterparts 2 and 5 are unreadable."""
    return setting(
        folder,
        micro_batch=micro_batch,
        test=str(folder / "test-damaged"),
        test_exchanged=str(folder / "exchanged-damaged"),
    )


def test_unreadable_samples_are_left_out_and_counted(data: Path) -> None:
    result = evaluated(damaged(data))
    assert (result.videos, result.captions) == (8, 8)
    keys = [query["key"] for query in result.queries]
    assert keys == [f"test-{row:05d}" for row in range(10) if row not in (2, 9)]
    assert [(entry.key, entry.reason) for entry in result.left_out] == [
        (f"test-{row:05d}", "checksum") for row in (2, 9, 2, 5)
    ]
    assert result.summary()["left_out"] == 4
    assert "4 unreadable samples were left out" in result.table()


def test_binding_accuracy_covers_clips_readable_with_their_counterparts(
    data: Path,
) -> None:
    wins = binding_by_definition(setting(data), data)
    readable = [row for row in range(10) if row not in (2, 5, 9)]
    expected = 100 * float(wins[readable].double().mean())
    assert expected != pytest.approx(100 * float(wins.double().mean()))
    assert evaluated(damaged(data)).binding_accuracy == pytest.approx(expected)
    one_sided = setting(data, test_exchanged=str(data / "exchanged-damaged"))
    readable = [row for row in range(10) if row not in (2, 5)]
    expected = 100 * float(wins[readable].double().mean())
    assert evaluated(one_sided).binding_accuracy == pytest.approx(expected)
    six = setting(data, test_exchanged=str(data / "six"))
    expected = 100 * float(wins[4:].double().mean())
    assert evaluated(six).binding_accuracy == pytest.approx(expected)


def test_budget_for_unreadable_samples_applies(data: Path) -> None:
    config = setting(data, test=str(data / "test-damaged"), test_exchanged=None, max_bad=1)
    with pytest.raises(TooManyBadSamples, match=r"max_bad=1 allowed .*test-00009: checksum"):
        evaluated(config)


def test_missing_test_set_is_refused(data: Path) -> None:
    config = setting(data, test=None)
    with pytest.raises(ValueError, match=r"data\.test is not set"):
        evaluated(config)


def test_counterpart_with_other_keys_is_refused(data: Path, tmp_path: Path) -> None:
    other = setting(data, test_exchanged=str(data / "train"))
    with pytest.raises(ValueError, match=r"train shares no readable key with .*test"):
        evaluated(other)
    # A run refuses other keys, and too few, before it trains.
    for split in ("train", "two"):
        config = setting(data, test_exchanged=str(data / split))
        with pytest.raises(ValueError, match=rf"{split} must hold the same keys in the same order"):
            train(config, tmp_path / split)


def test_table_shows_the_summary(data: Path) -> None:
    config = setting(data)
    result = evaluated(config)
    summary = result.summary()
    summary["text_to_video"] |= {"recall_at_1": 12.34, "median_rank": 7.5}
    summary["binding_accuracy"] = 65.0
    lines = results_table(summary).splitlines()
    assert lines[0] == f"10 captions, 10 videos ({data / 'test'})"
    assert lines[1].startswith("protocol: single_caption, version 2; 0 captions equal one")
    assert lines[2].split() == ["raw", "R@1", "R@5", "R@10", "R@50", "MdR", "MnR"]
    assert lines[3].split()[:4] == ["text", "to", "video", "12.3"]
    assert lines[3].split()[7] == "7.5"
    assert [line.split()[0] for line in lines[4:6]] == ["video", "mean"]
    assert lines[6] == "binding accuracy 65.0 % (chance 50 %)"
    assert len(lines) == 7
    without = results_table(replace(result, binding_accuracy=None).summary())
    assert "binding" not in without
