"""The two towers and the heads on top: a batch in, token features out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvr.data_prep.records import Batch
from tvr.kernels.numerics import unit
from tvr.kernels.partial import LinearTokenWeights, tpm_cl
from tvr.kernels.weight_layers import SequenceHeader, TokenWeightLayer
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.model.parameter_groups import add_adapters, freeze
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.model.towers import (
    Towers,
    check_tokenizer,
    pretrained_image_size,
    pretrained_towers,
    random_towers,
)


class Features(NamedTuple):
    """What the similarity and the losses need of A captions and C videos.

    Sentence, words and frames have unit length (frames: unless `unit_after_header` is off).
    """

    sentence: Tensor
    """(A, D) the vector that the text tower gives a whole caption, CLIP's the end token's."""
    words: Tensor
    """(A, T, D) contextual word vectors."""
    word_mask: Tensor
    """(A, T) 0 = padding."""
    frames: Tensor
    """(C, F, D)."""
    frame_mask: Tensor
    """(C, F) 0 = padding."""
    word_logits: Tensor | None
    """(A, T) before the masked softmax; none in the ti family."""
    frame_logits: Tensor | None
    """(C, F)."""
    margin_hinge: Tensor | None
    """(B,) TPM-CL of each matched pair; none in evaluation or where it is off."""


class TextVideoModel(nn.Module):
    """A tower per frame and per word, the method's weight layers, and the TPM-CL predictors.

    `num_frames` and `num_words` are fixed, since the predictors mix along the slots.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        towers: Towers,
        model: ModelConfig,
        loss: LossConfig,
        *,
        num_frames: int,
        num_words: int,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.family = towers.family
        self.text_tower, self.image_tower = towers.text, towers.image
        width = towers.width
        self.sequence_header = (
            SequenceHeader(
                width,
                num_layers=model.sequence_header_layers,
                num_positions=max(77, num_frames),
            )
            if model.sequence_header_layers
            else None
        )
        self.unit_after_header = model.unit_after_header
        weighted = model.interaction.endswith("wti")
        self.text_weight = TokenWeightLayer(width, model.weight_layers) if weighted else None
        self.frame_weight = TokenWeightLayer(width, model.weight_layers) if weighted else None
        partial = bool(loss.tpm_cl)
        self.word_predictor = LinearTokenWeights(num_frames, num_words, width) if partial else None
        self.frame_predictor = LinearTokenWeights(1, num_frames, width) if partial else None
        for name in ("pixel_mean", "pixel_std"):
            value = torch.tensor(getattr(self.family, name)).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, frames: Tensor, frame_mask: Tensor, token_ids: Tensor, word_mask: Tensor
    ) -> Features:
        """Encodes C videos, frames (C, F, 3, H, W) uint8, and A captions, token_ids (A, T).

        The TPM-CL hinge is computed in training only, where caption i belongs to video i. It is
        inside the forward, because ZeRO-3 holds parameters only while the module that owns them
        runs; the loss over the global batch, which has no parameters, is outside.
        """
        frames = self._encode_frames(frames, frame_mask)
        sentence, words = self._encode_text(token_ids, word_mask)
        weigh_words, weigh_frames = self.text_weight, self.frame_weight
        return Features(
            sentence=sentence,
            words=words,
            word_mask=word_mask,
            frames=frames,
            frame_mask=frame_mask,
            word_logits=weigh_words(words) if weigh_words else None,
            frame_logits=weigh_frames(frames) if weigh_frames else None,
            margin_hinge=self._margins(sentence, words, word_mask, frames, frame_mask),
        )

    def _encode_frames(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        pixels = frames.flatten(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        pixels = (pixels / 255 - self.pixel_mean) / self.pixel_std
        pixels = pixels.to(self.image_tower.dtype)
        per_frame = self.family.encode_frames(self.image_tower, pixels)
        vectors = unit(per_frame).unflatten(0, frames.shape[:2])
        if self.sequence_header is None:
            return vectors
        vectors = self.sequence_header(vectors, frame_mask)
        return unit(vectors) if self.unit_after_header else vectors

    def _encode_text(self, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        sentence, words = self.family.encode_text(self.text_tower, token_ids, word_mask)
        return unit(sentence), unit(words)

    def _margins(
        self, sentence: Tensor, words: Tensor, word_mask: Tensor, frames: Tensor, frame_mask: Tensor
    ) -> Tensor | None:
        if not self.training or not self.word_predictor or not self.frame_predictor:
            return None
        mask_padding = self.loss.mask_padding_weights
        return tpm_cl(
            sentence,
            words,
            frames,
            frame_mask,
            word_weights=self.word_predictor(frames, words, word_mask if mask_padding else None),
            frame_weights=self.frame_predictor(
                sentence[:, None], frames, frame_mask if mask_padding else None
            ),
            frame_weight_layer=self.frame_weight,
            kind=self.loss.tpm_cl,
            threshold=self.loss.mask_threshold,
            margin=self.loss.margin,
            straight_through=self.loss.straight_through,
            normalise_partial=self.loss.normalise_partial,
        ).hinge


def build_model(
    model: ModelConfig, loss: LossConfig, tokenizer: Tokenizer, *, num_frames: int
) -> TextVideoModel:
    """Builds the model from a local folder or from scratch; weights follow torch's global seed.

    Raises:
        ValueError: the folder holds no model, the tokeniser does not fit the text tower, or what
            is to be frozen or adapted cannot be.
    """
    return _built(model, loss, tokenizer, num_frames, weights=True)


def _built(
    model: ModelConfig, loss: LossConfig, tokenizer: Tokenizer, num_frames: int, *, weights: bool
) -> TextVideoModel:
    if model.pretrained is None:
        towers = random_towers(model.towers, tokenizer)
    else:
        towers = pretrained_towers(model.pretrained, weights=weights)
    check_tokenizer(towers, tokenizer)
    built = TextVideoModel(
        towers, model, loss, num_frames=num_frames, num_words=tokenizer.max_words
    )
    sides = {"text": built.text_tower, "image": built.image_tower}
    if not model.lora_rank:
        freeze(sides, model.freeze)
    elif model.freeze:
        raise ValueError(
            f"model.freeze={model.freeze!r} goes without model.lora_rank={model.lora_rank}, which "
            "freezes both towers whole"
        )
    else:
        add_adapters(sides, model.lora_rank)
    return built.train()  # pretrained towers come in evaluation mode, without dropout


def build_meta_model(
    model: ModelConfig, loss: LossConfig, tokenizer: Tokenizer, *, num_frames: int
) -> TextVideoModel:
    """The model that `build_model` gives, on the meta device: shapes without numbers.

    Of a pretrained folder only config.json is read.

    Raises:
        ValueError: as `build_model`.
    """
    with torch.device("meta"):
        return _built(model, loss, tokenizer, num_frames, weights=False)


def checkpoint_activations(model: TextVideoModel) -> None:
    """Keeps the inputs of the towers' layers alone for the backward, which runs them again."""
    for tower in (model.text_tower, model.image_tower):
        tower.activation_checkpointing_enable({"use_reentrant": False})


def tokenizer_folder(model: ModelConfig) -> str:
    """The local folder with the tokeniser.

    Raises:
        ValueError: neither `model.tokenizer` nor `model.pretrained` is set.
    """
    folder = model.tokenizer or model.pretrained
    if folder is None:
        raise ValueError(
            "set model.tokenizer to a local folder, or model.pretrained to one that has it"
        )
    return folder


def image_size(model: ModelConfig) -> int:
    """Side in pixels of the frames that the image tower takes."""
    if model.pretrained is None:
        return model.towers.image_size
    return pretrained_image_size(model.pretrained)


def model_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a batch that `TextVideoModel.forward` takes, on the device."""
    tensors = (batch.frames, batch.frame_mask, batch.token_ids, batch.word_mask)
    frames, frame_mask, token_ids, word_mask = (t.to(device, non_blocking=True) for t in tensors)
    return frames, frame_mask, token_ids, word_mask
