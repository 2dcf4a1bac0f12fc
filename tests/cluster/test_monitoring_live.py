"""A Prometheus with the shipped rules looks at real jobs, to which everything is done that alerts
are for. The times of the rules are 60 times shorter (`tvr launch monitor --speed 60`).

One story, told once: run `a` trains on two ranks with some bad samples, run `b` ends by a loss that
is not finite, and `tvr pack` packs from a slow store.
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
from builders.http_store import HttpStorage, serve_folder
from builders.monitoring import (
    Asked,
    name_of,
    panel_queries,
    rule_queries,
    rules,
    selectors,
    write_files,
)
from builders.prometheus_server import Prometheus, Series, prometheus, wait_until
from builders.tiny import tiny_config
from test_metrics_run import ABSENT

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.demo_clips import ANNOTATIONS
from tvr.trainer.config import Config
from tvr.trainer.monitoring.metrics import METRICS

SPEED = 60
RANKS = 2
NUM_BAD, MAX_BAD = 3, 4
PAIRS = 16  # of a global batch
EVERY = 20  # steps between checkpoints
FILE_BYTES = 65536  # more than the run's other files take, less than its checkpoints'
# What alerts say of what is done here, from the beginning.
SAID = {
    "TvrStalled": r"Run runs/a has not ended a step for 10 minutes",
    "TvrNonFinite": r"Run runs/b met a loss or gradient that is not finite",
    "TvrDataStarved": r"Run runs/a waits for data [\d.]+% of the time",
    "TvrStraggler": r"Run runs/a waits for rank 1, which takes [\d.]+% of a step longer than",
    "TvrSlow": r"Run runs/a trains [\d.]+ pairs/s, below 80 % of its hour before",
    "TvrCheckpointOld": r"A failure of run runs/a would now cost \d+ steps",
    "TvrSavesFail": r"A checkpoint of run runs/a could not be saved",
    "TvrSkipBudget": r"Bad samples have spent 75% of what run runs/a may replace before it stops",
    "TvrDown": r"The metrics of run runs/a on \S+ do not answer",
}
# Run `a` has the mode that tells it.
HERE_ABSENT = ABSENT - {"tvr_train_zero_gradient_positives_ratio"}


@dataclass
class Story:
    """What was seen while it went on."""

    files: Path
    healthy: dict[str, str] = field(default_factory=dict)
    """Alerts of `a` before anything was done to it, with what they say."""
    series: list[Series] = field(default_factory=list)
    """Of all jobs, at that time."""
    answers: dict[Asked, list[Series]] = field(default_factory=dict)
    """To the queries of panels and of recording rules, at that time."""
    fired: set[str] = field(default_factory=set)
    """Alerts that said what they should, once they were brought about."""
    resolved: set[str] = field(default_factory=set)
    at_the_end: dict[str, str] = field(default_factory=dict)
    """Alerts of `a` from when its target was gone until none of its samples was young enough for
    any rule."""


@pytest.fixture(scope="module")
def story(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("monitored") / "runs"
    for name in ("a", "b", "pack"):
        (folder / name / "metrics").mkdir(parents=True)
    story = Story(folder / "files")
    targets = [folder / name / "metrics" for name in ("a", "b", "pack")]
    write_files(story.files, *targets, speed=SPEED)
    with (
        prometheus(story.files / "prometheus.yml", folder / "tsdb") as seen,
        packing(data, folder / "pack") as go_on,
    ):
        tell(story, seen, data, folder, go_on)
    return story


def tell(
    story: Story, seen: Prometheus, data: Path, folder: Path, pack_the_rest: Callable[[], None]
) -> None:
    run_dir = folder / "a"
    config = settings(with_bad_samples(data, folder / "data"))

    def comes(*alerts: str, run: str = "runs/a") -> None:
        # What an alert says follows its expression. It may have fired before, for another reason.
        def are_said() -> bool:
            said = seen.firing(run)
            return all(re.match(SAID[name], said.get(name, "")) for name in alerts)

        wait_until(are_said, f"{alerts} of {run}")
        story.fired |= set(alerts)

    def goes(*alerts: str, run: str = "runs/a") -> None:
        wait_until(lambda: not seen.firing(run).keys() & set(alerts), f"no {alerts} of {run}")
        story.resolved |= set(alerts)

    with (
        ending_by_a_loss(data, folder / "b") as let_its_data_come,
        jobs.running(config, run_dir, RANKS) as job,
    ):
        comes("TvrSkipBudget")
        wait_until(lambda: any(up.value for up in seen.ask('up{run="runs/b"}')), "b is seen")
        let_its_data_come()
        comes("TvrNonFinite", run="runs/b")
        look(story, seen)
        pack_the_rest()
        pids = rank_pids(run_dir)
        with files_of_at_most(FILE_BYTES, pids):
            comes("TvrSavesFail", "TvrCheckpointOld")
        with throttled(loaders(pids[1])):
            comes("TvrDataStarved", "TvrStraggler", "TvrSlow")
        goes("TvrSavesFail", "TvrCheckpointOld", "TvrStraggler")
        os.kill(pids[1], signal.SIGSTOP)
        comes("TvrStalled")
        os.kill(pids[1], signal.SIGCONT)
        goes("TvrStalled", "TvrSlow", "TvrDataStarved")
        goes("TvrNonFinite", run="runs/b")
        os.kill(pids[0], signal.SIGKILL)
        comes("TvrDown")
        _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
        assert job.returncode == 3, errors
    with_room = replace(config, data=replace(config.data, max_bad=100))
    with jobs.running(with_room, run_dir, RANKS) as job:
        goes("TvrDown", "TvrSkipBudget")
        wait_until(lambda: bool(seen.ask('tvr_train_step{run="runs/a"}')), "the new start is seen")
        os.kill(rank_pids(run_dir)[0], signal.SIGUSR1)
        _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
        assert job.returncode == 75, errors
    # Prometheus lets go of a target 5 s after its file, which is longer than TvrDown waits here.
    wait_until(lambda: not seen.ask('up{run="runs/a"}'), "the target is gone")
    wait_until(lambda: "TvrDown" not in seen.firing("runs/a"), "nobody is missed")

    def is_forgotten() -> bool:
        story.at_the_end |= seen.firing("runs/a")
        return not seen.ask('last_over_time(tvr_train_step{run="runs/a"}[15s])')

    wait_until(is_forgotten, "the run's samples are old")


def look(story: Story, seen: Prometheus) -> None:
    """Everything at once, when every job has been seen for the longest window of a panel."""
    both = 'count(count_over_time({__name__=~"tvr_evaluation_step|tvr_pack_clips_total"}[10s]) > 7)'
    wait_until(lambda: [found.value for found in seen.ask(both)] == [2], "both jobs are seen")

    def is_healthy() -> bool:
        story.healthy = seen.firing("runs/a")
        return story.healthy.keys() == {"TvrSkipBudget"}

    # What else starts at the same time takes cores away from it, for which there are alerts.
    wait_until(is_healthy, "a run that has no fault but its bad samples")
    story.series = seen.ask('{job="tvr"}')
    recorded = [asked for asked in rule_queries(story.files) if asked.where.startswith("run:")]
    for asked in (*panel_queries(story.files), *recorded):
        story.answers[asked] = seen.ask(asked.expr)


def settings(data: Path) -> Config:
    return tiny_config(
        data,
        data={"workers": 1, "max_bad": MAX_BAD},
        # Most of a step is the rank's own work, so that a moment without a core is no straggler.
        model={"towers": {"width": 64, "layers": 8}},
        loss={"neg_nce_mode": "reference"},
        train={
            "steps": 1_000_000,
            "global_batch": PAIRS,
            "eval_every": 60,
            "log_every": 1000,
            "stall_factor": 0.0,
        },
        checkpoint={"every": EVERY},
        metrics={"address": "127.0.0.1", "peak_tflops": 1.0},
    )


def with_bad_samples(data: Path, folder: Path) -> Path:
    """A copy in which some samples of the training set are damaged."""
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
    """Processes that get a small part of the time only."""
    over = threading.Event()

    def send(number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):  # an evaluation's loaders end with it
                os.kill(pid, number)

    def hold_up() -> None:
        while not over.is_set():
            for number, seconds in ((signal.SIGSTOP, 1.9), (signal.SIGCONT, 0.1)):
                send(number)
                over.wait(seconds)
        send(signal.SIGCONT)

    thread = threading.Thread(target=hold_up)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def files_of_at_most(num_bytes: int, pids: list[int]) -> Iterator[None]:
    """The kernel refuses to let these processes' files grow, as a full disk or a quota does."""
    before = [resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids]
    for pid, (_, hard) in zip(pids, before, strict=True):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        for pid, limits in zip(pids, before, strict=True):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def ending_by_a_loss(data: Path, run_dir: Path) -> Iterator[Callable[[], None]]:
    """A run whose second step has no finite loss. It gets its data once what is yielded is called:
    of a run that is over before the first scrape nobody hears."""
    at_once = {"learning_rate": 1e30, "encoder_learning_rate": 1e30}
    come = threading.Event()
    with serve_folder(data) as store:
        hold_back(store, lambda: come.wait(240))
        config = tiny_config(
            data,
            data={"train": f"{store.url}/train", "test": None, "test_exchanged": None},
            train={"steps": 5, **at_once},
            metrics={"address": "127.0.0.1"},
        )
        with jobs.running(config, run_dir, 1) as job:
            yield come.set
            come.set()
            _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
            assert job.returncode == 3, errors


