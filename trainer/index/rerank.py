"""The second stage: DMAE's similarity of a query with candidates, and queries made of videos."""

from __future__ import annotations

from typing import Any, cast, get_args

import numpy as np
import torch

from tvr.data_prep.records import ShardCorrupt
from tvr.kernels.numerics import masked_softmax, unit
from tvr.trainer.config import ModelConfig
from tvr.trainer.evaluation.model_source import Interaction
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features

# Candidates whose frames are in memory at a time: 50 MB of 12 frames of width 512 in fp32.
CANDIDATES_AT_ONCE = 2048


def similarity_settings(features: FeatureSet) -> ModelConfig:
    """Settings of the similarity with which the features were encoded.

    Raises:
        ShardCorrupt: they are none.
    """
    values = features.info.settings
    interaction, neighbours = values.get("interaction"), values.get("neighbour_frames")
    if interaction not in get_args(Interaction) or type(neighbours) is not bool:
        raise ShardCorrupt(
            f"{features.folder}: interaction={interaction!r:.100},"
            f" neighbour_frames={neighbours!r:.100}: must be one of"
            f" {', '.join(get_args(Interaction))}, and true or false"
        )
    return ModelConfig(
        interaction=cast(Interaction, interaction),
        matching=features.info.matching,
        neighbour_frames=neighbours,
    )


def similarities(
    query: Features,
    features: FeatureSet,
    rows: np.ndarray,
    settings: ModelConfig,
    device: torch.device,
) -> np.ndarray:
    """Similarity (n,) of one caption with n videos, whose frames are read from their files.

    Raises:
        ShardCorrupt: a similarity is not finite: the features are damaged.
    """
    query = _on(device, query)
    found = [np.empty(0, np.float32)]
    with torch.no_grad():
        for start in range(0, len(rows), CANDIDATES_AT_ONCE):
            videos = _on(device, features.videos(rows[start : start + CANDIDATES_AT_ONCE]))
            try:
                scores = similarity_rows(query, videos, settings)
            except ValueError as error:  # of masks: the query's are valid
                raise ShardCorrupt(f"{features.folder}: damaged features: {error}") from error
            found.append(scores[0].float().cpu().numpy())
    scores = np.concatenate(found)
    if not np.isfinite(scores).all():
        row = int(rows[~np.isfinite(scores)][0])
        raise ShardCorrupt(
            f"{features.folder}: the similarity of a query with {features.keys[row]} is not finite;"
            " its features are damaged"
        )
    return scores


def as_texts(videos: Features, settings: ModelConfig) -> Features:
    """Videos as queries: their frames stand for words, their weighted mean for the sentence.

    With `words_to_frames` frames have no weights; as words they count equally.
    """
    mask, logits = videos.frame_mask, videos.frame_logits
    weights = mask.float() / mask.sum(dim=1, keepdim=True)
    if settings.interaction.endswith("wti") and logits is not None:
        weights = masked_softmax(logits.float(), mask)
    frames = videos.frames.float() * (mask > 0)[..., None]
    return videos._replace(
        sentence=unit(torch.einsum("cf,cfd->cd", weights, frames)),
        words=videos.frames.float(),
        word_mask=mask,
        word_logits=torch.zeros_like(weights) if logits is None else logits,
    )


def _on(device: torch.device, features: Features) -> Features:
    moved: list[Any] = [None if each is None else each.to(device) for each in features]
    return Features(*moved)
