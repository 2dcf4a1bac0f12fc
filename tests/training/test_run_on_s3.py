"""A run whose data and checkpoints lie in S3: packed, verified, trained, killed, resumed, exported.

The same again through a proxy that fails every third request, in turn with 503, 429, a cut body and
a lost answer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.exhaustive import principal_and_further
from builders.s3_server import (
    BUCKET,
    Fault,
    FaultProxy,
    Request,
    Rule,
    S3Server,
    every,
    fault_proxy,
    serve_s3,
    throttled,
    unavailable,
)
from builders.spawn import started
from builders.tiny import IMAGE_SIZE, NUM_FRAMES, tiny_config, with_ranks

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.launchers.rank_main import end_process
from tvr.trainer.checkpoint.catalogue import newest_checkpoint, published_steps
from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.evaluation.export import export_run, load_exported
from tvr.trainer.evaluation.saved_run import evaluate_run, load_run

RANKS, STEPS, KILLED_AT = 2, 8, 6
SPLITS = ("train", "test", "exchanged")
FAULTS: dict[str, Rule] = {
    "no faults": lambda request: None,
    "every third request": every(3, unavailable(), throttled(), Fault(cut=True), Fault(lose=True)),
}


@dataclass
class Job:
    """A run at a fault rate, killed and resumed; its checkpoints are at `url`."""

    run_dir: Path
    config: Config
    proxy: FaultProxy
    codes: list[list[int | None]]
    """Exit codes of the ranks of each start."""
    keys_at_kill: list[str]


def train_on_s3(
    rank: int, world_size: int, variables: dict[str, str], settings: Path, run_dir: Path
) -> None:
    """Runs `tvr train` on a rank that finds the store by these environment variables."""
    from tvr.data_prep.storage import retries

    # The client does not retry, so that our retries meet each fault; and they do not wait long.
    os.environ.update(variables, AWS_MAX_ATTEMPTS="1")
    retries.FIRST_WAIT_S = 0.02
    end_process(tvr_train(["--config", str(settings), "--run-dir", str(run_dir)]))


def run_ranks(
    proxy: FaultProxy,
    config: Config,
    run_dir: Path,
    watch: Callable[[list[int]], None] = lambda pids: None,
) -> list[int | None]:
    """Runs all ranks to their end; returns their exit codes. `watch` gets their process ids."""
    settings = run_dir.with_suffix(".json")
    settings.write_text(to_json(config))
    arguments = (proxy.variables(), settings, run_dir)
    with started(train_on_s3, RANKS, *arguments, timeout_s=jobs.TIMEOUT_S) as (processes, _):
        watch([process.pid for process in processes if process.pid is not None])
        for process in processes:
            process.join(jobs.TIMEOUT_S)
        return [process.exitcode for process in processes]


def settings(data: Path, prefix: str, cache: Path) -> Config:
    where = f"s3://{BUCKET}/{prefix}"
    config = tiny_config(
        data,
        data={
            **{"train": f"{where}/train", "test": f"{where}/test"},
            **{"test_exchanged": f"{where}/exchanged", "shard_cache": str(cache), "workers": 1},
        },
        train={"steps": STEPS, "eval_every": 4},
        checkpoint={"every": 2, "url": f"{where}/checkpoints", "keep_best": True},
        metrics={"endpoint": "none"},
    )
    return with_ranks(config, RANKS)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with data and checkpoints on a local disk."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train = {"steps": STEPS, "eval_every": 4}
    checkpoint, metrics = {"every": 2}, {"endpoint": "none"}
    config = with_ranks(
        tiny_config(data, train=train, checkpoint=checkpoint, metrics=metrics), RANKS
    )
    file = run_dir.with_suffix(".json")
    file.write_text(to_json(config))
    assert jobs.run_forked(file, run_dir, RANKS) == [0, 0]
    return run_dir


@pytest.fixture(scope="module", params=principal_and_further(FAULTS, ["every third request"]))
def job(
    request: pytest.FixtureRequest,
    server: S3Server,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Job]:
    """Packs to S3, and trains from there until the ranks are killed; then trains on."""
    folder = tmp_path_factory.mktemp("run")
    prefix, faults = request.param.replace(" ", "-"), FAULTS[request.param]
    config = settings(data, prefix, folder / "cache")
    server.clear()
    patch = pytest.MonkeyPatch()
    with fault_proxy(server) as proxy, proxy.environment(patch):
        proxy.fail = faults
        for split in SPLITS:
            pack_shards(
                read_annotations(str(data / "clips" / split / ANNOTATIONS)),
                f"s3://{BUCKET}/{prefix}/{split}",
                layout="frames",
                num_frames=NUM_FRAMES,
                short_side=IMAGE_SIZE,
                samples_per_shard=10,
            )
        pids: list[int] = []
        keys_at_kill: list[str] = []

        def kill(request: Request) -> Fault | None:
            """Kills all ranks as the manifest of a step is about to be written."""
            is_manifest = request.path.endswith(f"step-{KILLED_AT:08d}/manifest.json")
            if pids and is_manifest and request.method == "PUT":
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                pids.clear()
                keys_at_kill.extend(server.keys(f"{prefix}/checkpoints/step-{KILLED_AT:08d}"))
                return unavailable()
            return faults(request)

        proxy.fail = kill
        run_dir = folder / "run"
        codes = [run_ranks(proxy, config, run_dir, pids.extend)]
        proxy.fail = faults
        codes.append(run_ranks(proxy, config, run_dir))
        yield Job(run_dir, config, proxy, codes, keys_at_kill)


def test_packed_data_sets_are_whole(job: Job, server: S3Server) -> None:
    for split in SPLITS:
        url = job.config.data.train.removesuffix("train") + split
        report = verify_dataset(url, decode=4)
        assert report.problems == ()
        assert report.num_samples == {"train": 48}.get(split, 10)
        prefix = url.removeprefix(f"s3://{BUCKET}/")
        stored = {key.removeprefix(f"{prefix}/") for key in server.keys(f"{prefix}/")}
        shards = {f"shard-{number:06d}.tar" for number in range(report.num_shards)}
        assert stored >= {"manifest.json", *shards}
        assert not [name for name in stored if name.endswith(".partial") or ".packing" in name]


def test_killed_run_ends_as_an_uninterrupted_one_on_a_disk(job: Job, uninterrupted: Path) -> None:
    assert job.codes == [[-signal.SIGKILL] * RANKS, [0] * RANKS]
    # The files of the step were there, and its manifest was not.
    assert len(job.keys_at_kill) >= 2 * RANKS
    assert not any(key.endswith("manifest.json") for key in job.keys_at_kill)
    (resumed,) = jobs.events(job.run_dir, "resumed")
    assert resumed["step"] == KILLED_AT - 2
    assert jobs.losses(job.run_dir) == jobs.losses(uninterrupted)
    assert jobs.events(job.run_dir, "save_failed") == []
    ours, theirs = load_run(job.run_dir, job.config)[0].state_dict(), local_weights(uninterrupted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def local_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from tvr.trainer.run_dir import read_config

    return load_run(run_dir, read_config(run_dir))[0].state_dict()


def numbers(evaluation: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation, those of each direction under both names."""
    found: dict[str, float] = {}
    found |= {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
    for name, value in evaluation.items():
        if isinstance(value, dict):
            found |= {
                f"{name} {inner}": number
                for inner, number in value.items()
                if isinstance(number, int | float)
            }
    return found


def test_run_is_evaluated_and_exported(job: Job, uninterrupted: Path, tmp_path: Path) -> None:
    stored = json.loads((job.run_dir / "evaluation.json").read_text())
    result = evaluate_run(job.run_dir, None)
    again = json.loads((job.run_dir / "evaluation.json").read_text())
    assert stored["step"] == again["step"] == STEPS
    summary = numbers(result.summary())
    assert summary == pytest.approx({name: numbers(stored)[name] for name in summary}, rel=1e-5)
    elsewhere = json.loads((uninterrupted / "evaluation.json").read_text())
    assert numbers(stored) == numbers(elsewhere)
    export_run(job.run_dir, tmp_path / "exported")
    exported = load_exported(tmp_path / "exported").state_dict()
    trained = load_run(job.run_dir, job.config)[0].state_dict()
    assert all(torch.equal(exported[name], trained[name]) for name in exported)


def test_bucket_holds_published_files_only(job: Job, server: S3Server) -> None:
    url = job.config.checkpoint.url
    assert url is not None
    storage, prefix = StorageFolder(url), url.removeprefix(f"s3://{BUCKET}/")
    expected = {"latest", "best.json"}
    steps = published_steps(storage)
    assert steps[-1] == STEPS
    for step in steps:
        name = f"step-{step:08d}"
        fields = json.loads(storage.read(f"{name}/manifest.json"))
        expected.add(f"{name}/manifest.json")
        expected |= {f"{name}/{fields['folder']}/{file}" for file in fields["files"]}
    assert set(server.keys(f"{prefix}/")) == {f"{prefix}/{name}" for name in expected}
    found = newest_checkpoint(storage)
    assert found is not None
    assert found.state.attempt == 2


def test_shards_are_read_from_the_cache(job: Job) -> None:
    cache = Path(job.config.data.shard_cache or "")
    assert list(cache.rglob("*.tar"))
    shutil.rmtree(cache)


def test_faults_were_met(job: Job) -> None:
    if "third" in str(job.config.checkpoint.url):
        assert job.proxy.num_faults > 60
        assert job.proxy.num_faults >= len(job.proxy.requests) // 3 - 2
