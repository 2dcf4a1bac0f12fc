"""What is looked at before a run begins, on all ranks; every failure of every rank is named.

That the ranks can reach each other is seen before, in `join_world`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from tvr.trainer.checkpoint import steps_in
from tvr.trainer.config import Config, to_json
from tvr.trainer.errors import PreflightFailed
from tvr.trainer.model import TextVideoModel
from tvr.trainer.node_memory import ranks_here
from tvr.trainer.outline import checkpoint_bytes
from tvr.trainer.place import Place
from tvr.trainer.rank_memory import free_bytes, rank_memory
from tvr.trainer.run_dir import checkpoints_of
from tvr.trainer.tokenizer import Tokenizer
from tvr.trainer.world import World

log = logging.getLogger(__name__)

PACKAGES = ("tvr", "torch", "deepspeed", "transformers")


def preflight(config: Config, run_dir: Path, world: World) -> None:
    """Checks that all ranks are of one kind, and that each can use the checkpoints' place.

    Raises:
        PreflightFailed: a line for each failure.
    """
    mine = (socket.gethostname(), _identity(config), list(_place_errors(config, run_dir, world)))
    everyone = world.gather_objects(mine)
    if world.is_first:
        _leave_as_it_was(checkpoints_of(config, run_dir))
    hosts = [host for host, _, _ in everyone]
    lines = differences([identity for _, identity, _ in everyone], hosts)
    for rank, (host, _, errors) in enumerate(everyone):
        lines += [f"rank {rank} on {host}: {error}" for error in errors]
    if lines:
        raise PreflightFailed(lines)


def check_disk(config: Config, run_dir: Path, model: TextVideoModel, world: World) -> None:
    """Checks that the checkpoints that are kept, and one being written, fit a local disk.

    Raises:
        PreflightFailed: naming what they take and what is free.
    """
    place = checkpoints_of(config, run_dir)
    if not place.is_local:
        return

    def check() -> None:
        size = checkpoint_bytes(model, config.train)
        coming = max(1, config.checkpoint.keep_last + 1 - len(steps_in(place)))
        folder = place.path("")
        while not os.path.exists(folder):
            folder = os.path.dirname(folder.rstrip("/")) or "/"
        free = shutil.disk_usage(folder).free
        if coming * size > free:
            raise PreflightFailed(
                [
                    f"rank 0 on {socket.gethostname()}: {coming} more checkpoints of"
                    f" {size / 1e9:.3g} GB each (checkpoint.keep_last={config.checkpoint.keep_last}"
                    f" and one being written) do not fit {place.url}, where {free / 1e9:.3g} GB are"
                    " free; make room, or set checkpoint.url or checkpoint.keep_last"
                ]
            )

    world.from_first(check)


def check_memory(config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Checks that each rank's device holds weights, gradients and optimiser, before they are made.

    The rest of a step is estimated, and rather high: where it may not fit, that is only told.

    Raises:
        PreflightFailed: naming what they take and what is free.
    """
    needs = world.from_first(lambda: rank_memory(config, tokenizer, world.world_size))
    # The ranks of a machine share its memory, and have a GPU each.
    sharing = len(ranks_here(world)) if world.device.type == "cpu" else 1
    free = free_bytes()
    short = (socket.gethostname(), free) if sharing * needs.states > free else None
    where = f"{sharing} ranks of its machine" if sharing > 1 else "it"
    lines = [
        f"rank {rank} on {found[0]}: weights, gradients and optimiser of {where} take"
        f" {sharing * needs.states / 1e9:.3g} GB of memory, and {found[1] / 1e9:.3g} GB are free;"
        " more ranks with train.zero_stage=3 share them out, train.offload moves them to the host"
        for rank, found in enumerate(world.gather_objects(short))
        if found is not None
    ]
    if lines:
        raise PreflightFailed(lines)
    if world.is_first and sharing * needs.total > free:
        log.warning(
            "a step may need %.3g GB of memory, and %.3g GB are free; see `tvr train --dry-run`",
            sharing * needs.total / 1e9,
            free / 1e9,
        )


def differences(identities: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """A line for each thing in which ranks differ from the most of them."""
    lines = []
    for name in identities[0]:
        values = [identity[name] for identity in identities]
        usual = max(values, key=values.count)
        lines += [
            f"rank {rank} on {hosts[rank]}: {name} is {value}, elsewhere {usual}"
            for rank, value in enumerate(values)
            if value != usual
        ]
    return lines


def _identity(config: Config) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "the sha256 of its settings": hashlib.sha256(to_json(config).encode()).hexdigest()[:16],
    }


def _leave_as_it_was(place: Place) -> None:
    """A run that is refused in the end leaves no folder for checkpoints behind."""
    if place.is_local:
        with suppress(OSError):
            os.rmdir(place.path(""))  # fails where anything is in it


def _place_errors(config: Config, run_dir: Path, world: World) -> Iterator[str]:
    """Does with a small file what saving does with large ones."""
    place = checkpoints_of(config, run_dir)
    folder = f"preflight-{socket.gethostname()}-{os.getpid()}-{world.rank}"
    content = os.urandom(64)
    try:
        with place.writing(f"{folder}/file") as file:
            file.write(content)
        place.rename(folder, f"{folder}-moved")
        folder = f"{folder}-moved"
        found = place.read(f"{folder}/file")
        place.remove(folder)
    except OSError as error:
        yield f"{place.url} cannot be used for checkpoints: {type(error).__name__}: {error}"
        return
    if found != content:
        yield f"{place.url} cannot be used for checkpoints: a file is not read as it was written"
