"""Text and image towers: CLIP or SigLIP from a local Hugging Face folder, or a CLIP from scratch.

          sentence                      words                        frame
CLIP      the end token, projected      every token, projected       the class token, projected
SigLIP    the last slot, by `head`      every token, by `head`       pooled by learned attention

Sentences and frames are the vectors of the family's own similarity. Words go through the same
final layer as the sentence. CLIP's text tower is causal and never attends to padding. SigLIP's
attends to all slots without a mask and was trained with all its positions filled, so padding is
part of its captions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import (
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipModel,
    SiglipProcessor,
    SiglipTextModel,
    SiglipVisionModel,
)
from transformers.models.clip import modeling_clip
from transformers.utils import logging

from tvr.trainer.config import TowersConfig
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.versions.versions import bare_tower

TAKES_WHOLE_MASK = hasattr(modeling_clip, "create_causal_mask")
"""True if the text tower of CLIP takes a mask of every pair of slots, too."""

Channels: TypeAlias = tuple[float, float, float]
Weights: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerFamily:
    """The differences between CLIP and SigLIP."""

    name: str
    """`model_type` in a folder's config.json."""
    text: Any
    """Class of the text tower."""
    image: Any
    """Class of the image tower."""
    bare: Callable[[Any], Any]
    """Built tower -> the same tower with the weights' names of transformers 5."""
    whole: Any
    """Class of the whole model, for export."""
    text_width: str
    """Name of the text configuration's field with the width of the tower's vectors."""
    image_width: str
    """Name of the image configuration's field with the width of the tower's vectors."""
    pixel_mean: Channels
    """Mean of pixels in 0 to 1; it belongs to the pretrained weights, so it is not a setting."""
    pixel_std: Channels
    """Standard deviation of pixels in 0 to 1."""
    fills_all_slots: bool
    """True if captions must fill all positions of the text tower."""
    processor: Any
    """Class of the Hugging Face processor, for export."""
    joint_settings: Callable[[Any], dict[str, Any]]
    """Text tower -> settings of `whole` beside those of its towers."""
    joined: Callable[[Weights, Weights, Tensor], Weights]
    """State dicts of text and image tower, log(1 / temperature) -> state dict of `whole`."""
    encode_text: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(tower, token_ids (A, T), word_mask (A, T)) -> sentence (A, D), words (A, T, D)."""
    encode_frames: Callable[[Any, Tensor], Tensor]
    """(tower, pixels (N, 3, H, W)) -> (N, D)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Towers:
    """A text and an image tower of one family."""

    family: TowerFamily
    text: Any
    image: Any

    @property
    def width(self) -> int:
        """Width of the vectors of both towers.

        Raises:
            ValueError: the widths differ.
        """
        text = getattr(self.text.config, self.family.text_width)
        image = getattr(self.image.config, self.family.image_width)
        if image != text:
            raise ValueError(
                f"the text tower projects to width {text}, the image tower to {image}: "
                "their vectors cannot be compared"
            )
        return text


