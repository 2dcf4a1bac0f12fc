"""Trained projections and the method's heads on top of frozen features, and their training.

Similarity, losses, TPM-CL, weight layers and ranking are those of `tvr train`; only the towers are
replaced by linear maps of stored features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from evidence.droid_features import ClipFeatures
from torch import Tensor, nn

from tvr.kernels.numerics import unit
from tvr.kernels.partial import LinearTokenWeights, tpm_cl
from tvr.kernels.weight_layers import SequenceHeader, TokenWeightLayer
from tvr.trainer.config import Config
from tvr.trainer.distributed.world import World
from tvr.trainer.engine.schedule import learning_rate_factor
from tvr.trainer.evaluation.protocol import caption_ids
from tvr.trainer.evaluation.retrieval import rank_features
from tvr.trainer.loss.objective import objective, similarity_rows
from tvr.trainer.model.model import Features

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Shape of the trained part; the values were chosen on inner folds, see README.md."""

    width: int = 384
    """Width D of words and frames."""
    parts: int = 1
    """Vectors of a frame that take part: 1 = of the whole picture, 7 = also of its cells."""
    components: int = 256
    """Principal components of the frames' features that are kept, found on the training clips."""
    whitening: float = 0.0
    """Power by which their deviations are divided out: 0 leaves them, 1 makes all equal."""
    dropout: float = 0.3
    """Of the stored features, in training."""
    keep_text: bool = True
    """Starts the map of words as the identity (needs D = the text's width)."""


class Rows:
    """Features of some clips as tensors; frames (C, F x parts, W), words (C, T, V)."""

    def __init__(self, features: ClipFeatures, rows: np.ndarray, parts: int) -> None:
        self.frames = torch.from_numpy(features.frames[rows][:, :, :parts]).float().flatten(1, 2)
        self.words = torch.from_numpy(features.words[rows]).float()
        self.word_mask = torch.from_numpy(features.word_mask[rows]).long()
        self.sentences = torch.from_numpy(features.sentences[rows]).float()
        self.caption_ids = caption_ids(list(features.captions[rows]))
        self.video_ids = torch.from_numpy(np.asarray(rows)).long()

    def __len__(self) -> int:
        return len(self.frames)


def reduce_frames(train: Rows, test: Rows, shape: HeadShape) -> None:
    """Replaces the frames' features by principal components, which the training clips give."""
    vectors = train.frames.flatten(0, 1)
    mean = vectors.mean(0)
    covariance = (vectors - mean).T @ (vectors - mean) / len(vectors)
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances.argsort(descending=True)[: shape.components]
    deviations = variances[kept].clamp(min=1e-6).sqrt()
    scales = deviations**-shape.whitening
    # The whole has the size of unit vectors' entries, whatever the power.
    scales = scales / (deviations * scales).square().mean().sqrt()
    matrix = directions[:, kept] * scales
    for rows in (train, test):
        rows.frames = (rows.frames - mean) @ matrix


class FeatureModel(nn.Module):
    """Stored features -> `Features`, as `TextVideoModel` makes them from pixels and tokens."""

    def __init__(self, config: Config, shape: HeadShape, train: Rows) -> None:
        super().__init__()
        self.loss = config.loss
        text_width, tokens = train.words.shape[-1], train.frames.shape[1]
        self.dropout = nn.Dropout(shape.dropout)
        self.frame_map = nn.Linear(train.frames.shape[-1], shape.width)
        self.word_map = nn.Linear(text_width, shape.width)
        if shape.keep_text:
            if shape.width != text_width:
                raise ValueError(f"keep_text needs width {text_width}, not {shape.width}")
            nn.init.eye_(self.word_map.weight)
            nn.init.zeros_(self.word_map.bias)
        layers = config.model.sequence_header_layers
        self.sequence_header = (
            SequenceHeader(shape.width, num_layers=layers, num_positions=max(77, tokens))
            if layers
            else None
        )
        weighted = config.model.interaction.endswith("wti")
        new = partial(TokenWeightLayer, shape.width, config.model.weight_layers)
        self.text_weight, self.frame_weight = (new(), new()) if weighted else (None, None)
        # Last, so that the other layers start alike with and without TPM-CL.
        partial_loss, words = bool(config.loss.tpm_cl), train.words.shape[1]
        self.word_predictor = (
            LinearTokenWeights(tokens, words, shape.width) if partial_loss else None
        )
        self.frame_predictor = LinearTokenWeights(1, tokens, shape.width) if partial_loss else None

    def forward(self, rows: Rows, chosen: Tensor) -> Features:
        """Encodes the chosen clips and their captions; in training with TPM-CL."""
        frames = unit(self.frame_map(self.dropout(rows.frames[chosen])))
        frame_mask = torch.ones(frames.shape[:2], dtype=torch.int64)
        if self.sequence_header is not None:
            frames = unit(self.sequence_header(frames, frame_mask))
        word_mask = rows.word_mask[chosen]
        words = unit(self.word_map(self.dropout(rows.words[chosen])))
        sentence = unit(self.word_map(self.dropout(rows.sentences[chosen])))
        weigh_words, weigh_frames = self.text_weight, self.frame_weight
        found = Features(
            sentence=sentence,
            words=words,
            word_mask=word_mask,
            frames=frames,
            frame_mask=frame_mask,
            word_logits=weigh_words(words) if weigh_words else None,
            frame_logits=weigh_frames(frames) if weigh_frames else None,
            margin_hinge=None,
        )
        if not self.training or not self.word_predictor or not self.frame_predictor:
            return found
        hinge = tpm_cl(
            sentence,
            words,
            frames,
            frame_mask,
            word_weights=self.word_predictor(frames, words, None),
            frame_weights=self.frame_predictor(sentence[:, None], frames, None),
            frame_weight_layer=self.frame_weight,
            kind=self.loss.tpm_cl,
            threshold=self.loss.mask_threshold,
            margin=self.loss.margin,
            straight_through=self.loss.straight_through,
            normalise_partial=self.loss.normalise_partial,
        ).hinge
        return found._replace(margin_hinge=hinge)


def batch_rows(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of row numbers: epochs of a new order each, without the incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


def train_model(config: Config, shape: HeadShape, train: Rows) -> FeatureModel:
    """Trains on the rows with the settings of `config`: steps, batch, AdamW, schedule, loss."""
    settings = config.train
    torch.manual_seed(settings.seed)
    model = FeatureModel(config, shape, train).train()
    matrices = [x for x in model.parameters() if x.ndim > 1]
    vectors = [x for x in model.parameters() if x.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
    )
    batches = batch_rows(len(train), min(settings.global_batch, len(train)), settings.seed)
    for step in range(settings.steps):
        factor = learning_rate_factor(
            step, warmup_steps=settings.warmup_steps, steps=settings.steps
        )
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * factor
        chosen = next(batches)
        found = objective(
            model(train, chosen),
            train.video_ids[chosen],
            config.model,
            config.loss,
            ALONE,
            caption_ids=train.caption_ids[chosen],
        )
        optimiser.zero_grad(set_to_none=True)
        found.for_backward.backward()
        if settings.gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimiser.step()
    return model.eval()


@torch.no_grad()
def ranks(model: FeatureModel, config: Config, test: Rows) -> tuple[Tensor, Tensor]:
    """Rank of every caption and of every video; equal captions count as hits."""
    everything = torch.arange(len(test))
    found = rank_features(
        model(test, everything),
        everything,
        partial(similarity_rows, model=config.model),
        ALONE,
        caption_ids=test.caption_ids,
        merge_equal=True,
    ).ranks
    return found.text_to_video, found.video_to_text
