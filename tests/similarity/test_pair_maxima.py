"""The terms behind one similarity: they follow the method's formulas and add up to the score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.partial_inputs import partial_inputs
from builders.similarity_inputs import similarity_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvr.kernels.explanation import PairMaxima, pair_maxima
from tvr.kernels.partial import select_tokens
from tvr.kernels.reference import INTERACTIONS, MATCHINGS, dmae_similarity

SIZES = st.integers(1, 5)


def one_pair(words: int, frames: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return similarity_inputs(1, 1, words, frames, seed=seed, dtype=dtype)


def total(found: PairMaxima) -> Tensor:
    """The sum of all terms."""
    sets = [found.sentence] + ([] if found.words is None else [found.words])
    return sum((x.token_terms.sum() + x.frame_terms.sum() for x in sets), torch.zeros(()))


@given(
    words=SIZES,
    frames=SIZES,
    seed=st.integers(0, 10_000),
    interaction=st.sampled_from(INTERACTIONS),
    matching=st.sampled_from(MATCHINGS),
    neighbour_frames=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_terms_add_up_to_the_reference(
    words: int,
    frames: int,
    seed: int,
    interaction: str,
    matching: str,
    neighbour_frames: bool,
    dtype: torch.dtype,
) -> None:
    pair = one_pair(words, frames, seed, dtype)
    options: dict[str, Any] = {"interaction": interaction, "neighbour_frames": neighbour_frames}
    options["matching"] = matching
    expected = dmae_similarity(**pair, **options)[0, 0]
    found = pair_maxima(**pair, **options)
    assert abs(total(found) - expected) < 1e-6
    assert abs(found.score - expected) < 1e-6
    assert found.score.dtype == dtype
    plain_loops(found, pair, interaction, neighbour_frames, both_ways=matching == "two_way")


def plain_loops(
    found: PairMaxima,
    pair: dict[str, Tensor],
    interaction: str,
    neighbour_frames: bool,
    *,
    both_ways: bool,
) -> None:
    """Compares every field with the formulas of the method, written as loops over numbers."""
    words, frames = pair["words"][0].tolist(), pair["frames"][0].tolist()
    word_mask, frame_mask = pair["word_mask"][0].tolist(), pair["frame_mask"][0].tolist()
    count = len(frames)

    def dot(x: list[float], y: list[float]) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True))

    def cosines(tokens: list[list[float]], mask: list[int]) -> list[list[float]]:
        return [
            [
                dot(token, frame) if valid and shown else 0.0
                for frame, shown in zip(frames, frame_mask, strict=True)
            ]
            for token, valid in zip(tokens, mask, strict=True)
        ]

    strength, neighbour = [], []
    for f in range(count):
        row = [
            dot(frames[f], frames[g]) if g != f and frame_mask[f] and frame_mask[g] else 0.0
            for g in range(count)
        ]
        strength.append(max(row) if neighbour_frames else 0.0)
        neighbour.append(row.index(max(row)) if neighbour_frames else f)
    assert found.neighbour.tolist() == neighbour
    assert found.neighbour_weight.tolist() == pytest.approx([0.5 * r for r in strength], abs=1e-5)

    logits = pair["frame_logits"][0] if interaction.endswith("wti") else None
    shares = weights_of(frame_mask, logits) if both_ways else [0.0] * count
    assert found.frame_weights.tolist() == pytest.approx(shares, abs=1e-5)

    reads_words = interaction.startswith("att_")
    sets = [(found.sentence, cosines(pair["sentence"].tolist(), [1]), [1.0], True)]
    assert found.words is not None
    logits = pair["word_logits"][0] if interaction.endswith("wti") else None
    weights = weights_of(word_mask, logits) if reads_words else [0.0] * len(words)
    sets.append((found.words, cosines(words, word_mask), weights, reads_words))
    # The sets are averaged, and so are the two sides.
    part_of_score = (0.5 if reads_words else 1.0) * (0.5 if both_ways else 1.0)
    for part, scores, weights, is_read in sets:
        for row, expected in zip(part.similarity.tolist(), scores, strict=True):
            assert row == pytest.approx(expected, abs=1e-5)
        for t, row in enumerate(scores):
            # Away from rounding, the first of the largest.
            j = int(part.best_frame[t])
            assert row[j] == pytest.approx(max(row), abs=1e-6)
            assert all(abs(row[f] - row[j]) > 1e-9 or row[f] < row[j] for f in range(j))
            helped = 0.5 * strength[j] * row[neighbour[j]]
            assert float(part.neighbour_terms[t]) == pytest.approx(
                part_of_score * weights[t] * helped, abs=1e-5
            )
            assert float(part.token_terms[t]) == pytest.approx(
                part_of_score * weights[t] * (row[j] + helped), abs=1e-5
            )
        for f in range(count):
            column = [row[f] for row in scores]
            i = int(part.best_token[f])
            assert column[i] == pytest.approx(max(column), abs=1e-6)
            term = part_of_score * shares[f] * max(column) if is_read else 0.0
            assert float(part.frame_terms[f]) == pytest.approx(term, abs=1e-5)
        assert part.weights.tolist() == pytest.approx(weights, abs=1e-5)


def weights_of(mask: list[int], logits: Tensor | None) -> list[float]:
    if logits is None:
        return [value / sum(mask) for value in mask]
    powers = [
        float(torch.exp(logit)) if value else 0.0 for logit, value in zip(logits, mask, strict=True)
    ]
    return [value * power / sum(powers) for value, power in zip(mask, powers, strict=True)]


def test_a_pair_computed_by_hand() -> None:
    """Two words, three frames of width 2, no weights: every number is small enough to check."""
    pair = {
        "sentence": torch.tensor([[1.0, 0.0]]),
        "words": torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]),
        "frames": torch.tensor([[[0.6, 0.8], [1.0, 0.0], [0.8, 0.6]]]),
        "word_mask": torch.tensor([[1, 2]]),
        "frame_mask": torch.tensor([[1, 1, 1]]),
    }
    found = pair_maxima(**pair, interaction="att_ti")
    words = found.words
    assert words is not None
    assert words.best_frame.tolist() == [1, 0]
    assert words.best_token.tolist() == [1, 0, 0]
    # Frames 0 and 2 have cosine 0.96, frame 1 has 0.8 with frame 2.
    assert found.neighbour.tolist() == [2, 2, 0]
    assert found.neighbour_weight.tolist() == pytest.approx([0.48, 0.4, 0.48])
    assert words.weights.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert words.token_terms.tolist() == pytest.approx(
        [(1 + 0.4 * 0.8) / 3 / 4, 2 * (0.8 + 0.48 * 0.6) / 3 / 4]
    )
    assert words.frame_terms.tolist() == pytest.approx([0.8 / 12, 1 / 12, 0.8 / 12])
    assert found.score.item() == pytest.approx(float(dmae_similarity(**pair, interaction="att_ti")))


def test_the_first_of_equal_frames_and_words_is_named() -> None:
    frame, word = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    found = pair_maxima(
        word[None],
        word.expand(1, 3, 2),
        frame.expand(1, 4, 2),
        torch.ones(1, 3, dtype=torch.long),
        torch.ones(1, 4, dtype=torch.long),
        interaction="att_ti",
    )
    assert found.words is not None
    assert found.words.best_frame.tolist() == [0, 0, 0]
    assert found.words.best_token.tolist() == [0, 0, 0, 0]
    assert found.neighbour.tolist() == [1, 0, 0, 0]


def test_padding_wins_over_negative_similarities() -> None:
    away = torch.tensor([[-1.0, 0.0]])
    found = pair_maxima(
        -away,
        -away[None].expand(1, 2, 2),
        away[None].expand(1, 2, 2),
        torch.tensor([[1, 0]]),
        torch.tensor([[1, 0]]),
        interaction="att_ti",
    )
    assert found.words is not None
    assert found.words.best_frame.tolist() == [1, 0]
    assert found.words.best_token.tolist() == [1, 0]
    # Only the sentence's frame side has no padding to win: half of half of -1.
    assert found.score.item() == pytest.approx(-0.25)


@given(seed=st.integers(0, 1000), threshold=st.floats(0.1, 0.9))
def test_the_selector_removes_what_tpm_cl_removes(seed: int, threshold: float) -> None:
    pairs = partial_inputs(1, 5, 4, seed=seed)
    found = pair_maxima(
        pairs["sentence"],
        pairs["words"],
        pairs["frames"],
        torch.ones(1, 5, dtype=torch.long),
        pairs["frame_mask"],
        interaction="att_ti",
        selector_word_weights=pairs["word_weights"],
        selector_frame_weights=pairs["frame_weights"],
        threshold=threshold,
    )
    for removed, tokens, weights in (
        (found.removed_words, pairs["words"], pairs["word_weights"]),
        (found.removed_frames, pairs["frames"], pairs["frame_weights"]),
    ):
        assert removed is not None
        kept, _ = select_tokens(tokens, weights, threshold)
        assert removed.tolist() == (kept[0] == 0).all(dim=1).tolist()


def test_words_that_are_not_read_have_no_part_in_the_score() -> None:
    pair = one_pair(4, 3, 1, torch.float64)
    for interaction in ("ti", "wti"):
        found = pair_maxima(**pair, interaction=interaction)
        assert found.words is not None
        assert not found.words.token_terms.any()
        assert not found.words.frame_terms.any()
        alone = pair_maxima(**(pair | {"words": None}), interaction=interaction)
        assert alone.words is None
        assert alone.score == found.score
    assert found.removed_words is None
    assert found.removed_frames is None


def test_several_pairs_and_missing_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 videos"):
        pair_maxima(**similarity_inputs(2, 1))
    with pytest.raises(ValueError, match="words"):
        pair_maxima(**(one_pair(3, 3, 0, torch.float32) | {"words": None}))
