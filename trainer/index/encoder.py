"""Loads the model that encoded a feature set, and refuses any other."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch

from tvr.trainer.checkpoint.choice import CheckpointChoice
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.model_source import Interaction, SourceModel, load_source
from tvr.trainer.features.feature_set import FeatureSet
from tvr.trainer.index.layout import IndexManifest


class NamedModel(NamedTuple):
    path: Path
    """Folder of a run, an export, or a plain CLIP or SigLIP."""
    checkpoint: CheckpointChoice = "newest"


def named_model(manifest: IndexManifest) -> NamedModel | None:
    """The model that an index names."""
    place = manifest.model
    if place is None:
        return None
    return NamedModel(Path(place.path), "newest" if place.step is None else place.step)


def load_model(named: NamedModel | None, features: FeatureSet, device: torch.device) -> SourceModel:
    """Loads the model that encoded a feature set, in the settings of the features.

    Raises:
        ValueError: no model is named, or its weights or settings are not those that encoded the
            features.
        CheckpointDamaged, OSError: it cannot be read.
    """
    if named is None:
        raise ValueError(
            f"{features.folder} does not name the model that encoded it, {features.info.model};"
            " give it with --model (model of `Index.open`), or name it once with"
            " `tvr index --model`"
        )
    info = features.info
    settings = info.settings
    frames, words, interaction = (
        settings.get(name) for name in ("num_frames", "max_words", "interaction")
    )
    try:
        found = load_source(
            named.path,
            named.checkpoint,
            num_frames=cast(int, frames),
            max_words=cast(int, words),
            interaction=None if settings.get("mean_of_frames") else cast(Interaction, interaction),
            world=World(rank=0, world_size=1, device=device),
        )
    except ValueError as error:
        # Such as an interaction of the features that another model cannot have.
        raise ValueError(
            f"{named.path} cannot take the place of the model that encoded {features.folder},"
            f" {info.model}: {error}; name the one that did with --model"
        ) from error
    if found.fingerprint != info.fingerprint:
        own = found.settings
        names = dict.fromkeys([*own, *settings])
        differing = [name for name in names if own.get(name) != settings.get(name)]
        what = ", ".join(
            f"{name}={own.get(name)} instead of {settings.get(name)}" for name in differing
        )
        raise ValueError(
            f"{found.name} is not the model that encoded {features.folder}, {info.model}:"
            f" {what or 'its weights differ'}; name the one that did with --model"
        )
    return found
