"""Loads a model to use, from a run, from a folder of `tvr export`, or from plain towers.

A plain folder of towers, such as a CLIP or a PE-Core, has no trained token weights. Its similarity
is the one of every zero-shot baseline: the sentence with the mean of the frames. The frames of a
video are averaged and scaled to unit length when they are encoded, so a video has one frame vector.
With one frame, `ti` without neighbours is the cosine of sentence and mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tvr.data_prep.caption_text import clean_captions
from tvr.data_prep.records import Caption
from tvr.data_prep.video.images import fit_square
from tvr.kernels.numerics import unit
from tvr.trainer.checkpoint.choice import CheckpointChoice
from tvr.trainer.config import Config, DataConfig, LossConfig, ModelConfig, TrainConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.export import SETTINGS, exported_config, load_exported
from tvr.trainer.evaluation.saved_run import ALONE, load_run
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.model.model import Features, TextVideoModel, build_model, image_size
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.model.tower_folders import default_words
from tvr.trainer.run_dir import read_config
from tvr.trainer.run_files import CONFIG

Interaction = Literal["ti", "wti", "att_ti", "att_wti"]
MEAN_OF_FRAMES = "zero-shot, mean of frames"
# Of TPM-CL: they are read in training only.
TRAINING_ONLY = ("word_predictor.", "frame_predictor.")
DEFAULT_BATCH = 32
DEFAULT_FRAMES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceModel:
    """A model in evaluation mode, with what it takes to use it."""

    model: TextVideoModel
    tokenizer: Tokenizer
    config: Config
    """Settings: `config.model` for the similarity, `config.data` for reading clips."""
    mean_of_frames: bool
    """True if the frames of a video are averaged: a plain CLIP or SigLIP."""
    name: str
    """Readable name, such as "runs/demo/run, step 300"."""
    step: int | None
    """Step of the checkpoint; None for a folder."""
    weights: str
    """SHA-256 of the weights that an evaluation reads."""

    @property
    def num_frames(self) -> int:
        """Frames that are taken from a video."""
        return self.config.data.num_frames

    @property
    def max_words(self) -> int:
        """Tokens of a caption."""
        return self.tokenizer.max_words

    @property
    def image_size(self) -> int:
        """Side of the square frames, in pixels."""
        return image_size(self.config.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def settings(self) -> dict[str, Any]:
        """The settings on which features and similarity depend, beside the weights."""
        data, model = self.config.data, self.config.model
        # The defaults have no entry, so that those of earlier versions still belong to it.
        changed = {"matching": model.matching, "tokens_per_frame": model.tokens_per_frame}
        usual = {"matching": "two_way", "tokens_per_frame": 1}
        return {name: value for name, value in changed.items() if value != usual[name]} | {
            "num_frames": data.num_frames,
            "max_words": self.max_words,
            "image_size": self.image_size,
            "content_words": self.tokenizer.content_words,
            "frame_spacing": data.frame_spacing,
            "interaction": model.interaction,
            "neighbour_frames": model.neighbour_frames,
            "mean_of_frames": self.mean_of_frames,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and `settings`: equal ones give features that can be compared."""
        text = json.dumps({"weights": self.weights, **self.settings}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(
        self, frames: Tensor, frame_mask: Tensor, token_ids: Tensor, word_mask: Tensor
    ) -> Features:
        """The model's forward, for `evaluate`; arguments as `TextVideoModel.forward`."""
        with torch.no_grad():
            return self._pooled(self.model(frames, frame_mask, token_ids, word_mask))

    def caption(self, text: str) -> Caption:
        """A plain text as packing reads it, with its words if the model weights content words.

        Raises:
            ValueError: it has no visible character.
        """
        texts = clean_captions([text])
        if not texts:
            raise ValueError(f"the caption {text!r:.100} has no visible character")
        if not self.tokenizer.content_words:
            return Caption(text=texts[0])
        from tvr.data_prep.packing.words import WordTagger

        return WordTagger([]).tag(texts)[0]

    def encode_texts(
        self, texts: Sequence[str | Caption], *, batch: int = DEFAULT_BATCH
    ) -> Features:
        """Encodes captions, `batch` at a time.

        Returns:
            Features without videos, on the model's device.

        Raises:
            ValueError: there is no text, or the model weights content words and a caption comes
                without its words.
        """
        captions = [Caption(text=each) if isinstance(each, str) else each for each in texts]
        if not captions:
            raise ValueError("there is no text to encode")
        parts = []
        with torch.no_grad():
            for start in range(0, len(captions), batch):
                ids, mask = self.tokenizer(captions[start : start + batch])
                parts.append(self.model.encode_texts(ids.to(self.device), mask.to(self.device)))
        return concat_features(parts)

    def encode_frames(
        self, videos: Iterable[np.ndarray], *, batch: int = DEFAULT_BATCH
    ) -> Features:
        """Encodes videos, each given by frames (F, H, W, 3) uint8 with 1 to `num_frames` frames.

        Returns:
            Features without captions, on the model's device.

        Raises:
            ValueError: no video, or frames of another form.
        """
        parts, pending = [], []
        for video in videos:
            pending.append(self._fitted(video))
            if len(pending) == batch:
                parts.append(self._encode_batch(pending))
                pending = []
        if pending:
            parts.append(self._encode_batch(pending))
        if not parts:
            raise ValueError("there is no video to encode")
        return concat_features(parts)

    def _fitted(self, video: np.ndarray) -> np.ndarray:
        shape, most = video.shape, self.num_frames
        if video.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise ValueError(
                f"the frames of a video must be (F, H, W, 3) uint8, F >= 1; these are {shape}"
                f" {video.dtype}"
            )
        if shape[0] > most:
            raise ValueError(f"a video of {shape[0]} frames; {self.name} takes at most {most}")
        return fit_square(video, self.image_size)

    def _encode_batch(self, videos: Sequence[np.ndarray]) -> Features:
        side = self.image_size
        frames = torch.zeros(len(videos), self.num_frames, side, side, 3, dtype=torch.uint8)
        mask = torch.zeros(len(videos), self.num_frames, dtype=torch.int64)
        for row, video in enumerate(videos):
            frames[row, : len(video)] = torch.from_numpy(np.ascontiguousarray(video))
            mask[row, : len(video)] = 1
        frames = frames.permute(0, 1, 4, 2, 3).to(self.device)
        with torch.no_grad():
            return self._pooled(self.model.encode_videos(frames, mask.to(self.device)))

    def _pooled(self, features: Features) -> Features:
        if not self.mean_of_frames:
            return features
        weight = features.frame_mask[..., None].to(features.frames.dtype)
        mean = (features.frames * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return features._replace(
            frames=unit(mean), frame_mask=torch.ones_like(features.frame_mask[:, :1])
        )


def load_source(
    source: str | Path,
    choice: CheckpointChoice = "newest",
    *,
    num_frames: int | None = None,
    max_words: int | None = None,
    interaction: Interaction | None = None,
    world: World = ALONE,
) -> SourceModel:
    """Loads a model from a run, from a folder of `tvr export`, or from a plain CLIP or SigLIP.

    Args:
        source: Folder of a run, of an export, or of towers as `model.pretrained` takes them.
        choice: Checkpoint of a run: "newest", "best" or a step.
        num_frames: Frames of a video instead of the model's own number; 12 for a plain folder.
        max_words: Tokens of a caption instead of the model's own number; all positions of its text
            tower for a plain folder.
        interaction: Similarity instead of the model's own. For a plain folder "ti" or "att_ti"
            compare single frames; None is the mean of frames.
        world: All its ranks call it for a run, of which they share the reading.

    Raises:
        ValueError: the folder holds none of the three, has no such checkpoint, or an override does
            not fit the model; names it.
        CheckpointDamaged: see `load_run`.
    """
    folder = Path(source)
    if (folder / CONFIG).is_file() and not _is_model(folder):
        config = read_config(folder)
        model, tokenizer, step = load_run(folder, config, world, choice)
        name, mean = f"{folder}, step {step}", False
    else:
        if choice != "newest":
            raise ValueError(f"{folder} is no run, so it has no checkpoint {choice}; leave it out")
        step, name = None, str(folder)
        if (folder / SETTINGS).is_file():
            model, config, mean = load_exported(folder), exported_config(folder), False
            tokenizer = load_tokenizer(
                folder, config.data.max_words, content_words=config.data.content_words
            )
        else:
            mean = interaction is None
            model, config, tokenizer = _plain(folder, interaction)
            if mean:
                name += f" ({MEAN_OF_FRAMES})"
    if num_frames is not None or max_words is not None:
        config, tokenizer = _resized(model, config, tokenizer, num_frames, max_words)
    if interaction is not None:
        _check_interaction(folder, interaction, has_weights=model.text_weight is not None)
        config = replace(config, model=replace(config.model, interaction=interaction))
    model = model.to(world.device).eval()
    return SourceModel(
        model=model,
        tokenizer=tokenizer,
        config=config,
        mean_of_frames=mean,
        name=name,
        step=step,
        weights=_digest(model.state_dict(), tokenizer),
    )


def _is_model(folder: Path) -> bool:
    """True for a Hugging Face folder, whose config.json is not a run's."""
    if (folder / SETTINGS).is_file():
        return True
    try:
        content = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False  # reading it as a run's settings names the fault
    return isinstance(content, dict) and "model_type" in content


def _check_interaction(folder: Path, interaction: Interaction, *, has_weights: bool) -> None:
    if interaction.endswith("wti") and not has_weights:
        raise ValueError(
            f"interaction={interaction}: {folder} has no learned token weights; use ti or att_ti"
        )


def _plain(
    folder: Path, interaction: Interaction | None
) -> tuple[TextVideoModel, Config, Tokenizer]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of a run, an export, a CLIP or a SigLIP")
    if interaction is not None:
        _check_interaction(folder, interaction, has_weights=False)
    data = DataConfig(
        train="",  # nothing is trained: here and below, a run's required settings have no effect
        num_frames=DEFAULT_FRAMES,
        max_words=default_words(str(folder)),
    )
    settings = ModelConfig(
        pretrained=str(folder),
        interaction=interaction or "ti",
        neighbour_frames=interaction is not None,
    )
    loss = LossConfig(tpm_cl=0)
    tokenizer = load_tokenizer(folder, data.max_words)
    model = build_model(settings, loss, tokenizer, num_frames=data.num_frames)
    train = TrainConfig(steps=1, global_batch=DEFAULT_BATCH, micro_batch=DEFAULT_BATCH)
    return model, Config(data=data, model=settings, loss=loss, train=train), tokenizer


def _resized(
    model: TextVideoModel,
    config: Config,
    tokenizer: Tokenizer,
    num_frames: int | None,
    max_words: int | None,
) -> tuple[Config, Tokenizer]:
    """Settings and tokeniser for other numbers of frames and words."""
    frames = config.data.num_frames if num_frames is None else num_frames
    words = tokenizer.max_words if max_words is None else max_words
    header = model.sequence_header
    if header is not None and frames > max(77, config.data.num_frames):
        raise ValueError(
            f"num_frames={frames}: the sequence header has {max(77, config.data.num_frames)}"
            " positions"
        )
    most = model.family.positions(model.text_tower.config)
    if words > most or (model.family.fills_all_slots and words < most) or words < 3:
        allowed = str(most) if model.family.fills_all_slots else f"from 3 to {most}"
        raise ValueError(f"max_words={words} must be {allowed}, the text tower's positions")
    if frames < 1:
        raise ValueError(f"num_frames={frames} must be at least 1")
    data = replace(config.data, num_frames=frames, max_words=words)
    return replace(config, data=data), replace(tokenizer, max_words=words)


def _digest(weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> str:
    """SHA-256 of names, shapes, types and values, and of the vocabulary."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if name.startswith(TRAINING_ONLY):
            continue
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    vocabulary = sorted(tokenizer.backend.get_vocab().items())
    found.update(json.dumps(vocabulary).encode())
    return found.hexdigest()
