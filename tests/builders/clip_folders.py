"""Folders in the format of a published CLIP: config.json, a small tokeniser, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from tvr.trainer.model.tokenizer import train_tokenizer

# Each openai/clip-vit-*: (width, feed-forward width, layers, heads) of the text and of the image
# tower, projection width, patch size, and parameters of both towers without the logit scale.
SHAPES = {
    "base-patch32": ((512, 2048, 12, 8), (768, 3072, 12, 12), 512, 32, 151_277_312),
    "base-patch16": ((512, 2048, 12, 8), (768, 3072, 12, 12), 512, 16, 149_620_736),
    "large-patch14": ((768, 3072, 12, 12), (1024, 4096, 24, 16), 768, 14, 427_616_512),
}
CAPTIONS = ("a man plays the guitar on a stage", "two dogs run after a red ball in the snow")


def write_clip(folder: Path, name: str, *, weights: bool = False) -> str:
    """Writes config.json, a tokeniser and, with `weights`, random weights; returns the folder."""
    tokenizer = train_tokenizer(CAPTIONS, folder, vocab_size=560, max_words=77)
    text, vision, projection, patch, _ = SHAPES[name]
    common = {"projection_dim": projection}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**_shape(*text), **common, **ends},
        vision_config={**_shape(*vision), **common, "patch_size": patch, "image_size": 224},
        projection_dim=projection,
    )
    if weights:
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return str(folder)


def _shape(width: int, feed_forward: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
