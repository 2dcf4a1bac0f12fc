"""A real Prometheus with the shipped rules scrapes real jobs in which every alert's cause occurs.

All times in the rules are divided by 60 (`tvr launch monitor --speed 60`). One scenario runs once
for all tests: run `a` trains on two ranks with some bad samples, run `b` stops at a non-finite
loss, and `tvr pack` packs from a slow store.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from builders import jobs
from builders.exhaustive import is_collected
from builders.http_store import HttpStorage, serve_folder
from builders.monitoring import (
    LocatedQuery,
    panel_queries,
    rule_name,
    rule_queries,
    rules,
    selectors,
    write_files,
)
from builders.prometheus_server import Prometheus, Series, prometheus, wait_until
from builders.tiny import tiny_config

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.trainer.config import Config
from tvr.trainer.monitoring.metrics import METRICS

SPEED = 60
RANKS = 2
NUM_BAD, MAX_BAD = 3, 4
GLOBAL_BATCH = 16
CHECKPOINT_EVERY = 20
# Larger than the run's other files, smaller than a checkpoint.
FILE_BYTES = 65536
# Expected summaries of the alerts.
SUMMARIES = {
    "TvrStalled": r"Run runs/a has not completed a step for 10 minutes",
    "TvrNonFinite": r"Run runs/b stopped because of a non-finite loss or gradient",
    "TvrDataStarved": r"Run runs/a waits for data [\d.]+% of the time",
    "TvrStraggler": r"Run runs/a waits for rank 1, which is slower than the fastest rank by",
    "TvrSlow": r"Run runs/a trains [\d.]+ pairs/s, less than 80 %",
    "TvrCheckpointOld": r"Run runs/a would lose \d+ steps in a failure now",
    "TvrSavesFail": r"Run runs/a could not save a checkpoint",
    "TvrSkipBudget": r"Run runs/a has used 75% of its budget for bad samples",
    "TvrDown": r"Run runs/a on \S+ does not answer",
}
# There is no GPU, the runs have one training set each, and the reference mode masks no captions.
ABSENT_METRICS = {
    "tvr_device_memory_bytes",
    "tvr_train_dropped_negatives_per_row",
    "tvr_train_equal_captions_per_row",
} | {metric.name for metric in METRICS if metric.name.startswith("tvr_data_set_")}


@dataclass
class Scenario:
    """Observations of Prometheus during the scenario."""

    files: Path
    healthy: dict[str, str] = field(default_factory=dict)
    """Firing alerts of `a` before any further fault, with their summaries."""
    series: list[Series] = field(default_factory=list)
    """Series of all jobs at that time."""
    answers: dict[LocatedQuery, list[Series]] = field(default_factory=dict)
    """Answers to the queries of panels and recording rules at that time."""
    fired: set[str] = field(default_factory=set)
    """Alerts that fired with the expected summary."""
    resolved: set[str] = field(default_factory=set)
    after_the_end: dict[str, str] = field(default_factory=dict)
    """Alerts of `a` after its target was removed, until its samples were too old for any rule."""


@pytest.fixture(scope="module")
def scenario(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Scenario:
    folder = tmp_path_factory.mktemp("monitored") / "runs"
    for name in ("a", "b", "pack"):
        (folder / name / "metrics").mkdir(parents=True)
    scenario = Scenario(folder / "files")
    targets = [folder / name / "metrics" for name in ("a", "b", "pack")]
    write_files(scenario.files, *targets, speed=SPEED)
    with (
        prometheus(scenario.files / "prometheus.yml", folder / "tsdb") as prom,
        packing(data, folder / "pack") as pack_the_rest,
    ):
        every_alert = is_collected(request, "test_every_alert_fires_for_its_cause_and_ends_with_it")
        run_scenario(scenario, prom, data, folder, pack_the_rest, every_alert=every_alert)
    return scenario


def run_scenario(
    scenario: Scenario,
    prom: Prometheus,
    data: Path,
    folder: Path,
    pack_the_rest: Callable[[], None],
    *,
    every_alert: bool,
) -> None:
    """Watches two runs and a packing; with `every_alert`, run a then meets each cause of one."""
    run_dir = folder / "a"
    config = settings(with_bad_samples(data, folder / "data"))

    def wait_for(*alerts: str, run: str = "runs/a") -> None:
        # An alert may have fired earlier for another reason, so its summary is checked.
        def all_fire() -> bool:
            summaries = prom.firing(run)
            return all(re.match(SUMMARIES[name], summaries.get(name, "")) for name in alerts)

        wait_until(all_fire, f"{alerts} of {run}")
        scenario.fired |= set(alerts)

    def wait_for_end(*alerts: str, run: str = "runs/a") -> None:
        wait_until(lambda: not prom.firing(run).keys() & set(alerts), f"no {alerts} of {run}")
        scenario.resolved |= set(alerts)

    with (
        failing_run(data, folder / "b") as release_data,
        jobs.running(config, run_dir, RANKS) as job,
    ):
        wait_for("TvrSkipBudget")
        wait_until(lambda: any(up.value for up in prom.query('up{run="runs/b"}')), "b is scraped")
        release_data()
        wait_for("TvrNonFinite", run="runs/b")
        observe(scenario, prom)
        pack_the_rest()
        pids = rank_pids(run_dir)
        if every_alert:
            with files_of_at_most(FILE_BYTES, pids):
                wait_for("TvrSavesFail", "TvrCheckpointOld")
            with throttled(loaders(pids[1])):
                wait_for("TvrDataStarved", "TvrStraggler", "TvrSlow")
            wait_for_end("TvrSavesFail", "TvrCheckpointOld", "TvrStraggler")
            os.kill(pids[1], signal.SIGSTOP)
            wait_for("TvrStalled")
            os.kill(pids[1], signal.SIGCONT)
            wait_for_end("TvrStalled", "TvrSlow", "TvrDataStarved")
            wait_for_end("TvrNonFinite", run="runs/b")
            os.kill(pids[0], signal.SIGKILL)
            wait_for("TvrDown")
            _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
            assert job.returncode == 3, errors
        else:
            end_normally(job, pids)
    with_room = replace(config, data=replace(config.data, max_bad=100))
    with jobs.running(with_room, run_dir, RANKS) as job:
        wait_for_end("TvrDown", "TvrSkipBudget")
        wait_until(
            lambda: bool(prom.query('tvr_train_step{run="runs/a"}')), "the new start is scraped"
        )
        end_normally(job, rank_pids(run_dir))
    until_samples_expire(scenario, prom)


def end_normally(job: subprocess.Popen[str], pids: list[int]) -> None:
    """Asks a run to stop, and waits for its end."""
    os.kill(pids[0], signal.SIGUSR1)
    _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
    assert job.returncode == 75, errors


def until_samples_expire(scenario: Scenario, prom: Prometheus) -> None:
    """Notes the alerts of run a from its end until its samples are too old for any rule."""
    # Prometheus drops a target 5 s after its file, which is longer than TvrDown waits here.
    wait_until(lambda: not prom.query('up{run="runs/a"}'), "the target is dropped")
    wait_until(lambda: "TvrDown" not in prom.firing("runs/a"), "TvrDown ends")

    def samples_expired() -> bool:
        scenario.after_the_end |= prom.firing("runs/a")
        return not prom.query('last_over_time(tvr_train_step{run="runs/a"}[15s])')

    wait_until(samples_expired, "the run's samples expire")


def observe(scenario: Scenario, prom: Prometheus) -> None:
    """Records series and answers once every job has been scraped for the longest panel window."""
    both = 'count(count_over_time({__name__=~"tvr_evaluation_step|tvr_pack_clips_total"}[10s]) > 7)'
    wait_until(lambda: [found.value for found in prom.query(both)] == [2], "both jobs are scraped")

    def is_healthy() -> bool:
        scenario.healthy = prom.firing("runs/a")
        return scenario.healthy.keys() == {"TvrSkipBudget"}

    # Jobs that start at the same time take cores from it, which may fire alerts for a moment.
    wait_until(is_healthy, "only the bad samples fire an alert")
    scenario.series = prom.query('{job="tvr"}')
    recorded = [
        query for query in rule_queries(scenario.files) if query.location.startswith("run:")
    ]
    for query in (*panel_queries(scenario.files), *recorded):
        scenario.answers[query] = prom.query(query.expr)


def settings(data: Path) -> Config:
    return tiny_config(
        data,
        data={"workers": 1, "max_bad": MAX_BAD},
        # Most of a step is the rank's own work, so that a short lack of cores makes no straggler.
        model={"towers": {"width": 64, "layers": 8}},
        loss={"neg_nce_mode": "reference"},
        train={
            "steps": 1_000_000,
            "global_batch": GLOBAL_BATCH,
            "eval_every": 60,
            "log_every": 1000,
            "stall_factor": 0.0,
        },
        checkpoint={"every": CHECKPOINT_EVERY},
        metrics={"address": "127.0.0.1", "peak_tflops": 1.0},
    )


def with_bad_samples(data: Path, folder: Path) -> Path:
    """Copies a data set and damages some samples of its training set."""
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("clips"))
    manifest = read_manifest(str(folder / "train"))
    for row in range(NUM_BAD):
        shard = manifest.shards[int(manifest.samples.shard[row])].name
        with (folder / "train" / shard).open("r+b") as file:
            file.seek(int(manifest.samples.offset[row]))
            file.write(bytes(100))
    return folder


def rank_pids(run_dir: Path) -> list[int]:
    found = [jobs.rank_pid(run_dir, rank) for rank in range(RANKS)]
    return [pid for pid in found if pid is not None]


def loaders(pid: int) -> list[int]:
    """A rank's loader processes."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


