"""The identity of stored tower outputs: weights, vocabulary and settings on which they depend."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.trainer.config import Config
from tvr.trainer.features.feature_set import OUTPUT, DataSource, FeatureHeader
from tvr.trainer.model.model import TextVideoModel, image_size
from tvr.trainer.model.tokenizer import Tokenizer

# Small enough for many ranks to share a test set, large enough to be read by few opened files.
VIDEOS_PER_BLOCK = 256
TOWERS = ("text_tower", "image_tower")
# Of a tower's configuration: they do not change what it computes.
UNUSED = ("architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version")


def towers_header(config: Config, model: TextVideoModel, tokenizer: Tokenizer) -> FeatureHeader:
    """Describes the outputs of a model's towers, as every part of their folder does."""
    data = config.data
    settings = {
        OUTPUT: "towers",
        "family": model.family.name,
        "num_frames": data.num_frames,
        "max_words": tokenizer.max_words,
        "image_size": image_size(config.model),
        "content_words": data.content_words,
        "frame_spacing": data.frame_spacing,
        "precision": config.train.precision,
    }
    weights = _digest(model, tokenizer)
    text = json.dumps({"weights": weights, **settings}, sort_keys=True)
    device = next(model.parameters()).device
    side = settings["image_size"]
    pixels = torch.zeros(1, 1, 3, side, side, dtype=torch.uint8)
    with torch.no_grad():
        frames, _, words = model.tower_outputs(
            *(x.to(device) for x in (pixels, *_probe(tokenizer)))
        )
    return FeatureHeader(
        model=config.model.pretrained or "towers of the run",
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        settings=settings,
        stored=data.features_type,
        num_frames=data.num_frames,
        num_words=words.shape[1],
        width=words.shape[-1],
        has_logits=False,
        frame_width=0 if frames.shape[-1] == words.shape[-1] else frames.shape[-1],
    )


def packed_source(url: str, node_folder: str | None = None) -> DataSource:
    """Describes the content of a packed data set."""
    manifest = read_manifest(url, node_folder=node_folder)
    return DataSource(
        # The same folder by another path is the same data set.
        url=url if "://" in url else str(Path(url).absolute()),
        kind="packed",
        content=hashlib.sha256(manifest.content.encode()).hexdigest(),
        num_blocks=max(1, -(-manifest.num_samples // VIDEOS_PER_BLOCK)),
    )


def _probe(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """One caption of start and end alone: its vectors have the shapes of all others."""
    ids = torch.zeros(1, tokenizer.max_words, dtype=torch.int64)
    return ids, torch.ones_like(ids)


def _digest(model: TextVideoModel, tokenizer: Tokenizer) -> str:
    """SHA-256 of both towers (names, shapes, types, values), pixel scales and vocabulary."""
    found = hashlib.sha256()
    for side in TOWERS:
        tower = getattr(model, side)
        found.update(json.dumps(_computed(tower), sort_keys=True, default=str).encode())
        for name, value in sorted(tower.state_dict().items()):
            found.update(f"{side}.{name} {tuple(value.shape)} {value.dtype}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    # A folder may set them, and no tower holds them.
    found.update(json.dumps([model.pixel_mean.tolist(), model.pixel_std.tolist()]).encode())
    found.update(json.dumps(sorted(tokenizer.backend.get_vocab().items())).encode())
    return found.hexdigest()


def _computed(tower: Any) -> dict[str, Any]:
    """The settings of a tower that change what it computes, such as its activation function."""
    config = getattr(tower, "config", None)
    settings = {} if config is None else config.to_dict()
    return {k: v for k, v in settings.items() if k not in UNUSED and not k.startswith("_")}
