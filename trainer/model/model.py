"""The model: two towers and the heads on top, from a batch to token features.

The door of the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tvr.data_prep.records import Batch
from tvr.kernels.numerics import unit
from tvr.kernels.partial import LinearTokenWeights, tpm_cl
from tvr.kernels.weight_layers import SequenceHeader, TokenWeightLayer
from tvr.trainer.config import LossConfig, ModelConfig
from tvr.trainer.model.features import Features, in_whole_tiles, projected
from tvr.trainer.model.parameter_groups import add_adapters, freeze
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.model.tower_depth import checkpoint_activations as checkpoint_activations
from tvr.trainer.model.tower_folders import build_towers
from tvr.trainer.model.tower_folders import image_size as image_size
from tvr.trainer.model.tower_folders import tokenizer_folder as tokenizer_folder
from tvr.trainer.model.towers import Towers, check_tokenizer


class TextVideoModel(nn.Module):
    """Text and image tower, the method's token-weight layers, and the TPM-CL predictors.

    `num_frames` and `num_words` are fixed, because the predictors mix along these dimensions.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    has_frozen_towers: bool = False
    """True if no weight of either tower is trained: the outputs of the towers are constants."""

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
        self.text_projection = towers.text_projection
        self.visual_projection = towers.visual_projection
        self.width = width = towers.width
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
        self.tokens_per_frame = model.tokens_per_frame
        self.family.check_cells(self.image_tower, self.tokens_per_frame)
        slots = num_frames * self.tokens_per_frame
        weighted = model.interaction.endswith("wti")
        self.text_weight = TokenWeightLayer(width, model.weight_layers) if weighted else None
        self.matching = model.matching
        # Without a way from frames to words, nothing would read the weights of frames.
        weighted = weighted and model.matching == "two_way"
        self.frame_weight = TokenWeightLayer(width, model.weight_layers) if weighted else None
        partial = bool(loss.tpm_cl)
        self.word_predictor = LinearTokenWeights(slots, num_words, width) if partial else None
        self.frame_predictor = LinearTokenWeights(1, slots, width) if partial else None
        for name in ("pixel_mean", "pixel_std"):
            value = torch.tensor(getattr(self.family, name)).view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @property
    def towers(self) -> Towers:
        """Both towers with their projections, if there are any."""
        return Towers(
            family=self.family,
            text=self.text_tower,
            image=self.image_tower,
            width=self.width,
            text_projection=self.text_projection,
            visual_projection=self.visual_projection,
        )

    def forward(
        self, frames: Tensor, frame_mask: Tensor, token_ids: Tensor, word_mask: Tensor
    ) -> Features:
        """Encodes C videos and A captions.

        In training, caption i must belong to video i: the forward then computes TPM-CL, too. That
        loss has parameters, which ZeRO-3 gathers only while the module that owns them runs. The
        loss over the global batch has none, and is computed outside.

        Args:
            frames: (C, F, 3, H, W) uint8, or the stored vectors of `tower_outputs`, (C, F, D).
            frame_mask: (C, F), 0 = padding.
            token_ids: (A, T), or the stored sentence and words of `tower_outputs`, (A, 1 + T, D).
            word_mask: (A, T), 0 = padding, 1, or 2 = content word.
        """
        frames, frame_mask = self._encode_frames(frames, frame_mask)
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

    def encode_texts(self, token_ids: Tensor, word_mask: Tensor) -> Features:
        """Encodes captions alone, as `forward` in evaluation: a record without videos."""
        sentence, words = self._encode_text(token_ids, word_mask)
        weigh, weighs_frames = self.text_weight, self.frame_weight is not None
        return Features(
            sentence=sentence,
            words=words,
            word_mask=word_mask,
            frames=sentence.new_zeros(0, 1, sentence.shape[1]),
            frame_mask=word_mask.new_zeros(0, 1),
            word_logits=weigh(words) if weigh else None,
            frame_logits=sentence.new_zeros(0, 1) if weighs_frames else None,
            margin_hinge=None,
        )

    def encode_videos(self, frames: Tensor, frame_mask: Tensor) -> Features:
        """Encodes videos alone, as `forward` in evaluation: a record without captions."""
        vectors, frame_mask = self._encode_frames(frames, frame_mask)
        weigh, weighs_words = self.frame_weight, self.text_weight is not None
        return Features(
            sentence=vectors.new_zeros(0, vectors.shape[-1]),
            words=vectors.new_zeros(0, 1, vectors.shape[-1]),
            word_mask=frame_mask.new_zeros(0, 1),
            frames=vectors,
            frame_mask=frame_mask,
            word_logits=vectors.new_zeros(0, 1) if weighs_words else None,
            frame_logits=weigh(vectors) if weigh else None,
            margin_hinge=None,
        )

    def tower_outputs(
        self, frames: Tensor, token_ids: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the towers alone: no unit length, no heads.

        Returns:
            Vectors of the frames (C, F, D), the sentences (A, D) and the words (A, T, D).
        """
        return self._frame_outputs(frames), *self._text_outputs(token_ids, word_mask)

    def train(self, mode: bool = True) -> TextVideoModel:
        """Sets training mode; batch norms of a tower keep the statistics that they came with.

        Statistics of a batch would depend on the number of ranks, and of the gradient cache. Frozen
        towers stay in evaluation mode: dropout would make other outputs at each visit.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        if self.has_frozen_towers:
            self.text_tower.eval()
            self.image_tower.eval()
        return self

    def _frame_outputs(self, frames: Tensor) -> Tensor:
        """Vectors of the image tower, (C, F, D), or those that are stored already."""
        if frames.is_floating_point():
            return frames
        pixels = frames.flatten(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        pixels = (pixels / 255 - self.pixel_mean) / self.pixel_std
        pixels = pixels.to(next(self.image_tower.parameters(), pixels).dtype)
        count = len(pixels)
        if self.has_frozen_towers:
            pixels = in_whole_tiles(pixels)
        vectors = self.family.encode_slots(self.image_tower, pixels, self.tokens_per_frame)
        vectors = vectors[: count * self.tokens_per_frame]
        return vectors.unflatten(0, (len(frames), -1))

    def frame_vectors(self, frames: Tensor) -> Tensor:
        """Frames (C, F, D), before they are scaled to unit length."""
        return projected(self._frame_outputs(frames), self.visual_projection)

    def _encode_frames(self, frames: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and mask of F slots, or of F x `tokens_per_frame`."""
        mask = frame_mask.repeat_interleave(self.tokens_per_frame, dim=1)
        vectors = unit(self.frame_vectors(frames))
        if self.sequence_header is None:
            return vectors, mask
        vectors = self.sequence_header(vectors, mask)
        return (unit(vectors) if self.unit_after_header else vectors), mask

    def _encode_text(self, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        sentence, words = self.text_vectors(token_ids, word_mask)
        return unit(sentence), unit(words)

    def text_vectors(self, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Sentence (A, D) and words (A, T, D), before they are scaled to unit length."""
        sentence, words = self._text_outputs(token_ids, word_mask)
        return projected(sentence, self.text_projection), projected(words, self.text_projection)

    def _text_outputs(self, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of the text tower, (A, D) and (A, T, D), or those that are stored already."""
        if token_ids.is_floating_point():
            return token_ids[:, 0], token_ids[:, 1:]
        count = len(token_ids)
        if self.has_frozen_towers:
            token_ids, word_mask = in_whole_tiles(token_ids), in_whole_tiles(word_mask)
        sentence, words = self.family.encode_text(self.text_tower, token_ids, word_mask)
        return sentence[:count], words[:count]

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
            matching=self.matching,
            kind=self.loss.tpm_cl,
            threshold=self.loss.mask_threshold,
            margin=self.loss.margin,
            straight_through=self.loss.straight_through,
            normalise_partial=self.loss.normalise_partial,
            # Checked on the host, where batches are made: each of their rows has a frame.
            check_mask=False,
        ).hinge


def build_model(
    model: ModelConfig,
    loss: LossConfig,
    tokenizer: Tokenizer,
    *,
    num_frames: int,
    initialise: Callable[[TextVideoModel], None] | None = None,
) -> TextVideoModel:
    """Builds the model from a local folder or from scratch; new weights follow torch's global seed.

    Args:
        initialise: Called with the model before layers are frozen or adapted; may set its weights.

    Raises:
        ValueError: the folder holds no model, the tokeniser does not fit the text tower, or
            `model.freeze` or `model.lora_rank` cannot be applied.
    """
    return _build(model, loss, tokenizer, num_frames, weights=True, initialise=initialise)


def _build(
    model: ModelConfig,
    loss: LossConfig,
    tokenizer: Tokenizer,
    num_frames: int,
    *,
    weights: bool,
    initialise: Callable[[TextVideoModel], None] | None = None,
) -> TextVideoModel:
    towers = build_towers(model, tokenizer, weights=weights)
    check_tokenizer(towers, tokenizer)
    built = TextVideoModel(
        towers, model, loss, num_frames=num_frames, num_words=tokenizer.max_words
    )
    if initialise is not None:
        initialise(built)
    built.has_frozen_towers = model.freeze == "both"
    sides = {"text": built.text_tower, "image": built.image_tower}
    if not model.lora_rank:
        freeze(sides, model.freeze)
    elif model.freeze:
        raise ValueError(
            f"model.freeze={model.freeze!r} cannot be combined with model.lora_rank="
            f"{model.lora_rank}, which freezes both towers"
        )
    else:
        add_adapters(sides, model.lora_rank)
    return built.train()  # transformers loads pretrained towers in evaluation mode


def build_meta_model(
    model: ModelConfig, loss: LossConfig, tokenizer: Tokenizer, *, num_frames: int
) -> TextVideoModel:
    """Builds the model of `build_model` on the meta device: shapes without values.

    It reads only config.json of a pretrained folder.

    Raises:
        ValueError: as `build_model`.
    """
    with torch.device("meta"):
        return _build(model, loss, tokenizer, num_frames, weights=False)


def build_empty_model(
    model: ModelConfig, loss: LossConfig, tokenizer: Tokenizer, *, num_frames: int
) -> TextVideoModel:
    """Builds the model of `build_model` with no memory for its parameters, whose values are 0.

    Each parameter has its shape, and one number that all its entries share.

    Raises:
        ValueError: as `build_model`.
    """
    built = build_meta_model(model, loss, tokenizer, num_frames=num_frames)
    for module in built.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return built


def host_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `TextVideoModel.forward`, in host memory."""
    return batch.frames, batch.frame_mask, batch.token_ids, batch.word_mask


def model_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moves the arguments of `TextVideoModel.forward` to the device; see also `BatchCopies`."""
    frames, frame_mask, token_ids, word_mask = (x.to(device) for x in host_inputs(batch))
    return frames, frame_mask, token_ids, word_mask
