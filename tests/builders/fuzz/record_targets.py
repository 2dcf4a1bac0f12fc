"""Damaged checkpoint manifests and files of an unfinished packing: a changed one is never used."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from builders.clip_files import pack_settings, write_clips
from builders.fuzz.mutations import mutate_bytes, mutate_json_file, mutate_text
from builders.fuzz.target import READ, SEEDS, Target, documented, require

from tvr.data_prep.annotations.clip_source import AnnotationFile
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.packing.shard_record import COLUMNS, decode_record
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.catalogue import best_step, list_candidates, read_latest, read_state
from tvr.trainer.checkpoint.manifest import FileRecord, SavedState, create_manifest, read_manifest

STEP, NAME = 300, "step-00000300"
ATTEMPT = "attempt-000003-1a2b3c4d-7"


class Checkpoints(Target):
    """Manifests of checkpoints, and the small files beside them."""

    name = "checkpoints"
    share = 0.06

    @classmethod
    def make(cls, folder: Path) -> None:
        storage = StorageFolder(str(folder / "made"))
        create_manifest(storage, NAME, _state())
        shutil.copy(folder / "made" / NAME / "manifest.json", folder / SEEDS / "manifest.json")
        (folder / SEEDS / "latest").write_text(f"{NAME}\n")
        (folder / SEEDS / "best.json").write_text(json.dumps({"step": STEP, "score": 41.5}) + "\n")

    def prepare(self) -> None:
        (self.scratch / NAME / ATTEMPT / "shards").mkdir(parents=True)
        for seed, content in self.seeds.items():
            self._path(seed).write_bytes(content)
        self._storage = StorageFolder(str(self.scratch))

    def _path(self, seed: str) -> Path:
        return self.scratch / NAME / seed if seed == "manifest.json" else self.scratch / seed

    def mutate(self, seed: str, chance: Random) -> bytes:
        change = mutate_text if seed == "latest" else mutate_json_file
        return change(self.seeds[seed], chance, self.donors)

    def check(self, seed: str, content: bytes) -> str:
        path = self._path(seed)
        path.write_bytes(content)
        try:
            return self._check_manifest(path) if seed == "manifest.json" else self._check_small()
        finally:
            path.write_bytes(self.seeds[seed])

    def _check_manifest(self, path: Path) -> str:
        state, lines = read_state(self._storage, STEP)
        require(state is not None or bool(lines), "neither a state nor an error")
        try:
            state = read_manifest(self._storage, NAME)
        except ValueError as error:
            return documented(error, str(path))
        require(asdict(state) == asdict(_state()), f"a changed manifest is read: {state}")
        return READ

    def _check_small(self) -> str:
        step, best = read_latest(self._storage), best_step(self._storage)
        require(STEP in list_candidates(self._storage), "the step's folder is not listed")
        for number in (step, best):
            require(number is None or type(number) is int, f"step {number!r}")
        return READ if (step, best) == (STEP, STEP) else "ignored, or another step"


def _state() -> SavedState:
    record = FileRecord(num_bytes=12, sha256="a" * 64)
    names = ("shards/zero_pp_rank_0_mp_rank_00_optim_states.pt", "random-rank-00000.pt")
    return SavedState(
        step=STEP,
        world_size=2,
        zero_stage=1,
        precision="bf16",
        attempt=3,
        quarantine={"c07": "checksum"},
        metrics={"samples_read": 1234.0},
        folder=ATTEMPT,
        files=dict.fromkeys(names, record),
    )


SETTINGS: dict[str, Any] = {"layout": "frames", "num_frames": 2, "samples_per_shard": 2}


class Packings(Target):
    """The plan of a packing, its index and clips, and the record of a complete shard."""

    name = "packings"
    share = 0.06

    @classmethod
    def make(cls, folder: Path) -> None:
        clips = write_clips(folder, 5, num_frames=2)
        rows = [{"video": Path(c.video).name, "captions": c.captions, "key": c.key} for c in clips]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "a.jsonl").write_text(text)
        source = AnnotationFile(str(folder / "a.jsonl"))
        out = folder / "out"
        # The second task's shard stays missing, so that nothing is published.
        pack_shards(source, str(out), **SETTINGS, task=0, num_tasks=2, processes=0)
        for path in (out / ".packing").iterdir():
            shutil.copy(path, folder / SEEDS / path.name)

    def prepare(self) -> None:
        self._settings = pack_settings(**SETTINGS)
        self._source = AnnotationFile(str(self.folder / "a.jsonl")).identity()
        self._url = self.scratch / "out"
        (self._url / ".packing").mkdir(parents=True)
        for seed, content in self.seeds.items():
            (self._url / ".packing" / seed).write_bytes(content)
        self._id = json.loads(next(c for n, c in self.seeds.items() if "shard" in n))["packing"]
        self._records = {n: self._record(c) for n, c in self.seeds.items() if "shard" in n}
        self._clips = self._read_clips()
        require(len(self._clips or ()) == 5, "the whole plan is not read")

    def _record(self, content: bytes) -> Any:
        record = decode_record(content, self._id)
        if record is None:
            return None
        files = []
        for file in record.files:
            assert file.samples is not None
            rows = {name: getattr(file.samples, name).tolist() for name in COLUMNS}
            files.append((asdict(file.shard), rows))
        return files, record.num_empty_captions, record.bad

    def _read_clips(self) -> list[Any] | None:
        output = OutputDir(str(self._url))
        if output.join(self._source, self._settings) != "joined":
            return None
        plan = output.open_plan(self._settings, self.scratch)
        return [clip for number in range(plan.num_shards) for clip in plan.shard_clips(number)]

    def mutate(self, seed: str, chance: Random) -> bytes:
        if seed.endswith(".bin"):
            return mutate_bytes(self.seeds[seed], chance, self.donors)
        change = mutate_json_file if seed.endswith(".json") else mutate_text
        return change(self.seeds[seed], chance, self.donors)

    def check(self, seed: str, content: bytes) -> str:
        if seed in self._records:
            record = self._record(content)
            require(record in (None, self._records[seed]), "a changed record is used")
            return "packed again" if record is None else READ
        path = self._url / ".packing" / seed
        path.write_bytes(content)
        try:
            clips = self._read_clips()
        except (ShardCorrupt, ValueError) as error:
            return documented(error, seed)
        finally:
            path.write_bytes(self.seeds[seed])
        require(clips in (None, self._clips), "a changed plan is used")
        return "planned again" if clips is None else READ
