"""Kinds of text and vision encoders that dual encoders are made of, and how each is pooled.

    text kind (model_type)                    sentence
    bert, roberta, xlm-roberta, camembert,    pooler_output, or the first token if the folder has no
    mpnet                                     weights of a pooler
    distilbert, electra, modernbert           the first token
    any of them, with 1_Pooling/config.json   as this file of sentence-transformers says: the mean
                                              of all tokens but padding, or the first token

    vision kind (model_type)                  frame
    vit, deit                                 pooler_output, or the class token if the folder has no
                                              weights of a pooler
    dinov2, dinov2_with_registers,            pooler_output: the class token after the last norm
    dinov3_vit, clip_vision_model
    swin, swinv2, convnext, convnextv2,       pooler_output: the mean over places, with a norm where
    dinov3_convnext, resnet                   the kind has one
    siglip_vision_model                       pooler_output: pooled by learned attention
    pvt                                       the class token of the last stage
    pvt_v2                                    the mean over places of the last stage
    timm_wrapper                              pooler_output: as timm pools before its classifier

Words are the last hidden states. A `VisionTextDualEncoderModel` folder is pooled as that class
does, by pooler_output, unless its config.json names a `text_pooling` or a `vision_pooling`, as
`tvr export` writes them. A pooler that is not used is removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tvr.trainer.model.towers import Pooling as Pooling

POOLINGS: tuple[Pooling, ...] = ("pooler", "class", "mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderKind:
    """What sets a kind of encoder apart."""

    pooling: Pooling = "pooler"
    """How a sentence or a frame is pooled."""
    has_learned_pooler: bool = False
    """True if the pooler is a layer with weights, which a folder may lack."""
    counts_after_padding: bool = False
    """True if positions are counted from the padding id + 1, so that fewer are usable."""
    fixed_side: bool = False
    """True if frames must have the side that config.json names."""


_BERT = EncoderKind(has_learned_pooler=True)
_ROBERTA = EncoderKind(has_learned_pooler=True, counts_after_padding=True)
_BARE = EncoderKind(pooling="class")
TEXT_KINDS: Mapping[str, EncoderKind] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA,
    "distilbert": _BARE,
    "electra": _BARE,
    "modernbert": _BARE,
}
_VIT = EncoderKind(has_learned_pooler=True, fixed_side=True)
_FIXED = EncoderKind(fixed_side=True)
_FREE = EncoderKind()
VISION_KINDS: Mapping[str, EncoderKind] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _FREE,
    "dinov2_with_registers": _FREE,
    "dinov3_vit": _FREE,
    "dinov3_convnext": _FREE,
    "swin": _FREE,
    "swinv2": _FREE,
    "convnext": _FREE,
    "convnextv2": _FREE,
    "resnet": _FREE,
    "clip_vision_model": _FIXED,
    "siglip_vision_model": _FIXED,
    "pvt": EncoderKind(pooling="class", fixed_side=True),
    "pvt_v2": EncoderKind(pooling="mean"),
    "timm_wrapper": _FREE,
}


def kind_of(kinds: Mapping[str, EncoderKind], model_type: str | None, where: str) -> EncoderKind:
    """Returns the kind of an encoder.

    Raises:
        ValueError: it is none of `kinds`.
    """
    if model_type is None or model_type not in kinds:
        raise ValueError(
            f"{where} holds an encoder of type {model_type!r}; supported are {', '.join(kinds)}"
        )
    return kinds[model_type]


def text_pooling(kind: EncoderKind, folder: Path) -> Pooling:
    """How the text encoder of a folder of its own is pooled.

    Raises:
        ValueError: 1_Pooling/config.json asks for another pooling than "mean" or "cls".
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return _pooling(kind, folder)
    content = json.loads(path.read_text())
    # Newer releases of sentence-transformers write one key, older ones a flag for each mode.
    modes = [content["pooling_mode"]] if isinstance(content.get("pooling_mode"), str) else []
    modes += [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, value in content.items()
        if name.startswith("pooling_mode_") and value is True
    ]
    names: dict[str, Pooling] = {"mean": "mean", "cls": "class"}
    if len(modes) != 1 or modes[0] not in names:
        raise ValueError(f"{path} pools by {modes}; supported are mean or cls")
    return names[modes[0]]


