"""A text and an image tower, and what families of towers have in common.

                sentence                       words                    frame
CLIP            the end token, projected       all tokens, projected    class token, projected
SigLIP          the last slot, by `head`       all tokens, by `head`    pooled by learned attention
PE-Core         the end token, projected       all tokens, projected    pooled by learned attention,
                                                                        projected
dual encoder    as its text encoder pools,     all tokens, projected    as its vision encoder
                projected                                               pools, projected

Sentences and frames are the vectors of the family's own similarity. Words go through the same
final layer as the sentence. The text tower of CLIP and PE-Core is causal and never attends to
padding. SigLIP's attends to all slots without a mask and was trained with all its positions filled,
so padding is part of its captions. The encoders of a dual encoder attend to all tokens but padding;
encoder_kinds.py lists how each kind pools.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.utils import logging

from tvr.trainer.model.tokenizer import Tokenizer

Channels: TypeAlias = tuple[float, float, float]
Pooling: TypeAlias = Literal["pooler", "class", "mean"]
Weights: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerFamily:
    """The differences between families of towers."""

    name: str
    """`model_type` in a folder's config.json."""
    whole: Any
    """Class of the whole model, for export."""
    processor: Any
    """Class of the Hugging Face processor, for export."""
    pixel_mean: Channels
    """Mean of pixels in 0 to 1; it belongs to the pretrained weights, so it is not a setting."""
    pixel_std: Channels
    """Standard deviation of pixels in 0 to 1."""
    fills_all_slots: bool
    """True if captions must fill all positions of the text tower."""
    positions: Callable[[Any], int]
    """Configuration of a text tower -> the most tokens that it takes."""
    encode_text: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(tower, token_ids (A, T), word_mask (A, T)) -> sentence (A, W), words (A, T, W); W is D, or
    the width of the encoder if a projection follows."""
    encode_frames: Callable[[Any, Tensor], Tensor]
    """(tower, pixels (N, 3, H, W)) -> (N, W)."""
    encode_cells: Callable[[Any, Tensor, int], Tensor] | None = None
    """(tower, pixels (N, 3, H, W), side) -> (N, side x side, W), of the cells of `cell_means` or
    `cell_patches`; None in families without them."""
    needs_equal_cells: bool = False
    """True if all cells must have equally many patches."""
    joined: Callable[[Towers, Tensor], Any]
    """(towers, log(1 / temperature)) -> the whole model with their weights, for export."""
    text_code: str = "model.get_text_features(**texts).pooler_output"
    """How transformers alone encodes tokenised `texts`, in the model card."""
    image_code: str = "model.get_image_features(**pixels).pooler_output"
    """How transformers alone encodes processed `pixels`, in the model card."""
    pooling: tuple[Pooling, Pooling] | None = None
    """How the sentence and the frame are pooled, in families with a choice (encoder_kinds.py)."""

    def check_cells(self, tower: Any, tokens_per_frame: int) -> None:
        """Raises ValueError if an image tower has no such grid of cells."""
        if tokens_per_frame == 1:
            return
        if self.encode_cells is None:
            raise ValueError(
                f"model.tokens_per_frame={tokens_per_frame}: towers of the family {self.name} have"
                " no grid of patches here; use a CLIP or a SigLIP, or 1"
            )
        rows = tower.config.image_size // tower.config.patch_size
        cells(rows, math.isqrt(tokens_per_frame), equal=self.needs_equal_cells)

    def encode_slots(self, tower: Any, pixels: Tensor, tokens_per_frame: int) -> Tensor:
        """(N x tokens_per_frame, W): frames, or the cells of each frame side by side."""
        if tokens_per_frame == 1 or self.encode_cells is None:
            return self.encode_frames(tower, pixels)
        return self.encode_cells(tower, pixels, math.isqrt(tokens_per_frame)).flatten(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Towers:
    """A text and an image tower of one family."""

    family: TowerFamily
    text: Any
    image: Any
    width: int
    """Width D of the vectors that are compared."""
    text_projection: nn.Linear | None = None
    """From the text encoder to D; none if the tower ends with its own projection."""
    visual_projection: nn.Linear | None = None
    """From the vision encoder to D; none if the tower ends with its own projection."""


def check_tokenizer(towers: Towers, tokenizer: Tokenizer) -> None:
    """Checks that the tokeniser fits the text tower.

    Raises:
        ValueError: the vocabulary is larger than the tower's, or `data.max_words` does not fit its
            positions.
    """
    text, slots = towers.text.config, tokenizer.max_words
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens, the text tower only "
            f"{text.vocab_size}: model.tokenizer does not belong to model.pretrained"
        )
    positions = towers.family.positions(text)
    if slots > positions:
        raise ValueError(f"data.max_words={slots} exceeds the text tower's {positions} positions")
    if towers.family.fills_all_slots and slots < positions:
        raise ValueError(
            f"data.max_words={slots} must be {positions}: "
            f"{towers.family.name} takes a caption's vector from its last position"
        )


def load_tower(tower: Any, folder: str, *, setting: str, dropped: tuple[str, ...] = ()) -> Any:
    """Loads a model of transformers from a local folder in fp32.

    Args:
        tower: Class with `from_pretrained`.
        setting: Name of the setting that gives the folder, for errors.
        dropped: Prefixes of weights that may be missing, since the caller drops their module.

    Raises:
        ValueError: the folder holds no whole model.
    """
    try:
        with quiet_transformers():
            model, found = tower.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{setting}={folder!r} holds no whole model: {error}") from None
    # transformers initialises missing weights at random and only reports them.
    missing = [name for name in found["missing_keys"] if not name.startswith(dropped)]
    absent = sorted(map(str, [*missing, *found["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"{setting}={folder!r} lacks {len(absent)} weights of a tower, such as {absent[0]}"
        )
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers: it lists the other tower's weights as unexpected, and draws bars."""
    before, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bars:
            logging.enable_progress_bar()


