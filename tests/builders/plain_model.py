"""A small model without towers, a batch for it, and the batch's loss by the naive reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tvr.kernels import losses, reference
from tvr.kernels.numerics import unit
from tvr.kernels.partial import LinearTokenWeights, tpm_cl
from tvr.kernels.weight_layers import TokenWeightLayer
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.model.model import Features

WORDS, FRAMES, WIDTH = 4, 3, 8
LENGTHS = (4, 2, 3, 4, 1, 3, 4, 2, 4, 3, 2, 4, 1, 4)
PAIRS = len(LENGTHS)
# Three videos have two captions each, which every split over ranks separates.
VIDEO_IDS = torch.tensor([7, 8, 1, 9, 2, 2**62, 3, 7, 4, 5, 9, 6, 10, 8])
# Five pairs of other videos share two captions; pairs 3 and 10 share the video, too.
CAPTION_IDS = torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8, 0, 3, 11, 12, 13])

Gradients = dict[str, Tensor]
Matching = Literal["two_way", "words_to_frames"]


class PlainModel(nn.Module):
    """Linear layers, dropout, token weights and TPM-CL; every parameter gets a gradient."""

    def __init__(self, dropout: float = 0.0, matching: Matching = "two_way") -> None:
        super().__init__()
        self.matching = matching
        self.words = nn.Linear(WIDTH, WIDTH)
        self.sentence = nn.Linear(WIDTH, WIDTH)
        self.frames = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.word_weight, self.frame_weight = TokenWeightLayer(WIDTH), TokenWeightLayer(WIDTH)
        self.word_predictor = LinearTokenWeights(FRAMES, WORDS, WIDTH)
        self.frame_predictor = LinearTokenWeights(1, FRAMES, WIDTH)
        if matching == "words_to_frames":
            self.frame_weight = None

    def forward(self, batch: tuple[Tensor, ...]) -> Features:
        """Encodes words (B, T, D), word_mask (B, T), frames (B, F, D) and frame_mask (B, F)."""
        words, word_mask, frames, frame_mask = batch
        words = unit(self.words(self.dropout(words)))
        sentence = unit(self.sentence(self.dropout(words).mean(1)))
        frames = unit(self.frames(self.dropout(frames)))
        hinge = tpm_cl(
            sentence,
            words,
            frames,
            frame_mask,
            word_weights=self.word_predictor(frames, words),
            frame_weights=self.frame_predictor(sentence[:, None], frames),
            frame_weight_layer=self.frame_weight,
            matching=self.matching,
            straight_through=True,
        ).hinge
        return Features(
            sentence=sentence,
            words=words,
            word_mask=word_mask,
            frames=frames,
            frame_mask=frame_mask,
            word_logits=self.word_weight(words),
            frame_logits=self.frame_weight(frames) if self.frame_weight else None,
            margin_hinge=hinge,
        )


def plain_model(
    dtype: torch.dtype, dropout: float = 0.0, matching: Matching = "two_way"
) -> PlainModel:
    """Builds the model; the weights are equal for every dtype, up to its rounding."""
    torch.manual_seed(5)
    return PlainModel(dropout, matching).to(dtype)


def plain_batch(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns PAIRS pairs; the frames resemble the caption, so that positives can score best."""
    generator = torch.Generator().manual_seed(9)
    lengths = torch.tensor(LENGTHS)[:, None]
    theme = torch.randn(PAIRS, 1, WIDTH, generator=generator)
    words = theme + torch.randn(PAIRS, WORDS, WIDTH, generator=generator)
    frames = theme + torch.randn(PAIRS, FRAMES, WIDTH, generator=generator)
    word_mask = (torch.arange(WORDS) < lengths).long()
    frame_mask = (torch.arange(FRAMES) < lengths - 1).long()
    frame_mask[:, 0] = 1
    return words.to(dtype), word_mask, frames.to(dtype), frame_mask


def split(batch: tuple[Tensor, ...], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Splits the batch into consecutive smaller ones."""
    return list(zip(*(x.split(list(sizes)) for x in batch), strict=True))


def gradients_of(model: nn.Module) -> Gradients:
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def defined(
    loss: LossConfig, dtype: torch.dtype, matching: Matching = "two_way"
) -> tuple[float, Gradients]:
    """Computes loss and gradients in one process: naive similarity, square loss, mean hinge."""
    model, config = plain_model(dtype, matching=matching), ModelConfig(matching=matching)
    features = model(plain_batch(dtype))
    square = reference.dmae_similarity(
        features.sentence,
        features.words,
        features.frames,
        features.word_mask,
        features.frame_mask,
        interaction=config.interaction,
        matching=config.matching,
        neighbour_frames=config.neighbour_frames,
        word_logits=features.word_logits,
        frame_logits=features.frame_logits,
    )
    scale = 1 / loss.temperature
    if loss.similarity == "info_nce":
        value = losses.info_nce(
            square,
            caption_ids=CAPTION_IDS,
            mask_equal_captions=loss.mask_equal_captions is True,
            scale=scale,
        )
    elif loss.similarity == "sigmoid":
        value = losses.sigmoid_loss(square, bias=loss.sigmoid_bias, scale=scale)
    else:
        value = losses.neg_nce(
            square,
            mode=loss.neg_nce_mode,
            video_ids=VIDEO_IDS,
            caption_ids=CAPTION_IDS,
            mask_equal_captions=loss.mask_equal_captions,
            scale=scale,
            hardness=loss.hardness,
            drop_above=loss.drop_above,
        )
    value = value + loss.tpm_cl_weight * features.margin_hinge.mean()
    value.backward()
    return value.item(), gradients_of(model)


def assert_close(ours: Gradients, theirs: Gradients, *, relative: float) -> None:
    """Compares every gradient to `relative` of its own largest entry.

    The bias of a token-weight layer shifts all logits of a softmax alike. Its true gradient is 0,
    and the computed one is rounding noise, so it is compared to `relative` of the model's largest.
    """
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, expected in theirs.items():
        of_softmax_shift = name.endswith("_weight.layers.0.bias")
        bound = relative * (largest if of_softmax_shift else float(expected.abs().max()))
        difference = float((ours[name] - expected).abs().max())
        assert difference <= bound, (name, difference, bound)
