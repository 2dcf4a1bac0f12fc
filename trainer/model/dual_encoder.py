"""Dual encoders: any text encoder beside any vision encoder, each with a linear projection.

Hugging Face's convention, `VisionTextDualEncoderModel`: a folder of it, or two folders of single
encoders, whose projections are then made here. Projections belong to the heads of the model: they
train with `train.learning_rate`, and `model.freeze` and LoRA leave them trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from tvr.trainer.model.encoder_kinds import (
    TEXT_KINDS,
    VISION_KINDS,
    Pooling,
    drop_unused,
    encode_frames,
    encode_text,
    encoder_width,
    kind_of,
    stated_pooling,
    text_pooling,
    usable_positions,
    vision_pooling,
)
from tvr.trainer.model.pixel_format import PixelFormat, pixel_format
from tvr.trainer.model.towers import TowerFamily, Towers, load_tower

DUAL_ENCODER = "vision-text-dual-encoder"
TEXT, VISION, PRETRAINED = "model.text_tower", "model.vision_tower", "model.pretrained"

# What `encode_text` and `encode_frames` do, for the model card.
TEXT_CODE: dict[Pooling, str] = {
    "pooler": "model.text_projection(model.text_model(**texts).pooler_output)",
    "class": "model.text_projection(model.text_model(**texts).last_hidden_state[:, 0])",
    "mean": (
        'texts["attention_mask"][..., None]\n'
        "words = model.text_model(**texts).last_hidden_state\n"
        "sentences = model.text_projection((words * sentences).sum(1) / sentences.sum(1))"
    ),
}
IMAGE_CODE: dict[Pooling, str] = {
    "pooler": "model.visual_projection(model.vision_model(**pixels).pooler_output.flatten(1))",
    "class": "model.visual_projection(model.vision_model(**pixels).last_hidden_state[:, 0])",
    "mean": (
        "model.visual_projection(model.vision_model(**pixels).last_hidden_state.flatten(2).mean(2))"
    ),
}


def pair_towers(text_folder: str, vision_folder: str, width: int, *, weights: bool) -> Towers:
    """Loads two single encoders and makes their projections; these follow torch's global seed.

    Args:
        width: Width D of the projected vectors.
        weights: If False, only the folders' configurations are read.

    Raises:
        ValueError: a folder holds no supported encoder, lacks some of its weights, or does not
            name the format of its frames.
    """
    text_config, vision_config = (
        encoder_config(folder, setting)
        for folder, setting in ((text_folder, TEXT), (vision_folder, VISION))
    )
    text_kind = kind_of(TEXT_KINDS, text_config.model_type, f"{TEXT}={text_folder!r}")
    kind_of(VISION_KINDS, vision_config.model_type, f"{VISION}={vision_folder!r}")
    pooling: tuple[Pooling, Pooling] = (
        text_pooling(text_kind, Path(text_folder)),
        vision_pooling(VISION_KINDS[vision_config.model_type], Path(vision_folder)),
    )
    encoders = [
        _encoder(text_folder, text_config, TEXT, pooling[0], weights=weights),
        _encoder(vision_folder, vision_config, VISION, pooling[1], weights=weights),
    ]
    projections = [_projection(encoder_width(each), width) for each in encoders]
    return _towers(encoders, projections, pooling, pair_pixels(vision_folder), width)


def text_encoder(folder: str) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], int]:
    """Loads a single text encoder, as `pair_towers` pools it.

    Returns:
        (token_ids (A, T), word_mask (A, T)) -> sentence (A, W), words (A, T, W); and the most
        tokens that it takes.

    Raises:
        ValueError: the folder holds no supported encoder, or lacks some of its weights.
    """
    config = encoder_config(folder, TEXT)
    kind = kind_of(TEXT_KINDS, config.model_type, f"{TEXT}={folder!r}")
    pooling = text_pooling(kind, Path(folder))
    encoder = _encoder(folder, config, TEXT, pooling, weights=True).eval()
    return partial(encode_text, pooling, encoder), usable_positions(encoder.config)


def pair_pixels(vision_folder: str) -> PixelFormat:
    """The frames that the vision encoder of a folder takes.

    Raises:
        ValueError: as `pixel_format`.
    """
    config = encoder_config(vision_folder, VISION)
    kind = kind_of(VISION_KINDS, config.model_type, f"{VISION}={vision_folder!r}")
    return pixel_format(Path(vision_folder), config, fixed_side=kind.fixed_side, setting=VISION)


def dual_encoder_config(folder: str) -> Any:
    """The configuration of a folder with a `VisionTextDualEncoderModel`.

    Raises:
        ValueError: one of its encoders is not supported.
    """
    config: Any = VisionTextDualEncoderConfig.from_pretrained(folder, local_files_only=True)
    where = f"{PRETRAINED}={folder!r}"
    kind_of(TEXT_KINDS, config.text_config.model_type, where)
    kind_of(VISION_KINDS, config.vision_config.model_type, where)
    return config


def dual_encoder_pixels(folder: str) -> PixelFormat:
    """The frames that a `VisionTextDualEncoderModel` folder takes.

    Raises:
        ValueError: as `pixel_format`.
    """
    config = dual_encoder_config(folder).vision_config
    fixed = VISION_KINDS[config.model_type].fixed_side
    return pixel_format(Path(folder), config, fixed_side=fixed, setting=PRETRAINED)


def dual_encoder_towers(folder: str, *, weights: bool) -> Towers:
    """Loads a folder with a `VisionTextDualEncoderModel`; `weights` as `pair_towers`.

    Raises:
        ValueError: as `pair_towers`.
    """
    config = dual_encoder_config(folder)
    pooling = (
        stated_pooling(config, "text_pooling", TEXT_KINDS[config.text_config.model_type].pooling),
        stated_pooling(
            config, "vision_pooling", VISION_KINDS[config.vision_config.model_type].pooling
        ),
    )
    sides = zip(("text_model", "vision_model"), pooling, strict=True)
    dropped = tuple(f"{side}.pooler." for side, pooled in sides if pooled != "pooler")
    if weights:
        whole = load_tower(VisionTextDualEncoderModel, folder, setting=PRETRAINED, dropped=dropped)
    else:
        whole = VisionTextDualEncoderModel(config).float()
    for encoder, pooled in zip((whole.text_model, whole.vision_model), pooling, strict=True):
        drop_unused(encoder, pooled)
    return _towers(
        [whole.text_model, whole.vision_model],
        [whole.text_projection, whole.visual_projection],
        pooling,
        dual_encoder_pixels(folder),
        config.projection_dim,
    )


def encoder_config(folder: str, setting: str) -> Any:
    """The configuration of a folder with a single encoder.

    Raises:
        ValueError: the folder holds none, or of an unknown architecture; or timm is needed for it
            and not installed.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{setting}={folder!r} holds no config.json of an encoder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise _needs_timm(folder, setting, error) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}={folder!r} holds no known encoder: {error}") from None
    # A CLIP or SigLIP folder: its own vision tower.
    if setting == VISION and hasattr(config, "vision_config"):
        config = config.vision_config
    return config


