"""Time of TPM-CL on matched pairs against all pairs: forward + backward, predictors included.

The published code computes all pairs: in blocks of 8 texts x 16 videos, token weights and partial
samples of every text with every video, of which only the diagonal's hinge is used. Both ways run
the same functions here, so that only the number of pairs differs. All pairs are measured at small
batches and extrapolated as k x B^2, where k minimises the relative squared errors.

Prints one line of JSON. Other sizes: tpm_cl.py --pairs 256 --all-pairs 8 16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tvr.kernels.partial import LinearTokenWeights, tpm_cl
from tvr.kernels.weight_layers import TokenWeightLayer
from tvr.launchers.host_limits import host_cpus

# The published code's blocks.
BLOCK_TEXTS, BLOCK_VIDEOS = 8, 16


class TpmCl(nn.Module):
    """Predictors and hinge of B matched pairs, as the trainer's model joins them."""

    def __init__(self, num_words: int, num_frames: int, width: int) -> None:
        super().__init__()
        self.word_predictor = LinearTokenWeights(num_frames, num_words, width)
        self.frame_predictor = LinearTokenWeights(1, num_frames, width)
        self.frame_weight = TokenWeightLayer(width)

    def forward(self, sentence: Tensor, words: Tensor, frames: Tensor) -> Tensor:
        return tpm_cl(
            sentence,
            words,
            frames,
            frames.new_ones(frames.shape[:2], dtype=torch.long),
            word_weights=self.word_predictor(frames, words),
            frame_weights=self.frame_predictor(sentence[:, None], frames),
            frame_weight_layer=self.frame_weight,
        ).hinge


def matched_loss(model: TpmCl, sentence: Tensor, words: Tensor, frames: Tensor) -> Tensor:
    return model(sentence, words, frames).mean()


def all_pairs_loss(model: TpmCl, sentence: Tensor, words: Tensor, frames: Tensor) -> Tensor:
    """The same value from all B x B pairs."""
    rows = []
    for texts in zip(sentence.split(BLOCK_TEXTS), words.split(BLOCK_TEXTS), strict=True):
        row = [_block(model, *texts, videos) for videos in frames.split(BLOCK_VIDEOS)]
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows).diagonal().mean()


def _block(model: TpmCl, sentence: Tensor, words: Tensor, frames: Tensor) -> Tensor:
    num_texts, num_videos = len(sentence), len(frames)
    hinge = model(
        sentence.repeat_interleave(num_videos, dim=0),
        words.repeat_interleave(num_videos, dim=0),
        frames.repeat(num_texts, 1, 1),
    )
    return hinge.view(num_texts, num_videos)


def seconds(
    loss: Callable[..., Tensor], pairs: int, *, words: int, frames: int, width: int, repeats: int
) -> tuple[list[float], float]:
    """Seconds of each repeat after a warm-up, and the loss."""
    torch.manual_seed(0)
    model = TpmCl(words, frames, width)
    shapes = ((pairs,), (pairs, words), (pairs, frames))
    features = [normalize(torch.randn(*shape, width), dim=-1).requires_grad_() for shape in shapes]
    found, value = [], 0.0
    for _ in range(repeats + 1):
        started = time.perf_counter()
        out = loss(model, *features)
        out.backward()
        found.append(time.perf_counter() - started)
        value = out.item()
    return found[1:], value


def quadratic_fit(sizes: list[int], times: list[float]) -> tuple[float, list[float]]:
    """k of time = k x size^2 with the least relative squares, and the relative residuals."""
    ratios = [size**2 / seconds for size, seconds in zip(sizes, times, strict=True)]
    k = sum(ratios) / sum(ratio**2 for ratio in ratios)
    return k, [k * ratio - 1 for ratio in ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=512, help="of the large batch")
    parser.add_argument("--all-pairs", type=int, nargs="+", default=[8, 16, 32], help="batches")
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in ("words", "frames", "width", "repeats")}

    def timed(loss: Callable[..., Tensor], pairs: int) -> dict[str, Any]:
        found, value = seconds(loss, pairs, **sizes)
        return {
            "pairs": pairs,
            "median_s": statistics.median(found),
            "spread_s": [min(found), max(found)],
            "loss": value,
        }

    matched = timed(matched_loss, options.pairs)
    small = [timed(all_pairs_loss, pairs) for pairs in options.all_pairs]
    k, residuals = quadratic_fit(options.all_pairs, [one["median_s"] for one in small])
    extrapolated = k * options.pairs**2
    line = {
        "benchmark": "TPM-CL kind 4, learned frame weights, float32, forward + backward",
        "sizes": sizes,
        "matched": matched,
        "all_pairs": small,
        "all_pairs_extrapolated": {
            "pairs": options.pairs,
            "s": extrapolated,
            "relative_residuals": residuals,
        },
        "ratio": matched["median_s"] / extrapolated,
        "machine": {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "cores": host_cpus().usable,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    print(json.dumps(rounded(line)))


def rounded(x: Any) -> Any:
    """Every float within to four significant digits."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
