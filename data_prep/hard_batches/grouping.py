"""Hard batches: samples with similar captions are brought together, as a pure function.

THE CONTRACT. A window's samples come in the order of `reading/order.py`. Each global batch, or the
part of it that lies in the window, has n positions. Of its n // g runs of g consecutive positions,
floor(share n / g), evenly spread, are hard groups: a batch holds at most share n samples in them.

The window is cut into blocks of about BLOCK positions. In a block of h hard groups, the first
TRIES h samples are visited in their order. One that is still free becomes the seed of the next hard
group, with those g - 1 free samples of the block whose captions are most similar to its own, of the
CANDIDATES g most similar ones. Similarity is the dot product of
the captions' vectors (`caption_vectors`) and must be positive; of equal ones, the earlier sample
goes first. A group never holds two equal captions, nor two samples of one video: these are no
negatives. A sample without any neighbour is no seed. All other samples fill the other positions of
the block in their order.

The result is a permutation of each block, so an epoch still reads each sample once, and a window
still reads the same shards. Blocks bound the search: it costs the same per sample for any data set.
Searching near neighbours in the whole data set would be of no use: a window holds few of them.

Dot products of int8 vectors are sums of at most 2^24, which float32 adds without rounding in any
order. So every machine finds the same neighbours. Changing any number of this module changes the
data of every resumed run with hard batches: see `reading/order.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Positions among which neighbours are searched.
BLOCK = 1 << 14
# Neighbours of a seed that are looked at, for each sample of its group. They were free when the
# seed was searched, together with others.
CANDIDATES = 8
# Samples that are visited for each hard group: captions without neighbours would cost much time.
TRIES = 4
# Seeds whose similarities are held at once.
CHUNK = 128
# The largest sum of products that float32 holds exactly.
MAX_WIDTH = (1 << 24) // 127**2


class Captions(NamedTuple):
    """The captions of consecutive samples, one each."""

    vectors: np.ndarray
    """(M, D) int8, D at most MAX_WIDTH, values from -127 on."""
    texts: np.ndarray
    """(M,) hashes of the captions; equal captions have equal ones."""
    videos: np.ndarray
    """(M,) hashes of the video ids."""


def hard_groups(bounds: np.ndarray, share: float, group: int) -> np.ndarray:
    """Returns the first positions of the hard groups, ascending.

    Args:
        bounds: (batches + 1,) ascending positions at which batches begin, then the end.
        share: Largest share of a batch's positions in hard groups.
        group: Positions of a group.
    """
    starts = []
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        slots, count = (end - first) // group, int(share * (end - first) / group)
        count = min(slots, count)
        starts += [first + i * slots // count * group for i in range(count)]
    return np.array(starts, dtype=np.int64)


def grouped_order(
    captions: Captions, starts: np.ndarray, group: int, block_size: int = BLOCK
) -> np.ndarray:
    """Returns which sample each position of a window reads, (M,) int64.

    Args:
        captions: Those of the window's samples, in their order.
        starts: First positions of the hard groups, see `hard_groups`.
        group: Positions of a hard group.
        block_size: Positions of a block, about.
    """
    count = len(captions.texts)
    bounds = np.arange(max(1, round(count / block_size)) + 1)
    bounds = bounds * count // bounds[-1]
    parts = [np.empty(0, np.int64)]
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = starts[(starts >= first) & (starts + group <= end)] - first
        block = Captions(*(column[first:end] for column in captions))
        parts.append(first + _grouped_block(block, own, group))
    return np.concatenate(parts)


def _grouped_block(block: Captions, starts: np.ndarray, group: int) -> np.ndarray:
    order = np.full(len(block.texts), -1, np.int64)
    is_free = np.ones(len(order), bool)
    found = _groups(block, is_free, len(starts), group)
    for start, members in zip(starts[: len(found)].tolist(), found, strict=True):
        order[start : start + len(members)] = members
    order[order < 0] = np.flatnonzero(is_free)
    return order


def _groups(block: Captions, is_free: np.ndarray, wanted: int, group: int) -> list[list[int]]:
    """Finds up to `wanted` groups, and marks their samples as taken."""
    vectors = block.vectors.astype(np.float32)
    texts, videos = block.texts.tolist(), block.videos.tolist()
    found, at = list[list[int]](), 0
    while len(found) < wanted:
        free = np.flatnonzero(is_free[at : TRIES * wanted])
        seeds = at + free[: min(CHUNK, wanted - len(found))]
        if not len(seeds):
            break
        at = int(seeds[-1]) + 1
        near = _most_similar(vectors, seeds, is_free, CANDIDATES * group)
        for seed, neighbours in zip(seeds.tolist(), near, strict=True):
            if not is_free[seed]:
                continue
            members = [seed]
            for other in neighbours:
                if len(members) == group:
                    break
                if is_free[other] and not any(
                    texts[other] == texts[each] or videos[other] == videos[each] for each in members
                ):
                    members.append(other)
            if len(members) > 1:
                is_free[members] = False
                found.append(members)
    return found


def _most_similar(
    vectors: np.ndarray, seeds: np.ndarray, is_free: np.ndarray, most: int
) -> list[list[int]]:
    """The free samples with positive similarity to each seed, the most similar ones first."""
    count = len(vectors)
    scores = (vectors[seeds] @ vectors.T).astype(np.int64)
    scores[:, ~is_free] = 0
    scores[np.arange(len(seeds)), seeds] = 0
    # Unique keys: of equal similarities, the earlier sample is first, on every machine.
    keys = scores * count + (count - 1 - np.arange(count))
    if most < count:
        best = np.argpartition(keys, count - most, axis=1)[:, count - most :]
    else:
        best = np.broadcast_to(np.arange(count), keys.shape)
    chosen = np.take_along_axis(keys, best, axis=1)
    ranked = np.take_along_axis(best, np.argsort(-chosen, axis=1), axis=1)
    is_near = np.take_along_axis(scores, ranked, axis=1) > 0
    return [row[near].tolist() for row, near in zip(ranked, is_near, strict=True)]