def vision_pooling(kind: EncoderKind, folder: Path) -> Pooling:
    """How the vision encoder of a folder of its own is pooled."""
    return _pooling(kind, folder)


def _pooling(kind: EncoderKind, folder: Path) -> Pooling:
    names = _weight_names(folder) if kind.has_learned_pooler else []
    if names and not any("pooler.dense" in name for name in names):
        return "class"
    return kind.pooling


def _weight_names(folder: Path) -> list[str]:
    """Names of a folder's weights, without reading their values; none if it holds no weights."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            return list(json.loads((folder / name).read_text())["weight_map"])
    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return list(file.keys())
    if (folder / "pytorch_model.bin").is_file():
        return list(torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True))
    return []


def drop_unused(encoder: Any, pooling: Pooling) -> None:
    """Removes a pooler that is not used, and stops training weights that no forward reads."""
    pooler = getattr(encoder, "pooler", None)
    # Poolers without weights, as Swin's, are harmless, and the forward may insist on them.
    if pooling != "pooler" and isinstance(pooler, nn.Module) and list(pooler.parameters()):
        encoder.pooler = None
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2] == "mask_token":  # of masked pre-training
            parameter.requires_grad_(False)


def usable_positions(config: Any) -> int:
    """The most tokens that a text encoder takes."""
    kind = TEXT_KINDS[config.model_type]
    used = config.pad_token_id + 1 if kind.counts_after_padding else 0
    return config.max_position_embeddings - used


def encoder_width(encoder: Any) -> int:
    """Width of an encoder's vectors.

    Raises:
        ValueError: its configuration names none.
    """
    config = encoder.config
    if config.model_type == "timm_wrapper":
        inner = encoder.timm_model  # its pooling may widen the features
        return getattr(inner, "head_hidden_size", inner.num_features)
    width = getattr(config, "hidden_size", None)
    if width is None and getattr(config, "hidden_sizes", None):
        width = config.hidden_sizes[-1]
    if not isinstance(width, int):
        raise ValueError(f"an encoder of type {config.model_type!r} names no width of its vectors")
    return width


def encode_text(
    pooling: Pooling, encoder: Any, token_ids: Tensor, word_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Sentence (A, W) and words (A, T, W) of a text encoder of width W.

    Token types are not given: all tokens are of the first segment, as in a tokeniser's output for
    single texts. The mean is the one of sentence-transformers: over start and end, too.
    """
    valid = (word_mask > 0).long()
    out = encoder(input_ids=token_ids, attention_mask=valid)
    words = out.last_hidden_state
    if pooling == "pooler":
        return out.pooler_output, words
    if pooling == "class":
        return words[:, 0], words
    weight = valid[..., None].to(words.dtype)
    return (words * weight).sum(1) / weight.sum(1).clamp(min=1e-9), words


def encode_frames(pooling: Pooling, encoder: Any, pixels: Tensor) -> Tensor:
    """Frames (N, W) of a vision encoder of width W, from pixels (N, 3, H, W)."""
    out = encoder(pixel_values=pixels)
    if pooling == "pooler":
        return out.pooler_output.flatten(1)
    hidden = out.last_hidden_state
    if hidden.ndim == 4:  # (N, W, height, width)
        hidden = hidden.flatten(2).transpose(1, 2)
    return hidden[:, 0] if pooling == "class" else hidden.mean(1)


def stated_pooling(config: Any, name: str, default: Pooling) -> Pooling:
    """The pooling that the config.json of a dual encoder names, or the default.

    Raises:
        ValueError: it names an unknown one.
    """
    found = getattr(config, name, None) or default
    if found not in POOLINGS:
        raise ValueError(f"config.json: {name}={found!r} must be one of {', '.join(POOLINGS)}")
    return cast(Pooling, found)
