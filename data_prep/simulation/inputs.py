"""The arguments of `tvr simulate` as the simulation takes them."""

from __future__ import annotations

import math

import numpy as np

from tvr.data_prep.dataset.index_rules import TAR_BLOCK
from tvr.data_prep.simulation.arguments import SimulateArguments
from tvr.data_prep.simulation.fake_store import Network
from tvr.data_prep.simulation.nodes import LoaderShape
from tvr.data_prep.simulation.simulate import DataShape, RunShape
from tvr.data_prep.simulation.start_up import (
    IndexCost,
    described_index_cost,
    described_shard,
    index_cost,
)

# A description of more clips is a slip of the keyboard.
MAX_CLIPS = 10**10


def run_of(arguments: SimulateArguments) -> RunShape:
    """The settings of the run.

    Raises:
        ValueError: a number is out of range.
    """
    _check_number("step_s", arguments.step_s, least=0.0)
    _check_number("decode_ms", arguments.decode_ms, least=0.0)
    for name in ("ranks", "ranks_per_node", "micro_batch"):
        _check_number(name, getattr(arguments, name), least=1)
    _check_number("shard_cache_gib", arguments.shard_cache_gib, least=0)
    _check_number("seed", arguments.seed, least=0)
    pairs = arguments.ranks * arguments.micro_batch
    global_batch = pairs if arguments.global_batch is None else arguments.global_batch
    loader = LoaderShape(
        world_size=arguments.ranks,
        ranks_per_node=min(arguments.ranks_per_node, arguments.ranks),
        workers=arguments.workers,
        micro_batch=arguments.micro_batch,
        micro_step_s=arguments.step_s * pairs / max(global_batch, 1),
        decode_s=arguments.decode_ms / 1e3,
    )
    return RunShape(
        loader=loader,
        global_batch=global_batch,
        seed=arguments.seed,
        start_step=arguments.start_step,
        cache_bytes=(arguments.shard_cache_gib << 30) or None,
    )


def network_of(arguments: SimulateArguments) -> Network:
    """The speed of the store; raises as `run_of`."""
    _check_number("latency_ms", arguments.latency_ms, least=0.0)
    for name in ("node_gb_s", "store_gb_s", "request_mb_s"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be above 0 ({_option(name)})")
    return Network(
        latency_s=arguments.latency_ms / 1e3,
        node_bytes_per_s=arguments.node_gb_s * 1e9,
        store_bytes_per_s=_scaled(arguments.store_gb_s, 1e9),
        request_bytes_per_s=_scaled(arguments.request_mb_s, 1e6),
    )


def data_of(arguments: SimulateArguments) -> tuple[DataShape, IndexCost]:
    """The sizes of the data set that the arguments name or describe.

    Raises:
        ValueError: it is neither named nor described, or both, or cannot be at a store.
        OSError, ShardCorrupt: see `read_manifest`.
    """
    described = {"clips": arguments.clips, "clip_kb": arguments.clip_kb}
    if arguments.url is not None:
        given = [name for name, value in described.items() if value is not None]
        if given:
            raise ValueError(
                f"{arguments.url} has its own sizes: leave out {_option(given[0])}, or the URL"
            )
        return _data_at(arguments.url)
    missing = [name for name, value in described.items() if value is None]
    if missing:
        raise ValueError(
            f"{_option(missing[0])} is missing: name a packed data set, or describe one by --clips"
            " and --clip-kb"
        )
    clips, clip_kb = arguments.clips or 0, arguments.clip_kb or 0.0
    _check_number("clips", clips, least=1, most=MAX_CLIPS)
    _check_number("clip_kb", clip_kb, least=0.001)
    _check_number("samples_per_shard", arguments.samples_per_shard, least=1)
    clip_bytes = math.ceil(clip_kb * 1e3 / TAR_BLOCK) * TAR_BLOCK
    full, rest = divmod(clips, arguments.samples_per_shard)
    sizes = [arguments.samples_per_shard] * full + [rest] * (rest > 0)
    data = DataShape(
        shards=[described_shard(number, size, clip_bytes) for number, size in enumerate(sizes)],
        sample_bytes=lambda rows: np.full(len(rows), clip_bytes),
    )
    return data, described_index_cost(clips, arguments.samples_per_shard, clip_bytes)


def _data_at(url: str) -> tuple[DataShape, IndexCost]:
    manifest, cost = index_cost(url)
    if manifest.beton is not None:
        raise ValueError(
            f"{url} is one FFCV file, which is read from a local disk and needs no store; simulate"
            " the data set of shards that it was made from"
        )
    lengths = np.asarray(manifest.samples.length)
    data = DataShape(shards=manifest.shards, sample_bytes=lambda rows: lengths[rows])
    return data, cost


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _check_number(name: str, value: float, *, least: float, most: float = math.inf) -> None:
    if not math.isfinite(value) or not least <= value <= most:
        allowed = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}={value} must be {allowed} ({_option(name)})")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
