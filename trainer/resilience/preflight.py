"""Checks on all ranks before a run begins; every failure of every rank is reported.

`join_world` has already checked that the ranks reach each other. A wrong setting would fail on any
node, so the job must not start again. A fault of a node may not occur on another one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import published_steps
from tvr.trainer.config import CheckpointConfig, Config, DataConfig, TrainConfig, to_json
from tvr.trainer.data import DataSets, validate_data_sets
from tvr.trainer.distributed.shared_memory import ranks_on_node
from tvr.trainer.distributed.world import World
from tvr.trainer.memory.model_memory import checkpoint_bytes
from tvr.trainer.memory.rank_memory import free_bytes, rank_memory, total_bytes
from tvr.trainer.model.model import TextVideoModel
from tvr.trainer.model.tokenizer import Tokenizer
from tvr.trainer.records import Finding, raise_findings
from tvr.trainer.run_dir import checkpoints_of

log = logging.getLogger(__name__)

PACKAGES = ("tvr", "torch", "deepspeed", "transformers")
SETTINGS = "the sha256 of its settings"
# Errors that a wrong path or URL causes; any other OSError is a fault of the node.
WRONG_NAME_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)


def preflight(config: Config, run_dir: Path, world: World) -> None:
    """Checks that all ranks run the same software and settings, and can write to the run's storage.

    All ranks call it.

    Raises:
        PreflightFailed: with a line for each failure.
    """
    folders = _written_folders(config.checkpoint, run_dir)
    new = {use for use, storage in folders.items() if _is_missing(storage)}
    storage_errors = list(_storage_errors(folders, world))
    own = (socket.gethostname(), _identity(config), storage_errors, new)
    hosts, identities, errors, made = zip(*world.all_gather_objects(own), strict=True)
    if world.is_first:
        # Those that a rank found missing; a folder that was there stays, even if it is empty.
        for use in set().union(*made):
            folders[use].remove_empty("")
    findings = find_differences(identities)
    # A name that no rank can use is wrong; a name that some rank can use is right.
    is_wrong = all(any(error.is_name for error in found) for found in errors)
    for rank, found in enumerate(errors):
        findings += [
            Finding(rank, error.text, is_node_fault=not (is_wrong and error.is_name))
            for error in found
        ]
    raise_findings(findings, hosts)


def check_data(data: DataConfig, train: TrainConfig, world: World) -> DataSets:
    """Checks the data sets on every rank. All ranks call it.

    Raises:
        OSError, ShardCorrupt, ValueError: as `validate_data_sets`, if every rank fails.
        PreflightFailed: some ranks fail and others do not.
    """
    found, error = DataSets({}, {}), None
    try:
        found = validate_data_sets(data, train, world)
    except (OSError, ShardCorrupt, ValueError) as caught:
        error = caught
    own_text = None if error is None else str(error)
    hosts, errors = zip(*world.all_gather_objects((socket.gethostname(), own_text)), strict=True)
    if error is not None and None not in errors:
        raise error
    texts = [(rank, text) for rank, text in enumerate(errors) if text is not None]
    raise_findings([Finding(rank, text, is_node_fault=True) for rank, text in texts], hosts)
    return found


def check_disk(
    checkpoint: CheckpointConfig,
    train: TrainConfig,
    run_dir: Path,
    model: TextVideoModel,
    world: World,
) -> None:
    """Checks that a local disk has room for the checkpoints that stay and one being written.

    All ranks call it; rank 0 checks.

    Raises:
        PreflightFailed: with the bytes that are needed and free.
    """
    storage = checkpoints_of(checkpoint, run_dir)
    if not storage.is_local:
        return

    def check() -> None:
        size = checkpoint_bytes(model, train)
        coming = max(1, checkpoint.keep_last + 1 - len(published_steps(storage)))
        folder = storage.path("")
        while not os.path.exists(folder):
            folder = os.path.dirname(folder.rstrip("/")) or "/"
        disk = shutil.disk_usage(folder)
        if coming * size > disk.free:
            text = (
                f"{coming} more checkpoints of {size / 1e9:.3g} GB each (checkpoint.keep_last="
                f"{checkpoint.keep_last} and one being written) do not fit {storage.url},"
                f" where {disk.free / 1e9:.3g} of {disk.total / 1e9:.3g} GB are free; free some"
                " space, or set checkpoint.url or checkpoint.keep_last"
            )
            finding = Finding(0, text, is_node_fault=coming * size <= disk.total)
            raise_findings([finding], [socket.gethostname()])

    world.run_on_first(check)


def check_memory(config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Checks that each rank's device has memory for weights, gradients and optimiser.

    All ranks call it before these are allocated. The memory of a whole step is an estimate, and a
    high one: if only that exceeds the free memory, a warning is logged.

    Raises:
        PreflightFailed: with the bytes that are needed and free.
    """
    needs = world.run_on_first(lambda: rank_memory(config, tokenizer, world.world_size))
    # On a CPU the ranks of a machine share its memory; on GPUs each has its own.
    sharing = len(ranks_on_node(world)) if world.device.type == "cpu" else 1
    needed, free, total = sharing * needs.states, free_bytes(), total_bytes()
    owner = f"{sharing} ranks of this machine" if sharing > 1 else "this rank"
    text = (
        f"weights, gradients and optimiser of {owner} need {needed / 1e9:.3g} GB of memory, and"
        f" {free / 1e9:.3g} of {total / 1e9:.3g} GB are free; use more ranks with"
        " train.zero_stage=3, or train.offload to keep them in the host's memory"
    )
    results = world.all_gather_objects((socket.gethostname(), text, needed > free, needed > total))
    fits_somewhere = not all(is_larger for *_, is_larger in results)
    findings = [
        Finding(rank, text, is_node_fault=fits_somewhere)
        for rank, (_, text, is_short, _) in enumerate(results)
        if is_short
    ]
    raise_findings(findings, [host for host, *_ in results])
    if world.is_first and sharing * needs.total > free:
        log.warning(
            "a step may need %.3g GB of memory, and %.3g GB are free; see `tvr train --dry-run`",
            sharing * needs.total / 1e9,
            free / 1e9,
        )


