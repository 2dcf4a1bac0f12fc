"""A rank that fails, dies or hangs ends its job, and the output names the cause once and first."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import jobs
from builders.tiny import tiny_config

from tvr.data_prep.records import TooManyBadSamples
from tvr.trainer.config import Config
from tvr.trainer.errors import Fenced, NonFiniteLoss, NotSaved, TrainingFailed
from tvr.trainer.resilience.failure_file import Failure, FailureFile
from tvr.trainer.resilience.failures import _report_once, peer_failure_line

STALL_S = 5.0


@pytest.fixture(scope="module")
def config(data: Path) -> Config:
    return tiny_config(
        data,
        data={"test": None, "test_exchanged": None},
        train={"steps": 100_000, "log_every": 5, "log_keys": True, "timeout_s": STALL_S},
    )


def errors_of(
    config: Config, run_dir: Path, disturb: Callable[[], None] | None, number: int | None = None
) -> str:
    """The error output of a job of two ranks, whose rank 1 is disturbed after a few steps."""
    with jobs.running(config, run_dir, 2) as job:
        if number is not None:
            jobs.signal_rank(job, run_dir, 1, number, lambda: jobs.steps_logged(run_dir) >= 10)
        if disturb is not None:
            assert jobs.wait_for(job, lambda: jobs.steps_logged(run_dir) >= 10)
            disturb()
        _, errors = job.communicate(timeout=jobs.TIMEOUT_S)
    assert job.returncode == 3, errors
    return errors


def keys_of_rank_1(run_dir: Path) -> Path:
    return run_dir / "keys" / "rank-00001.jsonl"


def test_only_the_failing_rank_reports_its_exception(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def disturb() -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        file = keys_of_rank_1(run_dir)
        file.rename(tmp_path / "moved")
        folder.rename(file)

    errors = errors_of(config, run_dir, disturb)
    assert errors.count("IsADirectoryError") == 1
    assert errors.count("TrainingFailed: step ") == 1
    # The cause has a traceback; the lost connection that follows has none.
    assert errors.index("IsADirectoryError") < errors.index(
        "tvr train: rank 0 exits because rank 1 on "
    )
    assert "gloo" not in errors
    assert "ChildFailedError" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("tvr launch: rank 1 (")
    assert last.endswith("failed first with exit code 3; see its output above")
    (file,) = (run_dir / "failures").iterdir()
    report = json.loads(file.read_text())
    assert (report["rank"], report["code"]) == (1, 3)
    assert report["error"].startswith("TrainingFailed: step ")


@pytest.mark.exhaustive
def test_killed_rank_is_named(config: Config, tmp_path: Path) -> None:
    errors = errors_of(config, tmp_path / "run", None, signal.SIGKILL)
    assert errors.count("killed by SIGKILL") == 1
    assert errors.count("rank 0 exits because it lost another rank, which reported no error") == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("tvr launch: rank 1 (")


@pytest.mark.exhaustive
def test_suspended_rank_is_named_and_ended(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    errors = errors_of(config, run_dir, None, signal.SIGSTOP)
    assert errors.count("does not respond") == 1
    assert "error [rank 0]: no rank has made progress for " in errors
    assert "rank 1 on " in errors
    assert re.search(r"the other ranks wait in \w+ after step \d", errors)
    (file,) = (run_dir / "failures").iterdir()
    assert json.loads(file.read_text())["of"] == 1
    assert "Traceback" not in errors
    (job,) = (run_dir / "stalls").iterdir()
    assert sorted(path.name for path in job.iterdir()) == ["rank-00000.json", "rank-00000.txt"]
    assert " in run_steps\n" in (job / "rank-00000.txt").read_text()
    assert jobs.rank_pid(run_dir, 1) is None


def test_hanging_rank_is_named_with_its_line(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def disturb() -> None:
        # Opening a FIFO for writing blocks until a reader comes, as a dead file server would.
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "fifo").rename(keys_of_rank_1(run_dir))

    errors = errors_of(config, run_dir, disturb)
    assert len(re.findall(r"is behind, in \w+ after step \d", errors)) == 1
    assert "rank 1 on " in errors
    assert "tvr.trainer.monitoring.run_log:" in errors
    assert 'trainer/monitoring/run_log.py", line' in errors  # stack traces of the hanging rank
    (job,) = (run_dir / "stalls").iterdir()
    assert len(list(job.glob("rank-*.txt"))) == 2


def test_first_rank_claims_the_failure_file_and_others_read_its_report(tmp_path: Path) -> None:
    first, other = (FailureFile(tmp_path / "failures" / "job.json", rank) for rank in (1, 0))
    assert other.read() is None
    assert [first.claim(), other.claim(), first.claim()] == [True, False, False]
    assert other.read() is None
    first.record("ValueError: no", 2, of=1)
    failure = other.wait()
    host = socket.gethostname()
    assert failure == Failure(rank=1, host=host, code=2, error="ValueError: no", of=1)
    assert peer_failure_line(0, failure) == (
        f"tvr train: rank 0 exits because rank 1 on {host} failed; see the error of that rank"
    )


@pytest.mark.parametrize(
    ("error", "of"),
    [
        (TrainingFailed("step 4 on rank 1"), 1),
        # All ranks raise these alike, and the first one to report must not cost its node.
        (NonFiniteLoss("step 4"), None),
        (NotSaved("step 4"), None),
        (Fenced("attempt 2"), None),
        (TooManyBadSamples("101"), None),
    ],
)
def test_error_of_all_ranks_blames_none(error: Exception, of: int | None, tmp_path: Path) -> None:
    failures = FailureFile(tmp_path / "failures" / "job.json", 1)
    assert _report_once(failures, error, lambda raised: 3) == 3
    failure = failures.read()
    assert failure is not None
    assert (failure.rank, failure.of) == (1, of)


def test_every_rank_reports_if_no_file_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "failures").write_text("no folder")
    for rank in (0, 1):
        failures = FailureFile(tmp_path / "failures" / "job.json", rank)
        assert failures.claim()
        failures.record("ValueError: no", 2, of=rank)
        assert failures.read() is None
