"""Loads the model, the results and the test clips of a saved run."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from tvr.data_prep.reading.sample_reader import SampleReader
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.video.frame_sampling import segment_centres
from tvr.trainer.checkpoint.catalogue import newest_checkpoint
from tvr.trainer.checkpoint.choice import CheckpointChoice, chosen_step
from tvr.trainer.checkpoint.restore import find_newest_weights, load_weights
from tvr.trainer.config import Config
from tvr.trainer.data import build_tokenizer
from tvr.trainer.distributed.world import World, join_world
from tvr.trainer.evaluation.bank import encoded_bank
from tvr.trainer.evaluation.evaluate import Report, evaluate
from tvr.trainer.evaluation.options import DEFAULTS, EvaluationOptions
from tvr.trainer.frozen.tower_outputs import open_or_make
from tvr.trainer.model.model import TextVideoModel, build_model, image_size
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.model.tower_folders import has_imported
from tvr.trainer.records import Evaluation, results_table
from tvr.trainer.run_dir import checkpoints_of, read_config, write_evaluation
from tvr.trainer.run_files import EVALUATION

THUMBNAIL_FRAMES = 3

ALONE = World(rank=0, world_size=1, device=torch.device("cpu"))

log = logging.getLogger(__name__)


def evaluate_run(
    run_dir: Path,
    data: str | None,
    choice: CheckpointChoice = "newest",
    options: EvaluationOptions = DEFAULTS,
    report: Report | None = None,
) -> Evaluation:
    """Evaluates a run's checkpoint, on as many ranks as the job has.

    The result on the run's own test set is stored: that of the newest checkpoint replaces
    evaluation.json, that of another one gets a file of its own.

    Args:
        data: URL of another test set; None: the run's test set.
        choice: The newest checkpoint, the best one, or that of a step.
        options: Choices of the protocol. With `equal_captions` or `paragraphs` nothing is stored.
        report: As in `evaluate`.

    Raises:
        ValueError: no run, no such checkpoint, or no test set.
    """
    config = read_config(run_dir)
    if data is not None:
        config = replace(config, data=replace(config.data, test=data, test_exchanged=None))
    # Before anything is read, so that the ranks share the reading.
    with join_world() as world:
        model, tokenizer, step = load_run(run_dir, config, world, choice)
        model.eval()
        bank = None
        if options.qb_norm is not None:
            bank = encoded_bank(
                options.qb_norm,
                model.encode_texts,
                tokenizer,
                config,
                options.bank_captions,
                world,
            )
        # Without towers, only stored outputs can be evaluated.
        stored = None
        if has_imported(config.model):
            stored = open_or_make(config, model, tokenizer, world)
        found = evaluate(model, config, tokenizer, world, options, bank, report, stored)
        result = replace(found, step=step)
        # The results in a run are all of one protocol.
        is_plain = not (options.equal_captions or options.paragraphs)
        if data is None and is_plain and world.is_first:
            is_last = choice == "newest" or step == step_of(run_dir, "newest")
            write_evaluation(run_dir, result, step, is_last=is_last)
    return result


def load_run(
    run_dir: Path, config: Config, world: World = ALONE, choice: CheckpointChoice = "newest"
) -> tuple[TextVideoModel, Tokenizer, int]:
    """Loads the weights of a run's checkpoint: the newest with intact ones, or the chosen one.

    All ranks of `world` call it.

    Returns:
        The model in fp32 on the device of `world`, its tokeniser, and the step.

    Raises:
        ValueError: the run has no checkpoint, or not the chosen one; names those it has.
        CheckpointDamaged: all its checkpoints are damaged, or the chosen one is.
    """
    storage = checkpoints_of(config.checkpoint, run_dir)
    with tempfile.TemporaryDirectory(prefix="tvr-restore-") as folder:
        checkpoint = find_newest_weights(storage, world, Path(folder), choice)
        if checkpoint is None:
            raise ValueError(f"{run_dir} has no checkpoint yet")
        tokenizer = build_tokenizer(config.model, config.data)
        model = build_model(config.model, config.loss, tokenizer, num_frames=config.data.num_frames)
        load_weights(storage, checkpoint, model.to(world.device), Path(folder), world)
    return model, tokenizer, checkpoint.state.step


def step_of(run_dir: Path, choice: CheckpointChoice) -> int:
    """The step of a run's checkpoint, whose files are not read.

    Raises:
        ValueError: the run has no such checkpoint; names those it has.
    """
    storage = checkpoints_of(read_config(run_dir).checkpoint, run_dir)
    step = chosen_step(storage, choice)
    if step is None:
        newest = newest_checkpoint(storage)
        if newest is None:
            raise ValueError(f"{run_dir} has no checkpoint yet")
        step = newest.state.step
    return step


def stored_table(run_dir: Path) -> str:
    """The results in evaluation.json as text for a terminal."""
    return results_table(json.loads((run_dir / EVALUATION).read_text()))


def thumbnail_reader(run_dir: Path) -> Callable[[str], list[Image.Image]] | None:
    """A function that returns a few frames of the test clip with a given key.

    Returns:
        None if the run has no test set or the set cannot be opened, which is logged.
    """
    config = read_config(run_dir)
    url = config.data.test
    if url is None:
        return None
    try:
        reader = SampleReader(
            url,
            num_frames=config.data.num_frames,
            image_size=image_size(config.model),
            decoder=config.data.decoder,
            frame_spacing=config.data.frame_spacing,
        )
    except (OSError, ValueError, ShardCorrupt) as error:
        log.warning("no thumbnails: %s", error)
        return None
    rows = {reader.key(row): row for row in range(len(reader))}

    def thumbnails(key: str) -> list[Image.Image]:
        frames = reader.read(rows[key]).frames
        picked = segment_centres(len(frames), min(THUMBNAIL_FRAMES, len(frames)))
        return [Image.fromarray(frames[index]) for index in picked]

    return thumbnails