def _encoder(folder: str, config: Any, setting: str, pooling: Pooling, *, weights: bool) -> Any:
    if weights:
        dropped = () if pooling == "pooler" else ("pooler.",)
        encoder = load_tower(
            _encoder_class(config, folder, setting), folder, setting=setting, dropped=dropped
        )
    else:
        encoder = AutoModel.from_config(config).float()
    drop_unused(encoder, pooling)
    return encoder


def _encoder_class(config: Any, folder: str, setting: str) -> Any:
    try:
        return MODEL_MAPPING[type(config)]
    except ImportError as error:
        raise _needs_timm(folder, setting, error) from None


def _needs_timm(folder: str, setting: str, error: ImportError) -> ValueError:
    return ValueError(
        f"{setting}={folder!r} is an encoder of timm, which needs timm and the torchvision of the"
        f" installed torch (pip install timm torchvision): {error}"
    )


def _projection(width: int, projected: int) -> nn.Linear:
    projection = nn.Linear(width, projected, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)  # as CLIP's
    return projection


def _towers(
    encoders: list[Any],
    projections: list[nn.Linear],
    pooling: tuple[Pooling, Pooling],
    pixels: PixelFormat,
    width: int,
) -> Towers:
    family = TowerFamily(
        name=DUAL_ENCODER,
        whole=VisionTextDualEncoderModel,
        processor=VisionTextDualEncoderProcessor,
        pixel_mean=pixels.mean,
        pixel_std=pixels.std,
        fills_all_slots=False,
        positions=usable_positions,
        encode_text=partial(encode_text, pooling[0]),
        encode_frames=partial(encode_frames, pooling[1]),
        joined=_whole,
        pooling=pooling,
        text_code=TEXT_CODE[pooling[0]],
        image_code=IMAGE_CODE[pooling[1]],
    )
    (text, image), (text_projection, visual_projection) = encoders, projections
    return Towers(
        family=family,
        text=text,
        image=image,
        width=width,
        text_projection=text_projection,
        visual_projection=visual_projection,
    )


def _whole(towers: Towers, log_scale: Tensor) -> VisionTextDualEncoderModel:
    """The whole model; config.json also names the poolings and each encoder's width."""
    assert towers.family.pooling is not None
    configs = {}
    for name, tower in (("text_config", towers.text), ("vision_config", towers.image)):
        # The class sizes its projections by `hidden_size`, which pyramids do not have.
        configs[name] = tower.config.to_dict() | {"hidden_size": encoder_width(tower)}
    pooling = towers.family.pooling
    poolings: Any = {"text_pooling": pooling[0], "vision_pooling": pooling[1]}
    config = VisionTextDualEncoderConfig(**configs, **poolings, projection_dim=towers.width)
    parts = {
        "text_model": towers.text,
        "vision_model": towers.image,
        "text_projection": towers.text_projection,
        "visual_projection": towers.visual_projection,
    }
    weights = {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    with torch.device("meta"):
        whole = VisionTextDualEncoderModel(config)
    for encoder, pooled in zip(
        (whole.text_model, whole.vision_model), towers.family.pooling, strict=True
    ):
        drop_unused(encoder, pooled)
    whole.load_state_dict(weights | {"logit_scale": log_scale}, assign=True)
    return whole
