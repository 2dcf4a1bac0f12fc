"""Real clips: H.264 with B-frames and sound, packed and streamed in both layouts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from builders.clip_files import tokenize

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.check.verify import verify_dataset
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.loader import evaluation_batches, train_batches

CLIPS = Path(__file__).parents[3] / "shared" / "clips"


@pytest.mark.skipif(not (CLIPS / "captions.jsonl").exists(), reason=f"no captions.jsonl in {CLIPS}")
@pytest.mark.parametrize(
    "settings",
    [
        {"layout": "frames", "num_frames": 12, "short_side": 64},
        {"layout": "video"},
        {"layout": "video", "reencode": True, "short_side": 64},
    ],
)
def test_real_clips(tmp_path: Path, settings: dict[str, Any]) -> None:
    clips = read_annotations(str(CLIPS / "captions.jsonl"))
    url = str(tmp_path / "data")
    manifest = pack_shards(clips, url, **settings)
    assert manifest.num_samples == len(clips)
    assert verify_dataset(url).problems == ()
    again = pack_shards(clips[:1], str(tmp_path / "again"), **settings)
    assert again.samples.crc32[0] == manifest.samples.crc32[0]  # natural pictures, same bytes
    common: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "workers": 0,
        "num_frames": 12,
        "image_size": 48,
        "tokenize": tokenize,
        "max_bad": 0,
    }
    (everything,) = evaluation_batches(url, micro_batch=8, **common)
    assert everything.keys == tuple(clip.key for clip in clips)
    assert everything.captions == tuple(text for clip in clips for text in clip.captions)
    assert everything.frame_mask.all()
    contrast = everything.frames.float().std(dim=(2, 3, 4))
    assert (contrast > 5).all()  # pictures, not flat frames
    training = train_batches(url, seed=0, global_batch=2, micro_batch=2, start_step=0, **common)
    for batch in islice(training, 2):
        assert set(batch.keys) == set(everything.keys)
