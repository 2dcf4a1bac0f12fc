"""The two CLIP towers and the heads on top: a batch in, token features out."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tvr.data_prep.records import Batch
from tvr.kernels.layers import SequenceHeader, TokenWeightLayer
from tvr.kernels.partial import LinearTokenWeights, tpm_cl
from tvr.kernels.reference import unit
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.tokenizer import Tokenizer

# CLIP's pixel statistics: part of the pretrained weights, so not a setting.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

Towers: TypeAlias = tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]


class Features(NamedTuple):
    """What the similarity and the losses need of A captions and C videos.

    Sentence, words and frames have unit length (frames: unless `unit_after_header` is off).
    """

    sentence: Tensor
    """(A, D) the end token's vector."""
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
    """CLIP per frame and per word, the method's weight layers, and the TPM-CL predictors.

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
        self.text_tower, self.image_tower = towers
        width = self.text_tower.text_projection.out_features
        image_width = self.image_tower.visual_projection.out_features
        if image_width != width:
            raise ValueError(
                f"the text tower projects to width {width}, the image tower to {image_width}: "
                "they cannot be compared"
            )
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
        for name, value in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

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
        pixels = pixels.to(self.image_tower.visual_projection.weight.dtype)
        per_frame = self.image_tower(pixel_values=pixels).image_embeds
        vectors = unit(per_frame).unflatten(0, frames.shape[:2])
        if self.sequence_header is None:
            return vectors
        vectors = self.sequence_header(vectors, frame_mask)
        return unit(vectors) if self.unit_after_header else vectors

    def _encode_text(self, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.text_tower
        out = tower.text_model(input_ids=token_ids, attention_mask=(word_mask > 0).long())
        project = tower.text_projection
        return unit(project(out.pooler_output)), unit(project(out.last_hidden_state))

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
        ValueError: if the folder is missing, or the tokeniser does not fit the text tower.
    """
    return _built(model, loss, tokenizer, num_frames, weights=True)


def _built(
    model: ModelConfig, loss: LossConfig, tokenizer: Tokenizer, num_frames: int, *, weights: bool
) -> TextVideoModel:
    if model.clip is None:
        towers = _from_scratch(model, tokenizer)
    else:
        towers = _pretrained(model.clip) if weights else _shaped(model.clip)
    text = towers[0].config
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokeniser knows {tokenizer.vocab_size} tokens, the text tower only "
            f"{text.vocab_size}: model.tokenizer does not belong to model.clip"
        )
    if tokenizer.max_words > text.max_position_embeddings:
        raise ValueError(
            f"data.max_words={tokenizer.max_words} exceeds the text tower's "
            f"{text.max_position_embeddings} positions"
        )
    built = TextVideoModel(
        towers, model, loss, num_frames=num_frames, num_words=tokenizer.max_words
    )
    return built.train()  # pretrained towers come in evaluation mode, without dropout


def build_outline(
    model: ModelConfig, loss: LossConfig, tokenizer: Tokenizer, *, num_frames: int
) -> TextVideoModel:
    """The model that `build_model` gives, on the meta device: shapes without numbers.

    Of a pretrained folder only config.json is read.

    Raises:
        ValueError: as `build_model`.
    """
    with torch.device("meta"):
        return _built(model, loss, tokenizer, num_frames, weights=False)


def tokenizer_folder(model: ModelConfig) -> str:
    """The local folder with the tokeniser.

    Raises:
        ValueError: neither `model.tokenizer` nor `model.clip` is set.
    """
    folder = model.tokenizer or model.clip
    if folder is None:
        raise ValueError("set model.tokenizer (a local folder), or model.clip to a CLIP folder")
    return folder


def image_size(model: ModelConfig) -> int:
    """Side in pixels of the frames that the image tower takes."""
    if model.clip is None:
        return model.towers.image_size
    size = CLIPVisionConfig.from_pretrained(model.clip, local_files_only=True).image_size
    if not isinstance(size, int):
        raise ValueError(f"model.clip={model.clip!r} takes images of {size}, not squares")
    return size


def parameter_groups(
    model: TextVideoModel,
    *,
    learning_rate: float,
    encoder_learning_rate: float,
    weight_decay: float,
) -> list[dict[str, object]]:
    """Four groups: towers and heads, each with and without decay; biases and norms never decay.

    `name` is "encoder" or "head", `peak` the group's highest learning rate.
    """
    exempt = {p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        owner = "encoder" if name.startswith(("text_tower.", "image_tower.")) else "head"
        # CLIP's class vector is one-dimensional like a bias, and CLIP does not decay it either.
        decays = parameter.ndim > 1 and parameter not in exempt
        groups.setdefault((owner, decays), []).append(parameter)
    peaks = {"encoder": encoder_learning_rate, "head": learning_rate}
    return [
        {
            "params": members,
            "name": owner,
            "peak": peaks[owner],
            "lr": peaks[owner],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (owner, decays), members in groups.items()
    ]


def model_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a batch that `TextVideoModel.forward` takes, on the device."""
    tensors = (batch.frames, batch.frame_mask, batch.token_ids, batch.word_mask)
    frames, frame_mask, token_ids, word_mask = (t.to(device, non_blocking=True) for t in tensors)
    return frames, frame_mask, token_ids, word_mask


def _pretrained(folder: str) -> Towers:
    return (
        _loaded(CLIPTextModelWithProjection, folder),
        _loaded(CLIPVisionModelWithProjection, folder),
    )


def _shaped(folder: str) -> Towers:
    """Towers as config.json has them, with weights at random."""
    try:
        text = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
        vision = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"model.clip={folder!r} holds no CLIP model: {error}") from None
    return CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(vision)


def _loaded(tower: Any, folder: str) -> Any:
    """A tower with every weight from the folder, in fp32 whatever it was saved in."""
    try:
        model, found = tower.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model.clip={folder!r} holds no CLIP model: {error}") from None
    # transformers starts what is missing at random and only reports it.
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"model.clip={folder!r} lacks {len(absent)} weights of a CLIP tower, {absent[0]} first"
        )
    return model


def _from_scratch(model: ModelConfig, tokenizer: Tokenizer) -> Towers:
    shape = model.towers
    common: dict[str, Any] = {
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "projection_dim": shape.embed_width,
        "hidden_act": "gelu",  # one fused operation; only OpenAI's weights need quick_gelu
    }
    text = CLIPTextConfig(
        **common,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=tokenizer.max_words,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(**common, image_size=shape.image_size, patch_size=shape.patch_size)
    return CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(vision)