def _clip_text(tower: Any, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    out = tower.text_model(input_ids=token_ids, attention_mask=_attention_mask(tower, word_mask))
    project = tower.text_projection
    return project(out.pooler_output), project(out.last_hidden_state)


def _attention_mask(tower: Any, word_mask: Tensor) -> Tensor:
    """The mask of CLIP's text tower: causal, and without padding.

    Given the (A, T) mask, transformers 5 asks whether there is padding at all before it builds the
    (A, 1, T, T) mask: on a GPU, each forward would wait for its queue. It takes the latter as it
    is. Older releases read nothing, and take no other than the former.
    """
    valid = word_mask > 0
    if not TAKES_WHOLE_MASK or tower.config._attn_implementation != "sdpa":
        return valid.long()
    slots = word_mask.shape[1]
    is_past = torch.ones(slots, slots, dtype=torch.bool, device=word_mask.device).tril()
    return is_past & valid[:, None, None, :]


def _siglip_text(tower: Any, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    out = tower(input_ids=token_ids)
    return out.pooler_output, tower.head(out.last_hidden_state)


def _whole_clip(text: Weights, image: Weights, log_scale: Tensor) -> Weights:
    return text | image | {"logit_scale": log_scale}


def _whole_siglip(text: Weights, image: Weights, log_scale: Tensor) -> Weights:
    named = {f"text_model.{name}": value for name, value in text.items()}
    named |= {f"vision_model.{name}": value for name, value in image.items()}
    # The bias belongs to SigLIP's sigmoid loss, which is not used here.
    return named | {"logit_scale": log_scale[None], "logit_bias": torch.zeros(1)}


CLIP = TowerFamily(
    name="clip",
    text=CLIPTextModelWithProjection,
    image=CLIPVisionModelWithProjection,
    bare=lambda tower: tower,
    whole=CLIPModel,
    text_width="projection_dim",
    image_width="projection_dim",
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
    fills_all_slots=False,
    processor=CLIPProcessor,
    joint_settings=lambda text: {"projection_dim": text.config.projection_dim},
    joined=_whole_clip,
    encode_text=_clip_text,
    encode_frames=lambda tower, pixels: tower(pixel_values=pixels).image_embeds,
)
SIGLIP = TowerFamily(
    name="siglip",
    text=SiglipTextModel,
    image=SiglipVisionModel,
    bare=bare_tower,
    whole=SiglipModel,
    text_width="projection_size",
    image_width="hidden_size",
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
    fills_all_slots=True,
    processor=SiglipProcessor,
    joint_settings=lambda text: {},
    joined=_whole_siglip,
    encode_text=_siglip_text,
    encode_frames=lambda tower, pixels: tower(pixel_values=pixels).pooler_output,
)
FAMILIES = {family.name: family for family in (CLIP, SIGLIP)}


def family_of(folder: str) -> TowerFamily:
    """Reads from config.json which family a Hugging Face folder holds.

    Raises:
        ValueError: the folder has no config.json, or holds another kind of model.
    """
    try:
        kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model.pretrained={folder!r} holds no config.json of a CLIP or SigLIP: {error}"
        ) from None
    if kind not in FAMILIES:
        raise ValueError(
            f"model.pretrained={folder!r} holds a model of type {kind!r}; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def pretrained_width(folder: str) -> int:
    """Returns the width of the text tower's vectors, without loading weights."""
    family = family_of(folder)
    config = family.text.config_class.from_pretrained(folder, local_files_only=True)
    width = getattr(config, family.text_width)
    if not isinstance(width, int):
        raise ValueError(f"model.pretrained={folder!r}: its config.json has no {family.text_width}")
    return width


def pretrained_image_size(folder: str) -> int:
    """Returns the side, in pixels, of the square frames that the image tower takes."""
    config = family_of(folder).image.config_class.from_pretrained(folder, local_files_only=True)
    if not isinstance(config.image_size, int):
        raise ValueError(
            f"model.pretrained={folder!r} takes images of {config.image_size}, not squares"
        )
    return config.image_size


def pretrained_towers(folder: str, *, weights: bool = True) -> Towers:
    """Loads both towers of a local folder in fp32, whatever precision they were saved in.

    Args:
        weights: If False, only config.json is read, and the weights are random.

    Raises:
        ValueError: the folder holds no CLIP or SigLIP, or lacks some of its weights.
    """
    family, load = family_of(folder), _load_tower if weights else _random_tower
    text, image = (family.bare(load(tower, folder)) for tower in (family.text, family.image))
    return Towers(family=family, text=text, image=image)


def random_towers(shape: TowersConfig, tokenizer: Tokenizer) -> Towers:
    """Builds the towers of a CLIP from scratch; the weights follow torch's global seed."""
    common: dict[str, Any] = {
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "projection_dim": shape.embed_width,
        "hidden_act": "gelu",  # a single fused operation; only OpenAI's weights need quick_gelu
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
    return Towers(
        family=CLIP,
        text=CLIPTextModelWithProjection(text),
        image=CLIPVisionModelWithProjection(vision),
    )


def check_tokenizer(towers: Towers, tokenizer: Tokenizer) -> None:
    """Checks that the tokeniser fits the text tower.

    Raises:
        ValueError: the vocabulary is larger than the tower's, or `data.max_words` does not fit its
            positions.
    """
    text, slots = towers.text.config, tokenizer.max_words
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens, the text tower only "
            f"{text.vocab_size}: model.tokenizer does not belong to model.pretrained"
        )
    if slots > text.max_position_embeddings:
        raise ValueError(
            f"data.max_words={slots} exceeds the text tower's "
            f"{text.max_position_embeddings} positions"
        )
    if towers.family.fills_all_slots and slots < text.max_position_embeddings:
        raise ValueError(
            f"data.max_words={slots} must be {text.max_position_embeddings}: "
            f"{towers.family.name} takes a caption's vector from its last position"
        )


def _load_tower(tower: Any, folder: str) -> Any:
    try:
        with _quiet_transformers():
            model, found = tower.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model.pretrained={folder!r} holds no whole model: {error}") from None
    # transformers initialises missing weights at random and only reports them.
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"model.pretrained={folder!r} lacks {len(absent)} weights of a tower, such as "
            f"{absent[0]}"
        )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers: it lists the other tower's weights as unexpected, and draws bars."""
    before, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bars:
            logging.enable_progress_bar()


def _random_tower(tower: Any, folder: str) -> Any:
    return tower(tower.config_class.from_pretrained(folder, local_files_only=True))
