"""Memory of the similarity and its loss on one rank, estimated from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tvr.trainer.config import Config, accumulation_steps
from tvr.trainer.memory import alive_torch
from tvr.trainer.memory import similarity_memory as alive
from tvr.trainer.memory.sizes import Sizes

# Peaks above this are met within ACCURACY; below it what is not counted shows (see `alive`).
FLOOR = 30_000_000
ACCURACY = 0.15


@dataclass(frozen=True, slots=True)
class Estimate:
    """The peak in bytes: when it is reached, and what is alive then, by name."""

    moment: str
    parts: dict[str, int]
    """The largest first."""
    inputs: int
    """Bytes of the features themselves, which are there before; not among the parts."""

    @property
    def above_inputs(self) -> int:
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        return self.inputs + self.above_inputs


def estimate(sizes: Sizes) -> Estimate:
    """Peak of one forward and backward, similarity and loss, on one rank."""
    ways = {"compiled": alive.compiled, "torch": alive_torch.tiles, "naive": alive_torch.naive}
    moments = alive.streamed if sizes.streamed else ways[sizes.backend]
    moment, parts = max(moments(sizes), key=lambda found: found[1].total())
    return Estimate(moment, dict(parts.most_common()), sizes.inputs)


def configured(config: Config, ranks: int, *, width: int, backend: str, device: str) -> Sizes:
    """The sizes of one loss of a run on so many ranks; `width` is that of the features.

    Captions fill all word slots but one, since none take more: they are packed, and long.

    Raises:
        ValueError: as `accumulation_steps`.
    """
    train = config.train
    micro_steps = accumulation_steps(train, ranks)
    texts = train.micro_batch * (micro_steps if train.gradient_cache else 1)
    words = config.data.max_words
    sizes = Sizes(
        texts=texts,
        videos=texts * ranks,
        words=words,
        frames=config.data.num_frames,
        width=width,
        interaction=config.model.interaction,
        neighbour_frames=config.model.neighbour_frames,
        backend=backend,
        # Features are float32 in every precision: `numerics.unit` raises them.
        bytes_per_number=4,
        word_share=1 - 1 / (texts * words),
        device=device,
    )
    return by_way(sizes, train.exchange, train.scores)


def by_way(
    sizes: Sizes, exchange: Literal["gather", "ring"], scores: Literal["keep", "stream"]
) -> Sizes:
    """The sizes where `objective` is told so; a single rank has nothing to exchange."""
    return replace(
        sizes,
        exchange=exchange if sizes.videos > sizes.texts else "none",
        streamed=exchange == "ring" or scores == "stream",
        keep_scores=scores == "keep",
    )
