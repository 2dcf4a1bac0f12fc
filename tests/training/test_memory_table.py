"""`tvr show-config --memory`: its table, flags and refusals; the reported backend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tvr.kernels.backends import cpu_build
from tvr.trainer.cli import show_config
from tvr.trainer.memory import environment
from tvr.trainer.memory.similarity_memory import estimate_similarity
from tvr.trainer.memory.similarity_sizes import SimilaritySizes

# The recipe `demo` on one rank.
DEMO = SimilaritySizes(
    texts=64, videos=64, words=24, frames=6, width=128, word_share=1 - 1 / (64 * 24)
)


@pytest.fixture(autouse=True)
def wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def memory_rows(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """Runs the command; returns the table's values by row name, and all of stderr as "stderr"."""
    capsys.readouterr()
    assert show_config(["--memory", *flags]) == 0
    out, err = capsys.readouterr()
    json.loads(out)  # stdout holds the settings alone
    rows = (line.rsplit(maxsplit=1) for line in err.splitlines() if line.strip())
    return {row[0].strip(): row[1] for row in rows if len(row) == 2} | {"stderr": err}


def test_the_table_shows_the_parts_the_total_and_other_ways(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = memory_rows(capsys)
    assert "one rank of 1," in rows["stderr"]
    assert "64 texts x 64 videos, 24 words, 6 frames, width 128, compiled kernels" in rows["stderr"]
    found = estimate_similarity(DEMO)
    assert f"peak: {found.phase}" in rows
    for name, size in found.buffers.items():
        assert rows[name] == f"{size / 1e6:.1f}"
    assert rows["the features themselves"] == f"{found.inputs / 1e6:.1f}"
    assert rows["total"] == f"{found.total / 1e6:.1f}"
    others = [name for name in rows if name.startswith("total with")]
    assert [name.removeprefix("total with ") for name in others] == [
        "exchange gather, scores stream",
        "exchange ring, scores keep",
        "exchange ring, scores stream",
        "the naive definition",
    ]
    assert float(rows["total with the naive definition"]) > float(rows["total"])


def test_the_table_follows_ranks_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train.global-batch", "512", "--train.micro-batch", "32", "--ranks", "4"]
    assert "32 texts x 128 videos" in memory_rows(capsys, *flags)["stderr"]
    assert (
        "128 texts x 512 videos" in memory_rows(capsys, *flags, "--train.gradient-cache")["stderr"]
    )
    rows = memory_rows(capsys, *flags, "--train.gradient-cache", "--train.exchange", "ring")
    assert "other ranks' frames" in rows
    assert "total with exchange gather, scores keep" in rows
    assert "total with exchange ring, scores keep" not in rows


def test_the_width_is_read_from_the_folder_of_a_clip(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shape = {"model_type": "clip", "text_config": {"projection_dim": 96}}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert "width 96," in memory_rows(capsys, "--model.pretrained", str(tmp_path))["stderr"]
    assert show_config(["--memory", "--model.pretrained", str(tmp_path / "absent")]) == 2
    assert "holds no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--ranks", "2"], "--ranks 2 needs --memory"),
        (["--memory", "--ranks", "0"], "--ranks 0 must be at least 1"),
        (["--memory", "--ranks", "3"], "must be a multiple of micro_batch x ranks = 64 x 3 = 192"),
    ],
)
def test_ranks_that_cannot_be_end_with_code_2(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_config(flags) == 2
    assert reason in capsys.readouterr().err


def test_the_backend_is_shown_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert show_config([]) == 0
    folder = cpu_build.available_backend()[1]
    assert f"similarity: compiled kernels ({folder})" in capsys.readouterr().err
    assert show_config(["--data.num-frames", "256"]) == 0
    reason = "256 words or frames are more than 255"
    assert f"similarity: torch tiles, products by oneDNN; {reason}" in capsys.readouterr().err
    monkeypatch.setattr(cpu_build, "available_backend", lambda: ("torch", "no C++ compiler"))
    rows = memory_rows(capsys)
    assert "similarity: torch tiles, products by oneDNN; no C++ compiler" in rows["stderr"]
    assert "width 128, torch tiles" in rows["stderr"]


def test_a_chosen_backend_is_shown_and_estimated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = memory_rows(capsys, "--train.similarity-backend", "dense")
    line = "similarity: dense tiles, products by oneDNN; set by train.similarity_backend"
    assert line in rows["stderr"]
    assert "width 128, dense tiles" in rows["stderr"]
    assert "indices of the maxima" not in rows
    monkeypatch.setattr(environment, "compile_failure", lambda device: "no compiler")
    flags = ["--train.similarity-backend", "dense", "--train.compile-similarity"]
    assert f"{line}; tiles not compiled: no compiler" in memory_rows(capsys, *flags)["stderr"]
    flags = ["--train.similarity-backend", "compiled", "--data.num-frames", "256"]
    assert show_config(flags) == 2
    reason = "train.similarity_backend=compiled is not available: 256 words or frames"
    assert reason in capsys.readouterr().err
