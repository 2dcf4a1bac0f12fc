"""Hugging Face folders of a tiny CLIP and a tiny SigLIP with random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
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


def save_siglip2(folder: Path, captions: list[str], *, max_words: int, image_size: int) -> Any:
    """Saves a SigLIP 2 for frames of one size, as Google publishes it: a SigLIP with Gemma's rules.

    Its tokeniser adds an end, pads at the end, and keeps the case of letters.
    """
    letters = sorted({letter for text in captions for letter in text + text.lower()} - {" "})
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    for piece in ["\u2581", *letters, *(f"<0x{byte:02X}>" for byte in range(256))]:
        vocabulary.setdefault(piece, len(vocabulary))
    rules = Backend(
        models.BPE(vocabulary, [], fuse_unk=True, unk_token="<unk>", byte_fallback=True)
    )
    rules.normalizer = normalizers.Replace(" ", "\u2581")  # type: ignore[assignment]
    rules.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    rules.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    rules.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "SiglipProcessor",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_max_length": max_words,
    } | {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = SiglipConfig(
        text_config=LAYERS
        | {"vocab_size": len(vocabulary), "max_position_embeddings": max_words}
        | {"bos_token_id": 2, "eos_token_id": 1},
        vision_config=LAYERS | {"image_size": image_size, "patch_size": 8},
    )
    torch.manual_seed(7)
    siglip = SiglipModel(config).eval()
    siglip.save_pretrained(folder)
    return siglip
