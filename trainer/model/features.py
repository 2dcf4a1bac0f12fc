"""The features of a batch; frozen towers, whose outputs may be stored, or come from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tvr.trainer.model.towers import TowerFamily, Towers

IMPORTED = "tvr-features"
"""`model_type` of a folder with imported features."""
IMPORTED_SIZES = ("text_width", "frame_width", "max_words", "num_frames", "vocab_size")
MAX_SIZE = 1 << 24
ENCODER_TILE = 16
"""Rows that a frozen tower encodes at once, or a multiple of them."""


class Features(NamedTuple):
    """Features of A captions and C videos, as the similarity and the losses take them.

    Sentence, words and frames have unit length (frames do not if `unit_after_header` is off).
    """

    sentence: Tensor
    """(A, D) the text tower's vector of the whole caption; in CLIP, the end token's."""
    words: Tensor
    """(A, T, D) contextual word vectors."""
    word_mask: Tensor
    """(A, T) 0 = padding."""
    frames: Tensor
    """(C, F, D) frame vectors. With `tokens_per_frame` k, here and below F is k x the frames, the
    cells of a frame side by side."""
    frame_mask: Tensor
    """(C, F) 0 = padding."""
    word_logits: Tensor | None
    """(A, T) token weights before the masked softmax; none in the ti family."""
    frame_logits: Tensor | None
    """(C, F) frame weights before the masked softmax; none in the ti family, nor with
    `words_to_frames`."""
    margin_hinge: Tensor | None
    """(B,) TPM-CL of each matched pair; none in evaluation, or if TPM-CL is off."""


def in_whole_tiles(x: Tensor) -> Tensor:
    """Repeats the last row until the number of rows is a multiple of ENCODER_TILE.

    A matrix product works in tiles of rows, and sums the last, smaller tile in another order. With
    whole tiles the output of a row does not depend on the other rows: measured in float32 on CPUs
    for 16 to 192 rows and 1 to 4 threads. GPUs choose among products by the number of rows, so
    there rows agree to rounding.
    """
    missing = -len(x) % ENCODER_TILE
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x


def projected(vectors: Tensor, projection: nn.Linear | None) -> Tensor:
    """Vectors of a tower, projected if it does not end with a projection of its own."""
    return vectors if projection is None else projection(vectors.to(projection.weight.dtype))


class AbsentTower(nn.Module):
    """The place of a tower whose outputs were computed elsewhere (`tvr import-features`)."""

    def __init__(self, width: int, vocab_size: int, max_words: int) -> None:
        super().__init__()
        self.width = width
        self.config = SimpleNamespace(vocab_size=vocab_size, max_words=max_words)

    def forward(self, *inputs: Tensor) -> Tensor:
        raise ValueError(
            "this model was trained on imported features and has no towers: it cannot encode videos"
            " or captions; evaluate it on a data set in its folder of features"
        )


def imported_towers(folder: str, width: int) -> Towers:
    """No towers, and projections from the widths of imported features, as config.json has them.

    Args:
        folder: Folder of `tvr import-features`.
        width: Width D of the projected vectors.

    Raises:
        ValueError: its config.json is damaged.
    """
    found = imported_settings(folder)
    widths = found["text_width"], found["frame_width"]
    text, image = (AbsentTower(each, found["vocab_size"], found["max_words"]) for each in widths)
    family = TowerFamily(
        name=IMPORTED,
        whole=None,
        processor=None,
        pixel_mean=(0.0, 0.0, 0.0),
        pixel_std=(1.0, 1.0, 1.0),
        fills_all_slots=False,
        positions=lambda config: config.max_words,
        encode_text=lambda tower, ids, mask: tower(ids),
        encode_frames=lambda tower, pixels: tower(pixels),
        joined=_refuse_export,
    )
    projections = []
    for each in widths:
        projection = nn.Linear(each, width, bias=False)
        nn.init.normal_(projection.weight, std=each**-0.5)  # as those of single encoders
        projections.append(projection)
    return Towers(
        family=family,
        text=text,
        image=image,
        width=width,
        text_projection=projections[0],
        visual_projection=projections[1],
    )


def imported_settings(folder: str) -> dict[str, int]:
    """The sizes of imported features, by the names in their config.json.

    Raises:
        ValueError: one is missing, or not allowed; names it.
    """
    path = Path(folder) / "config.json"
    found = json.loads(path.read_text())
    for name in IMPORTED_SIZES:
        size = found.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_SIZE:
            raise ValueError(f"{path}: {name}={size!r} must be from 1 to {MAX_SIZE}; import again")
    return {name: found[name] for name in IMPORTED_SIZES}


def _refuse_export(towers: Towers, log_scale: Tensor) -> Any:
    raise ValueError("a model of imported features has no towers to export")


def stored_inputs(
    model: Any, frames: Tensor, frame_mask: Tensor, token_ids: Tensor, word_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of a model's forward with outputs of its towers in place of frames and token ids.

    Without towers (`imported_towers`) the outputs are noise of the same shapes.
    """
    text, image = model.text_tower, model.image_tower
    if isinstance(text, AbsentTower) and isinstance(image, AbsentTower):
        vectors = torch.randn(*frames.shape[:2], image.width, device=frames.device)
        size = (len(token_ids), 1 + token_ids.shape[1], text.width)
        return vectors, frame_mask, torch.randn(size, device=frames.device), word_mask
    vectors, sentence, words = model.tower_outputs(frames, token_ids, word_mask)
    texts = torch.cat([sentence[:, None], words], dim=1)
    return vectors.float(), frame_mask, texts.float(), word_mask
