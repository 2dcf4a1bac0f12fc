"""The dashboard: curves read from a run's log, the choice of panels, and the state of a run."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.run_logs import (
    STEPS,
    evaluation_event,
    save_event,
    settings,
    step_event,
    write_run,
)
from builders.scraping import RUN_GAUGES

from tvr.data_prep.exporter.metrics_table import MetricTable, MetricValues
from tvr.launchers.cli import main as tvr
from tvr.trainer.config import to_json
from tvr.trainer.monitoring.cli import markdown_page
from tvr.trainer.monitoring.field_metric import export_field, field_metrics, metric, table_rows
from tvr.trainer.monitoring.metrics import training_table
from tvr.trainer.monitoring.run_log import read_log
from tvr.trainer.monitoring.step_record import ALL_PARTS, MonitoredStepRecord, log_event
from tvr.trainer.pages import dashboard
from tvr.trainer.pages.dashboard import read_run, write_dashboard
from tvr.trainer.pages.history import MOST_POINTS, Curve, history, thinned
from tvr.trainer.pages.panels import panel_specs, panels


def test_curves_hold_the_values_of_the_log(tmp_path: Path) -> None:
    replaced = {"event": "replaced", "position": 7, "key": "a", "detail": "", "reason": "no_frames"}
    events = [step_event(1), step_event(2), {**replaced, "step": 2}, {**replaced, "step": 2}]
    events += [
        evaluation_event(2),
        save_event(2),
        step_event(3),
        {**replaced, "step": 3},
        {**replaced, "event": "left_out", "step": 3},
        step_event(4, loss=float("inf")),
    ]
    found = read_run(write_run(tmp_path / "run", *events)).history
    assert found["tvr_train_loss", "total"] == Curve([1, 2, 3], [4.0, 2.0, 4.0 / 3])
    assert found["tvr_train_frames_per_second",].y == [300.0] * 4
    assert found["tvr_train_temperature",].y == [settings().loss.temperature] * 4
    assert found["tvr_evaluation_recall_ratio", "test", "video_to_text", "1"].y == [0.425]
    assert found["tvr_data_skipped_samples_total", "no_frames"] == Curve([2, 3], [2, 3])
    assert found["tvr_checkpoint_bytes",] == Curve([2], [1000])
    # The save ended 1 s after step 2, which ended at 120 s.
    assert found["tvr_checkpoint_timestamp_seconds",].y == [60.0, 120.0, 59.0, 119.0]


def test_counters_are_drawn_as_increments_per_step(tmp_path: Path) -> None:
    def counted(number: int, **reads: int) -> dict[str, Any]:
        return step_event(number, reads=reads)

    events = [counted(10, local=80), counted(20, local=160, store=40)]
    # The checkpoint holds steps 21 to 25, the log does not; counters begin at 0 at each start.
    events += [{"event": "resumed", "step": 25, "attempt": 2}, counted(30, local=40)]
    found = read_run(write_run(tmp_path / "run", *events)).history
    assert found["tvr_data_reads_total", "local"] == Curve([10, 20, 30], [8.0, 8.0, 8.0])
    assert found["tvr_data_reads_total", "store"] == Curve([20], [4.0])
    (reads,) = [panel for panel in panels([found])["Data"] if panel.metric.endswith("reads_total")]
    assert [(line.label, line.x, line.y) for line in reads.lines] == [
        ("local", [10, 20, 30], [8.0, 8.0, 8.0]),
        ("store", [10, 20, 30], [0.0, 4.0, 0.0]),
    ]


def test_every_curve_has_a_panel_and_every_panel_a_metric(tmp_path: Path) -> None:
    forms = [form for forms in panel_specs().values() for form in forms]
    drawn = {name for form in forms for name in (form.metric, form.beside) if name}
    table = training_table(("films", "web"))
    assert drawn <= {metric.name for metric in table.metrics}
    more = {key: 0.5 for key in RUN_GAUGES} | {"step": 1, "parts_s": dict.fromkeys(ALL_PARTS, 0.1)}
    more |= {"reads": {"local": 8}, "received_bytes": {"all_gather": 4}, "host_memory_bytes": 1e9}
    more |= {"device_memory_bytes": {"peak": 1e9}}
    by_set = ("set_epochs", "set_pairs", "set_skipped", "set_quarantined")
    more |= {name: {"web": 2, "films": 1} for name in by_set}
    found = read_run(
        write_run(tmp_path / "run", step_event(1, **more), save_event(1), evaluation_event(1))
    ).history
    assert {name for name, *_ in found} <= drawn
    assert set(found) <= set(table.slots)
    (epochs,) = [each for each in panels([found])["Data"] if each.metric == "tvr_data_set_epoch"]
    assert [(line.label, line.y) for line in epochs.lines] == [("films", [1.0]), ("web", [2.0])]


def test_a_metric_without_values_has_no_panel(tmp_path: Path) -> None:
    def names(*events: dict[str, Any]) -> set[str]:
        found = panels([read_run(write_run(tmp_path / "run", *events)).history])
        return {panel.metric for group in found.values() for panel in group}

    everything = names(step_event(1), save_event(1), evaluation_event(1))
    assert "tvr_train_gradient_norm" not in everything  # the step has no update
    without = names(step_event(1, penalty=None))
    assert everything - without == {
        *(name for name in everything if name.startswith(("tvr_evaluation_", "tvr_checkpoint_"))),
        "tvr_train_negative_weight",
    }
    assert names() == set()


def test_titles_and_meanings_come_from_the_metrics_table(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", step_event(1), evaluation_event(1)))
    found = {panel.id: panel for group in panels([run.history]).values() for panel in group}
    meanings = {metric.name: metric.meaning for metric in training_table().metrics}
    assert all(panel.meaning.startswith(meanings[panel.metric]) for panel in found.values())
    of_rank_0 = {
        id
        for id, panel in found.items()
        if panel.meaning.endswith(" Only rank 0's values are shown.")
    }
    assert "tvr_train_step_seconds" in of_rank_0
    assert not {"tvr_train_loss", "tvr_train_goodput_ratio"} & of_rank_0
    assert found["tvr_train_hard_negatives_per_row"].title == "Hard negatives per row"
    recall = found["tvr_evaluation_recall_ratio-video_to_text"]
    assert recall.title == "Evaluation recall, video to text"
    assert recall.labels == ["k = 1", "k = 5", "k = 10"]
    assert found["tvr_train_loss"].labels == ["total", "similarity", "tpm cl", "penalty"]


def test_a_long_curve_keeps_its_spikes_and_its_ends() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[123, 70_001]] = 50.0, -50.0
    whole = Curve(range(100_000), values.tolist())
    (thin,) = thinned([whole])
    assert len(thin.x) <= MOST_POINTS
    assert list(thin.x) == sorted(set(thin.x))
    assert (thin.x[0], thin.x[-1]) == (0, 99_999)
    assert thin.y == [whole.y[at] for at in thin.x]
    assert {123, 70_001} <= set(thin.x)
    # Thinning keeps the minimum and the maximum of each stretch.
    places = np.searchsorted(thin.x, np.arange(0, 100_001, 10_000))
    for start, end in zip(range(0, 100_000, 10_000), range(10_000, 100_001, 10_000), strict=True):
        kept = thin.y[places[start // 10_000] : places[end // 10_000]]
        assert max(kept) == values[start:end].max()
        assert min(kept) == values[start:end].min()
    assert thin.mean is not None
    (peak,) = [at for at, step in enumerate(thin.x) if step == 70_001]
    assert thin.y[peak] == -50.0
    assert -1.0 < thin.mean[peak] < 0.0  # the mean of about a hundred values
    assert np.mean(thin.mean) == pytest.approx(values.mean(), abs=0.02)
    assert thinned([Curve([1, 2], [3.0, 4.0])]) == [Curve([1, 2], [3.0, 4.0])]


def test_stacked_curves_keep_the_same_steps() -> None:
    parts = [
        Curve(range(9000), np.random.default_rng(seed).random(9000).tolist()) for seed in (1, 2)
    ]
    first, second = thinned(parts)
    assert first.x == second.x
    total = np.asarray(parts[0].y) + np.asarray(parts[1].y)
    assert max(a + b for a, b in zip(first.y, second.y, strict=True)) == total.max()


def test_a_run_is_finished_once_its_last_step_is_saved_and_evaluated(tmp_path: Path) -> None:
    def state(*events: dict[str, Any], **overrides: Any) -> str:
        return read_run(write_run(tmp_path / "run", *events, **overrides)).state

    assert (
        state()
        == state(step_event(1))
        == state(step_event(STEPS), evaluation_event(STEPS))
        == "running"
    )
    assert state(step_event(STEPS), save_event(STEPS)) == "running"
    assert state(step_event(STEPS), save_event(STEPS), data={"test": None}) == "finished"
    assert state(step_event(STEPS), evaluation_event(STEPS), save_event(STEPS)) == "finished"
    lost = save_event(
        STEPS, event="save_failed", error="OSError: [Errno 28] No space left on device"
    )
    assert (
        state(step_event(STEPS), evaluation_event(STEPS), lost) == "running"
    )  # the failure file reports the error
    left = {"event": "preempted", "step": 2, "by": "SIGTERM"}
    assert state(step_event(1), step_event(2), save_event(2), left) == "preempted"
    resumed = {"event": "resumed", "step": 2, "attempt": 2}
    assert (
        state(step_event(1), step_event(2), save_event(2), left, resumed, step_event(3))
        == "running"
    )


def test_a_failure_is_shown_until_the_run_resumes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", step_event(1))
    (run / "failures").mkdir()
    failure = {"rank": 1, "host": "node-7", "code": 3, "error": "OSError: disk full"}
    file = run / "failures" / "1.json"
    file.write_text(json.dumps(failure) + "\n")
    os.utime(run / "log.jsonl", (1000, 1000))
    os.utime(file, (1010, 1010))
    found = read_run(run)
    assert (found.state, found.failure) == ("failed", "rank 1 on node-7: OSError: disk full")
    os.utime(run / "log.jsonl", (1020, 1020))
    assert read_run(run).state == "running"


def test_the_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    def size(steps: int) -> int:
        run = write_run(tmp_path / "run", *(step_event(n, loss=n / 7) for n in range(1, steps + 1)))
        write_dashboard([run], tmp_path / "page.html")
        return (tmp_path / "page.html").stat().st_size

    small, large = size(10), size(10_000)
    assert small < 2.1e6
    assert large < small + 1e6


def test_watching_follows_the_log_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "WATCH_EVERY_S", 0.01)
    run = write_run(tmp_path / "run", step_event(1), data={"test": None})
    out = tmp_path / "page.html"
    watcher = threading.Thread(target=dashboard.watch, args=([run], out))
    watcher.start()
    for events in ([step_event(2)], [step_event(STEPS), save_event(STEPS)]):
        before = out.read_text() if out.exists() else ""
        with (run / "log.jsonl").open("a") as log:
            log.write("".join(json.dumps(event) + "\n" for event in events))
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_text() == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    watcher.join(timeout=60)
    assert not watcher.is_alive()
    assert f'"step": {STEPS}' in out.read_text()
    assert list(tmp_path.glob(".*")) == []


def test_the_command_writes_into_the_run_folder_and_refuses_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", step_event(1))
    assert tvr(["dashboard", str(run)]) == 0
    assert (run / "dashboard.html").exists()
    assert tvr(["dashboard", str(run), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()
    finished = write_run(
        tmp_path / "finished", step_event(STEPS), save_event(STEPS), data={"test": None}
    )
    assert tvr(["dashboard", str(finished), "--watch"]) == 0
    assert (finished / "dashboard.html").exists()
    assert tvr(["dashboard", str(run), str(tmp_path / "none")]) == 2
    assert "none is no run: it has no config.json" in capsys.readouterr().err
    assert tvr(["dashboard"]) == 2
    assert "name the folder of one run" in capsys.readouterr().err


def test_old_and_torn_logs_are_read() -> None:
    log = read_log('{"event": "step", "st')
    assert history(log, json.loads(to_json(settings()))) == {}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordWithEntropy(MonitoredStepRecord):
    """A step's record with one more field."""

    entropy: float = field(
        metadata=metric(
            "tvr_train_entropy", "Mean entropy of the weights.", unit="ratio", panel="Training"
        )
    )


