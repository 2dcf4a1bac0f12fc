"""The two towers: CLIP's or SigLIP's from a local Hugging Face folder, or a CLIP's from scratch.

          sentence                      words                        frame
CLIP      the end token, projected      every token, projected       the class token, projected
SigLIP    the last slot, by `head`      every token, by `head`       pooled by learned attention

Each is what the family's own similarity is taken of; words go through the layer that its sentence
goes through. CLIP's text tower is causal and never looks at padding. SigLIP's looks at all slots,
was trained with as many as it has positions, and knows no mask: padding is part of its captions.
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
from transformers.utils import logging

from tvr.trainer.config import TowersConfig
from tvr.trainer.model.tokenizer import Tokenizer

Channels: TypeAlias = tuple[float, float, float]
Weights: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What differs between kinds of towers."""

    name: str
    """As `model_type` in a folder's config.json."""
    text: Any
    """Class of the text tower, and so on."""
    image: Any
    whole: Any
    text_width: str
    """Names of the settings that hold the width of what a tower gives."""
    image_width: str
    pixel_mean: Channels
    """Statistics of pixels in 0 to 1; part of the pretrained weights, so not a setting."""
    pixel_std: Channels
    fills_all_slots: bool
    """Whether captions must have as many slots as the text tower has positions."""
    processor: Any
    joint_settings: Callable[[Any], dict[str, Any]]
    """What `whole`'s configuration holds beside those of the towers, from the text tower."""
    joined: Callable[[Weights, Weights, Tensor], Weights]
    """State dicts of text and image tower and log(1 / temperature) -> that of `whole`."""
    encode_text: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(tower, token_ids (A, T), word_mask (A, T)) -> sentence (A, D), words (A, T, D)."""
    encode_frames: Callable[[Any, Tensor], Tensor]
    """(tower, pixels (N, 3, H, W)) -> (N, D)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Towers:
    """Two towers that belong together."""

    family: Family
    text: Any
    image: Any

    @property
    def width(self) -> int:
        """Of both towers' vectors.

        Raises:
            ValueError: they differ.
        """
        text = getattr(self.text.config, self.family.text_width)
        image = getattr(self.image.config, self.family.image_width)
        if image != text:
            raise ValueError(
                f"the text tower projects to width {text}, the image tower to {image}: "
                "they cannot be compared"
            )
        return text


def _clip_text(tower: Any, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    out = tower.text_model(input_ids=token_ids, attention_mask=(word_mask > 0).long())
    project = tower.text_projection
    return project(out.pooler_output), project(out.last_hidden_state)


def _siglip_text(tower: Any, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    out = tower(input_ids=token_ids)
    return out.pooler_output, tower.head(out.last_hidden_state)


def _whole_clip(text: Weights, image: Weights, log_scale: Tensor) -> Weights:
    return text | image | {"logit_scale": log_scale}


def _whole_siglip(text: Weights, image: Weights, log_scale: Tensor) -> Weights:
    named = {f"text_model.{name}": value for name, value in text.items()}
    named |= {f"vision_model.{name}": value for name, value in image.items()}
    # The bias belongs to the sigmoid loss, which the towers are not trained by here.
    return named | {"logit_scale": log_scale[None], "logit_bias": torch.zeros(1)}


CLIP = Family(
    name="clip",
    text=CLIPTextModelWithProjection,
    image=CLIPVisionModelWithProjection,
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
SIGLIP = Family(
    name="siglip",
    text=SiglipTextModel,
    image=SiglipVisionModel,
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


def family_of(folder: str) -> Family:
    """The family of a Hugging Face folder.

    Raises:
        ValueError: it is no such folder, or of another family.
    """
    try:
        kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model.pretrained={folder!r} holds no config.json of a CLIP or SigLIP: {error}"
        ) from None
    if kind not in FAMILIES:
        raise ValueError(
            f"model.pretrained={folder!r} holds a model of type {kind!r}; known are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def pretrained_width(folder: str) -> int:
    """Width of the text tower's vectors, without loading its weights."""
    family = family_of(folder)
    config = family.text.config_class.from_pretrained(folder, local_files_only=True)
    width = getattr(config, family.text_width)
    if not isinstance(width, int):
        raise ValueError(
            f"model.pretrained={folder!r}: its config.json tells no {family.text_width}"
        )
    return width


def pretrained_image_size(folder: str) -> int:
    """Side in pixels of the frames that the image tower takes."""
    config = family_of(folder).image.config_class.from_pretrained(folder, local_files_only=True)
    if not isinstance(config.image_size, int):
        raise ValueError(
            f"model.pretrained={folder!r} takes images of {config.image_size}, not squares"
        )
    return config.image_size


def pretrained_towers(folder: str, *, weights: bool = True) -> Towers:
    """Both towers of a local folder, in fp32 whatever they were saved in; without `weights` only
    its config.json is read, and they start at random.

    Raises:
        ValueError: the folder holds no CLIP or SigLIP, or not all of its weights.
    """
    family, load = family_of(folder), _loaded if weights else _shaped
    return Towers(family=family, text=load(family.text, folder), image=load(family.image, folder))


def random_towers(shape: TowersConfig, tokenizer: Tokenizer) -> Towers:
    """A CLIP's towers from scratch, for the tokeniser; weights follow torch's global seed."""
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
    return Towers(
        family=CLIP,
        text=CLIPTextModelWithProjection(text),
        image=CLIPVisionModelWithProjection(vision),
    )


def check_tokenizer(towers: Towers, tokenizer: Tokenizer) -> None:
    """Holds the tokeniser against the text tower.

    Raises:
        ValueError: it knows more tokens, or `data.max_words` does not fit the positions.
    """
    text, slots = towers.text.config, tokenizer.max_words
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokeniser knows {tokenizer.vocab_size} tokens, the text tower only "
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
            f"{towers.family.name}'s sentence is what stands in the last slot that it has"
        )


def _loaded(tower: Any, folder: str) -> Any:
    try:
        with _without_report():
            model, found = tower.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"model.pretrained={folder!r} holds no whole model: {error}") from None
    # transformers starts what is missing at random and only reports it.
    absent = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"model.pretrained={folder!r} lacks {len(absent)} weights of a tower, {absent[0]} first"
        )
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers would list the other tower's weights as unexpected, every time."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _shaped(tower: Any, folder: str) -> Any:
    return tower(tower.config_class.from_pretrained(folder, local_files_only=True))
