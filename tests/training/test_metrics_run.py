"""Two ranks train and are scraped 50 times a second for at least 4 s; or train without metrics."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from builders import jobs
from builders.scraping import ABSENT, RUN_GAUGES, Samples, parse_samples, scrape
from builders.spawn import spawn
from builders.tiny import tiny_config, with_ranks

from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import Config, to_json
from tvr.trainer.monitoring.metrics import TRAINING_METRICS
from tvr.trainer.monitoring.step_record import ALL_PARTS

SCRAPES, PAUSE_S = 200, 0.02
# Series that must have been scraped before the run is asked to stop.
REQUIRED = {("tvr_evaluation_step",), ("tvr_checkpoint_step",)}
MEMORY = ("tvr_host_memory_bytes", "0"), ("tvr_host_memory_bytes", "1")


@dataclass
class Run:
    config: Config
    run_dir: Path
    scraped: list[Samples]
    last: Samples
    """Values of the file in run_dir after the end."""
    steps: dict[int, dict[str, Any]]
    """Step events of the log, by step."""

    @property
    def end(self) -> int:
        """Number of the last step."""
        return max(self.steps)


def scrape_run(run_dir: Path, pid: int, found: list[Samples]) -> None:
    """Scrapes at most 50 times a second, from the first target file until the endpoint has closed.

    After SCRAPES scrapes during training it sends the signal to stop to this process.
    """
    jobs.until(lambda: any((run_dir / "metrics").glob("*.json")))
    (file,) = (run_dir / "metrics").glob("*.json")
    (target,) = json.loads(file.read_text())[0]["targets"]
    before, signalled = "", False
    while True:
        began = time.monotonic()
        try:
            text = scrape(f"http://{target}/metrics")
        except OSError:
            return
        # The text is made once a second; parsing it takes longer than the request.
        found.append(found[-1] if text == before else parse_samples(text))
        before = text
        if not signalled and len(found) >= SCRAPES and len(during_training(found)) >= SCRAPES:
            if REQUIRED <= found[-1].keys():
                os.kill(pid, signal.SIGUSR1)
                signalled = True
        time.sleep(max(0.0, PAUSE_S - (time.monotonic() - began)))


def during_training(found: list[Samples]) -> list[Samples]:
    """Returns the scrapes during training: after the first step and before the end."""
    return [
        each
        for each in found
        if each.get(("tvr_train_step",), 0) > 1 and each["tvr_train_finished",] == 0
    ]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run_dir = tmp_path_factory.mktemp("runs") / "scraped"
    config = tiny_config(
        data,
        train={"steps": 1_000_000, "eval_every": 100},
        checkpoint={"every": 80},
        metrics={"address": "127.0.0.1", "peak_tflops": 1e-3},
    )
    found: list[Samples] = []
    settings = jobs.write_settings(config, run_dir, 2)
    codes = jobs.run_forked(settings, run_dir, 2, lambda pids: scrape_run(run_dir, pids[1], found))
    assert codes == [75, 75]
    (written,) = (run_dir / "metrics").glob("*.prom")
    steps = {event["step"]: event for event in jobs.events(run_dir, "step")}
    return Run(config, run_dir, found, parse_samples(written.read_text()), steps)


def test_scrapes_during_training_agree_with_the_log(run: Run) -> None:
    training = during_training(run.scraped)
    assert len(training) >= SCRAPES
    assert len({found["tvr_train_step",] for found in training}) > 1
    for found in training:
        step = int(found["tvr_train_step",])
        # A scrape may fall between the updates of two metrics.
        near = [run.steps[at] for at in (step - 1, step, step + 1) if at in run.steps]
        for name, key in RUN_GAUGES.items():
            assert found.get(key) in [record[name] for record in near], name
        assert abs(found["tvr_train_steps_total",] - step) <= 1
        assert all(1e7 < found[key] < 1e11 for key in MEMORY)
    falls = [
        key
        for before, after in zip(run.scraped, run.scraped[1:], strict=False)
        for key in before.keys() & after.keys()
        if key[0].endswith("_total") and after[key] < before[key]
    ]
    assert falls == []


def test_the_last_values_stay_in_the_run_folder(run: Run) -> None:
    steps = run.end
    last, end, log = run.last, run.steps[steps], run.steps.values()
    for name, key in RUN_GAUGES.items():
        assert last.get(key) == end[name]
    assert last["tvr_train_finished",] == 1
    assert last["tvr_train_steps_total",] == steps == len(log)
    assert last["tvr_train_pairs_total",] == 8 * steps
    assert last["tvr_train_frames_total",] == 3 * 8 * steps
    assert last["tvr_train_ranks",] == 2
    assert last["tvr_train_restarts_total",] == 0
    waited = sum(record["data_wait_s"] for record in log)
    assert last["tvr_data_wait_seconds_total", "0"] == pytest.approx(waited)
    trained = sum(record["step_s"] for record in log)
    assert 0 < last["tvr_train_goodput_ratio",] < 1
    for rank in ("0", "1"):
        parts = {
            part: last["tvr_train_part_seconds_total", part.replace(" ", "_"), rank]
            for part in ALL_PARTS
        }
        assert all(parts.values())
        within = sum(parts[part] for part in ALL_PARTS[:7])  # data wait to optimiser
        assert within == pytest.approx(trained, rel=0.1)
        encoding = last["tvr_train_part_seconds_total", "encode", rank]
        loading = last["tvr_data_loading_seconds_total", rank]
        assert last["tvr_train_alone_seconds_total", rank] == pytest.approx(loading + encoding)
        assert 0 < last["tvr_data_loading_seconds_total", rank] <= parts["data wait"]
    # MFU follows from metrics.peak_tflops and 2 ranks; the operations per step are constant.
    assert last["tvr_train_mfu_ratio",] == last["tvr_train_model_flops_per_second",] / 2 / 1e9
    flops = last["tvr_train_model_flops_per_second",] * end["step_s"]
    assert flops == pytest.approx(run.steps[2]["model_flops_per_s"] * run.steps[2]["step_s"])
    # With neighbour frames a similarity lies within 1.25, see kernels/reference.py.
    assert -1.25 < last["tvr_train_hardest_negative_similarity",] < 1.25
    assert -1.25 < last["tvr_train_positive_similarity",] < 1.25
    gaps = sum(record["straggler_gap_s"] or 0.0 for record in log)
    assert last["tvr_train_straggler_gap_seconds_total",] == pytest.approx(gaps)
    assert last["tvr_train_slowest_rank",] in (0, 1)
    assert last["tvr_data_reads_total", "local"] == 8 * steps
    frames_of_others = 8 * 3 * 16 * 4  # 2 ranks receive 4 samples: 3 frames of 16 float32 numbers
    assert last["tvr_train_received_bytes_total", "all_gather"] > steps * frames_of_others
    assert last["tvr_train_received_bytes_total", "reduce_scatter"] >= steps * frames_of_others
    (*_, evaluation) = jobs.events(run.run_dir, "evaluation")
    assert evaluation["seconds"] > 0
    for direction in ("text_to_video", "video_to_text"):
        for k in ("1", "5", "10"):
            recall = last["tvr_evaluation_recall_ratio", direction, k, "test"]
            assert recall == evaluation[direction][f"recall_at_{k}"] / 100
    saves = jobs.events(run.run_dir, "saved")
    assert last["tvr_checkpoint_saves_total",] == len(saves) > 1
    assert last["tvr_checkpoint_failures_total",] == 0
    assert last["tvr_checkpoint_step",] == steps
    assert last["tvr_checkpoint_bytes",] == saves[-1]["num_bytes"]
    assert abs(time.time() - last["tvr_checkpoint_timestamp_seconds",]) < 600
    assert list((run.run_dir / "metrics").glob("*.json")) == []


def test_without_metrics_the_losses_are_the_same(run: Run) -> None:
    config = replace(run.config, metrics=replace(run.config.metrics, enabled=False))
    run_dir = run.run_dir.with_name("without")
    settings = jobs.write_settings(config, run_dir, 2)
    stop = jobs.stop_rank_after(run.end, run_dir)
    assert jobs.run_forked(settings, run_dir, 2, stop) == [75, 75]
    assert not (run_dir / "metrics").exists()
    assert jobs.losses(run_dir)[: run.end] == [record["loss"] for record in run.steps.values()]


def test_a_failed_run_leaves_its_target_and_its_last_values(data: Path, tmp_path: Path) -> None:
    diverging = {"learning_rate": 1e30, "encoder_learning_rate": 1e30}
    config = tiny_config(data, train={"steps": 5, **diverging}, data={"test": None})
    run_dir = tmp_path / "run"
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(config))
    assert tvr_train(["--config", str(settings), "--run-dir", str(run_dir)]) == 3
    (written,) = (run_dir / "metrics").glob("*.prom")
    last = parse_samples(written.read_text())
    assert last["tvr_train_nonfinite_total",] == 1
    assert last["tvr_train_finished",] == 0
    assert last["tvr_train_step",] == 1
    assert len(list((run_dir / "metrics").glob("*.json"))) == 1


def test_every_metric_that_applies_is_scraped(run: Run) -> None:
    seen = {name for found in run.scraped for name, *_ in found}
    assert seen == {metric.name for metric in TRAINING_METRICS} - ABSENT
    for found in run.scraped:
        for (name, *_), value in found.items():
            assert math.isfinite(value)
            assert value >= 0 or name.endswith(("_similarity", "_loss"))
            assert value <= 1 or not name.endswith("_ratio")


def train_with_stderr(rank: int, world_size: int, settings: Path, run_dir: Path) -> tuple[int, str]:
    """Exit code and error output of `tvr train`."""
    with redirect_stderr(StringIO()) as stderr:
        code = tvr_train(["--config", str(settings), "--run-dir", str(run_dir)])
    return code, stderr.getvalue()


def occupied_port_above_a_free_one() -> socket.socket:
    """Returns a server on a port such that the port below is free."""
    while True:
        occupied = socket.create_server(("127.0.0.1", 0))
        try:
            socket.create_server(("127.0.0.1", occupied.getsockname()[1] - 1)).close()
        except OSError:
            occupied.close()
        else:
            return occupied


def test_a_taken_port_is_a_node_fault_and_the_job_may_restart(data: Path, tmp_path: Path) -> None:
    settings, run_dir = tmp_path / "settings.json", tmp_path / "run"
    with occupied_port_above_a_free_one() as other:
        port = other.getsockname()[1] - 1
        metrics = {"address": "127.0.0.1", "port": port, "endpoint": "rank"}
        settings.write_text(to_json(with_ranks(tiny_config(data, metrics=metrics), 2)))
        (first, _), (second, stderr) = spawn(train_with_stderr, 2, settings, run_dir)
    assert (first, second) == (3, 3)
    message = (
        f"rank 1 on {socket.gethostname()}: metrics cannot be served at 127.0.0.1:{port + 1} of"
    )
    assert stderr.startswith(f"tvr train: error [rank 1]: {message}"), stderr
    assert stderr.endswith("or port 0 for any free port\n")
    assert stderr.count("\n") == 1
    (failure,) = (run_dir / "failures").iterdir()
    assert json.loads(failure.read_text())["of"] == 1
    assert not list((run_dir / "checkpoints").glob("step-*"))


def test_an_address_of_no_node_is_a_wrong_setting(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, run_dir = tmp_path / "settings.json", tmp_path / "run"
    settings.write_text(to_json(tiny_config(data, metrics={"address": "192.0.2.1"})))
    assert tvr_train(["--config", str(settings), "--run-dir", str(run_dir)]) == 2
    assert "metrics cannot be served at 192.0.2.1:0 of" in capsys.readouterr().err