def test_a_new_field_of_the_record_appears_everywhere(tmp_path: Path) -> None:
    values = {entry.name: None for entry in fields(MonitoredStepRecord)}
    record = RecordWithEntropy(**values | {"step": 1, "entropy": 0.25})  # pyright: ignore[reportArgumentType]
    # The log.
    event = log_event(record)
    assert event["entropy"] == 0.25
    # The metrics table, its page, and Prometheus.
    rows = table_rows(RecordWithEntropy)
    (row,) = [row for row in rows if row.name == "tvr_train_entropy"]
    assert (row.kind, row.unit, row.meaning) == ("gauge", "ratio", "Mean entropy of the weights.")
    expected = "| `tvr_train_entropy` | gauge | ratio |  | run | Mean entropy of the weights. |"
    assert expected in markdown_page(rows).splitlines()
    table = MetricTable(rows)
    values = np.empty(len(table.slots))
    export_field(
        field_metrics(RecordWithEntropy)["entropy"], record.entropy, MetricValues(table, values)
    )
    assert "\ntvr_train_entropy 0.25\n" in table.text({0: values}).decode()
    # A panel of the pages.
    run = write_run(tmp_path / "run", step_event(1, **{"entropy": event["entropy"]}))
    log, config = read_log((run / "log.jsonl").read_text()), json.loads(to_json(settings()))
    found = panels([history(log, config, RecordWithEntropy)], RecordWithEntropy)
    (panel,) = [panel for panel in found["Training"] if panel.metric == "tvr_train_entropy"]
    assert [(line.x, line.y) for line in panel.lines] == [([1], [0.25])]
