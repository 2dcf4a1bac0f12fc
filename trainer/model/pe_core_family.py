"""PE-Core (Perception Encoder) from a folder as open_clip and timm publish it.

    open_clip_config.json         names the vision transformer as timm does, shapes the text tower
    open_clip_model.safetensors   weights by open_clip's names: visual.trunk.* and text.*

Such folders are `timm/PE-Core-B-16`, `-L-14-336`, `-bigG-14-448`, `-S-16-384` and `-T-16-384`. The
text tower is CLIP's with GELU and is held as such; a caption's vector is that of its end token, the
last id of the vocabulary. transformers has no class for this pair, so an export is such a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPProcessor, CLIPTextConfig, CLIPTextModelWithProjection

from tvr.trainer.model.clip_family import clip_text
from tvr.trainer.model.pe_vision import PeVision, PeVisionConfig
from tvr.trainer.model.pixel_format import PixelFormat
from tvr.trainer.model.towers import TowerFamily, Towers, Weights

PE_CORE = "pe_core"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers"}


def _shape(patch: int, width: int, layers: int, heads: int, reference: int) -> dict[str, Any]:
    return {"patch_size": patch, "width": width, "layers": layers, "heads": heads} | {
        "mlp_width": 4 * width,
        "reference": reference,
    }


# By timm's names.
VISION_SHAPES: Mapping[str, dict[str, Any]] = {
    "vit_pe_core_tiny_patch16_384": _shape(16, 192, 12, 3, 24),
    "vit_pe_core_small_patch16_384": _shape(16, 384, 12, 6, 24),
    "vit_pe_core_base_patch16_224": _shape(16, 768, 12, 12, 14),
    "vit_pe_core_large_patch14_336": _shape(14, 1024, 24, 16, 24),
    "vit_pe_core_gigantic_patch14_448": _shape(14, 1536, 50, 16, 32)
    | {"mlp_width": 8960, "first_place": 0, "class_token": False},
}
# Beginnings of the text tower's names: open_clip's -> those of CLIP in transformers.
_NAMES = (
    ("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("text.ln_final.", "text_model.final_layer_norm."),
    ("text.transformer.resblocks.", "text_model.encoder.layers."),
)
_LAYER_NAMES = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
_FUSED = re.compile(r"(.*\.)attn\.in_proj_(weight|bias)")
_SPLIT = re.compile(r"(.*\.)self_attn\.q_proj\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class PeFolder:
    """The settings of a folder with a PE-Core."""

    model: dict[str, Any]
    pixels: PixelFormat

    @property
    def width(self) -> int:
        """Width D of the vectors."""
        return self.model["embed_dim"]

    @property
    def positions(self) -> int:
        """The most tokens of a caption."""
        return self.model["text_cfg"]["context_length"]


def pe_core_folder(folder: str) -> PeFolder:
    """Reads the settings of a folder.

    Raises:
        ValueError: open_clip_config.json describes another model than a PE-Core.
    """
    content = json.loads((Path(folder) / CONFIG).read_text())
    model, pixels = content.get("model_cfg", {}), content.get("preprocess_cfg", {})
    where = f"model.pretrained={folder!r}: {CONFIG}"
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    name = vision.get("timm_model_name")
    if name not in VISION_SHAPES:
        raise ValueError(
            f"{where} holds the vision tower {name!r}; supported are those of PE-Core:"
            f" {', '.join(VISION_SHAPES)}"
        )
    if vision.get("timm_pool") != "map" or vision.get("timm_proj"):
        raise ValueError(
            f"{where} pools by {vision.get('timm_pool')!r} and projects by"
            f" {vision.get('timm_proj')!r}; PE-Core has 'map' and null"
        )
    if text.keys() != TEXT_KEYS:
        raise ValueError(
            f"{where}: text_cfg has the keys {sorted(text)}; PE-Core's are {sorted(TEXT_KEYS)}"
        )
    half = [0.5, 0.5, 0.5]
    mean, std = (tuple(pixels.get(name, half)) for name in ("mean", "std"))
    return PeFolder(model, PixelFormat(side=vision["image_size"], mean=mean, std=std))


def pe_core_towers(folder: str, *, weights: bool) -> Towers:
    """Both towers of a folder with a PE-Core; `weights` as `pretrained_towers`.

    Raises:
        ValueError: as `pe_core_folder`, or the folder lacks weights.
    """
    found = pe_core_folder(folder)
    text_shape, vision = found.model["text_cfg"], found.model["vision_cfg"]
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=text_shape["width"],
            intermediate_size=4 * text_shape["width"],
            num_hidden_layers=text_shape["layers"],
            num_attention_heads=text_shape["heads"],
            projection_dim=found.width,
            hidden_act="gelu",
            vocab_size=text_shape["vocab_size"],
            max_position_embeddings=found.positions,
            eos_token_id=text_shape["vocab_size"] - 1,
        )
    )
    image = PeVision(
        PeVisionConfig(
            image_size=found.pixels.side,
            projected=found.width,
            **VISION_SHAPES[vision["timm_model_name"]],
        )
    )
    if weights:
        _load(text, image, folder)
    family = TowerFamily(
        name=PE_CORE,
        whole=OpenClipFolder,
        processor=CLIPProcessor,
        pixel_mean=found.pixels.mean,
        pixel_std=found.pixels.std,
        fills_all_slots=False,
        positions=lambda config: config.max_position_embeddings,
        encode_text=clip_text,
        encode_frames=_encode_frames,
        joined=partial(_open_clip_folder, found),
        text_code="model.encode_text(token_ids)  # of the tokeniser in this folder",
        image_code="model.encode_image(pixels)",
    )
    return Towers(family=family, text=text, image=image, width=found.width)


def _encode_frames(tower: Any, pixels: Tensor) -> Tensor:
    return tower(pixels)


def _load(text: nn.Module, image: nn.Module, folder: str) -> None:
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"model.pretrained={folder!r} holds no {WEIGHTS}, which open_clip writes")
    found = load_file(path)
    visual = {
        name.removeprefix("visual.trunk."): value
        for name, value in found.items()
        if name.startswith("visual.trunk.")
    }
    for tower, values in ((text, dict(_from_open_clip(found))), (image, visual)):
        try:
            tower.load_state_dict(values)
        except RuntimeError as error:
            raise ValueError(f"model.pretrained={folder!r} holds no whole model: {error}") from None


def _from_open_clip(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        if not name.startswith("text."):
            continue
        if name == "text.text_projection":
            yield "text_projection.weight", value.T.contiguous()
            continue
        for theirs, ours in (*_NAMES, *_LAYER_NAMES):
            name = name.replace(theirs, ours)
        if fused := _FUSED.fullmatch(name):
            for part, values in zip("qkv", value.chunk(3), strict=True):
                yield f"{fused[1]}self_attn.{part}_proj.{fused[2]}", values
        else:
            yield name, value


def _to_open_clip(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        if name == "text_projection.weight":
            yield "text.text_projection", value.T.contiguous()
            continue
        if split := _SPLIT.fullmatch(name):
            parts = [f"{split[1]}self_attn.{part}_proj.{split[2]}" for part in "qkv"]
            value = torch.cat([weights[part] for part in parts])
            name = f"{split[1]}attn.in_proj_{split[2]}"
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for theirs, ours in (*_NAMES, *_LAYER_NAMES):
            name = name.replace(ours, theirs)
        yield name, value


@dataclass(frozen=True, slots=True)
class OpenClipFolder:
    """A PE-Core that writes itself as open_clip does."""

    config: dict[str, Any]
    weights: Weights

    def save_pretrained(self, folder: Path) -> None:
        """Writes configuration and weights to an existing folder."""
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(
            {name: value.contiguous() for name, value in self.weights.items()}, folder / WEIGHTS
        )


def _open_clip_folder(found: PeFolder, towers: Towers, log_scale: Tensor) -> OpenClipFolder:
    weights = dict(_to_open_clip(towers.text.state_dict()))
    for name, value in towers.image.state_dict().items():
        weights[f"visual.trunk.{name}"] = value
    pixels = {"mean": list(found.pixels.mean), "std": list(found.pixels.std)}
    preprocess = pixels | {"interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": found.model, "preprocess_cfg": preprocess}
    return OpenClipFolder(config, weights | {"logit_scale": log_scale})
