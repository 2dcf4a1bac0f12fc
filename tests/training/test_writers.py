"""Values that TensorBoard, Weights & Biases and MLflow read back from a run; failing writers."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from builders.tiny import tiny_config

from tvr.trainer.cli import train as tvr_train
from tvr.trainer.config import to_json
from tvr.trainer.monitoring import writers
from tvr.trainer.monitoring.run_log import read_log
from tvr.trainer.monitoring.writers import Writers, check_installed

NAMES = ("tensorboard", "wandb", "mlflow")
Curves = dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of three steps and an evaluation. They run in a subprocess, since wandb leaves a
    process behind."""
    folder = tmp_path_factory.mktemp("runs")
    settings = folder / "settings.json"
    config = tiny_config(data, train={"steps": 3}, metrics={"writers": NAMES, "endpoint": "none"})
    settings.write_text(to_json(config))
    line = ["train", "--config", str(settings), "--run-dir", str(folder / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "tvr.launchers.cli", *line],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "gets no more values" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"settings.json", "run"}
    return folder / "run"


def tensorboard_curves(run_dir: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    return {
        tag: {event.step: event.value for event in found.Scalars(tag)}
        for tag in found.Tags()["scalars"]
    }


def wandb_curves(run_dir: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    curves: Curves = {}
    for content in level_db_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in items.items():
            curves.setdefault(name, {})[items["_step"]] = value
    return curves


def level_db_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a log in LevelDB's format: blocks of 32 KiB that may split a record."""
    at, record = 7, b""  # the first 7 bytes are wandb's header
    while at + 7 <= len(content):
        left = -at % 32768
        if 0 < left < 7:  # no room for a header
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def mlflow_curves(run_dir: Path) -> Curves:
    program = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
experiment = client.get_experiment_by_name("run")
(run,) = client.search_runs([experiment.experiment_id])
assert run.info.status == "FINISHED"
assert run.data.params["train.steps"] == "3"
curves = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
print(json.dumps({name: {x.step: x.value for x in curve} for name, curve in curves.items()}))
"""
    uri = (run_dir / "mlruns").as_uri()
    done = subprocess.run(
        [sys.executable, "-c", program, uri],
        capture_output=True,
        text=True,
        env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: {int(step): x for step, x in curve.items()} for name, curve in found.items()}


@pytest.mark.parametrize("read", [tensorboard_curves, wandb_curves, mlflow_curves])
def test_a_tool_reads_back_the_values_of_the_log(run_dir: Path, read: Any) -> None:
    curves = read(run_dir)
    log = read_log((run_dir / "log.jsonl").read_text())
    for name in ("loss", "gradient_norm", "learning_rate", "positive_similarity", "goodput"):
        expected = {event["step"]: event[name] for event in log.steps}
        assert len(expected) == 3
        assert curves[f"train/{name}"] == pytest.approx(expected, rel=1e-6)
    encode = {event["step"]: event["parts_s"]["encode"] for event in log.steps}
    assert curves["train/parts_s/encode"] == pytest.approx(encode, rel=1e-6)
    (evaluation,) = log.evaluations
    recall = evaluation["text_to_video"]["recall_at_5"]
    assert curves["evaluation/text_to_video/recall_at_5"] == {3: pytest.approx(recall)}
    assert "train/penalty" in curves
    assert "train/clamped_share" not in curves  # none in this mode


def test_a_missing_package_is_named_with_its_extra(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(writers.NEEDS, "wandb", "no_such_module")
    check_installed(["tensorboard", "mlflow"])
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(tiny_config(data, metrics={"writers": ["wandb"]})))
    assert tvr_train(["--config", str(settings), "--run-dir", str(tmp_path / "run")]) == 2
    stderr = capsys.readouterr().err
    assert "metrics.writers=wandb needs a package: pip install 'tvr[wandb]'" in stderr


class FailingWriter:
    """A writer with a full disk."""

    def __init__(self, *args: object) -> None:
        self.num_writes = 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.num_writes += 1
        raise OSError("No space left on device")

    def close(self) -> None:
        pytest.fail("a failed writer is closed")


class WorkingWriter:
    def __init__(self, *args: object) -> None:
        self.written: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.written.append((step, values))

    def close(self) -> None:
        self.closed = True


def test_a_failing_writer_does_not_stop_the_others(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail_to_open(*_: object) -> WorkingWriter:
        raise OSError("Read-only file system")

    failing, working = FailingWriter(), WorkingWriter()
    monkeypatch.setitem(writers.OPEN, "wandb", fail_to_open)
    monkeypatch.setitem(writers.OPEN, "mlflow", lambda *_: failing)
    monkeypatch.setitem(writers.OPEN, "tensorboard", lambda *_: working)
    config = tiny_config(data, metrics={"writers": ["wandb", "mlflow", "tensorboard"]})
    with caplog.at_level(logging.WARNING):
        opened = Writers(config, tmp_path, 0, 1)
        for step in (1, 2):
            opened.write(step, "train", {"step": step, "loss": 0.5, "none": None, "in": {"a": 1}})
        opened.close()
    assert working.written == [(step, {"train/loss": 0.5, "train/in/a": 1.0}) for step in (1, 2)]
    assert working.closed
    assert failing.num_writes == 1
    assert caplog.messages == [
        "wandb gets no more values: OSError: Read-only file system",
        "mlflow gets no more values: OSError: No space left on device",
    ]


def test_without_writers_no_tool_is_imported(data: Path, tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tvr.trainer.config import from_json
from tvr.trainer.monitoring.writers import Writers
opened = Writers(from_json(Path(sys.argv[1]).read_text(), where="test"), Path(sys.argv[2]), 0, 1)
opened.write(1, "train", {"loss": 1.0})
opened.close()
assert not {"tensorboard", "wandb", "mlflow"} & sys.modules.keys()
"""
    settings = tmp_path / "settings.json"
    settings.write_text(to_json(tiny_config(data)))
    line = [sys.executable, "-c", program, str(settings), str(tmp_path)]
    subprocess.run(line, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
