"""Several training sets in one stream: which set a stream position reads, as a pure function.

THE CONTRACT. Stream positions are cut into blocks of BLOCK positions. Set s has exactly `quotas[s]`
positions of each block: its share of all weights, rounded by the largest remainder. Its j-th one in
a block has the key (j + u) / quota, u uniform in [0, 1), and the block lists its positions by
rising key. So every stretch of a block holds the sets nearly in proportion. Each u is drawn from
raw words of numpy's Philox generator, keyed by (seed, name of the set, block).

The positions of a set, counted without gaps, are the positions of its own stream: the set has its
own epochs, permutations and substitutes, under a seed of (seed, name). Neither the order in which
sets are listed, nor world size, loader workers or restarts affect the stream, and its state is one
integer. A single set has the seed of the run, so that its stream is that of a run without a
mixture.

Changing any number of this module changes the data of every resumed run: see `reading/order.py`.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

BLOCK = 4096
SET_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
SET_NAME_RULE = "a letter, then at most 31 letters, digits and _; small letters only"
# A batch of up to 16,384 pairs reads at most five blocks.
MAX_BLOCKS = 8


class _Block(NamedTuple):
    """The positions of one block."""

    sets: np.ndarray
    """(BLOCK,) uint16: set of each position."""
    ranks: np.ndarray
    """(BLOCK,) int64: how many earlier positions of the block belong to the same set."""


class Mixture:
    """Maps stream positions to sets, and to positions in the sets' own streams.

    Sets are numbered in the order of their names. At most MAX_BLOCKS blocks are held.

    Args:
        weights: Weight of each set by name.
        seed: Seed of the run.

    Raises:
        ValueError: a name or a weight cannot be used, see `block_quotas`.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        quotas = block_quotas(weights)
        self.names = tuple(quotas)
        self.quotas = tuple(quotas.values())
        self.seed = seed
        self._blocks: OrderedDict[int, _Block] = OrderedDict()

    def share_of(self, name: str) -> float:
        """Returns the exact share of the stream that a set has."""
        return self.quotas[self.names.index(name)] / BLOCK

    @property
    def shares(self) -> tuple[float, ...]:
        """The exact share of the stream that each set has."""
        return tuple(quota / BLOCK for quota in self.quotas)

    def set_seed(self, number: int) -> int:
        """Returns the seed of a set's own stream."""
        if len(self.names) == 1:
            return self.seed
        return _digest("set seed", self.names[number], self.seed) >> 1

    def locate(self, position: int) -> tuple[int, int]:
        """Returns the set of a stream position, and the position in that set's own stream."""
        number, offset = divmod(position, BLOCK)
        block = self._block(number)
        found = int(block.sets[offset])
        return found, number * self.quotas[found] + int(block.ranks[offset])

    def locate_range(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns sets and own positions, as `locate`, of the positions from start up to stop."""
        sets = np.empty(stop - start, dtype=np.int64)
        own = np.empty(stop - start, dtype=np.int64)
        quotas = np.array(self.quotas, dtype=np.int64)
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            block, base = self._block(number), number * BLOCK
            first, end = max(start, base), min(stop, base + BLOCK)
            within, here = slice(first - base, end - base), slice(first - start, end - start)
            sets[here] = block.sets[within]
            own[here] = number * quotas[sets[here]] + block.ranks[within]
        return sets, own

    def drawn(self, position: int) -> dict[str, int]:
        """Returns how many positions before this one each set has, by name."""
        number, offset = divmod(position, BLOCK)
        counts = np.zeros(len(self.names), dtype=np.int64)
        if offset:
            counts += np.bincount(self._block(number).sets[:offset], minlength=len(self.names))
        return {
            name: number * quota + count
            for name, quota, count in zip(self.names, self.quotas, counts.tolist(), strict=True)
        }

    def _block(self, number: int) -> _Block:
        if number not in self._blocks:
            while len(self._blocks) >= MAX_BLOCKS:
                self._blocks.popitem(last=False)
            self._blocks[number] = self._draw(number)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _draw(self, number: int) -> _Block:
        keys, sets, ranks = [], [], []
        for index, (name, quota) in enumerate(zip(self.names, self.quotas, strict=True)):
            key = np.array([_digest("mixture", name, self.seed), number], dtype=np.uint64)
            words = np.random.Philox(key=key).random_raw(quota)
            in_order = np.arange(quota)
            keys.append((in_order + (words >> np.uint64(11)) * 2.0**-53) / quota)
            sets.append(np.full(quota, index, dtype=np.uint16))
            ranks.append(in_order)
        # Stable, so that equal keys are in the order of the names.
        by_key = np.argsort(np.concatenate(keys), kind="stable")
        return _Block(np.concatenate(sets)[by_key], np.concatenate(ranks)[by_key])


def block_quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Returns the positions that each set has in a block of BLOCK, by name in alphabetical order.

    Raises:
        ValueError: there is no set; a name is not SET_NAME; a weight is not a positive number, or
            so small that the set would have no position.
    """
    if not weights:
        raise ValueError("a mixture needs at least one training set")
    for name, weight in weights.items():
        if SET_NAME.fullmatch(name) is None:
            raise ValueError(
                f"{name!r} is no name of a training set (data.train_sets): {SET_NAME_RULE}"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"the weight {weight} of training set {name} (data.train_sets) must be above 0"
            )
    names = sorted(weights)
    # Exact arithmetic: the rounding must not depend on the machine.
    total = sum(Fraction(weights[name]) for name in names)
    exact = {name: Fraction(weights[name]) * BLOCK / total for name in names}
    quotas = {name: math.floor(exact[name]) for name in names}
    by_remainder = sorted(names, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: BLOCK - sum(quotas.values())]:
        quotas[name] += 1
    for name, quota in quotas.items():
        if quota == 0:
            raise ValueError(
                f"the weight {weights[name]} of training set {name} (data.train_sets) is too small:"
                f" with {float(exact[name] / BLOCK):.2g} of all weights the set would never be"
                f" read. A share of 1/{BLOCK} is the smallest that is surely read"
            )
    return quotas


def _digest(purpose: str, name: str, seed: int) -> int:
    """A 64-bit number of (purpose, name, seed)."""
    content = struct.pack("<Q", seed) + name.encode()
    digest = hashlib.blake2b(content, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little")
