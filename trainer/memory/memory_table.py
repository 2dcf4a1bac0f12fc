"""The estimated memory of a run's similarity and loss as a table: `tvr show-config --memory`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tvr.trainer.config import Config, TrainConfig
from tvr.trainer.memory.rank_memory import configured_sizes
from tvr.trainer.memory.similarity_memory import ACCURACY, FLOOR_BYTES, estimate_similarity
from tvr.trainer.memory.similarity_sizes import SimilaritySizes, with_exchange

EXCHANGES: tuple[Literal["gather", "ring"], ...] = ("gather", "ring")
SCORES: tuple[Literal["keep", "stream"], ...] = ("keep", "stream")
NOTE = (
    f"Estimated for full-length captions, within {ACCURACY:.0%} above {FLOOR_BYTES / 1e6:.0f} MB. "
    "--ranks sets another number of ranks."
)


def memory_table(config: Config, ranks: int) -> Group:
    """The buffers at the peak on one rank, and the totals of other settings.

    Raises:
        ValueError: The global batch does not fit the ranks, or a model folder cannot be used.
    """
    sizes = configured_sizes(config, ranks)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    peak = estimate_similarity(sizes)
    table.add_column(f"peak: {peak.phase}", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    for name, size in [*peak.buffers.items(), ("the features themselves", peak.inputs)]:
        table.add_row(name, _megabytes(size))
    table.add_row("total", _megabytes(peak.total), style="bold")
    table.add_section()
    for name, other in _other_settings(config.train, sizes):
        table.add_row(f"total with {name}", _megabytes(estimate_similarity(other).total))
    return Group(Text(_title(sizes, ranks)), table, Text(NOTE, style="dim"))


def _other_settings(
    train: TrainConfig, sizes: SimilaritySizes
) -> Iterator[tuple[str, SimilaritySizes]]:
    """Settings that could be chosen instead, by name."""
    for exchange, scores in product(EXCHANGES, SCORES):
        if (exchange, scores) != (train.exchange, train.scores):
            yield f"exchange {exchange}, scores {scores}", with_exchange(sizes, exchange, scores)
    yield "the naive definition", replace(sizes, backend="naive", streamed=False)


def _title(sizes: SimilaritySizes, ranks: int) -> str:
    backend = {"compiled": "compiled kernels", "torch": "torch tiles", "dense": "dense tiles"}[
        sizes.backend
    ]
    return (
        f"\nMemory of the similarity and its loss on one rank of {ranks}, without the model.\n"
        f"{sizes.texts} texts x {sizes.videos} videos, {sizes.words} words, {sizes.frames} frames, "
        f"width {sizes.width}, {backend}"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
