"""`tvr bench kernels`: every implementation in table and JSON, refusals, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tvr_bench import kernels
from tvr_bench.harness import MeasurementFailed
from tvr_bench.kernels_process import (
    BACKWARD,
    FORWARD,
    Job,
    Unsupported,
    peak_bytes,
    seconds,
)
from tvr_bench.kernels_report import Measurement, rows

from tvr.trainer.bench_cli import bench

TINY = ["--pairs", "6", "--words", "5", "--frames", "3", "--width", "16", "--threads", "1"]
TINY_JOB = Job(implementation="torch", texts=6, videos=6, words=5, frames=3, width=16)


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    """Runs `tvr bench kernels`; returns its exit code, stdout and stderr."""
    try:
        code: Any = bench(["kernels", *flags])
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of one tiny case with all implementations and the loss."""
    file = tmp_path_factory.mktemp("bench") / "numbers.json"
    flags = [*TINY, "--loss", "--stream", "--fast", "--repeats", "2", "--json", str(file)]
    assert bench(["kernels", *flags]) == 0
    return json.loads(file.read_text())


def test_every_implementation_is_measured_in_both_passes(measured: dict[str, Any]) -> None:
    found = {(row["implementation"], row["pass"]): row for row in measured["rows"]}
    names = ("reference", "compiled", "torch", "dense", "streamed", "fast", "bound")
    assert list(found) == [(name, pass_) for pass_ in (FORWARD, BACKWARD) for name in names]
    for row in found.values():
        assert row["reason"] is None
        assert (row["pairs"], row["words"], row["frames"], row["width"]) == (6, 5, 3, 16)
        assert 0 < row["fastest_s"] <= row["median_s"] <= row["slowest_s"]
        assert row["peak_bytes"] >= 0


def test_the_json_has_versions_machine_and_settings(measured: dict[str, Any]) -> None:
    assert set(measured["versions"]) == {"python", "torch", "tvr"}
    assert measured["machine"]["cpu"]
    assert (measured["threads"], measured["repeats"]) == (1, 2)
    assert (measured["interaction"], measured["loss"]) == ("att_wti", True)


def test_json_on_stdout_is_one_line_and_the_table_goes_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "measure", fake_measure)
    code, out, err = run(capsys, *TINY, "--pairs", "6", "7", "--json", "-")
    assert code == 0
    assert [row["pairs"] for row in json.loads(out)["rows"]] == [6] * 10 + [7] * 10
    assert out.count("\n") == 1
    for text in (
        "6 pairs, 5 words (ragged)",
        "7 pairs",
        "naive",
        "compiled",
        "torch tiles",
        "dense tiles",
    ):
        assert text in err


def test_table_is_on_stdout_and_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "measure", fake_measure)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, *TINY, "--dtype", "float32", "bfloat16", "--lengths", "full")
    assert code == 0
    assert "5 words (full)" in out
    assert "bfloat16" in out
    # Ratios to the naive 2 s, to the products' 0.5 s, and to the naive 4 MB.
    assert ["torch", "tiles", "1.00", "s", "0.50", "2.00", "1.0", "MB", "0.25"] in [
        line.split() for line in out.splitlines()
    ]


def test_naive_is_left_out_with_a_reason_if_memory_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def fake_peaks(job: Job) -> dict[str, int]:
        started.append(job.implementation)
        return {FORWARD: 1, BACKWARD: 1}

    monkeypatch.setattr(kernels, "peak_bytes", fake_peaks)
    monkeypatch.setattr(kernels, "seconds", lambda job, repeats: {FORWARD: [1.0], BACKWARD: [1.0]})
    # 512 x 512 pairs x 32 x 12 scores take gigabytes; the limit concerns the naive one only.
    code, out, _ = run(capsys, "--pairs", "512", "--memory-gib", "0.5", "--json", "-")
    naive, compiled, *_ = json.loads(out)["rows"]
    assert code == 0
    assert started == ["compiled", "torch", "dense", "bound"]
    assert naive["reason"].endswith("GiB, but may take 0.5")
    assert "peak_bytes" not in naive
    assert compiled["reason"] is None
    assert "time_to_naive" not in compiled


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pairs", "0"], "greater than 0"),
        (["--frames", "-3"], "greater than 0"),
        (["--pairs"], "at least 1 item"),
        (["--width", "wide"], "wide"),
        (["--dtype", "float16"], "float16"),
        (["--memory-gib", "0"], "greater than 0"),
        (["--chunk", "0"], "greater than 0"),
    ],
)
def test_bad_sizes_end_with_code_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *flags)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("argv", [[], ["nonesuch"], ["--pairs", "3"]])
def test_a_benchmark_must_be_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(argv)
    assert ended.value.code == 2
    assert "kernels" in capsys.readouterr().err