def find_differences(identities: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Findings for the ranks that differ from the majority.

    Args:
        identities: For each rank: version or digest by name, the settings' digest last.
    """
    findings: list[Finding] = []
    for name in identities[0]:
        values = [identity[name] for identity in identities]
        usual = max(values, key=values.count)
        # Another version may resolve equal settings differently, so it is the version's fault.
        others = {finding.rank for finding in findings}
        findings += [
            Finding(
                rank,
                f"{name} is {value}, on most ranks {usual}",
                is_node_fault=name != SETTINGS or rank in others,
            )
            for rank, value in enumerate(values)
            if value != usual
        ]
    return findings


def _identity(config: Config) -> dict[str, str]:
    """Versions and a digest of the settings, which must be equal on all ranks."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        SETTINGS: hashlib.sha256(to_json(config).encode()).hexdigest()[:16],
    }


def _is_missing(storage: StorageFolder) -> bool:
    return storage.is_local and not os.path.exists(storage.path(""))


def _written_folders(checkpoint: CheckpointConfig, run_dir: Path) -> dict[str, StorageFolder]:
    """The folders that all ranks write to, by their use."""
    folders = {"checkpoints": checkpoints_of(checkpoint, run_dir)}
    if checkpoint.url is not None:
        folders["a run"] = StorageFolder(str(run_dir))
    return folders


@dataclass(frozen=True, slots=True)
class _StorageError:
    text: str
    is_name: bool
    """True if the name of the folder or store may be wrong."""


def _storage_errors(folders: Mapping[str, StorageFolder], world: World) -> Iterator[_StorageError]:
    """Tests the folders that all ranks write to."""
    for use, storage in folders.items():
        name = f"preflight-{socket.gethostname()}-{os.getpid()}-{world.rank}"
        error = _storage_error(storage, name)
        if error is not None:
            text = f"{storage.url} cannot be used for {use}: {error.text}"
            yield _StorageError(text, error.is_name)


def _storage_error(storage: StorageFolder, folder: str) -> _StorageError | None:
    """Writes, creates, reads and removes small files, as a save does with large ones."""
    content, error = os.urandom(64), None
    file, manifest = f"{folder}/files/file", f"{folder}/manifest"
    try:
        storage.write(file, lambda opened: opened.write(content))
        storage.create(manifest, content)
        if any(b"".join(storage.read_chunks(name)) != content for name in (file, manifest)):
            error = _StorageError("a file was read back with other content", is_name=False)
    except OSError as caught:
        is_name = isinstance(caught, WRONG_NAME_ERRORS)
        error = _StorageError(f"{type(caught).__name__}: {caught}", is_name)
    try:
        # By their names, since the listing of a store may not show them yet.
        for name in (manifest, file):
            storage.remove_file(name)
        storage.remove(folder)
    except OSError as caught:
        is_name = isinstance(caught, WRONG_NAME_ERRORS)
        error = error or _StorageError(f"{type(caught).__name__}: {caught}", is_name)
    return error
