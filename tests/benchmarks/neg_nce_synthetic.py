"""NegNCE on growing global batches of synthetic features, without training.

Video i is a vector v_i drawn uniformly from the unit sphere, text i is
unit(a v_i + sqrt(1 - a^2) n_i) with n_i drawn likewise. So the cosine of a matched pair is a (the
"alignment") up to 1 / sqrt(D), the size of the cosine of two unrelated vectors. Measured for each
loss, over both directions:

    hard_share               hard negatives, of all off-diagonal pairs (a property of the features)
    hard_per_row             hard negatives of a text
    penalty_to_positive      the negative term over the rest of the loss
    penalty_gradient         the ratio of the norms of their gradients by the similarity
    positives_silent         positives with probability below 1/2 that get no gradient
    clamped_share            the share under the reference's clamp, as the loss reports it

Prints one line of JSON, every value as [mean over seeds, smallest, largest]; takes 2.5 minutes on
2 cores and 1.8 GB. neg_nce_plot.py plots the stored result:
neg_nce_synthetic.py > tests/benchmarks/results/neg_nce_synthetic.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from tvr.kernels.losses import LossTerms, row_info_nce, row_neg_nce
from tvr.kernels.numerics import unit
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK

LOSSES = ("info_nce", "neg_nce reference", "neg_nce log")
SCALE, WEIGHT = 100.0, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    powers = [2**power for power in range(7, 14)]
    parser.add_argument("--pairs", type=int, nargs="+", default=powers, help="global batches")
    parser.add_argument("--alignments", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    rows = []
    for alignment in options.alignments:
        for pairs in options.pairs:
            of_seeds = [
                of_one_draw(synthetic_similarity(pairs, alignment, options.width, seed))
                for seed in options.seeds
            ]
            for loss in LOSSES:
                case = {"alignment": alignment, "pairs": pairs, "loss": loss}
                rows.append(case | spread([found[loss] for found in of_seeds]))
            print(f"alignment {alignment}, {pairs} pairs: done", file=sys.stderr, flush=True)
    line = {
        "benchmark": "NegNCE on synthetic features: [mean over seeds, smallest, largest]",
        "width": options.width,
        "scale": SCALE,
        "weight": WEIGHT,
        "seeds": options.seeds,
        "rows": rows,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(line))


def synthetic_similarity(pairs: int, alignment: float, width: int, seed: int) -> Tensor:
    """Cosines (G, G) of texts (rows) and videos as the module's docstring defines."""
    draw = torch.Generator().manual_seed(seed)
    videos, noise = (unit(torch.randn(pairs, width, generator=draw)) for _ in range(2))
    texts = unit(alignment * videos + (1 - alignment**2) ** 0.5 * noise)
    return texts @ videos.T


def of_one_draw(similarity: Tensor) -> dict[str, dict[str, float]]:
    """The measures of every loss on one similarity (G, G)."""
    num_pairs = len(similarity)
    found = {}
    for loss in LOSSES:
        terms, gradient = with_gradient(similarity, loss, weight=WEIGHT)
        _, of_positives = with_gradient(similarity, loss, weight=0.0)
        penalty, hard = terms.penalty.item(), terms.hard_negatives_per_row.item()
        found[loss] = {
            "hard_share": hard / (num_pairs - 1),
            "hard_per_row": hard,
            "penalty_to_positive": penalty / (terms.loss.item() - penalty),
            "penalty_gradient": ((gradient - of_positives).norm() / of_positives.norm()).item(),
            "positives_silent": silent_positives(similarity, of_positives),
            "clamped_share": terms.clamped_share.item(),
        }
    return found


def with_gradient(similarity: Tensor, loss: str, *, weight: float) -> tuple[LossTerms, Tensor]:
    leaf = similarity.detach().requires_grad_()
    if loss == "info_nce":
        terms = row_info_nce(leaf, row_offset=0, collectives=SINGLE_RANK, scale=SCALE)
    else:
        terms = row_neg_nce(
            leaf,
            row_offset=0,
            collectives=SINGLE_RANK,
            mode=loss.split()[1],
            scale=SCALE,
            weight=weight,
        )
    (gradient,) = torch.autograd.grad(terms.loss, leaf)
    return terms, gradient


def silent_positives(similarity: Tensor, of_positives: Tensor) -> float:
    """Share of positives, of both directions, that lose and yet get no gradient; from the gradient.

    -log P_ii and -log Q_ii (texts to videos and back) should give the similarity of pair i the
    gradient -scale / 2G (1 - P_ii + 1 - Q_ii). The difference is the 1 - P of each silent
    direction: nearly 1 where the positive loses, nearly 0 where it has won, and rightly so.
    """
    num_pairs = len(similarity)
    logits = SCALE * similarity
    positives = logits.diagonal()
    rests = [-torch.expm1(positives - logits.logsumexp(dim)) for dim in (1, 0)]
    reached = of_positives.diagonal() * (-2 * num_pairs / SCALE)
    missing = rests[0] + rests[1] - reached
    return missing.round().sum().item() / (2 * num_pairs)


def spread(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean, minimum and maximum of each measure over the seeds."""
    statistic = (statistics.fmean, min, max)
    columns: dict[str, Any] = {name: [one[name] for one in found] for name in found[0]}
    return {
        name: [float(f"{f(values):.4g}") for f in statistic] for name, values in columns.items()
    }


if __name__ == "__main__":
    main()
