"""HNSW graphs as plain arrays.

`levels` holds the number of levels of each vector; `neighbours` the edges of all vectors, for each
one those of its levels in turn, where -1 is no edge; `entry` the vector at which a search starts,
and its highest level. FAISS follows edges without a check, so a graph from a file is checked whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvr.data_prep.records import ShardCorrupt
from tvr.trainer.index.optional_faiss import import_faiss

NEIGHBOURS = 32
# Candidates that a vector's edges are chosen from.
CANDIDATES_WHILE_BUILDING = 100


def build_graph(vectors: np.ndarray, neighbours: int) -> dict[str, np.ndarray]:
    """Arrays of the graph of some vectors; two builds on several threads may differ in edges."""
    faiss = import_faiss()
    index = faiss.IndexHNSWFlat(vectors.shape[1], neighbours, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = CANDIDATES_WHILE_BUILDING
    if len(vectors):
        index.add(np.ascontiguousarray(vectors))
    graph = index.hnsw
    return {
        "levels": faiss.vector_to_array(graph.levels).astype("<i4"),
        "neighbours": faiss.vector_to_array(graph.neighbors).astype("<i4"),
        "entry": np.array([graph.entry_point, graph.max_level], "<i4"),
    }


def open_graph(
    vectors: np.ndarray, arrays: Mapping[str, np.ndarray], neighbours: int, where: Path
) -> Any:
    """A FAISS index of the vectors, which it copies, and of a graph of `build_graph`.

    Args:
        vectors: (n, D) fp32, at least one.

    Raises:
        ShardCorrupt: the arrays are no such graph; names the array below `where`.
    """
    faiss = import_faiss()
    index = faiss.IndexHNSWFlat(vectors.shape[1], neighbours, faiss.METRIC_INNER_PRODUCT)
    graph = index.hnsw
    ends = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    offsets = _checked_offsets(arrays, ends, len(vectors), where)
    faiss.downcast_index(index.storage).add(np.ascontiguousarray(vectors))
    index.ntotal = len(vectors)
    # Copies: FAISS takes plain arrays of its own types.
    faiss.copy_array_to_vector(np.array(arrays["levels"], np.int32), graph.levels)
    faiss.copy_array_to_vector(offsets.astype(np.uint64), graph.offsets)
    faiss.copy_array_to_vector(np.array(arrays["neighbours"], np.int32), graph.neighbors)
    graph.entry_point, graph.max_level = (int(value) for value in arrays["entry"])
    return index


def _checked_offsets(
    arrays: Mapping[str, np.ndarray], ends: np.ndarray, count: int, where: Path
) -> np.ndarray:
    """Where each vector's edges begin and end, from `ends`, those of a vector's levels."""
    levels, edges = np.asarray(arrays["levels"]), np.asarray(arrays["neighbours"])
    if levels.min() < 1 or levels.max() >= len(ends):
        raise ShardCorrupt(f"{where / 'levels.bin'}: levels must be 1 to {len(ends) - 1}")
    offsets = np.concatenate([[0], np.cumsum(ends[levels])])
    if offsets[-1] != len(edges):
        raise ShardCorrupt(
            f"{where / 'neighbours.bin'}: {len(edges)} edges; the levels have {offsets[-1]}"
        )
    if edges.min() < -1 or edges.max() >= count:
        raise ShardCorrupt(f"{where / 'neighbours.bin'}: edges must be -1 to {count - 1}")
    # An edge of a level leads to a vector that has this level: FAISS reads its edges there.
    for level in range(1, int(levels.max())):
        nodes = np.flatnonzero(levels > level)
        slots = offsets[nodes][:, None] + np.arange(ends[level], ends[level + 1])
        targets = edges[slots]
        if (levels[targets[targets >= 0]] <= level).any():
            raise ShardCorrupt(
                f"{where / 'neighbours.bin'}: an edge of level {level} leads to a vector without it"
            )
    start, top = (int(value) for value in arrays["entry"])
    if not 0 <= start < count or top != levels[start] - 1 or top != levels.max() - 1:
        raise ShardCorrupt(
            f"{where / 'entry.bin'}: {start}, {top} must be a vector and its level, the highest"
        )
    return offsets
