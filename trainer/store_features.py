"""Stores the outputs of a run's frozen towers before the run, for `tvr features`."""

from __future__ import annotations

from tvr.trainer.build_run import initial_model
from tvr.trainer.config import Config
from tvr.trainer.data import build_tokenizer
from tvr.trainer.distributed.world import join_world
from tvr.trainer.frozen.progress import encoding_report
from tvr.trainer.frozen.tower_outputs import check_settings, open_or_make
from tvr.trainer.resilience.preflight import check_data


def store_features(config: Config) -> str:
    """Makes what `data.features` lacks for a run of these settings; returns the folder.

    Every rank of the job calls it.

    Raises:
        ValueError: `data.features` is not set, a setting makes outputs differ from visit to visit,
            or the folder holds outputs of other towers, settings or content.
        OSError, ShardCorrupt, TooManyBadSamples: as `open_or_make`.
    """
    if config.data.features is None:
        raise ValueError("data.features is not set: name the folder to write, --data.features")
    check_settings(config)
    with join_world(config.train.timeout_s) as world:
        check_data(config.data, config.train, world)
        tokenizer = build_tokenizer(config.model, config.data)
        model = initial_model(config, tokenizer, world)
        # As the engine does: every rank has rank 0's weights, in the precision of training.
        if config.train.precision == "bf16":
            model = model.bfloat16()
        model = model.to(world.device)
        world.broadcast_from_first(model.state_dict().values())
        report = encoding_report(prints=world.is_first)
        open_or_make(config, model, tokenizer, world, report, verify_bytes=None)
    return config.data.features
