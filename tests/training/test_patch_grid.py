"""`model.tokens_per_frame`: a grid of cells for each frame, from the towers to the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.clip_files import plain_captions
from builders.pretrained import save_siglip
from builders.tiny import IMAGE_SIZE, MAX_WORDS, NUM_FRAMES, tiny_config
from test_towers import CAPTIONS, pictures, unit
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tvr.kernels import reference
from tvr.trainer.config import ModelConfig
from tvr.trainer.distributed.world import World
from tvr.trainer.evaluation.embed import embed
from tvr.trainer.evaluation.evaluate import evaluate
from tvr.trainer.evaluation.export import export_run, exported_config, load_exported
from tvr.trainer.evaluation.model_source import SourceModel
from tvr.trainer.evaluation.saved_run import load_run
from tvr.trainer.explanation.explanation import explain
from tvr.trainer.loop import train
from tvr.trainer.loss.objective import objective, similarity_rows
from tvr.trainer.memory.environment import similarity_backend
from tvr.trainer.memory.rank_memory import configured_sizes
from tvr.trainer.model.model import TextVideoModel, build_model
from tvr.trainer.model.tokenizer import Tokenizer, load_tokenizer
from tvr.trainer.model.towers import cell_means, cell_patches, cells
from tvr.trainer.monitoring.flops import flops_per_pair

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))


def setting(data: Path, k: int = 4, **model: Any) -> Any:
    towers = {"image_size": IMAGE_SIZE, "patch_size": 4}  # 4 x 4 patches
    own = {"tokens_per_frame": k, "sequence_header_layers": 0, "towers": towers}
    return tiny_config(data, model=own | model)


def built(config: Any) -> tuple[TextVideoModel, Tokenizer]:
    tokenizer = load_tokenizer(str(config.model.tokenizer), config.data.max_words)
    torch.manual_seed(3)
    model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
    return model, tokenizer


def inputs(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(CAPTIONS), NUM_FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    mask = torch.ones(shape[:2], dtype=torch.long)
    mask[0, 2:] = mask[2, 1:] = 0
    return frames, mask, *tokenizer(plain_captions(*CAPTIONS))


@pytest.mark.parametrize(("rows", "side"), [(4, 1), (4, 2), (7, 2), (7, 3), (5, 3), (7, 7)])
def test_cells_are_those_of_adaptive_average_pooling(rows: int, side: int) -> None:
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(3, rows * rows, 5, generator=draw, dtype=torch.float64)
    image = patches.transpose(1, 2).unflatten(2, (rows, rows))
    expected = adaptive_avg_pool2d(image, side).flatten(2).transpose(1, 2)
    torch.testing.assert_close(cell_means(patches, side), expected)
    sizes = {len(part) for part in cells(rows, side)}
    if len(sizes) == 1:
        torch.testing.assert_close(cell_patches(patches, side).mean(2), expected)
        return
    with pytest.raises(ValueError, match="no 3 x 3 cells of equal size"):
        cell_patches(patches, side)


def test_clips_cells_are_projected_means_of_patches(data: Path) -> None:
    model, tokenizer = built(setting(data))
    model.eval()
    frames, mask, *texts = inputs(tokenizer)
    pixels = (frames.flatten(0, 1) / 255 - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        found = model(frames, mask, *texts)
        tower = model.image_tower
        hidden = tower.vision_model(pixel_values=pixels).last_hidden_state
        grid = tower.vision_model.post_layernorm(hidden[:, 1:]).unflatten(1, (4, 4))
        for place, (up, along) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            cell = grid[:, 2 * up : 2 * up + 2, 2 * along : 2 * along + 2].mean((1, 2))
            expected = unit(tower.visual_projection(cell)).unflatten(0, mask.shape)
            torch.testing.assert_close(found.frames[:, place::4], expected)
        videos = model.encode_videos(frames, mask)
    assert found.frames.shape == (len(CAPTIONS), NUM_FRAMES * 4, 16)
    assert found.frame_mask.tolist()[2] == [1] * 4 + [0] * 8
    assert torch.equal(videos.frames, found.frames)
    assert torch.equal(videos.frame_mask, found.frame_mask)


def test_siglips_cells_are_pooled_as_its_frames(tmp_path: Path) -> None:
    theirs = save_siglip(tmp_path, 8 * CAPTIONS, max_words=16, image_size=24)
    words = load_tokenizer(tmp_path, 16)
    frames, mask = pictures(24)
    pixels: Any = (frames.flatten(0, 1) / 255 - 0.5) / 0.5
    config = setting(tmp_path, 1, pretrained=str(tmp_path), tokenizer=None)
    whole = build_model(config.model, config.loss, words, num_frames=2).eval()
    rows = 24 // theirs.config.vision_config.patch_size
    model = replace(config.model, tokens_per_frame=rows * rows)
    one_each = build_model(model, config.loss, words, num_frames=2).eval()
    with torch.no_grad():
        # One cell is the frame; one patch a cell is the head of one patch.
        patches = theirs.vision_model(pixel_values=pixels).last_hidden_state
        expected = unit(theirs.vision_model.head(patches.flatten(0, 1)[:, None]))
        found = one_each.encode_videos(frames, mask).frames
        torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
        tower, family = whole.image_tower, whole.family
        assert family.encode_cells is not None
        torch.testing.assert_close(
            family.encode_cells(tower, pixels, 1)[:, 0], family.encode_frames(tower, pixels)
        )


@pytest.mark.parametrize("matching", ["two_way", "words_to_frames"])
def test_the_loss_reads_cells_as_frames(data: Path, matching: str) -> None:
    config = setting(data, matching=matching)
    model, tokenizer = built(config)
    found = model(*inputs(tokenizer))
    ids = torch.arange(len(CAPTIONS))
    result = objective(found, ids, config.model, config.loss, ALONE, scores="stream")
    result.for_backward.backward()
    assert found.margin_hinge is not None
    silent = {name for name, x in model.named_parameters() if x.grad is None}
    # As with one vector a frame: the frame predictor acts by a hard choice only.
    assert {name.split(".")[0] for name in silent} == {"frame_predictor"}
    with torch.no_grad():
        scores = similarity_rows(found, found, config.model)
        expected = reference.dmae_similarity(
            found.sentence,
            found.words,
            found.frames,
            found.word_mask,
            found.frame_mask,
            matching=matching,
            word_logits=found.word_logits,
            frame_logits=found.frame_logits,
        )
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_evaluation_memory_and_flops_count_the_cells(data: Path) -> None:
    config = setting(data)
    model, tokenizer = built(config)
    assert configured_sizes(config, 1).frames == 4 * NUM_FRAMES
    many = replace(config, model=replace(config.model, tokens_per_frame=100))
    assert "300 words or frames" in similarity_backend(many)[1]
    one, _ = built(setting(data, 1))
    more = flops_per_pair(model, config, 1) - flops_per_pair(one, setting(data, 1), 1)
    rows = 1 + MAX_WORDS
    similarity = 6 * config.train.micro_batch * rows * NUM_FRAMES * 3 * 16
    assert more > similarity
    result = evaluate(model.eval(), config, tokenizer, ALONE)
    assert result.captions == 10


def test_a_run_at_zero_3_exports_a_model_of_cells(data: Path, tmp_path: Path) -> None:
    config = setting(data, matching="words_to_frames")
    config = replace(config, train=replace(config.train, steps=2, zero_stage=3))
    train(config, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert exported_config(tmp_path / "out").model.tokens_per_frame == 4
    model, tokenizer, _ = load_run(tmp_path / "run", config)
    batch = inputs(tokenizer)
    with torch.no_grad():
        expected = model.eval()(*batch)
        found = load_exported(tmp_path / "out")(*batch)
    assert found.frames.shape[1] == 4 * NUM_FRAMES
    torch.testing.assert_close(found.frames, expected.frames)
    untrained, _ = built(config)
    untrained.eval()
    with torch.no_grad():
        assert not torch.allclose(untrained(*batch).frames, found.frames, atol=1e-4)


def test_what_holds_one_vector_a_frame_is_refused(data: Path, tmp_path: Path) -> None:
    config = setting(data)
    model, tokenizer = built(config)
    source = SourceModel(
        model=model.eval(),
        tokenizer=tokenizer,
        config=config,
        mean_of_frames=False,
        name="a model",
        step=None,
        weights="0",
    )
    assert source.settings["tokens_per_frame"] == 4
    for call in (
        lambda: embed(source, config.data.test, tmp_path),
        lambda: explain(source, "red", model.encode_videos(*inputs(tokenizer)[:2])),
    ):
        with pytest.raises(ValueError, match=r"model\.tokens_per_frame=4"):
            call()
    with pytest.raises(ValueError, match="tokens_per_frame=3 must be a square"):
        ModelConfig(tokens_per_frame=3)
    with pytest.raises(ValueError, match=r"combined with model\.sequence_header_layers=2"):
        ModelConfig(tokens_per_frame=4, sequence_header_layers=2)
    with pytest.raises(ValueError, match="=25 exceeds the 4 x 4 patches"):
        built(setting(data, 25))
    with pytest.raises(ValueError, match="family other have no grid"):
        replace(model.family, name="other", encode_cells=None).check_cells(model.image_tower, 4)
