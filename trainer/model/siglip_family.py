"""SigLIP, and SigLIP 2 for frames of one size, from a local Hugging Face folder.

SigLIP 2 is published as the same architecture with Gemma's vocabulary, so its `model_type` is
`siglip`, too. Its captions must be in lower case, which tokenizer.py sees to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTextModel,
    SiglipVisionModel,
)

from tvr.trainer.model.towers import (
    TowerFamily,
    Towers,
    cell_patches,
    equal_widths,
    load_tower,
    random_tower,
    whole_model,
)
from tvr.trainer.versions.versions import bare_tower


def _text(tower: Any, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    out = tower(input_ids=token_ids)
    return out.pooler_output, tower.head(out.last_hidden_state)


def _whole(towers: Towers, log_scale: Tensor) -> SiglipModel:
    text, image = towers.text, towers.image
    config = SiglipConfig(text_config=text.config.to_dict(), vision_config=image.config.to_dict())
    weights = {f"text_model.{name}": value for name, value in text.state_dict().items()}
    weights |= {f"vision_model.{name}": value for name, value in image.state_dict().items()}
    # The bias belongs to SigLIP's sigmoid loss, which is not used here.
    weights |= {"logit_scale": log_scale[None], "logit_bias": torch.zeros(1)}
    return whole_model(SiglipModel, config, weights)


def _cells(tower: Any, pixels: Tensor, side: int) -> Tensor:
    """The patches of each cell, pooled as those of a whole frame."""
    own = cell_patches(tower(pixel_values=pixels).last_hidden_state, side)
    return tower.head(own.flatten(0, 1)).unflatten(0, own.shape[:2])


SIGLIP = TowerFamily(
    name="siglip",
    whole=SiglipModel,
    processor=SiglipProcessor,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
    fills_all_slots=True,
    positions=lambda config: config.max_position_embeddings,
    encode_text=_text,
    encode_frames=lambda tower, pixels: tower(pixel_values=pixels).pooler_output,
    encode_cells=_cells,
    needs_equal_cells=True,
    joined=_whole,
    # Trained without an attention mask, so it is called without one.
    text_code='model.get_text_features(input_ids=texts["input_ids"]).pooler_output',
)


def siglip_towers(folder: str, *, weights: bool) -> Towers:
    """Both towers of a folder with a SigLIP; `weights` as `pretrained_towers`."""
    text, image = (
        bare_tower(
            load_tower(tower, folder, setting="model.pretrained")
            if weights
            else random_tower(tower, folder)
        )
        for tower in (SiglipTextModel, SiglipVisionModel)
    )
    width = equal_widths(text.config.projection_size, image.config.hidden_size)
    return Towers(family=SIGLIP, text=text, image=image, width=width)