@contextmanager
def throttled(pids: list[int]) -> Iterator[None]:
    """Lets processes run for a small part of the time only."""
    done = threading.Event()

    def send(number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):  # workers of an evaluation exit with it
                os.kill(pid, number)

    def alternate() -> None:
        while not done.is_set():
            for number, seconds in ((signal.SIGSTOP, 1.9), (signal.SIGCONT, 0.1)):
                send(number)
                done.wait(seconds)
        send(signal.SIGCONT)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def files_of_at_most(num_bytes: int, pids: list[int]) -> Iterator[None]:
    """Limits the size of files these processes write, like a full disk or a quota."""
    before = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
    for pid, (_, hard) in zip(pids, before, strict=True):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        for pid, limits in zip(pids, before, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def failing_run(data: Path, run_dir: Path) -> Iterator[Callable[[], None]]:
    """Runs a training whose second step has a non-finite loss.

    It receives its data when the yielded function is called, since a run that ends before the first
    scrape would go unnoticed.
    """
    settings = {"learning_rate": 1e30, "encoder_learning_rate": 1e30}
    release = threading.Event()
    with serve_folder(data) as store:
        delay_responses(store, lambda: release.wait(240))
        config = tiny_config(
            data,
            data={"train": f"{store.url}/train", "test": None, "test_exchanged": None},
            train={"steps": 5, **settings},
            metrics={"address": "127.0.0.1"},
        )
        with jobs.running(config, run_dir, 1) as job:
            yield release.set
            release.set()
            _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
            assert job.returncode == 3, errors


@contextmanager
def packing(data: Path, folder: Path) -> Iterator[Callable[[], None]]:
    """Runs `tvr pack` from a store that is slow until the yielded function is called."""
    release = threading.Event()
    with serve_folder(data / "clips" / "train") as store:
        delay_responses(store, lambda: release.wait(5.0))
        line = [sys.executable, "-m", "tvr.launchers.cli", "pack", "--layout", "frames"]
        line += ["--annotations", f"{store.url}/{ANNOTATIONS}", "--out", str(folder / "packed")]
        line += ["--num-frames", "3", "--processes", "1", "--no-words", "--metrics-port", "0"]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = re.fullmatch(r"metrics: http://.*:(\d+)/metrics\n", process.stdout.readline())
            assert port is not None
            target = {"targets": [f"127.0.0.1:{port[1]}"], "labels": {"run": "pack"}}
            (folder / "metrics" / "pack.json").write_text(json.dumps([target]))
            yield release.set
        finally:
            process.kill()
            process.communicate()


def delay_responses(store: HttpStorage, wait: Callable[[], object]) -> None:
    """Waits before each response that contains samples or a clip."""

    def fails(number: int) -> bool:
        if store.requests[number - 1].endswith((".tar", ".mp4")):
            wait()
        return False

    store.fails = fails


def test_every_applicable_metric_has_a_plausible_value(scenario: Scenario) -> None:
    names = {found.labels["__name__"] for found in scenario.series}
    assert {metric.name for metric in METRICS} - names == ABSENT_METRICS
    series_of_a = [found for found in scenario.series if found.labels["run"] == "runs/a"]
    for found in scenario.series:
        name, value = found.labels["__name__"], found.value
        if not name.startswith("tvr_"):
            continue
        assert math.isfinite(value), found
        assert value >= 0 or name.endswith(("_similarity", "_loss")), found
        if name.endswith("_ratio"):
            assert value <= 1, found
        if name.endswith("_timestamp_seconds"):
            assert abs(time.time() - value) < 600, found
        elif name.endswith("_seconds"):
            assert value < 60, found

    def value(name: str, **labels: str) -> float:
        (value,) = {
            found.value
            for found in series_of_a
            if found.labels["__name__"] == name and labels.items() <= found.labels.items()
        }
        return value

    # A scrape may happen while a step is recorded.
    assert abs(value("tvr_train_pairs_total") / GLOBAL_BATCH - value("tvr_train_steps_total")) <= 1
    assert abs(value("tvr_train_step") - value("tvr_train_steps_total")) <= 1
    assert value("tvr_train_steps_total") > CHECKPOINT_EVERY
    assert value("tvr_checkpoint_step") % CHECKPOINT_EVERY == 0
    assert value("tvr_train_ranks") == RANKS
    assert value("tvr_data_bad_samples_limit") == MAX_BAD
    assert value("tvr_data_quarantined_samples") == NUM_BAD
    assert {found.labels.get("rank") for found in series_of_a} == {None, "0", "1"}


def test_every_query_of_panels_and_recording_rules_returns_data(scenario: Scenario) -> None:
    assert len(scenario.answers) > 60
    empty = {query for query, answer in scenario.answers.items() if not answer}
    # Nor is there data from an hour before.
    without = {
        query
        for query in empty
        if any(s.name in ABSENT_METRICS or "data_set" in s.name for s in selectors(query.expr))
    }
    without |= {query for query in empty if "offset 1h" in query.expr}
    assert empty - without == set()
    for query, answer in scenario.answers.items():
        assert not any(math.isnan(found.value) for found in answer), query


def test_healthy_run_fires_only_the_bad_sample_alert(scenario: Scenario) -> None:
    assert scenario.healthy.keys() == {"TvrSkipBudget"}


@pytest.mark.exhaustive
def test_every_alert_fires_for_its_cause_and_ends_with_it(scenario: Scenario) -> None:
    alerts = {rule_name(rule) for rule in rules(scenario.files) if "alert" in rule}
    assert scenario.fired == alerts
    assert scenario.resolved == alerts


def test_run_that_ends_normally_fires_no_alert(scenario: Scenario) -> None:
    assert scenario.after_the_end == {}
