"""CLIP: from a local Hugging Face folder, or from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip import modeling_clip

from tvr.trainer.config import TowersConfig
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.model.towers import (
    TowerFamily,
    Towers,
    cell_means,
    equal_widths,
    load_tower,
    random_tower,
    whole_model,
)

TAKES_WHOLE_MASK = hasattr(modeling_clip, "create_causal_mask")
"""True if the text tower of CLIP takes a mask of every pair of slots, too."""


def clip_text(tower: Any, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The end token and all tokens, projected."""
    out = tower.text_model(input_ids=token_ids, attention_mask=attention_mask(tower, word_mask))
    project = tower.text_projection
    return project(out.pooler_output), project(out.last_hidden_state)


def attention_mask(tower: Any, word_mask: Tensor) -> Tensor:
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


def _whole(towers: Towers, log_scale: Tensor) -> CLIPModel:
    text, image = towers.text, towers.image
    config = CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config=image.config.to_dict(),
        projection_dim=text.config.projection_dim,
    )
    weights = text.state_dict() | image.state_dict() | {"logit_scale": log_scale}
    return whole_model(CLIPModel, config, weights)


def _cells(tower: Any, pixels: Tensor, side: int) -> Tensor:
    """The mean patch of each cell, through the layers that end the class token."""
    vision = tower.vision_model
    patches = vision(pixel_values=pixels).last_hidden_state[:, 1:]
    return tower.visual_projection(cell_means(vision.post_layernorm(patches), side))


CLIP = TowerFamily(
    name="clip",
    whole=CLIPModel,
    processor=CLIPProcessor,
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
    fills_all_slots=False,
    positions=lambda config: config.max_position_embeddings,
    encode_text=clip_text,
    encode_frames=lambda tower, pixels: tower(pixel_values=pixels).image_embeds,
    encode_cells=_cells,
    joined=_whole,
)


def clip_towers(folder: str, *, weights: bool) -> Towers:
    """Both towers of a folder with a CLIP; `weights` as `pretrained_towers`."""
    text, image = (
        load_tower(tower, folder, setting="model.pretrained")
        if weights
        else random_tower(tower, folder)
        for tower in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection)
    )
    return joined_clip(text, image)


def joined_clip(text: Any, image: Any) -> Towers:
    """CLIP's towers as one model.

    Raises:
        ValueError: they project to different widths.
    """
    width = equal_widths(text.config.projection_dim, image.config.projection_dim)
    return Towers(family=CLIP, text=text, image=image, width=width)


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
    return joined_clip(CLIPTextModelWithProjection(text), CLIPVisionModelWithProjection(vision))
