"""Stored outputs of frozen towers: made once, then read by training and evaluation.

The door of the package. A folder holds a feature set (`features`) of the towers alone: sentence,
words and frames before the sequence header and the weight layers. It belongs to one pair of towers,
one vocabulary and one way of reading, which its fingerprint names; each data set in it belongs to
one content. Both are compared whenever it is opened.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from tvr.data_prep.records import ShardCorrupt
from tvr.trainer.config import Config, DataConfig
from tvr.trainer.data import StoredTowers, training_sets
from tvr.trainer.distributed.world import World
from tvr.trainer.features.feature_set import MANIFEST, DataSource, FeatureHeader, FeatureSet
from tvr.trainer.frozen.encoding import Report, encode_blocks
from tvr.trainer.frozen.identity import packed_source, towers_header
from tvr.trainer.frozen.set_outputs import SetOutputs
from tvr.trainer.model.features import imported_settings
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.model.tower_folders import has_imported

# Read in seconds, also by the eight ranks of a node from one disk. Ten million clips take 900 GB.
VERIFY_BYTES = 2 << 30

__all__ = ["Report", "check_settings", "data_urls", "features_line", "open_or_make"]


def check_settings(config: Config) -> None:
    """Checks that the outputs of the towers are the same at each visit of a clip.

    Raises:
        ValueError: a setting makes them differ, or the folder cannot be read in place; names it.
    """
    data, model = config.data, config.model
    if data.features is None:
        if has_imported(model):
            raise ValueError(
                f"model.pretrained={model.pretrained} holds imported features and no towers: set"
                " data.features to the same folder"
            )
        return
    where = f"data.features={data.features}"
    imported = has_imported(model)
    if imported:
        _check_imported(config)
    for setting, value, allowed in (
        ("model.freeze", model.freeze, "both"),
        ("model.lora_rank", model.lora_rank, 0),
        ("model.tokens_per_frame", model.tokens_per_frame, 1),
        ("data.frame_sampling", data.frame_sampling, "centre"),
        ("data.crop_scale", data.crop_scale, 1.0),
        ("data.word_drop", data.word_drop, False),
    ):
        if value != allowed and not (imported and setting == "model.freeze"):
            raise ValueError(
                f"{where} needs {setting}={allowed}, and it is {value}: the outputs of the towers"
                " would differ from visit to visit; set it, or leave data.features out"
            )
    if imported and data.hard_batches and data.hard_every:
        raise ValueError(
            f"{where} holds imported features, and no text tower can find hard batches anew: set"
            f" data.hard_every=0, and it is {data.hard_every}"
        )
    if config.train.zero_stage == 3:
        raise ValueError(
            f"{where} needs train.zero_stage 0, 1 or 2, and it is 3, which would partition towers"
            " that are not run"
        )
    if "://" in data.features:
        raise ValueError(f"{where} must be a local folder that all ranks see: it is read by row")


def _check_imported(config: Config) -> None:
    data, folder = config.data, str(config.model.pretrained)
    if data.features is None or Path(data.features).resolve() != Path(folder).resolve():
        raise ValueError(
            f"model.pretrained={folder} holds imported features: data.features must be the same"
            f" folder, and it is {data.features}"
        )
    found = imported_settings(folder)
    for setting, value in (("num_frames", data.num_frames), ("max_words", data.max_words)):
        if found[setting] != value:
            raise ValueError(
                f"data.{setting} must be {found[setting]}, as in the imported features of {folder},"
                f" and it is {value}"
            )


def features_line(config: Config) -> str:
    """One line that tells whether the towers run in training."""
    data = config.data
    if data.features is None:
        frozen = config.model.freeze == "both" and not config.model.lora_rank
        return f"towers: run at each step{'; data.features would store their outputs' * frozen}"
    made = (Path(data.features) / MANIFEST).is_file()
    state = "stored in" if made else "to be stored by the first run in"
    return f"towers: not run in training; their outputs are {state} {data.features}"


def data_urls(data: DataConfig) -> list[str]:
    """The data sets of a run, each once."""
    tests = [url for url in (data.test, data.test_exchanged) if url is not None]
    return list(dict.fromkeys([*(each.url for each in training_sets(data)), *tests]))


def open_or_make(
    config: Config,
    model: TextVideoModel,
    tokenizer: Tokenizer,
    world: World,
    report: Report | None = None,
    *,
    verify_bytes: int | None = VERIFY_BYTES,
) -> StoredTowers | None:
    """Opens the stored outputs of all data sets of a run, and makes those that are missing.

    All ranks call it, with equal weights. They share the encoding, and the reading by which files
    are compared with their hashes. The sizes of all files are compared at every start.

    Args:
        model: The whole model on this rank's device, in the precision of the run.
        report: Called after each block with its data set and counts, see `Report`.
        verify_bytes: Bytes that a rank compares with their hashes; of a larger share, parts taken
            at random. None: all.

    Returns:
        None without `data.features`.

    Raises:
        ValueError: the folder holds outputs of other towers, settings or content; names them.
        ShardCorrupt: a file is damaged; names it.
        TooManyBadSamples: more videos of a set than `data.max_bad` cannot be read.
    """
    if config.data.features is None:
        return None
    check_settings(config)
    folder = Path(config.data.features)
    imported = has_imported(config.model)

    def describe() -> FeatureHeader:
        if imported:
            return FeatureSet.published(folder, towers=True).header
        return towers_header(config, model, tokenizer)

    header = world.run_on_first(describe, patient=True)
    sources = {url: packed_source(url, config.data.shard_cache) for url in data_urls(config.data)}

    def missing() -> list[str]:
        there = _published(folder, header)
        return [url for url, source in sources.items() if source.name not in there]

    for url in world.run_on_first(missing):
        if imported:
            raise ValueError(
                f"{folder} holds no features of {url} as it is now; add them by"
                f" `tvr import-features --data {url} --out {folder}`"
            )
        encode_blocks(folder, header, url, sources[url], config, model, tokenizer, world, report)
    features = world.run_on_all(lambda: FeatureSet.open(folder, towers=True), Exception)
    world.run_on_all(lambda: _verify(features, sources.values(), world, verify_bytes), ShardCorrupt)
    return {url: SetOutputs(features, source) for url, source in sources.items()}


def _published(folder: Path, header: FeatureHeader) -> set[str]:
    """Names of the data sets of the folder that are whole."""
    if not (folder / MANIFEST).is_file():
        return set()
    manifest = FeatureSet.published(folder, towers=True)
    manifest.header.check_same(header, str(folder))
    return {source.name for source, _ in manifest.sets}


def _verify(
    features: FeatureSet, sources: Iterable[DataSource], world: World, most: int | None
) -> None:
    """Compares this rank's share of the files that the run reads with their hashes.

    Args:
        most: Bytes after which no other part is begun; None = no limit.
    """
    wanted = {source.name for source in sources}
    parts = [each for each in features.parts if each[0].name in wanted][
        world.rank :: world.world_size
    ]
    if most is not None:
        # Another choice at each start, and none of the run's own random numbers.
        random.Random().shuffle(parts)
    done = 0
    for source, part in parts:
        if most is not None and done >= most:
            break
        features.verify(source, part)
        done += sum(file.num_bytes for file in part.files.values())
