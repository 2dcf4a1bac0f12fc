"""Hugging Face folders of a tiny CLIP and a tiny SigLIP with random weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, SiglipTokenizer

from tvr.trainer.model.tokenizer import Tokenizer

LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def save_clip(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    width: int,
    image_size: int,
    patch_size: int = 8,
    dropout: float = 0.0,
) -> CLIPModel:
    """Saves a CLIP and its tokeniser; `dropout` is the attention's."""
    words = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": tokenizer.max_words,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    common = LAYERS | {"projection_dim": width, "attention_dropout": dropout}
    config = CLIPConfig(
        text_config=common | words,
        vision_config=common | {"image_size": image_size, "patch_size": patch_size},
        projection_dim=width,
    )
    torch.manual_seed(5)
    clip = CLIPModel(config).eval()
    clip.save_pretrained(folder)
    tokenizer.backend.save_pretrained(folder)
    return clip


def save_siglip(
    folder: Path, captions: list[str], *, max_words: int, image_size: int
) -> SiglipModel:
    """Saves a SigLIP with a SentencePiece vocabulary learned from the captions."""
    learned = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=learned,
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "spiece.model"
    vocabulary.write_bytes(learned.getvalue())
    tokenizer: Any = SiglipTokenizer(str(vocabulary), model_max_length=max_words)
    tokenizer.save_pretrained(folder)
    config = SiglipConfig(
        text_config=LAYERS
        | {"vocab_size": len(tokenizer), "max_position_embeddings": max_words}
        | {"bos_token_id": None, "eos_token_id": 1},
        vision_config=LAYERS | {"image_size": image_size, "patch_size": 8},
    )
    torch.manual_seed(6)
    siglip = SiglipModel(config).eval()
    siglip.save_pretrained(folder)
    return siglip
