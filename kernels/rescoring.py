"""Rescored similarities of a test set: dual softmax and QB-Norm.

Both use more than the query and the candidate, so their numbers are never mixed with raw ones. The
functions on whole tables are the definitions. The others give scores of the same order from sums
that a pass over tiles can collect.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOG_FLOOR = 1e5
"""Products below exp(-LOG_FLOOR) count as zero."""


def dual_softmax(
    similarity: Float[Tensor, "A C"], temperature: float
) -> tuple[Float[Tensor, "A C"], Float[Tensor, "A C"]]:
    """Similarity times its softmax over the other axis.

    From text to video s[a, c] softmax_a(s[:, c] / t): a video that fits many texts counts less.
    From video to text s[a, c] softmax_c(s[a, :] / t). Source: Cheng et al. 2021, "Improving
    Video-Text Retrieval by Multi-Stream Corpus Alignment and Dual Softmax Loss" (CAMoE), applied
    when the test set is ranked. It sees all queries of the test set at once.

    Args:
        similarity: Rows are texts, columns are videos.
        temperature: t, in units of the similarity.

    Returns:
        The scores from text to video, and those from video to text.
    """
    scaled = similarity / temperature
    return similarity * scaled.softmax(dim=0), similarity * scaled.softmax(dim=1)


def qb_norm(
    similarity: Float[Tensor, "A C"], bank: Float[Tensor, "N C"], beta: float
) -> Float[Tensor, "A C"]:
    """Querybank normalisation by the dynamic inverted softmax, from text to video.

    The activation set are the videos that rank first for a text of the bank. A row whose first
    video is in that set becomes exp(beta s[a, c]) / sum_n exp(beta bank[n, c]); another row stays
    as it is. Source: Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", CVPR
    2022, with k = 1.

    Args:
        similarity: Rows are texts of the test set, columns its videos.
        bank: Similarity of the bank's texts, which are training captions, with the same videos.
        beta: Inverse temperature; the paper's is 20.
    """
    in_set = torch.zeros(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    in_set[bank.argmax(dim=1)] = True
    is_normalised = in_set[similarity.argmax(dim=1)]
    normalised = (beta * similarity).exp() / (beta * bank).exp().sum(dim=0)
    return torch.where(is_normalised[:, None], normalised, similarity)


def dual_softmax_order(
    similarity: Float[Tensor, "*shape"], log_sum: Float[Tensor, "*shape"], temperature: float
) -> Float[Tensor, "*shape"]:
    """Scores that order as s exp(s / t - log_sum), in units of the similarity.

    A product with a softmax over many texts is tiny, so it is compared by its logarithm:
    sign(s) t (log |s| + s / t - log_sum + LOG_FLOOR), and 0 where the bracket is negative. Scores
    differ by about as much as the similarities do, and the tolerance of ties stays what it is.

    Args:
        log_sum: Log-sum-exp of similarity / t over the other axis.
    """
    similarity = similarity.double()
    size = similarity.abs().log() + similarity / temperature - log_sum
    return similarity.sign() * (size + LOG_FLOOR).clamp_min(0) * temperature


def qb_norm_order(
    similarity: Float[Tensor, "*shape"],
    log_sum: Float[Tensor, "*shape"],
    is_normalised: Bool[Tensor, "*shape"],
    beta: float,
) -> Float[Tensor, "*shape"]:
    """Scores that order within a row as those of `qb_norm`, in units of the similarity.

    Args:
        log_sum: Log-sum-exp of beta times the bank's similarities with the video.
        is_normalised: True where the row's first video is in the activation set.
    """
    similarity = similarity.double()
    return torch.where(is_normalised, similarity - log_sum / beta, similarity)


def add_log_sum(
    total: Float[Tensor, " Q"], scores: Float[Tensor, "A C"], factor: float, dim: int
) -> Float[Tensor, " Q"]:
    """Adds a tile to log-sum-exps of factor x score, which begin at -inf."""
    return torch.logaddexp(total, (scores.double() * factor).logsumexp(dim=dim))


def first_videos(
    scores: Float[Tensor, "A C"], best: Float[Tensor, " A"], video: Int[Tensor, " A"], first: int
) -> tuple[Float[Tensor, " A"], Int[Tensor, " A"]]:
    """Best score of each text and its video after a tile, of equal ones the lower number.

    Args:
        best: Best scores of earlier tiles, which hold lower numbers.
        video: Their videos.
        first: Number of the tile's first video.
    """
    value, column = scores.max(dim=1)
    is_better = value > best
    return torch.where(is_better, value, best), torch.where(is_better, column + first, video)