def test_an_absent_device_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run(capsys, *TINY, "--device", "cuda")
    assert (code, err.count("\n")) == (2, 1)
    assert "torch finds no CUDA device" in err


def test_a_process_reports_why_an_implementation_cannot_run() -> None:
    job = replace(TINY_JOB, implementation="compiled", frames=256)
    with pytest.raises(Unsupported, match="256 words or frames are more than 255"):
        peak_bytes(job)


def test_a_failing_process_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_peaks(job: Job) -> dict[str, int]:
        if job.implementation == "torch":
            raise MeasurementFailed("the reason")
        return {FORWARD: 1, BACKWARD: 1}

    monkeypatch.setattr(kernels, "peak_bytes", failing_peaks)
    monkeypatch.setattr(kernels, "seconds", lambda job, repeats: {FORWARD: [1.0], BACKWARD: [1.0]})
    code, out, err = run(capsys, *TINY, "--json", "-")
    reasons = {row["implementation"]: row["reason"] for row in json.loads(out)["rows"]}
    assert code == 3
    assert reasons.pop("torch") == "the reason"
    assert reasons == dict.fromkeys(("reference", "compiled", "dense", "bound"))
    assert "tvr bench kernels: torch: the reason" in err


def test_a_crash_in_a_process_is_reported_by_its_last_line() -> None:
    with pytest.raises(MeasurementFailed, match="KeyError: 'nonesuch'"):
        seconds(replace(TINY_JOB, implementation="nonesuch"), repeats=1)


def test_each_heap_setting_has_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Ended:
        returncode, stdout, stderr = 0, "{}", ""

    def fake_run(line: list[str], env: dict[str, str], **_: Any) -> Ended:
        seen.append({key: value for key, value in env.items() if key.startswith("MALLOC_")})
        return Ended()

    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setattr("subprocess.run", fake_run)
    peak_bytes(TINY_JOB)
    seconds(TINY_JOB)
    returns_pages, keeps_pages = seen
    assert "MALLOC_ARENA_MAX" not in returns_pages
    assert int(returns_pages["MALLOC_MMAP_THRESHOLD_"]) < 2**20
    assert keeps_pages["MALLOC_MMAP_MAX_"] == "0"


def test_ratios_stay_within_a_case() -> None:
    few, many = (
        fake_measure(replace(TINY_JOB, implementation=name, texts=pairs), repeats=1, memory_limit=0)
        for name, pairs in (("reference", 6), ("torch", 7))
    )
    assert "time_to_naive" in rows([few])[0]
    assert all("time_to_naive" not in row for row in rows([few, many]) if row["pairs"] == 7)


def fake_measure(job: Job, *, repeats: int, memory_limit: int) -> Measurement:
    """Replaces `kernels.measure` by numbers whose ratios are known."""
    time = {"reference": 2.0, "compiled": 0.8, "torch": 1.0, "dense": 1.5, "bound": 0.5}
    peak = {"reference": 4, "compiled": 2, "torch": 1, "dense": 3, "bound": 1}
    took, size = time[job.implementation], peak[job.implementation] * 10**6
    return Measurement(
        job,
        peaks={FORWARD: size, BACKWARD: size},
        times={FORWARD: [took] * repeats, BACKWARD: [took] * repeats},
    )


def test_the_json_goes_to_the_named_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "measure", fake_measure)
    file = tmp_path / "numbers.json"
    assert run(capsys, *TINY, "--json", str(file))[0] == 0
    assert len(json.loads(file.read_text())["rows"]) == 10
    assert run(capsys, *TINY, "--json", str(tmp_path / "absent" / "x.json"))[0] == 2
