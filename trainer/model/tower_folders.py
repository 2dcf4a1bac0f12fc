"""Loads the towers that the settings name: a pretrained pair, two single encoders, or new ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import CLIPTextConfig, CLIPVisionConfig, SiglipTextConfig, SiglipVisionConfig

from tvr.trainer.config import ModelConfig
from tvr.trainer.model.clip_family import clip_towers, random_towers
from tvr.trainer.model.dual_encoder import (
    DUAL_ENCODER,
    dual_encoder_config,
    dual_encoder_pixels,
    dual_encoder_towers,
    pair_pixels,
    pair_towers,
    text_encoder,
)
from tvr.trainer.model.encoder_kinds import usable_positions
from tvr.trainer.model.features import IMPORTED, imported_towers
from tvr.trainer.model.pe_core_family import CONFIG as OPEN_CLIP_CONFIG
from tvr.trainer.model.pe_core_family import PE_CORE, pe_core_folder, pe_core_towers
from tvr.trainer.model.siglip_family import siglip_towers
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.model.towers import Towers

MOST_WORDS = 77
LOADERS: dict[str, Callable[..., Towers]] = {
    "clip": clip_towers,
    "siglip": siglip_towers,
    DUAL_ENCODER: dual_encoder_towers,
    PE_CORE: pe_core_towers,
}


def build_towers(model: ModelConfig, tokenizer: Tokenizer, *, weights: bool) -> Towers:
    """Builds the towers of `model.pretrained`, of `model.text_tower` and `model.vision_tower`, or
    from scratch.

    Raises:
        ValueError: a folder holds no supported model, or lacks some of its weights.
    """
    if model.text_tower is not None and model.vision_tower is not None:
        width = model.towers.embed_width
        return pair_towers(model.text_tower, model.vision_tower, width, weights=weights)
    if model.pretrained is None:
        return random_towers(model.towers, tokenizer)
    if has_imported(model):
        return imported_towers(model.pretrained, model.towers.embed_width)
    return pretrained_towers(model.pretrained, weights=weights)


def family_of(folder: str) -> str:
    """Reads from config.json, or open_clip_config.json, which family a folder holds.

    Raises:
        ValueError: the folder has neither file, or holds another kind of model.
    """
    is_open_clip = (Path(folder) / OPEN_CLIP_CONFIG).is_file()
    try:
        kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    except (OSError, json.JSONDecodeError) as error:
        if is_open_clip:
            return PE_CORE
        raise ValueError(
            f"model.pretrained={folder!r} holds no config.json of a supported model: {error}"
        ) from None
    # LAION's folders hold a CLIP in both forms; they are read from config.json.
    if is_open_clip and kind not in (*LOADERS, IMPORTED, "siglip2"):
        return PE_CORE
    if kind == "siglip2":
        raise ValueError(
            f"model.pretrained={folder!r} is a SigLIP 2 of the NaFlex form, which takes patches of"
            " images of any size; give one for frames of one size, such as"
            " google/siglip2-base-patch16-224, whose model_type is siglip"
        )
    if kind not in LOADERS and kind != IMPORTED:
        raise ValueError(
            f"model.pretrained={folder!r} holds a model of type {kind!r}; supported are "
            f"{', '.join(LOADERS)}"
        )
    return kind


def pretrained_towers(folder: str, *, weights: bool = True) -> Towers:
    """Loads both towers of a local folder in fp32, whatever precision they were saved in.

    Args:
        weights: If False, only config.json is read, and the weights are random.

    Raises:
        ValueError: the folder holds no supported model, or lacks some of its weights.
    """
    family = family_of(folder)
    if family == IMPORTED:
        raise ValueError(f"{folder} holds imported features, and no model; give a run, or towers")
    return LOADERS[family](folder, weights=weights)


def has_imported(model: ModelConfig) -> bool:
    """True if `model.pretrained` is a folder of `tvr import-features`, which has no towers."""
    return model.pretrained is not None and family_of(model.pretrained) == IMPORTED


def load_text_encoder(
    folder: str,
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], int]:
    """Loads the text tower of a pretrained pair, or a single text encoder.

    Returns:
        (token_ids (A, T), word_mask (A, T)) -> sentence (A, W), words (A, T, W), without a
        projection that would be trained; and the most tokens that it takes.

    Raises:
        ValueError: the folder holds no supported encoder, or lacks some of its weights.
    """
    path = Path(folder) / "config.json"
    kind = json.loads(path.read_text()).get("model_type") if path.is_file() else None
    if kind in LOADERS or (Path(folder) / OPEN_CLIP_CONFIG).is_file():
        towers = pretrained_towers(folder)
        text = towers.text.eval()
        return partial(towers.family.encode_text, text), towers.family.positions(text.config)
    return text_encoder(folder)


def embed_width(model: ModelConfig) -> int:
    """Length of a feature vector; of a pretrained model it is read from its config.json.

    Raises:
        ValueError: the folder holds no supported model.
    """
    if model.pretrained is None or has_imported(model):
        return model.towers.embed_width
    family = family_of(model.pretrained)
    if family == DUAL_ENCODER:
        return dual_encoder_config(model.pretrained).projection_dim
    if family == PE_CORE:
        return pe_core_folder(model.pretrained).width
    config, name = (
        (CLIPTextConfig, "projection_dim")
        if family == "clip"
        else (SiglipTextConfig, "projection_size")
    )
    width = getattr(config.from_pretrained(model.pretrained, local_files_only=True), name)
    if not isinstance(width, int):
        raise ValueError(f"model.pretrained={model.pretrained!r}: its config.json has no {name}")
    return width


def image_size(model: ModelConfig) -> int:
    """Returns the side, in pixels, of the square frames that the image tower takes.

    Raises:
        ValueError: a folder holds no supported model, or does not name the side.
    """
    if model.vision_tower is not None:
        return pair_pixels(model.vision_tower).side
    folder = model.pretrained
    if folder is None:
        return model.towers.image_size
    family = family_of(folder)
    if family == IMPORTED:
        return 1  # no frames are read
    if family == DUAL_ENCODER:
        return dual_encoder_pixels(folder).side
    if family == PE_CORE:
        return pe_core_folder(folder).pixels.side
    config = CLIPVisionConfig if family == "clip" else SiglipVisionConfig
    size = config.from_pretrained(folder, local_files_only=True).image_size
    if not isinstance(size, int):
        raise ValueError(f"model.pretrained={folder!r} takes images of {size}, not squares")
    return size


def default_words(folder: str) -> int:
    """Returns the tokens of a caption for a pretrained folder: all that its text tower takes.

    A dual encoder takes far more than a caption has; it gets at most 77, as many as a CLIP.
    """
    family = family_of(folder)
    if family == DUAL_ENCODER:
        return min(MOST_WORDS, usable_positions(dual_encoder_config(folder).text_config))
    if family == PE_CORE:
        return pe_core_folder(folder).positions
    config = CLIPTextConfig if family == "clip" else SiglipTextConfig
    return config.from_pretrained(folder, local_files_only=True).max_position_embeddings


def tokenizer_folder(model: ModelConfig) -> str:
    """Returns the local folder with the tokeniser.

    Raises:
        ValueError: none of `model.tokenizer`, `model.text_tower` and `model.pretrained` is set.
    """
    folder = model.tokenizer or model.text_tower or model.pretrained
    if folder is None:
        raise ValueError(
            "set model.tokenizer to a local folder, or model.pretrained or model.text_tower to one"
            " with a tokeniser"
        )
    return folder
