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
from tvr.trainer.evaluation.evaluate import TOP_VIDEOS, evaluate, query_results
from tvr.trainer.evaluation.model_source import Interaction, load_source
from tvr.trainer.evaluation.retrieval import rank_features
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
) -> Evaluation:
    """Evaluates a model on a packed data set, on as many ranks as the job has; stores nothing.

    Raises:
        ValueError, CheckpointDamaged: as `load_source` and `evaluate`.
    """
    with join_world() as world:
        model = load_source(source, choice, num_frames=num_frames, world=world)
        own = replace(model.config.data, test=data, test_exchanged=None)
        config = replace(model.config, data=own)
        result = evaluate(model.encode, config, model.tokenizer, world)
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
        keys: (C,) keys of the videos; None numbers them.
        captions: (A,) texts; None numbers them.
        data: Name of the data set in the result.
        left_out: Videos that could not be read.

    Raises:
        ValueError: an argument is missing, no rank has a caption, or a similarity is not finite.
        ShardCorrupt: the feature set is damaged.
    """
    name: str | None = None
    if isinstance(features, FeatureSet):
        stored = features
        if not len(stored) or not stored.num_captions:
            raise ValueError(f"{stored.folder} holds no captions: there is nothing to evaluate")
        first, end = (len(stored) * r // world.world_size for r in (world.rank, world.rank + 1))
        features, caption_video = stored.mapped(first, end)
        settings = stored.info.settings
        model = ModelConfig(
            interaction=cast(Interaction, settings["interaction"]),
            neighbour_frames=bool(settings["neighbour_frames"]),
        )
        keys = stored.keys[first:end]
        captions = [stored.captions[row] for row in stored.captions_of(first, end)]
        data = ", ".join(source.url for source in stored.sources)
        left_out, name = stored.left_out, stored.info.model
    elif caption_video is None or model is None:
        raise ValueError("features in memory need caption_video and model")
    else:
        left_out = tuple(each for part in world.all_gather_objects([*left_out]) for each in part)
    count = len(features.frames)
    keys = [f"video {row}" for row in range(count)] if keys is None else keys
    if captions is None:
        captions = [f"caption {row}" for row in range(len(caption_video))]
    if len(keys) != count or len(captions) != len(caption_video):
        raise ValueError(
            f"{len(keys)} keys for {count} videos, {len(captions)} texts for"
            f" {len(caption_video)} rows of caption_video; each needs as many"
        )
    score = partial(similarity_rows, model=model)
    found = rank_features(features, caption_video, score, world, top_videos=TOP_VIDEOS)
    names = world.gather_objects_to_first((list(keys), list(captions), caption_video.tolist()))
    return Evaluation(
        data=data,
        videos=sum(world.all_gather_counts(count)),
        captions=len(found.ranks.text_to_video),
        left_out=tuple(left_out),
        metrics=found.ranks.metrics(),
        binding_accuracy=None,
        queries=query_results(found, names),
        model=name,
    )
