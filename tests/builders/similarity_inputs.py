"""Random inputs of the similarity, and comparisons of its values and gradients."""

import torch
from torch import Tensor

from tvr.kernels.numerics import unit

FEATURES = ("sentence", "words", "frames", "word_logits", "frame_logits")


def similarity_inputs(
    texts: int = 5,
    videos: int = 4,
    words: int = 6,
    frames: int = 4,
    *,
    width: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Random arguments of `dmae_similarity`, with texts and videos of 1 to all valid slots."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def ragged(rows: int, slots: int) -> Tensor:
        lengths = torch.randint(1, slots + 1, (rows, 1), generator=draw)
        return (torch.arange(slots) < lengths).long()

    doubled = (torch.rand(texts, words, generator=draw) < 0.3).long()
    doubled[:, 0] = 0
    word_mask = ragged(texts, words)
    features = {
        "sentence": unit(normal(texts, width)),
        "words": unit(normal(texts, words, width)),
        "frames": unit(normal(videos, frames, width)),
        "word_logits": normal(texts, words),
        "frame_logits": normal(videos, frames),
    }
    masks = {"word_mask": word_mask * (1 + doubled), "frame_mask": ragged(videos, frames)}
    return {name: x.to(dtype) for name, x in features.items()} | masks


def scores_and_gradients(
    function, arguments: dict[str, Tensor], *, autocast: bool = False, **options
) -> dict[str, Tensor]:
    """The similarity, and the gradients of a fixed random weighted sum of it."""
    leaves = {n: x.clone().requires_grad_(n in FEATURES) for n, x in arguments.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = function(**leaves, **options)
    draw = torch.Generator().manual_seed(1)
    weighting = torch.randn(scores.shape, generator=draw, dtype=torch.float64).to(scores.device)
    (scores * weighting.to(scores.dtype)).sum().backward()
    gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return {"similarity": scores.detach()} | {n: gradients[n] for n in FEATURES}


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerances) -> None:
    """Asserts equality of named tensors within the tolerances."""
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )
