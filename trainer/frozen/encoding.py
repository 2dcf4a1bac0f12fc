"""Encodes a data set by frozen towers, in blocks that the ranks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.records import TRANSIENT_REASONS, Batch, Replacement, TooManyBadSamples
from tvr.trainer.config import Config
from tvr.trainer.data import ordered_batches
from tvr.trainer.distributed.world import World
from tvr.trainer.features.feature_set import DataSource, FeatureHeader, FeatureWriter, VideoSource
from tvr.trainer.loss.gradient_cache import concat_features
from tvr.trainer.model.model import Features, TextVideoModel, model_inputs
from tvr.trainer.model.tokenizer import Tokenizer

Report = Callable[[str, int, int, int], object]
"""Called on all ranks with the data set, its blocks done, all of them, and videos left out."""


def encode_blocks(
    folder: Path,
    header: FeatureHeader,
    url: str,
    source: DataSource,
    config: Config,
    model: TextVideoModel,
    tokenizer: Tokenizer,
    world: World,
    report: Report | None,
) -> None:
    """Encodes a data set, whose blocks the ranks share, and publishes it. All ranks call it.

    A block is written under a temporary name and renamed; a restart skips those that are whole.
    Ranks finish a block together, so that a rank that fails ends the job, and none waits for longer
    than a block takes.

    Raises:
        ValueError: the folder holds other features; names them.
        TooManyBadSamples: more videos than `data.max_bad` cannot be read, or the storage is down.
    """
    writer = world.run_on_all(lambda: FeatureWriter(folder, header, source), Exception)
    budget = BadSampleBudget(config.data.max_bad, f"while encoding {url}")
    blocks = source.num_blocks

    def encode(block: int) -> list[Replacement]:
        if block >= blocks or writer.has(block):
            return []
        return _encode_block(writer, block, url, config, model, tokenizer, world)

    left_out = 0
    for start in range(0, blocks, world.world_size):
        own = start + world.rank
        bad = world.run_on_all(lambda block=own: encode(block), Exception)
        found = [entry for part in world.all_gather_objects(bad) for entry in part]
        for entry in found:
            budget.record_bad(entry.key, entry.reason, entry.detail)
        left_out += len(found)
        if report is not None:
            report(url, min(start + world.world_size, blocks), blocks, left_out)
    world.run_on_first(writer.publish)


def _encode_block(
    writer: FeatureWriter,
    block: int,
    url: str,
    config: Config,
    model: TextVideoModel,
    tokenizer: Tokenizer,
    world: World,
) -> list[Replacement]:
    """Encodes one block and writes its part; returns the samples that cannot be read."""
    batches = ordered_batches(
        url,
        config.data,
        config.model,
        config.train,
        tokenizer,
        world,
        block=(block, writer.source.num_blocks),
    )
    parts: list[Features] = []
    keys: list[str] = []
    captions: list[str] = []
    caption_video: list[torch.Tensor] = []
    rows: list[int] = []
    left_out: list[Replacement] = []
    for batch in batches:
        for entry in batch.replaced:
            if entry.reason in TRANSIENT_REASONS:
                # It may be readable when the storage answers: the part must not lack it.
                raise TooManyBadSamples(
                    f"{url}: {entry.key} cannot be read for the moment: {entry.detail}; start again"
                )
            left_out.append(entry)
        if not batch.keys:
            continue
        parts.append(_encoded(batch, model, world))
        caption_video.append(batch.caption_video + len(keys))
        keys += batch.keys
        captions += batch.captions
        rows += batch.positions.tolist()
    writer.write(
        block,
        concat_features(parts) if parts else None,
        keys=keys,
        captions=captions,
        caption_video=torch.cat(caption_video) if caption_video else None,
        sources=[VideoSource(row=row) for row in rows],
        left_out=left_out,
    )
    return left_out


def _encoded(batch: Batch, model: TextVideoModel, world: World) -> Features:
    pixels, frame_mask, ids, word_mask = model_inputs(batch, world.device)
    with torch.no_grad():
        frames, sentence, words = model.tower_outputs(pixels, ids, word_mask)
    # A block need not fit in the device's memory.
    return Features(
        sentence=sentence.cpu(),
        words=words.cpu(),
        word_mask=word_mask.cpu(),
        frames=frames.cpu(),
        frame_mask=frame_mask.cpu(),
        word_logits=None,
        frame_logits=None,
        margin_hinge=None,
    )
