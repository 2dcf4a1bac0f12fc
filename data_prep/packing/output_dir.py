"""The output folder of a packing, shared by any number of processes on any machines.

    .packing/clips-FINGERPRINT.jsonl, .bin   clips of all shards, and their index, see `plan`
    .packing/plan.json                       the plan is stored; settings, versions, generation
    .packing/shard-0-000012-1-0.json         shard 12 is complete, see `shard_record`
    shard-000012.tar, shard-000012-001.tar   files of a complete shard, written before its record
    samples.rows, bad.jsonl, manifest.json   written in this order when all shards are complete
    .packing/launch-ID.json                  with `overwrite`: what the launch ID decided

There are no locks, because object stores have none. Every file is a pure function of the plan and
the source videos, and appears at once, see `output_files`. Two processes that write the same file
therefore replace it with the same bytes.

The files of a packing have a generation number in their names that no earlier packing of the
folder had, so that a process of an earlier one cannot touch them. A data set that is replaced stays
complete until `manifest.json` is written; its files are removed after that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from tvr.data_prep.dataset.index_rules import generation_of
from tvr.data_prep.dataset.manifest import (
    BAD_NAME,
    Manifest,
    read_manifest_json,
    write_manifest,
)
from tvr.data_prep.dataset.sample_table import SampleTable
from tvr.data_prep.packing.output_files import WORK_FOLDER, OutputFiles
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.packing.plan import (
    PackPlan,
    PackSettings,
    PlanHeader,
    is_plan_of,
    plan_differences,
)
from tvr.data_prep.packing.plan_build import BuiltPlan
from tvr.data_prep.packing.shard_record import is_replaced
from tvr.data_prep.packing.shard_records import ShardRecords
from tvr.data_prep.records import ShardCorrupt

PLAN_NAME = "plan.json"
LAUNCH_PREFIX = "launch-"
PlanState = Literal["absent", "joined", "complete"]


class OutputDir:
    """Output folder of one packing; see the module's docstring for its files.

    Args:
        overwrite: Replace a complete data set, or an unfinished packing with another plan.
        launch: Name that all tasks of one launch have in common, also when they start again.
    """

    def __init__(self, url: str, *, overwrite: bool = False, launch: str | None = None) -> None:
        self.url = url
        self.files = OutputFiles(url)
        self.generation = 0
        """Number of packings that this folder held before this one."""
        self._overwrite = overwrite
        self._launch = launch if overwrite else None
        self._header: PlanHeader | None = None
        self._has_planned = False
        self._records: ShardRecords | None = None

    def join(self, source: dict[str, Any] | None, settings: PackSettings) -> PlanState:
        """Joins a stored plan of the same source and settings, without reading the clips.

        Args:
            source: See `ClipSource.identity`.

        Returns:
            "joined", "complete" if this launch's data set is published, or "absent".
        """
        if source is None:
            return "absent"
        decided = self._read_decision()
        if decided is not None and is_plan_of(decided, source, settings):
            published = self._read_published()
            if _is_published(published, decided["fingerprint"], decided["generation"], self.url):
                return "complete"
        stored = self._read_json(PLAN_NAME)
        if stored is None or not is_plan_of(stored, source, settings):
            return "absent"
        self._adopt(stored)
        return "joined" if self._has_plan_files() else "absent"

    def claim(self, built: BuiltPlan, source: dict[str, Any] | None) -> PlanState:
        """Stores a plan and so starts its packing, or joins one with the same plan.

        Returns:
            "joined", or "complete" if the data set of this plan is already published.

        Raises:
            FileExistsError: the folder holds another complete data set that is not to be replaced.
            ValueError: the folder holds an unfinished packing with another plan, and `overwrite`
                is false.
        """
        state = self._decide(built.header)
        if state == "absent" or (state == "joined" and not self._has_plan_files()):
            self.files.put(built.rows, f"{WORK_FOLDER}/{built.header.rows_name}")
            self.files.put(built.index, f"{WORK_FOLDER}/{built.header.index_name}")
            # Copying took time; others may have started or ended this packing meanwhile.
            if (state := self._decide(built.header)) == "absent":
                self._store_plan(built.header, source)
                self._has_planned = True
                state = "complete" if self._is_published() else "joined"
        if state == "complete":
            self._remove_finished_work()
        return state

    def open_plan(self, settings: PackSettings, folder: Path) -> PackPlan:
        """Reads the index of the claimed plan.

        Args:
            folder: Local folder of this process.

        Raises:
            FileNotFoundError: another process has published this data set.
        """
        header = self._claimed
        index_name = f"{WORK_FOLDER}/{header.index_name}"
        index = self.files.read(index_name)
        if index is None:
            raise FileNotFoundError(f"{self.url}/{index_name} is gone")
        rows_name = f"{WORK_FOLDER}/{header.rows_name}"

        def read_rows(start: int, end: int) -> bytes:
            return self.files.read_range(rows_name, start, end)

        return PackPlan(header, settings, index, read_rows, folder)

    def publish(
        self, manifest: Manifest, bad: Sequence[RefusedClip], rows: Iterable[SampleTable]
    ) -> None:
        """Writes the index from the `rows` of each file, then removes the files that it replaces.

        Raises:
            FileNotFoundError: another process already published this data set.
        """
        self.check_active()
        lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in bad)
        # A path may hold bytes that are no UTF-8; their escapes are valid JSON.
        self.files.write(BAD_NAME, lines.encode("utf-8", "backslashreplace"))
        write_manifest(self.url, manifest, rows)
        named = {shard.name for shard in manifest.shards}
        replaced = [
            name
            for name in self.files.sizes()
            if name not in named and is_replaced(name, self.generation)
        ]
        self.files.remove(replaced)
        self._remove_work()

    def check_active(self) -> None:
        """Checks that this packing is unfinished.

        Raises:
            FileNotFoundError: the packing is published, or its work folder was removed.
            ValueError: the folder holds an unfinished packing of another plan.
        """
        stored = self._read_json(PLAN_NAME)
        if stored is None:
            raise FileNotFoundError(
                f"{self.url}/{WORK_FOLDER}/{PLAN_NAME} is gone: the data set is published, or the"
                " folder was removed; repeat the command"
            )
        if not self._is_mine(stored):
            raise self._unfinished_error(stored, self._claimed)

    def discard_if_empty(self) -> None:
        """Removes the plan that this process stored if the packing has no complete shard."""
        stored = self._read_json(PLAN_NAME)
        is_own = self._has_planned and stored is not None and self._is_mine(stored)
        if is_own and not self.records.names():
            self._remove_work()

    @contextmanager
    def ignore_files_removed_by_publisher(self) -> Iterator[None]:
        """Ignores a FileNotFoundError if another process has published this data set.

        Several processes may see all shards complete and publish at the same time. The first one
        removes files that the others still use.
        """
        try:
            yield
        except FileNotFoundError:
            # The manifest decides: the publisher removes the plan after it.
            if self._header is None or not self._is_published():
                raise
            self._remove_finished_work()  # a record that was written after that

    @property
    def records(self) -> ShardRecords:
        """The records of complete shards of the claimed packing."""
        if self._records is None:
            self._records = ShardRecords(self.files, self._claimed.fingerprint, self.generation)
        return self._records

    @property
    def _claimed(self) -> PlanHeader:
        assert self._header is not None, "claim or join came first"
        return self._header

    def _is_mine(self, stored: dict[str, Any]) -> bool:
        """True if a stored plan is the claimed one."""
        header, generation = self._claimed, self.generation
        return (stored["fingerprint"], stored["generation"]) == (header.fingerprint, generation)

    def _has_plan_files(self) -> bool:
        """False if the end of an earlier packing removed the files of the claimed plan."""
        names = (self._claimed.rows_name, self._claimed.index_name)
        return all(self.files.size(f"{WORK_FOLDER}/{name}") for name in names)

    def _decide(self, header: PlanHeader) -> PlanState:
        """Reads what the folder holds, and sets the generation."""
        self._header = header
        stored = self._read_json(PLAN_NAME)
        same = stored if stored and stored["fingerprint"] == header.fingerprint else None
        other = stored if same is None else None
        decided = self._read_decision()
        if same is not None and decided is None:
            self._adopt(same)
            return "joined"
        if other is not None and not self._overwrite:
            raise self._unfinished_error(other, header)
        published = self._read_published()
        # Once more: whoever published meanwhile has decided before.
        decided = decided or self._read_decision()
        if decided is not None and decided["fingerprint"] == header.fingerprint:
            self.generation = decided["generation"]
            if self._is_this_packing(published):
                return "complete"
            if other is not None and other["generation"] > self.generation:
                raise self._unfinished_error(other, header)
            if published is not None and generation_of(published, self.url) >= self.generation:
                raise FileExistsError(f"{self.url} holds a later data set than {self._launch}'s")
        elif same is None:
            # Processes that start this packing at the same time compute the same generation.
            earlier = [] if published is None else [generation_of(published, self.url)]
            earlier += [] if other is None else [int(other["generation"])]
            self.generation = max(earlier) + 1 if earlier and self._overwrite else 0
            if not self._overwrite and published is not None:
                if self._is_this_packing(published):
                    return "complete"
                raise FileExistsError(
                    f"{self.url} holds a complete data set; pack to another folder, or replace it"
                    " with --overwrite"
                )
        if same is None:
            return "absent"
        self._adopt(same)
        return "joined"

    def _remove_finished_work(self) -> None:
        stored = self._read_json(PLAN_NAME)
        if stored is None or self._is_mine(stored):  # and no later packing's
            self._remove_work()

    def _store_plan(self, header: PlanHeader, source: dict[str, Any] | None) -> None:
        index = asdict(header)
        named = {"fingerprint": index.pop("fingerprint"), "generation": self.generation}
        stored = {**named, "plan": index.pop("record"), "source": source, "index": index}
        self._write_decision(stored)
        self.files.write_sealed(f"{WORK_FOLDER}/{PLAN_NAME}", stored)

    def _adopt(self, stored: dict[str, Any]) -> None:
        """Takes over a stored plan."""
        self.generation = stored["generation"]
        self._header = PlanHeader(
            fingerprint=stored["fingerprint"], record=stored["plan"], **stored["index"]
        )
        if self._launch is not None:
            decided = self._read_decision()
            if decided is None or decided["fingerprint"] != stored["fingerprint"]:
                self._write_decision(stored)

    def _write_decision(self, stored: dict[str, Any]) -> None:
        if self._launch is not None:
            names = ("fingerprint", "generation", "plan", "source")
            decision = {"launch": self._launch} | {name: stored[name] for name in names}
            self.files.write_sealed(self._decision_name, decision)

    def _read_decision(self) -> dict[str, Any] | None:
        """Returns what this launch decided: its plan and generation."""
        return None if self._launch is None else self._read_json(self._decision_name, "")

    @property
    def _decision_name(self) -> str:
        digest = sha256(str(self._launch).encode()).hexdigest()
        return f"{WORK_FOLDER}/{LAUNCH_PREFIX}{digest[:16]}.json"

    def _read_json(self, name: str, folder: str = f"{WORK_FOLDER}/") -> dict[str, Any] | None:
        return self.files.read_sealed(folder + name)

    def _unfinished_error(self, unfinished: dict[str, Any], header: PlanHeader) -> ValueError:
        changes = plan_differences(unfinished["plan"], header.record)
        return ValueError(
            f"{self.url} holds an unfinished packing of other clips or settings ({changes});"
            " pack to another folder, repeat the earlier settings to resume it, or replace it"
            " with --overwrite"
        )

    def _read_published(self) -> dict[str, Any] | None:
        """Returns `manifest.json` if it exists; an empty dict for a damaged one."""
        try:
            published = read_manifest_json(self.url)
            generation_of(published, self.url)  # a number that file names contain
            return published
        except FileNotFoundError:
            return None
        except ShardCorrupt:
            return {}

    def _is_published(self) -> bool:
        return self._is_this_packing(self._read_published())

    def _is_this_packing(self, published: dict[str, Any] | None) -> bool:
        """True if the published data set has this packing's plan."""
        return _is_published(published, self._claimed.fingerprint, self.generation, self.url)

    def _remove_work(self) -> None:
        """Removes the work folder, plan first: a plan without records means missing shards."""
        self.files.remove([f"{WORK_FOLDER}/{PLAN_NAME}"])
        names = sorted(self.files.sizes(WORK_FOLDER))
        kept = [name for name in names if name.startswith(LAUNCH_PREFIX)]
        self.files.remove(f"{WORK_FOLDER}/{name}" for name in names if name not in kept)
        self.files.remove_folder(WORK_FOLDER)


def _is_published(
    published: dict[str, Any] | None, fingerprint: str, generation: int, url: str
) -> bool:
    return (
        published is not None
        and generation_of(published, url) >= generation
        and published.get("fingerprint") == fingerprint
    )
