"""How hard each loss pushes on hard negatives as the global batch grows, without training.

The features are those of neg_nce_synthetic.py: there the share of hard negatives among all pairs is
a property of the features (the alignment) and does not depend on the batch. Measured for each loss,
with s the similarities:

    absolute    sum over hard negatives of |dL / ds| / scale. The mean of both directions; 1 is
                InfoNCE's largest possible value: all of P lies on hard negatives.
    relative    absolute, divided by that of InfoNCE on the same similarities
    positives   sum over matched pairs of |dL / ds| / scale

`relative` tells whether a penalty on hard negatives still counts beside InfoNCE at this batch.
`variation` is its largest value over the batches divided by its smallest, minus 1. The bias of the
sigmoid loss gives a pair of the alignment's similarity the probability 1/2.

Prints one line of JSON; values are [mean over seeds, smallest, largest]. 8,192 pairs take 2 GB:
relative_gradients.py > tests/benchmarks/results/relative_gradients.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from typing import Any

import torch
from neg_nce_synthetic import synthetic_similarity
from torch import Tensor

from tvr.kernels.losses import row_loss
from tvr.kernels.row_loss.loss_rule import LossRule
from tvr.kernels.row_loss.online_softmax import SINGLE_RANK, hard_negatives

SCALE, WEIGHT, BASE = 100.0, 0.5, "info_nce"


def losses(alignment: float) -> dict[str, LossRule]:
    """The losses by name."""
    return {
        BASE: LossRule(None, scale=SCALE),
        "neg_nce reference": LossRule("reference", scale=SCALE, weight=WEIGHT),
        "neg_nce log": LossRule("log", scale=SCALE, weight=WEIGHT),
        "neg_nce set": LossRule("set", scale=SCALE, weight=WEIGHT),
        "info_nce, hardness 0.5": LossRule(None, scale=SCALE, hardness=0.5),
        "info_nce, hardness 1": LossRule(None, scale=SCALE, hardness=1.0),
        "neg_nce set, hardness 0.5": LossRule("set", scale=SCALE, weight=WEIGHT, hardness=0.5),
        "sigmoid": LossRule(None, scale=SCALE, sigmoid=True, sigmoid_bias=-alignment * SCALE),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--alignments", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=512)
    names = tuple(losses(0.0))
    parser.add_argument("--losses", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    rows, variation = [], {}
    for alignment in options.alignments:
        # InfoNCE is the measure of the others.
        chosen = {BASE, *options.losses}
        rules = {loss: rule for loss, rule in losses(alignment).items() if loss in chosen}
        for pairs in options.pairs:
            of_seeds = [
                of_one_draw(synthetic_similarity(pairs, alignment, options.width, seed), rules)
                for seed in options.seeds
            ]
            for loss in rules:
                case = {"alignment": alignment, "pairs": pairs, "loss": loss}
                rows.append(case | spread([found[loss] for found in of_seeds]))
            print(f"alignment {alignment}, {pairs} pairs: done", file=sys.stderr, flush=True)
        variation[str(alignment)] = {
            loss: relative_variation(rows, loss, alignment) for loss in rules
        }
    line = {
        "benchmark": "push on hard negatives: [mean over seeds, smallest, largest]",
        "width": options.width,
        "scale": SCALE,
        "weight": WEIGHT,
        "seeds": options.seeds,
        "rows": rows,
        "variation": variation,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    print(json.dumps(line))


def of_one_draw(scores: Tensor, rules: dict[str, LossRule]) -> dict[str, dict[str, float]]:
    """The measures of every loss on one similarity (G, G)."""
    hard = hard_negatives(scores, row_offset=0, collectives=SINGLE_RANK)
    num_pairs = len(scores)
    found: dict[str, dict[str, float]] = {}
    for loss, rule in rules.items():
        leaf = scores.detach().requires_grad_()
        terms = row_loss(leaf, rule, row_offset=0, collectives=SINGLE_RANK)
        (gradient,) = torch.autograd.grad(terms.loss, leaf)
        positives = gradient.diagonal().abs().sum(dtype=torch.float64).item() / SCALE
        push = gradient.masked_fill_(~hard, 0).abs_()
        absolute = push.sum(dtype=torch.float64).item() / SCALE
        base = found[BASE]["absolute"] if found else absolute
        found[loss] = {
            "absolute": absolute,
            "relative": absolute / base,
            "positives": positives,
            "hard_share": hard.sum().item() / (num_pairs * (num_pairs - 1)),
        }
    return found


def spread(found: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean, minimum and maximum of each measure over the seeds."""
    statistic = (statistics.fmean, min, max)
    return {
        name: [float(f"{f([one[name] for one in found]):.4g}") for f in statistic]
        for name in found[0]
    }


def relative_variation(rows: list[dict[str, Any]], loss: str, alignment: float) -> float:
    """Largest relative push over the batches, divided by the smallest, minus 1."""
    case = (loss, alignment)
    values = [row["relative"][0] for row in rows if (row["loss"], row["alignment"]) == case]
    return float(f"{max(values) / min(values) - 1:.3g}")


if __name__ == "__main__":
    main()
