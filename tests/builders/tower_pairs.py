"""Folders of tiny text and vision encoders with random weights, as Hugging Face saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

SIDE, WIDTH = 32, 32
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = LAYERS | {"max_position_embeddings": 40}
_VIT = LAYERS | {"image_size": SIDE, "patch_size": 8}
_SWIN = {"image_size": SIDE, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2]} | {
    "window_size": 2,
    "patch_size": 4,
}
_STAGES = {"hidden_sizes": [8, 16, 24, WIDTH], "depths": [1, 1, 1, 1]}
_PVT = _STAGES | {"image_size": SIDE, "num_attention_heads": [1, 1, 2, 2]}
TEXT_SHAPES: dict[str, dict[str, Any]] = {
    "bert": _TEXT,
    "roberta": _TEXT,
    "xlm-roberta": _TEXT,
    "camembert": _TEXT,
    "mpnet": _TEXT,
    "electra": _TEXT | {"embedding_size": WIDTH},
    "distilbert": {"dim": WIDTH, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}
    | {"max_position_embeddings": 40},
    "modernbert": _TEXT | {"cls_token_id": 2, "sep_token_id": 3},
}
VISION_SHAPES: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _VIT,
    "dinov2_with_registers": _VIT,
    "dinov3_vit": _VIT,
    "dinov3_convnext": _STAGES,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, WIDTH], "depths": [1, 1]},
    "clip_vision_model": _VIT,
    "siglip_vision_model": _VIT,
    "pvt": _PVT,
    "pvt_v2": _PVT,
}


def save_word_pieces(folder: Path, captions: list[str]) -> PreTrainedTokenizerFast:
    """Saves a tokeniser with BERT's rules, [CLS] and [SEP], whose words are those of captions."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted({letter for text in captions for letter in text.lower() if letter.isalpha()})
    words = sorted({word.strip(",.") for text in captions for word in text.lower().split()})
    pieces = [*specials, *words[::2], *letters, *(f"##{letter}" for letter in letters), ","]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    rules = Backend(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    rules.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    rules.decoder = decoders.WordPiece()  # type: ignore[assignment]
    rules.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_text_encoder(
    folder: Path, kind: str, captions: list[str], *, pooling: str | None = None, **changes: Any
) -> Any:
    """Saves a text encoder and its tokeniser; `pooling` writes sentence-transformers' file."""
    words = len(save_word_pieces(folder, captions))
    torch.manual_seed(3)
    shape = TEXT_SHAPES[kind] | {"vocab_size": words, "pad_token_id": 0} | changes
    encoder = AutoModel.from_config(AutoConfig.for_model(kind, **shape)).eval()
    encoder.save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return encoder


def save_vision_encoder(folder: Path, kind: str, *, side: int = SIDE, **changes: Any) -> Any:
    """Saves a vision encoder and its preprocessor_config.json."""
    torch.manual_seed(4)
    shape = VISION_SHAPES[kind] | changes
    if "image_size" in shape:
        shape |= {"image_size": side}
    encoder = AutoModel.from_config(AutoConfig.for_model(kind, **shape)).eval()
    encoder.save_pretrained(folder)
    size = {"size": {"height": side, "width": side}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    return encoder
