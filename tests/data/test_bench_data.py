"""`tvr bench data`: real shrunk runs of every source beside plain webdataset on the same clips."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tvr_bench import data_sources
from tvr_bench.data_sources import DataBenchSizes, make_data

from tvr.trainer.bench_cli import bench

# torch warns of more workers than cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TINY = DataBenchSizes(clips=4, frames=2, size=32, batch=2, workers=1, epochs=1, repeats=1)
FLAGS = ["--clips", "4", "--frames", "2", "--size", "32", "--batch", "2", "--workers", "1"]


def test_a_shrunk_run_measures_every_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    flags = [*FLAGS, "--epochs", "1", "--repeats", "1", "--source", "frames", "video", "reencoded"]
    flags += ["--clip-frames", "20", "--keyframe-interval", "8"]
    assert bench(["data", *flags, "--json", str(file)]) == 0
    table = capsys.readouterr().out
    result = json.loads(file.read_text())
    rows = {row["source"]: row for row in result["rows"]}
    names = ["plain jpeg", "frames", "plain mp4", "unindexed", "video", "reencoded"]
    assert list(rows) == names
    for name, row in rows.items():
        assert name in table
        assert row["clips_per_s"] > 0
        steps = {"1"} if name.startswith("plain") else {"1", "10", "1000000"}
        assert set(row["first_batch_s"]) == steps
    assert result["sizes"]["clips"] == 4
    assert result["sizes"]["clip_frames"] == 20
    assert {"webdataset", "simplejpeg", "torch"} <= set(result["versions"])
    assert result["machine"]["cpu"]


def test_all_sources_yield_the_same_pictures(tmp_path: Path) -> None:
    sources = ["plain jpeg", "frames", *(["beton"] if find_spec("ffcv") else [])]
    make_data(tmp_path, TINY, sources)
    seen = []
    for source in sources:
        batches = data_sources._batches(tmp_path, TINY, source, step=0)
        clips: dict[str, torch.Tensor] = {}
        while len(clips) < TINY.clips:
            batch = next(batches)
            plain = not hasattr(batch, "keys")
            frames, keys = (batch[0], batch[2]) if plain else (batch.frames, batch.keys)
            clips |= dict(zip(keys, frames, strict=True))
        seen.append(clips)
    for clips in seen[1:]:
        assert all(np.array_equal(clips[key], seen[0][key]) for key in seen[0])


def test_a_source_without_its_package_is_left_out_with_a_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvr_bench.data.find_spec", lambda name: None)
    assert bench(["data", "--source", "beton"]) == 2
    err = capsys.readouterr().err
    assert "beton left out: FFCV is not installed (make ffcv)" in err
    assert "nothing to measure" in err
