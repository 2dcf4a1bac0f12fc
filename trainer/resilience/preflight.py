"""What is looked at before a run begins, on all ranks; every failure of every rank is named.

That the ranks can reach each other is seen before, in `join_world`. What settings are to blame for
would fail in the same way anywhere; what a node is to blame for may go well on another one.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tvr.data_prep.records import ShardCorrupt
from tvr.trainer.checkpoint.catalogue import steps_in
from tvr.trainer.checkpoint.place import Place
from tvr.trainer.config import Config, to_json
from tvr.trainer.data import validate_data_sets
from tvr.trainer.distributed.shared_memory import ranks_on_node
from tvr.trainer.distributed.world import World
from tvr.trainer.errors import PreflightFailed
from tvr.trainer.memory.model_memory import checkpoint_bytes
from tvr.trainer.memory.rank_memory import free_bytes, rank_memory, total_bytes
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.run_dir import checkpoints_of

log = logging.getLogger(__name__)

PACKAGES = ("tvr", "torch", "deepspeed", "transformers")
SETTINGS = "the sha256 of its settings"
# What a path or URL meets that is wrong itself.
WRONG_NAME = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong on one rank."""

    rank: int
    text: str
    of_node: bool
    """Or else of the settings."""


def preflight(config: Config, run_dir: Path, world: World) -> None:
    """Checks that all ranks are of one kind, and that each can use the run's places.

    Raises:
        PreflightFailed: a line for each failure.
    """
    mine = (socket.gethostname(), _identity(config), list(_place_errors(config, run_dir, world)))
    everyone = world.all_gather_objects(mine)
    if world.is_first:
        _leave_as_it_was(checkpoints_of(config, run_dir))
    hosts, identities, errors = zip(*everyone, strict=True)
    findings = differences(identities)
    # A name that no rank can use is wrong; one that some can is right.
    is_wrong = all(any(error.is_name for error in found) for found in errors)
    for rank, found in enumerate(errors):
        findings += [
            Finding(rank, error.text, of_node=not (is_wrong and error.is_name)) for error in found
        ]
    refuse(findings, hosts)


def check_data(config: Config, world: World) -> int:
    """The number of training samples, where every rank finds the data sets to be good.

    Raises:
        OSError, ShardCorrupt, ValueError: as `validate_data_sets`, on all ranks.
        PreflightFailed: some ranks cannot use what others can.
    """
    found, error = 0, None
    try:
        found = validate_data_sets(config, world)
    except (OSError, ShardCorrupt, ValueError) as caught:
        error = caught
    said = None if error is None else str(error)
    hosts, errors = zip(*world.all_gather_objects((socket.gethostname(), said)), strict=True)
    if error is not None and None not in errors:
        raise error
    texts = [(rank, text) for rank, text in enumerate(errors) if text is not None]
    refuse([Finding(rank, text, of_node=True) for rank, text in texts], hosts)
    return found


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
        disk = shutil.disk_usage(folder)
        if coming * size > disk.free:
            text = (
                f"{coming} more checkpoints of {size / 1e9:.3g} GB each (checkpoint.keep_last="
                f"{config.checkpoint.keep_last} and one being written) do not fit {place.url},"
                f" where {disk.free / 1e9:.3g} of {disk.total / 1e9:.3g} GB are free; make room,"
                " or set checkpoint.url or checkpoint.keep_last"
            )
            finding = Finding(0, text, of_node=coming * size <= disk.total)
            refuse([finding], [socket.gethostname()])

    world.run_on_first(check)


