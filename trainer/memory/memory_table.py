"""The estimated memory of a configured run's similarity and loss, as a table for a person."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tvr.trainer.config import Config, ModelConfig
from tvr.trainer.memory.environment import device, similarity_backend
from tvr.trainer.memory.memory import ACCURACY, FLOOR, by_way, configured, estimate
from tvr.trainer.memory.sizes import Sizes

EXCHANGES: tuple[Literal["gather", "ring"], ...] = ("gather", "ring")
SCORES: tuple[Literal["keep", "stream"], ...] = ("keep", "stream")
HOW = (
    f"Estimated for full-length captions, to {ACCURACY:.0%} where above {FLOOR / 1e6:.0f} MB. "
    "Another number of ranks: --ranks."
)


def memory_table(config: Config, ranks: int) -> Group:
    """What is alive at the peak on one rank, and what other settings would take.

    Raises:
        ValueError: a global batch that does not fit the ranks, or a CLIP folder without width.
    """
    backend, _ = similarity_backend(config)
    sizes = configured(
        config, ranks, width=embed_width(config.model), backend=backend, device=device()
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    peak = estimate(sizes)
    table.add_column(f"peak: {peak.moment}", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    for name, size in [*peak.parts.items(), ("the features themselves", peak.inputs)]:
        table.add_row(name, _megabytes(size))
    table.add_row("total", _megabytes(peak.total), style="bold")
    table.add_section()
    for name, other in _instead(config, sizes):
        table.add_row(f"total with {name}", _megabytes(estimate(other).total))
    return Group(Text(_title(sizes, ranks)), table, Text(HOW, style="dim"))


def _instead(config: Config, sizes: Sizes) -> Iterator[tuple[str, Sizes]]:
    """What could be chosen in place of the configured way."""
    for exchange, scores in product(EXCHANGES, SCORES):
        if (exchange, scores) != (config.train.exchange, config.train.scores):
            yield f"exchange {exchange}, scores {scores}", by_way(sizes, exchange, scores)
    yield "the naive definition", replace(sizes, backend="naive", streamed=False)


def embed_width(model: ModelConfig) -> int:
    """Length of the features, from the folder's config.json where there is one; no weights.

    Raises:
        ValueError: the folder holds no CLIP or SigLIP.
    """
    if model.pretrained is None:
        return model.towers.embed_width
    from tvr.trainer.model.towers import pretrained_width

    return pretrained_width(model.pretrained)


def _title(sizes: Sizes, ranks: int) -> str:
    tiles = {"compiled": "compiled kernels", "torch": "torch tiles"}[sizes.backend]
    return (
        f"\nMemory of the similarity and its loss on one rank of {ranks}; the model comes on top.\n"
        f"{sizes.texts} texts x {sizes.videos} videos, {sizes.words} words, {sizes.frames} frames, "
        f"width {sizes.width}, {tiles}"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
