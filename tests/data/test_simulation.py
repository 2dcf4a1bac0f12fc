"""`tvr simulate` against real loaders: requests, bytes and cache sizes within a tenth."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.store_traffic import SEED, NodesRun, measure_nodes, write_clips_of_many_sizes

from tvr.data_prep.simulation.arguments import SimulateArguments
from tvr.data_prep.simulation.inputs import data_of, network_of
from tvr.data_prep.simulation.nodes import LoaderShape
from tvr.data_prep.simulation.prediction import Prediction
from tvr.data_prep.simulation.simulate import RunShape, simulate

SHARDS, PER_SHARD = 48, 6
MUCH = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 shards of 6 clips: 3 windows of 16 shards."""
    path = tmp_path_factory.mktemp("shards") / "data"
    write_clips_of_many_sizes(path, SHARDS, PER_SHARD)
    return path


def predicted(folder: Path, run: NodesRun) -> Prediction:
    arguments = SimulateArguments(url=str(folder), ranks=1, micro_batch=1, step_s=0.0)
    data, index = data_of(arguments)
    shape = RunShape(
        loader=LoaderShape(
            world_size=run.ranks,
            ranks_per_node=run.ranks_per_node,
            workers=run.workers,
            micro_batch=run.micro_batch,
            micro_step_s=1.0,
            decode_s=0.0,
        ),
        global_batch=run.global_batch,
        seed=SEED,
        start_step=0,
        cache_bytes=run.cache_bytes,
    )
    return simulate(data, shape, network_of(arguments), index, windows=run.windows)


RUNS = {
    "1 node": NodesRun(ranks=2, ranks_per_node=2, micro_batch=4, cache_bytes=MUCH, windows=2),
    "2 nodes": NodesRun(ranks=4, ranks_per_node=2, micro_batch=3, cache_bytes=MUCH, windows=2),
    "3 nodes": NodesRun(ranks=3, ranks_per_node=1, micro_batch=4, cache_bytes=MUCH, windows=2),
    "4 nodes, accumulation": NodesRun(
        ranks=4, ranks_per_node=1, micro_batch=2, accumulation=2, cache_bytes=MUCH, windows=2
    ),
    "2 nodes, workers": NodesRun(
        ranks=2, ranks_per_node=1, micro_batch=4, workers=2, cache_bytes=MUCH, windows=2
    ),
    "no cache": NodesRun(ranks=2, ranks_per_node=1, micro_batch=4, cache_bytes=None, windows=2),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", RUNS)
def test_predictions_hold_for_real_loaders(folder: Path, tmp_path: Path, name: str) -> None:
    run = RUNS[name]
    prediction, measured = predicted(folder, run), measure_nodes(folder, tmp_path, run)
    share = prediction.stretch.samples / prediction.stretch.samples_per_epoch
    store = prediction.store
    pairs = {
        "requests": (store.requests * share, measured.requests),
        "bytes": (store.num_bytes * share, measured.num_bytes),
        "downloads": (store.shard_downloads * share, measured.downloads),
        "cache": (prediction.node.cache_peak_bytes, measured.cache_peak_bytes),
    }
    print(pairs)
    for what, (expected, counted) in pairs.items():
        assert counted == pytest.approx(expected, rel=0.1), (what, pairs)
    if run.cache_bytes is not None:
        assert measured.downloads == round(store.shard_downloads * share) == 32
