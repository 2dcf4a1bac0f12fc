"""The output folder of a packing, shared by any number of processes on any machines.

    .packing/plan.json           clips, settings and versions of the packing
    .packing/shard-000012.json   shard 12 is complete, see `shard_record`
    shard-000012.tar             complete shard, written before its record
    samples.rows, bad.jsonl, manifest.json   written in this order when all shards are complete

There are no locks, because object stores have none. Every file is a pure function of the plan and
the source videos, and is written to a unique temporary name and then renamed. Two processes that
write the same file therefore replace it with the same bytes.

With `overwrite`, the new files have the next generation number in their names. The old data set
stays complete until `manifest.json` is renamed; its files are removed after that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from fsspec.core import url_to_fs

from tvr.data_prep.dataset.index_rules import generation_of
from tvr.data_prep.dataset.manifest import (
    BAD_NAME,
    Manifest,
    join_url,
    read_manifest_json,
    samples_name,
    shard_name,
    write_manifest,
)
from tvr.data_prep.dataset.shard_writer import ShardWriter, TarSample
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.packing.plan import PackPlan, plan_differences
from tvr.data_prep.packing.shard_record import (
    ShardRecord,
    decode_record,
    encode_record,
    packing_id,
    record_name,
)
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.storage import PARTIAL_SUFFIX, partial_name, write_file

WORK_FOLDER = ".packing"
PLAN_NAME = "plan.json"
# Files that `publish` removes unless the manifest names them.
PACKED_FILES = re.compile(
    rf"shard-(\d+-)?\d{{6,}}\.tar|samples(-\d+)?\.(npz|rows)|.*{re.escape(PARTIAL_SUFFIX)}"
)


class OutputDir:
    """Output folder of one packing; see the module's docstring for its files."""

    def __init__(self, url: str, plan: PackPlan) -> None:
        self.url = url
        self._plan = plan
        self._fs: Any
        self._fs, root = url_to_fs(url)
        self._root = root
        self._work = join_url(root, WORK_FOLDER)
        self.generation = 0
        """Number of data sets that this folder held before this one."""
        self._records: dict[int, ShardRecord] = {}

    def claim(self, *, overwrite: bool = False) -> bool:
        """Starts the packing, or joins a packing with the same plan.

        Returns:
            True if the data set of this plan is already complete.

        Raises:
            FileExistsError: the folder holds another complete data set, and `overwrite` is false.
            ValueError: the folder holds an unfinished packing with another plan, and `overwrite`
                is false.
        """
        unfinished = self._read_plan()
        if unfinished is not None and unfinished["fingerprint"] == self._plan.fingerprint:
            self.generation = unfinished["generation"]
            return False
        if unfinished is not None and not overwrite:
            changes = plan_differences(unfinished["plan"], self._plan.record)
            raise ValueError(
                f"{self.url} holds an unfinished packing of other clips or settings ({changes});"
                " pack to another folder, repeat the earlier settings to resume it, or replace it"
                " with --overwrite"
            )
        published = self._read_published()
        if published is not None and not overwrite:
            if self._is_this_packing(published):
                self._remove_work()
                return True
            raise FileExistsError(
                f"{self.url} holds a complete data set; pack to another folder, or replace it with"
                " --overwrite"
            )
        # Processes that start this packing at the same time compute the same generation. Manifests
        # of format version 1 have none.
        self.generation = 0 if published is None else generation_of(published, self.url) + 1
        self._fs.makedirs(self._work, exist_ok=True)
        record = {
            "fingerprint": self._plan.fingerprint,
            "generation": self.generation,
            "plan": self._plan.record,
        }
        content = json.dumps(record, indent=1).encode()
        write_file(self._fs, join_url(self._work, PLAN_NAME), content)
        return False

    def complete_shards(self) -> dict[int, ShardRecord]:
        """Returns the records of shards whose files are present, by shard number."""
        records = self.recorded_shards()
        sizes = self._file_sizes(self._root)
        return {
            number: record
            for number, record in sorted(records.items())
            if not record.samples or sizes.get(record.shard.name) == record.shard.shard_bytes
        }

    def recorded_shards(self) -> dict[int, ShardRecord]:
        """Returns the records of complete shards without checking the shards' files."""
        listed = self._list_names(self._work)
        for number in range(self._plan.num_shards):
            if record_name(number) not in listed:
                self._records.pop(number, None)
            elif number not in self._records:
                content = self._fs.cat_file(join_url(self._work, record_name(number)))
                record = decode_record(content, self._packing_id)
                if record is not None:
                    self._records[number] = record
        return dict(self._records)

    @contextmanager
    def open_shard(self, number: int) -> Iterator[OpenShard]:
        """Opens a temporary file for a shard; `OpenShard.commit` completes the shard."""
        name = shard_name(number, self.generation)
        partial = partial_name(join_url(self._work, name))
        writer = ShardWriter(self._fs, partial)
        try:
            yield OpenShard(self, writer, number, name, partial)
        finally:
            with suppress(OSError):  # a full disk fails here a second time
                writer.close()
            self._remove(partial)

    def publish(self, manifest: Manifest, bad: Sequence[RefusedClip]) -> None:
        """Writes the index, `manifest.json` last, then removes the files that it does not name.

        Raises:
            FileNotFoundError: another process already published this data set.
        """
        if not self.is_active():
            raise FileNotFoundError(f"{self.url}: {WORK_FOLDER} is gone")
        lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in bad)
        write_file(self._fs, join_url(self._root, BAD_NAME), lines.encode())
        write_manifest(self.url, manifest)
        named = {shard.name for shard in manifest.shards} | {samples_name(manifest.generation)}
        for name in self._list_names(self._root):
            if PACKED_FILES.fullmatch(name) and name not in named:
                self._remove(join_url(self._root, name))
        self._remove_work()

    def is_active(self) -> bool:
        """True while this packing is unfinished. Raises as `claim`."""
        before = self._packing_id
        return not self.claim() and self._packing_id == before

    def discard_if_empty(self) -> None:
        """Removes the work folder if this packing has no complete shard."""
        unfinished = self._read_plan() or {"fingerprint": "", "generation": 0}
        id_in_folder = packing_id(unfinished["fingerprint"], unfinished["generation"])
        if id_in_folder == self._packing_id and not self.complete_shards():
            self._remove_work()

    @contextmanager
    def ignore_files_removed_by_publisher(self) -> Iterator[None]:
        """Ignores a FileNotFoundError if another process has published this data set.

        Several processes may see all shards complete and publish at the same time. The first one
        removes temporary files that the others still use.
        """
        try:
            yield
        except FileNotFoundError:
            # The manifest decides: the publisher removes partial files first, the plan later.
            if not self._is_this_packing(self._read_published()):
                raise

    @property
    def _packing_id(self) -> str:
        return packing_id(self._plan.fingerprint, self.generation)

    def _commit(self, number: int, partial: str, record: ShardRecord) -> None:
        """Renames a shard's file, writes its record and removes other processes' partial files."""
        name = record.shard.name
        if record.samples:
            self._rename_shard(number, partial, name)
        content = encode_record(record, self._packing_id)
        write_file(self._fs, join_url(self._work, record_name(number)), content)
        self._records[number] = record
        # Their writers were killed, or will find the record.
        for other in self._list_names(self._work):
            if other.startswith(name) and other.endswith(PARTIAL_SUFFIX):
                self._remove(join_url(self._work, other))

    def _rename_shard(self, number: int, partial: str, name: str) -> None:
        try:
            self._fs.mv(partial, join_url(self._root, name))
        except FileNotFoundError:
            # Another process completed this shard meanwhile and removed this partial file.
            if record_name(number) not in self._list_names(self._work):
                raise

    def _read_plan(self) -> dict[str, Any] | None:
        """Returns the plan of the unfinished packing in the folder, if there is one."""
        try:
            return json.loads(self._fs.cat_file(join_url(self._work, PLAN_NAME)))
        except FileNotFoundError:
            return None

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

    def _is_this_packing(self, published: dict[str, Any] | None) -> bool:
        """True if the published data set has this packing's plan."""
        return (
            published is not None
            and generation_of(published, self.url) >= self.generation
            and published.get("fingerprint") == self._plan.fingerprint
        )

    def _list_names(self, folder: str) -> set[str]:
        self._fs.invalidate_cache()
        try:
            return {path.rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()

    def _file_sizes(self, folder: str) -> dict[str, int]:
        self._fs.invalidate_cache()
        listed = self._fs.ls(folder, detail=True)
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listed}

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _remove_work(self) -> None:
        """Removes the work folder, plan first: a plan without records means missing shards."""
        for name in sorted(self._list_names(self._work), key=lambda name: name != PLAN_NAME):
            self._remove(join_url(self._work, name))
        with suppress(OSError):  # already removed, or a store without folders
            self._fs.rmdir(self._work)


class OpenShard:
    """A shard while it is written; see `OutputDir.open_shard`."""

    def __init__(
        self, output: OutputDir, writer: ShardWriter, number: int, name: str, partial: str
    ) -> None:
        self._output = output
        self._writer = writer
        self._number = number
        self._name = name
        self._partial = partial
        self._bad: list[RefusedClip] = []
        self._num_empty_captions = 0

    def append(self, outcome: TarSample | RefusedClip) -> None:
        """Writes a packed clip, or notes a refused one for the shard's record."""
        if isinstance(outcome, RefusedClip):
            self._bad.append(outcome)
        else:
            self._num_empty_captions += outcome.num_empty_captions
            self._writer.append(outcome)

    def commit(self) -> bool:
        """Renames the shard to its final name and writes its record.

        Returns:
            False if another process has completed the data set meanwhile.

        Raises as `OutputDir.claim` if the folder holds another packing now.
        """
        shard, samples = self._writer.finish(self._name)
        if not self._output.is_active():
            return False
        record = ShardRecord(
            shard=shard,
            samples=samples,
            num_empty_captions=self._num_empty_captions,
            bad=tuple(self._bad),
        )
        self._output._commit(self._number, self._partial, record)
        return True
