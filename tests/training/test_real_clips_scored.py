"""Real clips through a whole evaluation: packed, streamed, encoded and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.tiny import tiny_config
from builders.worlds import SINGLE_RANK

from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.reading.loader import evaluation_batches
from tvr.trainer.evaluation.evaluate import evaluate
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import build_model, image_size, model_inputs
from tvr.trainer.model.tokenizer import load_tokenizer, train_tokenizer

CLIPS = Path(__file__).parents[3] / "shared" / "clips"


@pytest.mark.skipif(not (CLIPS / "captions.jsonl").exists(), reason=f"no captions.jsonl in {CLIPS}")
@pytest.mark.parametrize("settings", [{"layout": "frames", "num_frames": 4}, {"layout": "video"}])
def test_real_clips_are_scored(tmp_path: Path, settings: dict[str, Any]) -> None:
    clips = read_annotations(str(CLIPS / "captions.jsonl"))
    captions = [caption for clip in clips for caption in clip.captions]
    url = str(tmp_path / "data")
    pack_shards(clips, url, **settings)
    train_tokenizer(captions, tmp_path / "tokenizer", vocab_size=600, max_words=30)
    config = tiny_config(
        tmp_path,
        data={"test": url, "test_exchanged": None, "num_frames": 4, "max_words": 30},
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer", config.data.max_words)
    model = build_model(config.model, config.loss, tokenizer, num_frames=4).eval()
    (batch,) = evaluation_batches(
        url,
        micro_batch=8,
        rank=0,
        world_size=1,
        workers=0,
        num_frames=4,
        image_size=image_size(config.model),
        tokenize=tokenizer,
        max_bad=0,
    )
    with torch.no_grad():
        features = model(*model_inputs(batch, SINGLE_RANK.device))
        similarity = similarity_rows(features, features, config.model)
    assert similarity.shape == (len(captions), len(clips)) == (3, 2)
    assert similarity.isfinite().all()
    assert similarity.std() > 1e-4

    result = evaluate(model, config, tokenizer, SINGLE_RANK)
    assert (result.videos, result.captions, result.left_out) == (2, 3, ())
    assert [query["caption"] for query in result.queries] == captions
    for query, row in zip(result.queries, similarity, strict=True):
        assert {found["key"] for found in query["top"]} == set(batch.keys)
        scores = torch.tensor([found["similarity"] for found in query["top"]])
        assert torch.allclose(scores, row.sort(descending=True).values, atol=1e-6)
