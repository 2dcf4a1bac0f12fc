"""`tvr simulate` against real loaders: requests, bytes and cache sizes within a tenth."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders.store_traffic import SEED, NodesRun, measure_nodes, write_clips_of_many_sizes

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.reading.cache_folder import evicted
from tvr.data_prep.reading.locality import (
    CacheNeed,
    RankShare,
    assigned,
    dealt,
    training_need,
)
from tvr.data_prep.reading.order import SampleOrder, window_shards
from tvr.data_prep.simulation.arguments import SimulateArguments
from tvr.data_prep.simulation.cli import simulate as simulate_command
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
        ranks=2, ranks_per_node=1, micro_batch=4, workers=2, cache_bytes=MUCH, windows=1
    ),
    "1 node, small cache": NodesRun(
        ranks=2, ranks_per_node=2, micro_batch=4, cache_bytes=MUCH, windows=3
    ),
    "no cache": NodesRun(ranks=2, ranks_per_node=1, micro_batch=4, cache_bytes=None, windows=2),
}


def need(folder: Path, run: NodesRun) -> CacheNeed:
    """The room that the loader asks for in a node's cache."""
    shards = read_manifest(str(folder)).shards
    node = range(run.ranks_per_node)
    share = RankShare(rank=0, world_size=run.ranks, micro_batch=run.micro_batch, node=node)
    sizes = [shard.num_samples for shard in shards]
    order = SampleOrder(sizes, SEED, window_shards(run.global_batch, SHARDS))
    return training_need(shards, order, share, run.workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", RUNS)
def test_predictions_hold_for_real_loaders(folder: Path, tmp_path: Path, name: str) -> None:
    run = RUNS[name]
    if name == "1 node, small cache":
        run = replace(run, cache_bytes=need(folder, run).least)
    prediction, measured = predicted(folder, run), measure_nodes(folder, tmp_path, run)
    share = prediction.stretch.samples / prediction.stretch.samples_per_epoch
    store = prediction.store
    pairs = {
        "requests": (store.requests * share, measured.requests),
        "bytes": (store.num_bytes * share, measured.num_bytes),
        "downloads": (store.shard_downloads * share, measured.downloads),
        "cache": (prediction.node.cache_peak_bytes, measured.cache_peak_bytes),
    }
    for what, (expected, counted) in pairs.items():
        assert counted == pytest.approx(expected, rel=0.1), (what, pairs)
    if run.cache_bytes is not None:
        assert measured.downloads == round(store.shard_downloads * share) == 16 * run.windows
    if name == "1 node, small cache":
        assert prediction.node.evicted > 0


def test_a_cache_without_room_is_refused_as_by_the_loader(folder: Path) -> None:
    run = RUNS["2 nodes"]
    least = need(folder, run).least
    with pytest.raises(ValueError, match=f"must hold at least {least} bytes"):
        predicted(folder, replace(run, cache_bytes=least - 1))


def test_the_ranks_shares_together_are_each_ranks_share() -> None:
    places = np.random.Generator(np.random.Philox(0)).integers(0, 9, 24) / 9
    for world_size in (1, 2, 3, 8):
        together = dealt(places, world_size)
        for rank in range(world_size):
            assert together[rank].tolist() == assigned(places, rank, world_size).tolist()


def test_the_least_recently_used_shards_are_evicted_but_for_pinned_ones() -> None:
    sizes = {"old": 5, "pinned": 7, "newer": 3, "newest": 4}

    def names(room: int) -> list[str] | None:
        return evicted(sizes, lambda name: name == "pinned", room)

    assert names(19) == []
    assert names(18) == names(14) == ["old"]
    assert names(13) == ["old", "newer"]
    assert names(7) == ["old", "newer", "newest"]
    assert names(6) is None


def simulated(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = simulate_command([*arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


SMALL = ("--clips", "4000", "--clip-kb", "100", "--samples-per-shard", "50", "--ranks", "8")
REST = ("--ranks-per-node", "4", "--micro-batch", "8", "--step-s", "0.5")


def test_the_command_prints_a_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prediction.json"
    code, table, err = simulated(*SMALL, *REST, "--json", str(file), capsys=capsys)
    assert (code, err) == (0, "")
    values = json.loads(file.read_text())
    assert values["inputs"]["clips"] == 4000
    stretch, store = values["stretch"], values["store"]
    # 80 shards are 5 windows of 16, all of which are simulated; each shard goes to one node.
    assert (stretch["windows"], stretch["windows_per_epoch"]) == (5, 5)
    assert (stretch["samples"], stretch["micro_steps"]) == (4000, 63)
    assert store["shard_downloads"] == 80
    assert 1 <= store["over_data_set"] < 1.1
    for text in ("4,000 clips in 80 shards", "8 ranks on 2 nodes", "extrapolated", "nothing"):
        assert text in table
    code, text, err = simulated(*SMALL, *REST, "--json", "-", capsys=capsys)
    again = json.loads(text)
    # Times of this machine aside, a prediction is a function of its inputs.
    assert {name: again[name] for name in ("stretch", "store", "waiting")} == {
        name: values[name] for name in ("stretch", "store", "waiting")
    }


def test_fewer_windows_are_extrapolated_by_clips(capsys: pytest.CaptureFixture[str]) -> None:
    stores = []
    for windows in ("2", "5"):
        _, text, _ = simulated(*SMALL, *REST, "--windows", windows, "--json", "-", capsys=capsys)
        stores.append(json.loads(text))
    few, all_of_them = stores
    assert few["stretch"]["windows"] == 2
    assert few["store"]["shard_downloads"] == all_of_them["store"]["shard_downloads"] == 80
    assert few["store"]["requests"] == pytest.approx(all_of_them["store"]["requests"], rel=0.1)
    _, table, _ = simulated(*SMALL, *REST, "--windows", "2", capsys=capsys)
    assert "2 of 5 windows" in table
    assert "the rest of the epoch" in table


def test_a_slow_store_makes_ranks_wait_as_long_as_its_bytes_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 400 MB an epoch at 4 MB/s need 100 s; 62.5 steps compute for 31 s.
    slow = ("--store-gb-s", "0.004", "--workers", "2")
    _, text, _ = simulated(*SMALL, *REST, *slow, "--json", "-", capsys=capsys)
    waiting = json.loads(text)["waiting"]
    assert waiting["epoch_s"] == pytest.approx(100, rel=0.15)
    assert waiting["lost_share"] == pytest.approx(0.69, abs=0.05)


@pytest.mark.parametrize("nodes", [1, 8, 50])
def test_all_nodes_together_read_the_data_set_about_once(
    nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--ranks", str(8 * nodes), "--micro-batch", "32", "--step-s", "1")
    data = ("--clips", "128000", "--clip-kb", "100", "--samples-per-shard", "160")
    code, text, _ = simulated(*run, *data, "--json", "-", capsys=capsys)
    assert code == 0
    assert 1 <= json.loads(text)["store"]["over_data_set"] < 1.2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (("--ranks", "0"), "ranks=0 must be at least 1 (--ranks)"),
        (("--micro-batch", "0"), "micro_batch=0 must be at least 1 (--micro-batch)"),
        (("--global-batch", "100"), "must be a multiple of micro_batch x ranks = 8 x 8"),
        (("--clips", "0"), "clips=0 must be from 1 to 10000000000 (--clips)"),
        (("--clip-kb", "nan"), "clip_kb=nan must be at least 0.001 (--clip-kb)"),
        (("--samples-per-shard", "0"), "samples_per_shard=0 must be at least 1"),
        (("--node-gb-s", "0"), "node_gb_s=0.0 must be above 0 (--node-gb-s)"),
        (("--latency-ms", "-1"), "latency_ms=-1.0 must be at least 0.0 (--latency-ms)"),
        (("--step-s", "inf"), "step_s=inf must be at least 0.0 (--step-s)"),
        (("--workers", "-1"), "workers=-1 must be at least 0"),
        (("--windows", "0"), "windows=0 must be at least 1"),
        (("--start-step", "-1"), "start_step=-1 must be at least 0"),
        (("--seed", "-1"), "seed=-1 must be at least 0"),
        (("/nowhere/at/all",), "leave out --clips, or the URL"),
    ],
)
def test_bad_values_are_refused_by_name(
    changed: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = simulated(*SMALL, *REST, *changed, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("tvr simulate: error: ")
    assert reason in err


def test_a_data_set_must_be_named_or_described(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = simulated(*SMALL[2:], *REST, capsys=capsys)
    assert code == 2
    assert "--clips is missing: name a packed data set, or describe one" in err
    code, _, err = simulated("/nowhere/at/all", "--ranks", "8", *REST, capsys=capsys)
    assert code == 2
    assert "/nowhere/at/all/manifest.json does not exist" in err


def test_a_data_set_is_simulated_from_its_index(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, table, _ = simulated(str(folder), "--ranks", "8", *REST, capsys=capsys)
    assert code == 0
    assert "288 clips in 48 shards" in table


def test_help_is_fast_because_it_imports_little() -> None:
    code = (
        "import sys\n"
        "from tvr.launchers.cli import main\n"
        "try:\n    main(['simulate', '--help'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'PIL', 'av', 'tvr.data_prep.dataset.manifest'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    line = [sys.executable, "-c", code]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    assert "--shard-cache-gib" in ended.stdout
    assert ended.stderr == "[]\n"
