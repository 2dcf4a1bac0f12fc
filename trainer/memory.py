"""Memory of the similarity and its loss on one rank, estimated from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

from tvr.trainer import alive
from tvr.trainer.sizes import Sizes

# Peaks above this are met within 15 %; below it what is not counted shows (see `alive`).
FLOOR = 30_000_000


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
    ways = {"compiled": alive.compiled, "torch": alive.tiles, "naive": alive.naive}
    moments = alive.streamed if sizes.streamed else ways[sizes.backend]
    moment, parts = max(moments(sizes), key=lambda found: found[1].total())
    return Estimate(moment, dict(parts.most_common()), sizes.inputs)
