"""Ranks that start, resume or evaluate a run read no more when there are more of them.

Two ranks are processes of a gloo group. 64 ranks are threads, which share the verification of a
checkpoint as processes do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import jobs
from builders.exhaustive import principal_and_further
from builders.file_damage import DAMAGE
from builders.file_reads import CountingStorage, opened_files
from builders.spawn import spawn
from builders.tiny import make_tiny_data, tiny_config, with_ranks
from builders.worlds import SINGLE_RANK, on_thread_ranks, world_of

from tvr.data_prep.storage.storage import Storage
from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import checkpoint_name
from tvr.trainer.checkpoint.manifest import FileRecord, SavedState, create_manifest
from tvr.trainer.checkpoint.restore import find_newest_weights, local_files
from tvr.trainer.checkpoint.verification import find_newest_intact, split_files
from tvr.trainer.config import Config, from_json, to_json
from tvr.trainer.data import build_tokenizer, training_batches, validate_data_sets
from tvr.trainer.evaluation.saved_run import evaluate_run, load_run
from tvr.trainer.loop import train
from tvr.trainer.run_dir import read_config

RANKS = (2, 8, 64)
MODEL_BYTES, OPTIMISER_BYTES, RANDOM_BYTES = 40_000, 128_000, 100
MODEL = "shards/mp_rank_00_model_states.pt"


def optimiser_file(rank: int) -> str:
    return f"shards/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def write_checkpoint(storage: StorageFolder, ranks: int, step: int, **changes: Any) -> SavedState:
    """Writes files of the sizes that ZeRO-1 gives them: the optimiser's state is partitioned."""
    sizes = {MODEL: MODEL_BYTES}
    for rank in range(ranks):
        sizes[optimiser_file(rank)] = OPTIMISER_BYTES // ranks
        sizes[f"random-rank-{rank:05d}.pt"] = RANDOM_BYTES
    records = {}
    for name, size in sizes.items():
        content = hashlib.sha256(f"{step} {name}".encode()).digest() * (size // 32 + 1)
        with storage.open_write(f"{checkpoint_name(step)}/{name}") as file:
            file.write(content[:size])
        digest = hashlib.sha256(content[:size]).hexdigest()
        records[name] = FileRecord(num_bytes=size, sha256=digest)
    fields = {"zero_stage": 1, "precision": "fp32", "attempt": 1, "world_size": ranks, **changes}
    state = SavedState(**{"step": step, **fields, "files": records})
    create_manifest(storage, checkpoint_name(step), state)
    return state


@pytest.mark.parametrize("saved_by", [None, 64])
def test_verification_reads_each_file_once_and_no_more_on_more_ranks(
    tmp_path: Path, saved_by: int | None
) -> None:
    for ranks in RANKS:
        folder = tmp_path / str(ranks)
        state = write_checkpoint(StorageFolder(str(folder)), saved_by or ranks, 3)
        storages = [CountingStorage(str(folder)) for _ in range(ranks)]
        found = on_thread_ranks(
            ranks, lambda world, s=storages: find_newest_intact(s[world.rank], world)
        )
        assert all(scan.newest is not None and scan.newest.state == state for scan in found)
        opened = sum((storage.opened for storage in storages), Counter())
        # Rank 0 reads the manifest for all.
        prefix = checkpoint_name(3)
        assert opened == {f"{prefix}/{name}": 1 for name in (*state.files, "manifest.json")}
        files = [
            storage.num_bytes - Counter({f"{prefix}/manifest.json": 10**9}) for storage in storages
        ]
        # A bound that falls with the number of ranks: the largest file, and a share of the others.
        others = OPTIMISER_BYTES + (saved_by or ranks) * RANDOM_BYTES
        for counts in files:
            assert sum(counts.values()) <= MODEL_BYTES + others // ranks


@pytest.mark.parametrize("ranks", principal_and_further(RANKS, [8]))
def test_a_rank_verifies_the_files_that_it_loads(tmp_path: Path, ranks: int) -> None:
    state = write_checkpoint(StorageFolder(str(tmp_path)), ranks, 3)
    for rank, names in enumerate(split_files(state, state.files, ranks)):
        assert {optimiser_file(rank), f"random-rank-{rank:05d}.pt"} <= set(names)


@pytest.mark.parametrize("ranks", principal_and_further(RANKS, [8]))
def test_all_ranks_fall_back_alike_and_name_the_damaged_file(tmp_path: Path, ranks: int) -> None:
    storage = StorageFolder(str(tmp_path))
    for step in (3, 6):
        write_checkpoint(storage, ranks, step)
    damaged = tmp_path / checkpoint_name(6) / optimiser_file(ranks - 1)
    DAMAGE["one bit"](damaged)
    for scan in on_thread_ranks(ranks, lambda world: find_newest_intact(storage, world)):
        assert scan.newest is not None
        assert scan.newest.name == checkpoint_name(3)
        line = f"{damaged}: its sha256 differs from the manifest's"
        assert scan.damaged == {6: (line,)}


@pytest.mark.parametrize("ranks", principal_and_further(RANKS, [8]))
def test_each_byte_of_a_remote_checkpoint_is_fetched_once(tmp_path: Path, ranks: int) -> None:
    url = f"memory://{tmp_path.name}"
    state = write_checkpoint(StorageFolder(url), ranks, 3)
    storages = [CountingStorage(url) for _ in range(ranks)]
    copies = tmp_path / "fetched"
    found = on_thread_ranks(
        ranks, lambda world: find_newest_intact(storages[world.rank], world, copies=copies)
    )
    checkpoint = found[0].newest
    assert checkpoint is not None
    files = local_files(storages[0], checkpoint, copies / checkpoint.name)
    opened = sum((storage.opened for storage in storages), Counter())
    prefix = checkpoint_name(3)
    assert opened == {f"{prefix}/{name}": 1 for name in (*state.files, "manifest.json")}
    copied = {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()}
    assert copied == set(state.files)
    for name, record in state.files.items():
        assert hashlib.sha256((files / name).read_bytes()).hexdigest() == record.sha256


def test_damaged_remote_checkpoint_leaves_no_copy(tmp_path: Path) -> None:
    storage = StorageFolder(f"memory://{tmp_path.name}")
    write_checkpoint(storage, 1, 3)
    write_checkpoint(storage, 1, 6)
    with storage.open_write(f"{checkpoint_name(6)}/{MODEL}") as file:
        file.write(b"short")
    scan = find_newest_intact(storage, SINGLE_RANK, copies=tmp_path / "fetched")
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == [checkpoint_name(3)]
    assert scan.newest is not None
    # Files without a whole copy are fetched, and nothing else.
    files = tmp_path / "fetched" / checkpoint_name(3)
    (files / MODEL).unlink()
    counting = CountingStorage(storage.url)
    assert local_files(counting, scan.newest, files) == files
    assert list(counting.opened) == [f"{checkpoint_name(3)}/{MODEL}"]


@pytest.mark.parametrize(
    ("stage", "precision", "in_optimiser_files"),
    [(1, "fp32", False), (2, "fp32", False), (1, "bf16", True), (3, "fp32", True)],
)
@pytest.mark.parametrize("ranks", principal_and_further(RANKS, [8]))
def test_evaluation_verifies_only_files_with_weights(
    tmp_path: Path, ranks: int, stage: int, precision: str, in_optimiser_files: bool
) -> None:
    url = f"memory://{tmp_path.name}"
    changes = {"zero_stage": stage, "precision": precision}
    state = write_checkpoint(StorageFolder(url), ranks, 3, **changes)
    storages = [CountingStorage(url) for _ in range(ranks)]
    on_thread_ranks(
        ranks,
        lambda world: find_newest_weights(storages[world.rank], world, tmp_path / str(world.rank)),
    )
    opened = sum((storage.opened for storage in storages), Counter())
    expected = {MODEL, "manifest.json"}
    if in_optimiser_files:
        expected |= {name for name in state.files if name.endswith("optim_states.pt")}
    assert opened == {f"{checkpoint_name(3)}/{name}": 1 for name in expected}


# ---------------------------------------------------------------- whole runs


def settings(data: Path, stage: int) -> Config:
    return tiny_config(
        data,
        train={"steps": 4, "zero_stage": stage},
        checkpoint={"every": 2},
        metrics={"endpoint": "none"},
    )


def start_and_resume(rank: int, world_size: int, file: Path, run_dir: Path) -> dict[str, Any]:
    """Trains a run, trains a copy of it from step 2 on, and evaluates; returns the files opened."""
    torch.set_num_threads(1)
    config = from_json(file.read_text(), where="test")
    copy = run_dir.with_name(f"{run_dir.name}-copy")
    opened: dict[str, Any] = {}
    train(config, run_dir)
    world = world_of(rank, world_size)
    world.run_on_first(lambda: jobs.copy_run_at_step(2, run_dir, copy))
    with opened_files(copy / "checkpoints") as opened["resume"]:
        train(config, copy)
    with opened_files(run_dir / "checkpoints") as opened["evaluation"]:
        evaluate_run(run_dir, None)
    opened["digest"] = digest(load_run(run_dir, config, world)[0])
    return opened


def saved_in(run_dir: Path, step: int) -> str:
    """The folder of a checkpoint's files, relative to the run's checkpoints."""
    shards = jobs.shards_folder(run_dir, step)
    return shards.parent.relative_to(run_dir / "checkpoints").as_posix()


def digest(model: torch.nn.Module) -> str:
    weights = (value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(b"".join(weights)).hexdigest()


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """For each ZeRO stage and number of ranks: the run's folder, and what each rank opened."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for stage in (1, 3):
        for ranks in (1, 2):
            run_dir = folder / f"{stage}-{ranks}"
            file = run_dir.with_suffix(".json")
            file.write_text(to_json(with_ranks(settings(data, stage), ranks)))
            found[stage, ranks] = (
                run_dir,
                spawn(start_and_resume, ranks, file, run_dir, timeout_s=300.0),
            )
    return found


def bytes_below(run_dir: Path, opened: Counter[str]) -> int:
    """Bytes of the files of checkpoints that were opened, as often as they were."""
    folder = run_dir / "checkpoints"
    # The checks before a run also open a file that they have just written, and remove it.
    saved = {name: times for name, times in opened.items() if name.startswith("step-")}
    return sum(times * (folder / name).stat().st_size for name, times in saved.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_each_rank_of_a_resumed_run_reads_no_more_than_one_rank_alone(
    runs: dict[tuple[int, int], Any], stage: int
) -> None:
    (alone_dir, (alone,)), (run_dir, ranks) = runs[stage, 1], runs[stage, 2]
    copies = [path.with_name(f"{path.name}-copy") for path in (alone_dir, run_dir)]
    whole = bytes_below(copies[0], alone["resume"])
    for opened in ranks:
        assert bytes_below(copies[1], opened["resume"]) < whole
    state = json.loads((copies[1] / "checkpoints/step-00000002/manifest.json").read_text())
    opened = sum((opened["resume"] for opened in ranks), Counter())
    for name in state["files"]:
        # A rank alone verifies the file and loads it; DeepSpeed loads the model's file twice.
        same = name.replace("rank_1_", "rank_0_").replace("rank-00001", "rank-00000")
        loads = alone["resume"][f"{saved_in(copies[0], 2)}/{same}"] - 1
        # Of two ranks, one verifies it, and both load the model's file of ZeRO-1.
        expected = 1 + loads * (2 if name == MODEL else 1)
        assert opened[f"{saved_in(copies[1], 2)}/{name}"] == expected, name


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_of_an_evaluation_share_the_files_with_weights(
    runs: dict[tuple[int, int], Any], stage: int
) -> None:
    run_dir, ranks = runs[stage, 2]
    opened = sum((opened["evaluation"] for opened in ranks), Counter())
    names = {name for name in opened if name.startswith("step-00000004/")}
    if stage == 1:
        model_file = f"{saved_in(run_dir, 4)}/{MODEL}"
        assert names == {model_file, "step-00000004/manifest.json"}
        assert opened[model_file] == 2  # verified and loaded
        assert ranks[1]["evaluation"] == {}
    else:
        assert not any("random" in name for name in names)
        own = Counter(name for name in ranks[1]["evaluation"] if "zero_pp_rank_1" in name)
        assert ranks[1]["evaluation"] == own
    # Two ranks evaluate the weights that one rank reads alone.
    model, _, _ = load_run(run_dir, read_config(run_dir))
    assert {opened["digest"] for opened in ranks} == {digest(model)}


def test_damage_outside_the_weights_does_not_stop_an_evaluation(
    runs: dict[tuple[int, int], Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(runs[1, 2][0], run_dir)
    config, folder = read_config(run_dir), run_dir / "checkpoints" / saved_in(run_dir, 4)
    before, _, _ = load_run(run_dir, config)
    DAMAGE["gone"](folder / "random-rank-00001.pt")
    DAMAGE["one bit"](folder / optimiser_file(1))
    model, _, step = load_run(run_dir, config)
    assert step == 4
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    DAMAGE["one bit"](folder / MODEL)
    assert load_run(run_dir, config)[2] == 2


def test_the_index_of_a_data_set_is_read_alike_on_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_data(tmp_path, num_train=64, num_test=2)
    config = tiny_config(
        tmp_path,
        data={"test": None, "test_exchanged": None},
        train={"global_batch": 64, "micro_batch": 64},
    )
    tokenizer = build_tokenizer(config.model, config.data)
    read: Counter[str] = Counter()
    plain = Storage._read

    def counting(storage: Storage, path: str, *args: Any) -> bytes:
        content = plain(storage, path, *args)
        read["samples" if path.endswith(".tar") else "index"] += len(content)
        return content

    monkeypatch.setattr(Storage, "_read", counting)
    by_ranks = {}
    for ranks in (1, *RANKS):
        own = with_ranks(config, ranks)
        counts = []
        for rank in (0, ranks - 1):
            read.clear()
            world = world_of(rank, ranks)
            validate_data_sets(own.data, own.train, world)
            next(training_batches(own.data, own.model, own.train, tokenizer, world))
            counts.append(Counter(read))
        assert counts[0]["index"] == counts[1]["index"]
        by_ranks[ranks] = counts
    assert len({counts[0]["index"] for counts in by_ranks.values()}) == 1
    samples = [max(count["samples"] for count in counts) for counts in by_ranks.values()]
    assert samples == sorted(samples, reverse=True)
