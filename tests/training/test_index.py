"""Search in two stages: it finds what the whole similarity finds, and reads nothing damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from tvr.kernels.numerics import unit
from tvr.trainer.config import ModelConfig
from tvr.trainer.features.feature_set import (
    DataSource,
    FeatureHeader,
    FeatureSet,
    FeatureWriter,
    StoredType,
    VideoSource,
)
from tvr.trainer.index.index import Index, build_index
from tvr.trainer.loss.objective import similarity_rows
from tvr.trainer.model.model import Features

WIDTH, FRAMES, WORDS, PER_BLOCK, BLOCKS = 24, 4, 5, 40, 6
VIDEOS = PER_BLOCK * BLOCKS
METHODS = ("exact", "ivf", "hnsw")
Interaction = Literal["ti", "wti", "att_ti", "att_wti"]


def header(stored: StoredType = "fp32", interaction: Interaction = "att_wti") -> FeatureHeader:
    return FeatureHeader(
        model="planted",
        fingerprint="a" * 64,
        settings={
            "interaction": interaction,
            "neighbour_frames": True,
            "num_frames": FRAMES,
            "max_words": WORDS,
            "image_size": 16,
            "frame_spacing": "time",
            "mean_of_frames": False,
        },
        stored=stored,
        num_frames=FRAMES,
        num_words=WORDS,
        width=WIDTH,
        has_logits=True,
    )


def planted(seed: int) -> Features:
    """A block of videos of two scenes each, with a caption of the first scene of every video."""
    made = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, generator=made) / WIDTH**0.5

    theme = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(99)) / WIDTH**0.5
    scenes = theme[torch.arange(PER_BLOCK) % 8][:, None] + noise(PER_BLOCK, 2)
    frames = unit(scenes.repeat_interleave(FRAMES // 2, dim=1) + 0.4 * noise(PER_BLOCK, FRAMES))
    frame_mask = torch.ones(PER_BLOCK, FRAMES, dtype=torch.long)
    frame_mask[::5, -1] = 0
    said = unit(scenes[:, 0])
    word_mask = torch.tensor([[2, 1, 1, 1, 0]] * PER_BLOCK)
    return Features(
        sentence=unit(said + 1.5 * noise(PER_BLOCK)),
        words=unit(said[:, None] + 2.5 * noise(PER_BLOCK, WORDS)),
        word_mask=word_mask,
        frames=frames,
        frame_mask=frame_mask,
        word_logits=torch.randn(PER_BLOCK, WORDS, generator=made),
        frame_logits=torch.randn(PER_BLOCK, FRAMES, generator=made),
        margin_hinge=None,
    )


def data_source(number: int) -> DataSource:
    return DataSource(
        url=f"data/{number}", kind="packed", content=f"{number:064x}", num_blocks=BLOCKS
    )


def write_features(folder: Path, own: FeatureHeader, number: int = 0) -> FeatureSet:
    writer = FeatureWriter(folder, own, data_source(number))
    for block in range(BLOCKS):
        writer.write(
            block,
            planted(100 * number + block),
            keys=[f"v{block}_{row}" for row in range(PER_BLOCK)],
            captions=[f"caption {block} {row}" for row in range(PER_BLOCK)],
            caption_video=torch.arange(PER_BLOCK),
            sources=[VideoSource(row=PER_BLOCK * block + row) for row in range(PER_BLOCK)],
        )
    assert writer.publish()
    return FeatureSet.open(folder)


def build(folder: Path, method: Any, **more: Any) -> Index:
    built = build_index(FeatureSet.open(folder), method=method, blocks_per_segment=2, **more)
    assert built
    return Index.open(folder, verify=True)


def exhaustive(features: FeatureSet, texts: Features) -> Tensor:
    settings = features.info.settings
    model = ModelConfig(
        interaction=settings["interaction"], neighbour_frames=settings["neighbour_frames"]
    )
    return similarity_rows(texts, features.videos(), model)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features with an index of each method, in folders of its name."""
    folder = tmp_path_factory.mktemp("index")
    write_features(folder / "exact", header())
    for method in METHODS[1:]:
        shutil.copytree(folder / "exact", folder / method)
    for method in METHODS:
        build(folder / method, method)
    return folder


@pytest.mark.parametrize("interaction", get_args(Interaction))
@pytest.mark.parametrize("stored", get_args(StoredType))
def test_exact_search_that_reranks_all_is_the_exhaustive_ranking(
    tmp_path: Path, stored: StoredType, interaction: Interaction
) -> None:
    features = write_features(tmp_path, header(stored, interaction))
    index = build(tmp_path, "exact")
    assert (len(index), index.unindexed, index.method) == (VIDEOS, 0, "exact")
    texts = features.texts(range(0, VIDEOS, 24))
    scores = exhaustive(features, texts)
    for row, expected in enumerate(scores):
        one = Features(*(None if each is None else each[row : row + 1] for each in texts))
        hits = index.search_features(one, k=VIDEOS, rerank=VIDEOS)
        assert [hit.rank for hit in hits] == list(range(1, VIDEOS + 1))
        assert sorted(hit.video for hit in hits) == list(range(VIDEOS))
        own = torch.tensor([hit.similarity for hit in hits])
        best = expected.sort(descending=True).values
        assert torch.allclose(own, best, rtol=0, atol=1e-5)
        found = expected[[hit.video for hit in hits]]
        assert torch.allclose(found, best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_two_stages_find_what_the_whole_similarity_finds(written: Path, method: str) -> None:
    index = Index.open(written / method)
    features = index.features
    texts = features.texts()
    scores = exhaustive(features, texts)
    right = scores[torch.arange(VIDEOS), features.caption_video]
    whole = (scores > right[:, None]).sum(1) < 10
    assert 0.5 < whole.float().mean() < 0.99  # neither trivial nor hopeless
    found = []
    for row in range(VIDEOS):
        hits = index.search_features(features.texts([row]), k=10, rerank=60)
        found.append(int(features.caption_video[row]) in [hit.video for hit in hits])
    assert sum(found) >= 0.97 * int(whole.sum())
