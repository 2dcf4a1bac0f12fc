"""Evaluates features that are encoded already, and models that belong to no run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from tvr.data_prep.records import Replacement
from tvr.trainer.checkpoint.choice import CheckpointChoice
from tvr.trainer.config import ModelConfig
from tvr.trainer.distributed.world import World, join_world
from tvr.trainer.evaluation.bank import encoded_bank, stored_bank
from tvr.trainer.evaluation.evaluate import Report, evaluate
from tvr.trainer.evaluation.model_source import Interaction, load_source
from tvr.trainer.evaluation.protocol import (
    DEFAULTS,
    Bank,
    EvaluationOptions,
    Named,
    caption_ids,
    evaluation_of,
    rank_set,
)
from tvr.trainer.evaluation.saved_run import ALONE
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features
from tvr.trainer.records import Evaluation


def evaluate_source(
    source: str | Path,
    data: str,
    choice: CheckpointChoice = "newest",
    *,
    num_frames: int | None = None,
    options: EvaluationOptions = DEFAULTS,
    report: Report | None = None,
) -> Evaluation:
    """Evaluates a model on a packed data set, on as many ranks as the job has; stores nothing.

    `report` is that of `evaluate`.

    Raises:
        ValueError, CheckpointDamaged: as `load_source` and `evaluate`.
    """
    with join_world() as world:
        model = load_source(source, choice, num_frames=num_frames, world=world)
        own = replace(model.config.data, test=data, test_exchanged=None)
        config = replace(model.config, data=own)
        bank = None
        if options.qb_norm is not None:
            bank = encoded_bank(
                options.qb_norm,
                model.model.encode_texts,
                model.tokenizer,
                config,
                options.bank_captions,
                world,
            )
        result = evaluate(model.encode, config, model.tokenizer, world, options, bank, report)
    return replace(result, step=model.step, model=model.name)


def evaluate_features(
    features: Features | FeatureSet,
    caption_video: Tensor | None = None,
    *,
    model: ModelConfig | None = None,
    keys: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    data: str = "features",
    left_out: Sequence[Replacement] = (),
    options: EvaluationOptions = DEFAULTS,
    bank: Bank | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Ranks all captions and videos against each other, without encoding them.

    All ranks of `world` call it. Of a feature set each rank takes an equal slice of the videos, and
    reads it where it is used; features in memory are those of this rank alone.

    Args:
        features: Features of A captions and C videos, or a feature set, which brings all the
            following arguments itself.
        caption_video: (A,) row of each caption's video.
        model: Settings of the similarity; None for a feature set.
        keys: (C,) keys of the videos; None numbers them through all ranks, on every rank.
        captions: (A,) texts; None numbers them likewise.
        data: Name of the data set in the result.
        left_out: Videos that could not be read.
        options: Choices of the protocol. `paragraphs` needs the captions to be encoded anew.
        bank: This rank's part of the bank that `options.qb_norm` names; None for a feature set,
            which opens the bank itself.

    Raises:
        ValueError: an argument is missing, no rank has a caption, a similarity is not finite, or an
            option needs more than the features.
        ShardCorrupt: the feature set is damaged.
    """
    if options.paragraphs:
        raise ValueError(
            "paragraphs: stored captions are encoded one by one; evaluate the data set itself"
        )
    name: str | None = None
    if isinstance(features, FeatureSet):
        stored = features
        if not len(stored) or not stored.num_captions:
            raise ValueError(f"{stored.folder} holds no captions: there is nothing to evaluate")
        first, end = (len(stored) * r // world.world_size for r in (world.rank, world.rank + 1))
        features, caption_video = stored.lazy_features(first, end)
        settings = stored.info.settings
        model = ModelConfig(
            interaction=cast(Interaction, settings["interaction"]),
            matching=stored.info.matching,
            neighbour_frames=bool(settings["neighbour_frames"]),
        )
        keys = stored.keys[first:end]
        captions = [stored.captions[row] for row in stored.captions_of(first, end)]
        data = ", ".join(source.url for source in stored.sources)
        left_out, name = stored.left_out, stored.info.model
        if options.qb_norm is not None:
            source = FeatureSet.open(options.qb_norm)
            bank = stored_bank(source, stored.info, options.bank_captions, world)
    elif caption_video is None or model is None:
        raise ValueError("features in memory need caption_video and model")
    else:
        left_out = tuple(each for part in world.all_gather_objects([*left_out]) for each in part)
    ids = None if captions is None else caption_ids(captions)
    if ids is None and options.equal_captions:
        raise ValueError("equal_captions needs the captions' texts")
    keys = _numbered("video", len(features.frames), world) if keys is None else keys
    if captions is None:
        captions = _numbered("caption", len(caption_video), world)
    sizes = (len(keys), len(features.frames), len(captions), len(caption_video))
    # On every rank at once: the others would wait for a rank that leaves alone.
    world.run_on_all(lambda: _check_names(*sizes), ValueError)
    score = partial(similarity_rows, model=model)
    found, facts = rank_set(features, caption_video, ids, score, options, bank, data, world)
    return evaluation_of(
        found,
        facts,
        Named(list(keys), list(captions), caption_video.tolist()),
        options,
        world,
        data=data,
        left_out=left_out,
        model=name,
    )


def _numbered(kind: str, count: int, world: World) -> list[str]:
    """Names of this rank's videos or captions, numbered through all ranks."""
    first = sum(world.all_gather_counts(count)[: world.rank])
    return [f"{kind} {number}" for number in range(first, first + count)]


def _check_names(keys: int, videos: int, captions: int, rows: int) -> None:
    if keys != videos or captions != rows:
        raise ValueError(
            f"{keys} keys for {videos} videos, {captions} texts for {rows} rows of caption_video;"
            " each needs as many"
        )