@contextmanager
def packing(data: Path, folder: Path) -> Iterator[Callable[[], None]]:
    """`tvr pack` from a store that is slow until what is yielded is called."""
    hurry = threading.Event()
    with serve_folder(data / "clips" / "train") as store:
        hold_back(store, lambda: hurry.wait(5.0))
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
            yield hurry.set
        finally:
            process.kill()
            process.communicate()


def hold_back(store: HttpStorage, wait: Callable[[], object]) -> None:
    """Waits before each answer that holds samples or a clip."""

    def fails(number: int) -> bool:
        if store.requests[number - 1].endswith((".tar", ".mp4")):
            wait()
        return False

    store.fails = fails


def test_every_metric_that_applies_is_scraped_and_sane(story: Story) -> None:
    names = {found.labels["__name__"] for found in story.series}
    assert {metric.name for metric in METRICS} - names == HERE_ABSENT
    of_a = [found for found in story.series if found.labels["run"] == "runs/a"]
    for found in story.series:
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
            for found in of_a
            if found.labels["__name__"] == name and labels.items() <= found.labels.items()
        }
        return value

    # It may be scraped while a step is written.
    assert abs(value("tvr_train_pairs_total") / PAIRS - value("tvr_train_steps_total")) <= 1
    assert abs(value("tvr_train_step") - value("tvr_train_steps_total")) <= 1
    assert value("tvr_train_steps_total") > EVERY
    assert value("tvr_checkpoint_step") % EVERY == 0
    assert value("tvr_train_ranks") == RANKS
    assert value("tvr_data_bad_samples_limit") == MAX_BAD
    assert value("tvr_data_quarantined_samples") == NUM_BAD
    assert {found.labels.get("rank") for found in of_a} == {None, "0", "1"}


def test_every_query_of_panels_and_recording_rules_returns_data(story: Story) -> None:
    assert len(story.answers) > 60
    empty = {asked for asked, answer in story.answers.items() if not answer}
    # No GPU is here; and there is no hour before.
    without = {a for a in empty if {s.name for s in selectors(a.expr)} & HERE_ABSENT}
    without |= {a for a in empty if "offset 1h" in a.expr}
    assert empty - without == set()
    for asked, answer in story.answers.items():
        assert not any(math.isnan(found.value) for found in answer), asked


def test_a_healthy_run_has_no_alert_but_its_bad_samples(story: Story) -> None:
    assert story.healthy.keys() == {"TvrSkipBudget"}


def test_every_alert_fires_for_its_cause_and_ends_with_it(story: Story) -> None:
    alerts = {name_of(rule) for rule in rules(story.files) if "alert" in rule}
    assert story.fired == alerts
    assert story.resolved == alerts


def test_a_run_that_ends_as_it_should_is_not_missed(story: Story) -> None:
    assert story.at_the_end == {}
