"""Checks of the similarity's arguments. A message names the argument, its value and the range."""

from torch import Tensor

INTERACTIONS = ("ti", "wti", "att_ti", "att_wti")
MATCHINGS = ("two_way", "words_to_frames")


def check_presence(
    interaction: str,
    matching: str,
    sentence: Tensor | None,
    words: Tensor | None,
    word_logits: Tensor | None,
    frame_logits: Tensor | None,
) -> None:
    """Raises ValueError for an unknown name, or if a tensor that the similarity needs is None."""
    if interaction not in INTERACTIONS:
        raise ValueError(f"interaction={interaction!r} is unknown; use one of {INTERACTIONS}")
    check_matching(matching)
    weighted = interaction.endswith("wti")
    needed = {
        "sentence": sentence is None and not interaction.startswith("att_"),
        "words": words is None and interaction.startswith("att_"),
        "word_logits": word_logits is None and interaction == "att_wti",
        "frame_logits": frame_logits is None and weighted and matching == "two_way",
    }
    missing = [name for name, is_missing in needed.items() if is_missing]
    if missing:
        raise ValueError(f"interaction={interaction!r} needs {' and '.join(missing)}, not None")


def check_matching(matching: str) -> None:
    """Raises ValueError for an unknown matching."""
    if matching not in MATCHINGS:
        raise ValueError(f"matching={matching!r} is unknown; use one of {MATCHINGS}")


def check_shapes(
    sentence: Tensor | None,
    words: Tensor | None,
    frames: Tensor,
    word_mask: Tensor,
    frame_mask: Tensor,
    word_logits: Tensor | None,
    frame_logits: Tensor | None,
) -> None:
    """Raises ValueError for a shape that disagrees with those of `word_mask` and `frames`."""
    if frames.ndim != 3 or word_mask.ndim != 2:
        raise ValueError(
            f"frames must be (C, F, D) and word_mask (A, T), but their shapes are "
            f"{tuple(frames.shape)} and {tuple(word_mask.shape)}"
        )
    (num_texts, num_words), (num_videos, num_frames, width) = word_mask.shape, frames.shape
    expected = {
        "sentence": (sentence, (num_texts, width), "(A, D)"),
        "words": (words, (num_texts, num_words, width), "(A, T, D)"),
        "frame_mask": (frame_mask, (num_videos, num_frames), "(C, F)"),
        "word_logits": (word_logits, (num_texts, num_words), "(A, T)"),
        "frame_logits": (frame_logits, (num_videos, num_frames), "(C, F)"),
    }
    for name, (tensor, shape, letters) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but must be {letters} = {shape}, "
                f"from word_mask (A, T) and frames (C, F, D)"
            )


def check_mask(name: str, mask: Tensor, *, largest: int, sentence: bool) -> None:
    """Raises ValueError for a value outside 0 to `largest`, or a row without a valid slot.

    With `sentence`, the first slot must be valid, because it is the sentence's mask. The mask lies
    on the host.
    """
    values = mask.numpy()
    wrong = (values < 0) | (values > largest)
    if wrong.any():
        row, slot = (int(found[0]) for found in wrong.nonzero())
        raise ValueError(
            f"{name}[{row}, {slot}] is {int(values[row, slot])}; allowed are 0 to {largest}"
        )
    filled = values > 0
    empty = ~filled[:, :1].any(axis=1) if sentence else ~filled.any(axis=1)
    if not empty.any():
        return
    row = int(empty.argmax())
    if filled[row].any():
        raise ValueError(
            f"{name}[{row}, 0] is 0, but the first slot is the sentence's mask and must be valid: "
            "pad texts on the right"
        )
    raise ValueError(f"{name}[{row}] has no valid slot: leave out empty texts and videos")
