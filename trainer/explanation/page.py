"""Draws an explanation as one self-contained HTML page; imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tvr.data_prep.html_page import page_template, picture_strip
from tvr.trainer.explanation.record import NOTHING, Explanation

THUMBNAIL_HEIGHT = 96
TEMPLATE = "explanation.html.jinja"
PART_TITLES = {
    "sentence": "sentence, best frame",
    "frames_of_sentence": "frames, with the sentence",
    "words": "words, best frames",
    "frames_of_words": "frames, best words",
}


def explanation_page(explanation: Explanation, frames: np.ndarray, *, title: str) -> str:
    """Returns one HTML document: the heat map of words and frames, with all choices and weights.

    It needs no JavaScript and no network. Text of the caption is shown as text.

    Args:
        frames: (F, H, W, 3) uint8 pictures of the explanation's frames. For a model that averages
            the frames, all that it averaged.
        title: Heading, such as the key of the video.

    Raises:
        ValueError: the number of pictures does not fit the explanation.
    """
    count = len(explanation.frame_weights)
    averaged = count == 1 and len(frames) > 1
    if len(frames) != count and not averaged:
        raise ValueError(f"{len(frames)} pictures for an explanation of {count} frames")
    low, high = _range(explanation)
    groups = [frames] if averaged else [frames[row : row + 1] for row in range(count)]
    return page_template(Path(__file__).parent, TEMPLATE).render(
        title=title,
        caption=explanation.caption,
        model=explanation.model,
        score=explanation.score,
        tiles=[(PART_TITLES[name], value) for name, value in explanation.parts.items()],
        sentences=_in_words(explanation),
        columns=[
            _column(explanation, row, [Image.fromarray(each) for each in group])
            for row, group in enumerate(groups)
        ],
        sentence=_sentence_row(explanation),
        rows=[_word_row(explanation, row) for row in range(len(explanation.words))],
        reads_words=explanation.reads_words,
        frames_choose=explanation.frames_choose,
        has_neighbours=bool(explanation.neighbour_weight.any()),
        removal=_removal(explanation),
        low=low,
        high=high,
        # Where all cosines are nearly equal, two digits would not tell them apart.
        digits=3 if high - low < 0.1 else 2,
    )


def _column(found: Explanation, row: int, pictures: list[Image.Image]) -> dict[str, Any]:
    neighbour, best = int(found.neighbour_frame[row]), int(found.best_word[row])
    masked = found.masked_frames
    return {
        "number": row + 1,
        "picture": picture_strip(pictures, THUMBNAIL_HEIGHT),
        "time": _time(found, row),
        "is_removed": masked is not None and bool(masked[row]),
        "neighbour": None if neighbour == NOTHING else neighbour + 1,
        "neighbour_weight": float(found.neighbour_weight[row]),
        "best_word": "nothing" if best == NOTHING else found.words[best],
        "weight": float(found.frame_weights[row]),
        "weight_share": _share(found.frame_weights, row),
        "term": float(found.sentence_frame_terms[row] + found.frame_terms[row]),
    }


def _sentence_row(found: Explanation) -> dict[str, Any]:
    cells = _cells(found, found.sentence_similarity, found.sentence_frame, best_of=set())
    return {"cells": cells, "term": found.sentence_term}


def _word_row(found: Explanation, row: int) -> dict[str, Any]:
    masked = found.masked_words
    chosen = np.flatnonzero(found.best_word == row) if found.frames_choose else ()
    best_of = {int(frame) for frame in chosen}
    return {
        "text": found.words[row],
        "is_special": found.is_special[row],
        "continues": found.continues_word[row],
        "is_removed": masked is not None and bool(masked[row]),
        "weight": float(found.word_weights[row]),
        "weight_share": _share(found.word_weights, row),
        "term": float(found.word_terms[row]),
        "cells": _cells(found, found.similarity[row], int(found.best_frame[row]), best_of=best_of),
    }


def _cells(
    found: Explanation, similarity: np.ndarray, best: int, best_of: set[int]
) -> list[dict[str, Any]]:
    """The cells of one token: colour strength, and the marks of what it chose."""
    low, high = _range(found)
    neighbour = NOTHING if best == NOTHING else int(found.neighbour_frame[best])
    return [
        {
            "value": float(value),
            "strength": round(0.05 + 0.95 * (float(value) - low) / max(high - low, 1e-9), 3),
            "is_best": frame == best,
            "helps": (float(found.neighbour_weight[best] * value) if frame == neighbour else None),
            "is_best_word": frame in best_of,
        }
        for frame, value in enumerate(similarity)
    ]


def _range(found: Explanation) -> tuple[float, float]:
    """The smallest and the largest cosine of the table, between which the colours lie."""
    tables = (found.similarity, found.sentence_similarity)
    return min(float(x.min()) for x in tables), max(float(x.max()) for x in tables)


def _share(values: np.ndarray, row: int) -> float:
    """Length of a bar: 1 for the largest value."""
    largest = float(values.max())
    return round(float(values[row]) / largest, 3) if largest > 0 else 0.0


def _time(found: Explanation, row: int) -> str:
    seconds = float(found.frame_times[row])
    if not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:04.1f}" if minutes else f"{rest:.1f} s"


def _in_words(found: Explanation) -> list[str]:
    """The decomposition of the score as sentences."""
    parts = found.parts
    said = [f"The sentence's best frame gives {parts['sentence']:.3f}"]
    if found.frames_choose:
        of_frames = parts["frames_of_sentence"]
        said.append(f"the frames' similarities with the sentence give {of_frames:.3f}")
    text = f"The similarity of {found.score:.3f} is a sum. {', and '.join(said)}."
    helped = found.sentence_neighbour_term
    if found.reads_words:
        helped += float(found.neighbour_terms.sum())
        said = [f" The words' best frames give {parts['words']:.3f}"]
        if found.frames_choose:
            said.append(f"the frames' best words give {parts['frames_of_words']:.3f}")
        text += f"{', and '.join(said)}."
    else:
        text += f" The interaction {found.interaction} does not read the words."
    if not found.frames_choose:
        text += f" The matching {found.matching} counts no frame's best word."
    sentences = [text]
    if found.neighbour_weight.any():
        sentences.append(f"Of this sum, {helped:.3f} come from neighbour frames.")
    spoken = [row for row, special in enumerate(found.is_special) if not special]
    if found.reads_words and spoken:
        top = max(spoken, key=lambda row: float(found.word_terms[row]))
        frame = int(found.best_frame[top])
        if frame != NOTHING:
            time = _time(found, frame)
            at = f" at {time}" if time else ""
            sentences.append(
                f"The word that adds most is \u201c{found.words[top]}\u201d, with"
                f" {found.word_terms[top]:.3f}; its best frame is frame {frame + 1}{at}."
            )
    return sentences


def _removal(found: Explanation) -> str | None:
    """What TPM-CL removes, as a sentence; None for a model without its predictors."""
    if found.masked_words is None or found.masked_frames is None:
        return None
    words = [f"\u201c{found.words[row]}\u201d" for row in np.flatnonzero(found.masked_words)]
    frames = [f"frame {row + 1}" for row in np.flatnonzero(found.masked_frames)]
    removed = [
        f"{_listed(names)} from the {where}"
        for names, where in ((words, "caption"), (frames, "video"))
        if names
    ]
    return (
        "In training, TPM-CL compares a pair with a partial one that lacks the tokens of largest"
        f" predicted weight. From this pair it would remove {' and '.join(removed) or 'nothing'}."
        " The score does not depend on it."
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