def check_memory(config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Checks that each rank's device holds weights, gradients and optimiser, before they are made.

    The rest of a step is estimated, and rather high: where it may not fit, that is only told.

    Raises:
        PreflightFailed: naming what they take and what is free.
    """
    needs = world.run_on_first(lambda: rank_memory(config, tokenizer, world.world_size))
    # The ranks of a machine share its memory, and have a GPU each.
    sharing = len(ranks_on_node(world)) if world.device.type == "cpu" else 1
    needed, free, total = sharing * needs.states, free_bytes(), total_bytes()
    where = f"{sharing} ranks of its machine" if sharing > 1 else "it"
    text = (
        f"weights, gradients and optimiser of {where} take {needed / 1e9:.3g} GB of memory, and"
        f" {free / 1e9:.3g} of {total / 1e9:.3g} GB are free; more ranks with train.zero_stage=3"
        " share them out, train.offload moves them to the host"
    )
    everyone = world.all_gather_objects((socket.gethostname(), text, needed > free, needed > total))
    fits_somewhere = not all(is_larger for *_, is_larger in everyone)
    findings = [
        Finding(rank, text, of_node=fits_somewhere)
        for rank, (_, text, is_short, _) in enumerate(everyone)
        if is_short
    ]
    refuse(findings, [host for host, *_ in everyone])
    if world.is_first and sharing * needs.total > free:
        log.warning(
            "a step may need %.3g GB of memory, and %.3g GB are free; see `tvr train --dry-run`",
            sharing * needs.total / 1e9,
            free / 1e9,
        )


def differences(identities: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Each thing in which a rank differs from the most of them; its settings come last."""
    findings: list[Finding] = []
    for name in identities[0]:
        values = [identity[name] for identity in identities]
        usual = max(values, key=values.count)
        # Another version may also read the same settings otherwise.
        others = {finding.rank for finding in findings}
        findings += [
            Finding(
                rank, f"{name} is {value}, elsewhere {usual}", name != SETTINGS or rank in others
            )
            for rank, value in enumerate(values)
            if value != usual
        ]
    return findings


def refuse(findings: Sequence[Finding], hosts: Sequence[str]) -> None:
    """Raises PreflightFailed if there are any."""
    if not findings:
        return
    lines = [f"rank {found.rank} on {hosts[found.rank]}: {found.text}" for found in findings]
    # Where settings are wrong, too, another node helps nobody.
    elsewhere = all(found.of_node for found in findings)
    raise PreflightFailed(lines, min(found.rank for found in findings) if elsewhere else None)


def _identity(config: Config) -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        SETTINGS: hashlib.sha256(to_json(config).encode()).hexdigest()[:16],
    }


def _leave_as_it_was(place: Place) -> None:
    """A run that is refused in the end leaves no folder for checkpoints behind."""
    if place.is_local:
        with suppress(OSError):
            os.rmdir(place.path(""))  # fails where anything is in it


@dataclass(frozen=True, slots=True)
class _PlaceError:
    text: str
    is_name: bool
    """Whether the place's name can be what is wrong."""


def _place_errors(config: Config, run_dir: Path, world: World) -> Iterator[_PlaceError]:
    """Tries the places to which all ranks write."""
    places = {"checkpoints": checkpoints_of(config, run_dir)}
    if config.checkpoint.url is not None:
        places["a run"] = Place(str(run_dir))
    for use, place in places.items():
        error = _place_error(place, f"preflight-{socket.gethostname()}-{os.getpid()}-{world.rank}")
        if error is not None:
            text = f"{place.url} cannot be used for {use}: {error.text}"
            yield _PlaceError(text, error.is_name)


def _place_error(place: Place, folder: str) -> _PlaceError | None:
    """Does with a small file what saving does with large ones."""
    content = os.urandom(64)
    try:
        with place.writing(f"{folder}/file") as file:
            file.write(content)
        place.rename(folder, f"{folder}-moved")
        folder = f"{folder}-moved"
        found = place.read(f"{folder}/file")
        place.remove(folder)
    except OSError as error:
        return _PlaceError(f"{type(error).__name__}: {error}", isinstance(error, WRONG_NAME))
    if found != content:
        return _PlaceError("a file is not read as it was written", is_name=False)
    return None
