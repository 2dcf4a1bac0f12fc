"""The section `model`: the two towers and the heads on top.

The docstring below a field is its `--help` text. These docstrings wrap at 70 characters, since
`--help` keeps their line breaks on a terminal of 80.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from tvr.trainer.config_sections.field_types import STRICT, NotNegative, Positive

Freeze = NotNegative | Literal["text", "image", "both"]
TowerPart = Literal["text_tower", "image_tower"]
HeadPart = Literal[
    "text_projection",
    "visual_projection",
    "sequence_header",
    "text_weight",
    "frame_weight",
    "word_predictor",
    "frame_predictor",
]
InitPart = TowerPart | HeadPart | Literal["towers", "heads"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TowersConfig:
    """Shape of CLIP towers that are trained from scratch; ignored with
    `model.pretrained`. With `model.text_tower` only `embed_width` counts."""

    width: Positive = 128
    """Hidden width of both towers."""
    layers: Positive = 3
    """Transformer layers of each tower."""
    heads: Positive = 4
    """Attention heads of each layer."""
    embed_width: Positive = 128
    """Width D of the projected text and frame vectors."""
    image_size: Positive = 48
    """Side of the square frames, in pixels."""
    patch_size: Positive = 12
    """Side of an image patch, in pixels."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The two towers and the heads on top."""

    pretrained: str | None = None
    """Local folder with a pretrained CLIP, SigLIP, PE-Core or
    VisionTextDualEncoderModel. None: `text_tower` and `vision_tower`, or
    towers from scratch, as `towers` describes them."""
    text_tower: str | None = None
    """Local folder with a text encoder in Hugging Face format, such as a
    BERT or a model of sentence-transformers, instead of `pretrained`. Needs
    `vision_tower`. Both get a new projection to `towers.embed_width`."""
    vision_tower: str | None = None
    """Local folder with a vision encoder in Hugging Face format, such as a
    ViT, PVT, Swin or DINOv2, with its preprocessor_config.json."""
    tokenizer: str | None = None
    """Local folder with the tokeniser. None: the one in `pretrained`, or in
    `text_tower`."""
    init_from: str | None = None
    """Run, or folder of `tvr export`, from whose weights a new run starts;
    its optimiser is not taken. RUN is the newest checkpoint of a run,
    RUN@best the best one, RUN@300 that of step 300. Weights must fit by
    names and shapes. None: towers as above, new heads."""
    init_parts: tuple[InitPart, ...] = ()
    """Parts that are taken from `init_from`; others start as without it.
    towers and heads stand for several parts. Nothing: the whole model."""
    towers: TowersConfig = TowersConfig()
    """Shape of towers from scratch."""
    freeze: Freeze = 0
    """Weights of the towers that are not trained: a number N freezes the
    embeddings and the bottom N layers of each tower; text, image or both
    freezes whole towers. 0: nothing."""
    lora_rank: NotNegative = 0
    """Rank of LoRA adapters on the towers' queries and values (alpha = 2 x
    rank); the towers' own weights are then frozen. 0: no LoRA. Needs the
    extra `lora`."""
    sequence_header_layers: NotNegative = 0
    """Transformer layers over the frames of a video, on top of the image
    tower. 0: frames are encoded independently."""
    unit_after_header: bool = True
    """Normalises frames to unit length after the sequence header, so that
    similarities are cosines. false: as in the authors' implementation."""
    tokens_per_frame: Positive = 1
    """Vectors of a frame. 1: the frame's own vector. 4, 9 or another
    square: a grid of cells instead, each the patches of one part of the
    picture behind the tower's final layer; words choose among the cells of
    all frames. For CLIP and SigLIP, without a sequence header."""
    interaction: Literal["ti", "wti", "att_ti", "att_wti"] = "att_wti"
    """Similarity of captions and videos. ti and wti compare the sentence
    with the frames; att_ti and att_wti also compare the words. wti and
    att_wti weight tokens by learned weights, ti and att_ti by plain
    means."""
    matching: Literal["two_way", "words_to_frames"] = "two_way"
    """two_way: each word chooses its best frame and each frame its best
    word. words_to_frames: words alone choose, as in the late interaction
    of ColBERT; frames then have no weights, and TPM-CL compares a token
    with its best frame alone."""
    neighbour_frames: bool = True
    """Adds to each word's best frame the frame that is most similar to that
    frame."""
    weight_layers: Annotated[int, Field(ge=1, le=3)] = 1
    """Linear layers in the token-weight networks of wti and att_wti."""

    def __post_init__(self) -> None:
        if (self.text_tower is None) != (self.vision_tower is None):
            raise ValueError(
                f"model.text_tower={self.text_tower!r} and model.vision_tower="
                f"{self.vision_tower!r} must be given together"
            )
        if self.text_tower is not None and self.pretrained is not None:
            raise ValueError(
                f"model.pretrained={self.pretrained!r} cannot be given beside model.text_tower="
                f"{self.text_tower!r} and model.vision_tower: each names both towers"
            )
        if math.isqrt(self.tokens_per_frame) ** 2 != self.tokens_per_frame:
            raise ValueError(
                f"model.tokens_per_frame={self.tokens_per_frame} must be a square: 1, 4, 9 and so"
                " on"
            )
        if self.tokens_per_frame > 1 and self.sequence_header_layers:
            raise ValueError(
                f"model.tokens_per_frame={self.tokens_per_frame} cannot be combined with"
                f" model.sequence_header_layers={self.sequence_header_layers}, whose positions are"
                " those of whole frames"
            )
        if self.init_parts and self.init_from is None:
            raise ValueError(f"model.init_parts={self.init_parts} needs model.init_from")