def random_tower(tower: Any, folder: str) -> Any:
    """Builds a tower from the folder's config.json, with random weights."""
    return tower(tower.config_class.from_pretrained(folder, local_files_only=True))


def equal_widths(text: int, image: int) -> int:
    """Returns the width of the vectors of both towers.

    Raises:
        ValueError: the widths differ.
    """
    if image != text:
        raise ValueError(
            f"the text tower projects to width {text}, the image tower to {image}: "
            "their vectors cannot be compared"
        )
    return text


def whole_model(whole: Any, config: Any, weights: Weights) -> Any:
    """Builds the whole model of a family around existing weights, without a second copy."""
    with torch.device("meta"):
        built = whole(config)
    built.load_state_dict(weights, assign=True)
    return built


def cell_means(patches: Tensor, side: int) -> Tensor:
    """Means (N, side x side, W) of the patches (N, P, W) of each cell, row by row.

    That is adaptive average pooling, as a matrix product: torch's own backward adds in no fixed
    order on a GPU.

    Raises:
        ValueError: as `cells`.
    """
    rows = _patch_rows(patches)
    share = torch.zeros(side, rows, dtype=patches.dtype)
    for number, part in enumerate(cells(rows, side)):
        share[number, part.start : part.stop] = 1 / len(part)
    share = share.to(patches.device)
    grid = patches.unflatten(1, (rows, rows))
    return torch.einsum("gr,hc,nrcw->nghw", share, share, grid).flatten(1, 2)


def cell_patches(patches: Tensor, side: int) -> Tensor:
    """The patches (N, side x side, Q, W) of each cell, out of (N, P, W), row by row.

    Raises:
        ValueError: as `cells` of equal size.
    """
    rows = _patch_rows(patches)
    parts = cells(rows, side, equal=True)
    index = [[y * rows + x for y in up for x in along] for up in parts for along in parts]
    return patches[:, torch.tensor(index, device=patches.device)]


def _patch_rows(patches: Tensor) -> int:
    """Patches in a row of a square grid, of patches (N, P, W).

    Raises:
        ValueError: the grid is not square.
    """
    count = patches.shape[1]
    rows = math.isqrt(count)
    if rows * rows != count:
        raise ValueError(
            f"model.tokens_per_frame needs a square grid of patches; the tower has {count}"
        )
    return rows


@cache
def cells(rows: int, side: int, *, equal: bool = False) -> tuple[range, ...]:
    """Rows of patches of each row of cells. Neighbouring cells share one where it is needed.

    Raises:
        ValueError: there are more cells than patches; or, with `equal`, cells of unequal size.
    """
    if side > rows:
        raise ValueError(
            f"model.tokens_per_frame={side * side} exceeds the {rows} x {rows} patches of a frame"
        )
    found = tuple(range(n * rows // side, -(-(n + 1) * rows // side)) for n in range(side))
    if equal and len({len(part) for part in found}) > 1:
        raise ValueError(
            f"model.tokens_per_frame={side * side}: a grid of {rows} x {rows} patches has no"
            f" {side} x {side} cells of equal size"
        )
    return found
