"""`tvr bench data`: every source beside plain webdataset on the same clips, in table and JSON."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tvr_bench import data_sources as bench_data
from tvr_bench.data_sources import PLAIN, Sizes, make_data
from tvr_bench.kernels import bench

# torch warns of more workers than cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TINY = Sizes(clips=4, frames=2, size=32, batch=2, workers=1, epochs=1, repeats=1)
FLAGS = ["--clips", "4", "--frames", "2", "--size", "32", "--batch", "2", "--workers", "1"]


def test_sources_are_measured_beside_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    flags = [*FLAGS, "--epochs", "1", "--repeats", "1", "--source", "frames", "video"]
    assert bench(["data", *flags, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    found: dict[str, Any] = json.loads(file.read_text())
    rows = {row["source"]: row for row in found["rows"]}
    assert list(rows) == ["plain jpeg", "frames", "plain mp4", "video"]
    for name, row in rows.items():
        assert name in said
        assert 0 < row["slowest"] <= row["clips_per_s"] <= row["fastest"]
        assert set(row["first_batch_s"]) == ({"1", "10", "1000000"} if row["plain"] else {"1"})
        against = rows[PLAIN.get(name, name)]
        assert row["to_plain"] == row["clips_per_s"] / against["clips_per_s"]
    assert found["sizes"]["clips"] == 4
    assert {"webdataset", "simplejpeg", "torch"} <= set(found["versions"])


def test_all_sources_give_the_same_pictures(tmp_path: Path) -> None:
    sources = ["plain jpeg", "frames", *(["beton"] if find_spec("ffcv") else [])]
    make_data(tmp_path, TINY, sources)
    seen = []
    for source in sources:
        batches = bench_data._batches(tmp_path, TINY, source, step=0)
        clips: dict[str, torch.Tensor] = {}
        while len(clips) < TINY.clips:
            batch = next(batches)
            plain = not hasattr(batch, "keys")
            frames, keys = (batch[0], batch[2]) if plain else (batch.frames, batch.keys)
            clips |= dict(zip(keys, frames, strict=True))
        seen.append(clips)
    for clips in seen[1:]:
        assert all(np.array_equal(clips[key], seen[0][key]) for key in seen[0])


def test_what_cannot_be_measured_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvr_bench.data.find_spec", lambda name: None)
    assert bench(["data", "--source", "beton"]) == 2
    said = capsys.readouterr().err
    assert "beton left out: FFCV is not installed (make ffcv)" in said
    assert "nothing to measure" in said
