"""The folder of a data set while it is packed, by any number of processes on any machines.

    .packing/plan.json           what is packed: clips, settings, versions
    .packing/shard-000012.json   shard 12 is complete: see shard_record
    shard-000012.tar             named when complete; the record comes after
    samples.npz, bad.jsonl, manifest.json, in this order, when all shards are there

There are no locks, since object stores have none. Everything is a pure function of the plan and the
sources, is written under a name of its own and renamed: who makes a file again replaces it by the
same bytes. A data set that is being replaced stays complete until the last rename, since the new
files carry the next generation in their names. Files are removed after that rename only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from fsspec.core import url_to_fs

from tvr.data_prep.dataset.manifest import (
    BAD_NAME,
    Manifest,
    join,
    read_manifest_json,
    samples_name,
    shard_name,
    write_manifest,
)
from tvr.data_prep.dataset.shard_writer import ShardWriter, TarSample
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.packing.plan import Plan, differences
from tvr.data_prep.packing.shard_record import (
    ShardRecord,
    packing_id,
    read_record,
    record_bytes,
    record_name,
)
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.storage import PARTIAL, partial_name, write_file

WORK = ".packing"
PLAN_NAME = "plan.json"
# Files that a finished data set may hold only if its manifest names them.
OURS = re.compile(rf"shard-(\d+-)?\d{{6,}}\.tar|samples(-\d+)?\.npz|.*{re.escape(PARTIAL)}")


class OutputDir:
    """One packing in the folder at a URL."""

    def __init__(self, url: str, plan: Plan) -> None:
        self.url = url
        self._plan = plan
        self._fs: Any
        self._fs, root = url_to_fs(url)
        self._root = root
        self._work = join(root, WORK)
        self.generation = 0
        """How many data sets lay here before the one that is packed."""
        self._records: dict[int, ShardRecord] = {}

    def claim(self, *, overwrite: bool = False) -> bool:
        """Begins the packing or joins it; True where its data set is complete already.

        Raises:
            FileExistsError: another data set is complete here, and `overwrite` is false.
            ValueError: another packing was begun here, and `overwrite` is false.
        """
        begun = self._begun()
        if begun is not None and begun["fingerprint"] == self._plan.fingerprint:
            self.generation = begun["generation"]
            return False
        if begun is not None and not overwrite:
            told = differences(begun["plan"], self._plan.record)
            raise ValueError(
                f"{self.url} holds an unfinished packing of something else ({told}); pack"
                " elsewhere, go on with its settings, or start anew with --overwrite"
            )
        published = self._published()
        if published is not None and not overwrite:
            if self._is_complete(published):
                self._remove_work()
                return True
            raise FileExistsError(
                f"{self.url} holds a complete data set; pack elsewhere or allow it with --overwrite"
            )
        # The same for all who begin this packing at once. Format 1 had no generations.
        self.generation = 0 if published is None else int(published.get("generation", 0)) + 1
        self._fs.makedirs(self._work, exist_ok=True)
        record = {
            "fingerprint": self._plan.fingerprint,
            "generation": self.generation,
            "plan": self._plan.record,
        }
        write_file(self._fs, join(self._work, PLAN_NAME), json.dumps(record, indent=1).encode())
        return False

    def records(self) -> dict[int, ShardRecord]:
        """The complete shards by number, whoever made them; their files are there."""
        known = self.known_records()
        sizes = self._sizes(self._root)
        return {
            number: record
            for number, record in sorted(known.items())
            if not record.samples or sizes.get(record.shard.name) == record.shard.shard_bytes
        }

    def known_records(self) -> dict[int, ShardRecord]:
        """The records of complete shards, less a look at their files."""
        listed = self._names(self._work)
        for number in range(self._plan.num_shards):
            if record_name(number) not in listed:
                self._records.pop(number, None)
            elif number not in self._records:
                content = self._fs.cat_file(join(self._work, record_name(number)))
                record = read_record(content, self._packing)
                if record is not None:
                    self._records[number] = record
        return dict(self._records)

    def write_shard(self, number: int, outcomes: Iterable[TarSample | RefusedClip]) -> bool:
        """Makes a shard and gives it its name; False where the data set was completed meanwhile.

        Raises as `claim` where another packing was begun here.
        """
        name = shard_name(number, self.generation)
        partial = partial_name(join(self._work, name))
        writer = ShardWriter(self._fs, partial)
        bad = []
        num_empty_captions = 0
        try:
            for outcome in outcomes:
                if isinstance(outcome, RefusedClip):
                    bad.append(outcome)
                else:
                    num_empty_captions += outcome.num_empty_captions
                    writer.append(outcome)
            shard, samples = writer.finish(name)
            if not self.goes_on():
                return False
            if samples:
                self._name_shard(number, partial, name)
        finally:
            with suppress(OSError):  # of a full disk, once more
                writer.close()
            self._remove(partial)
        record = ShardRecord(
            shard=shard, samples=samples, num_empty_captions=num_empty_captions, bad=tuple(bad)
        )
        content = record_bytes(record, self._packing)
        write_file(self._fs, join(self._work, record_name(number)), content)
        self._records[number] = record
        # Those of packers that were killed, or that will find the record.
        for other in self._names(self._work):
            if other.startswith(name) and other.endswith(PARTIAL):
                self._remove(join(self._work, other))
        return True

    def publish(self, manifest: Manifest, bad: Sequence[RefusedClip]) -> None:
        """Writes the index, `manifest.json` last, then removes all that it does not name.

        Raises FileNotFoundError where others did it long ago.
        """
        if not self.goes_on():
            raise FileNotFoundError(f"{self.url}: {WORK} is gone")
        lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in bad)
        write_file(self._fs, join(self._root, BAD_NAME), lines.encode())
        write_manifest(self.url, manifest)
        named = {shard.name for shard in manifest.shards} | {samples_name(manifest.generation)}
        for name in self._names(self._root):
            if OURS.fullmatch(name) and name not in named:
                self._remove(join(self._root, name))
        self._remove_work()

    def goes_on(self) -> bool:
        """Whether this packing goes on. Raises as `claim`."""
        packing = self._packing
        return not self.claim() and self._packing == packing

    def abandon(self) -> None:
        """Leaves no trace of this packing if it has no complete shard."""
        begun = self._begun() or {"fingerprint": "", "generation": 0}
        ours = packing_id(begun["fingerprint"], begun["generation"]) == self._packing
        if ours and not self.records():
            self._remove_work()

    @contextmanager
    def completed_by_others(self) -> Iterator[None]:
        """Several may find all shards complete and publish at once. Who comes last may miss what
        the first removed: an error only if the data set is not there."""
        try:
            yield
        except FileNotFoundError:
            # By the manifest: who published removes partial files first and the plan after them.
            if not self._is_complete(self._published()):
                raise

    @property
    def _packing(self) -> str:
        return packing_id(self._plan.fingerprint, self.generation)

    def _name_shard(self, number: int, partial: str, name: str) -> None:
        try:
            self._fs.mv(partial, join(self._root, name))
        except FileNotFoundError:
            # Another packer made this shard at the same time, and removed what was left of it.
            if record_name(number) not in self._names(self._work):
                raise

    def _begun(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._fs.cat_file(join(self._work, PLAN_NAME)))
        except FileNotFoundError:
            return None

    def _published(self) -> dict[str, Any] | None:
        try:
            return read_manifest_json(self.url)
        except FileNotFoundError:
            return None
        except ShardCorrupt:  # there is one, whatever it says
            return {}

    def _is_complete(self, published: dict[str, Any] | None) -> bool:
        """Whether what is published is what this packing makes."""
        return (
            published is not None
            and published.get("generation", 0) >= self.generation
            and published.get("fingerprint") == self._plan.fingerprint
        )

    def _names(self, folder: str) -> set[str]:
        """What is in a folder now."""
        self._fs.invalidate_cache()
        try:
            return {path.rsplit("/", 1)[-1] for path in self._fs.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()

    def _sizes(self, folder: str) -> dict[str, int]:
        self._fs.invalidate_cache()
        listed = self._fs.ls(folder, detail=True)
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in listed}

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _remove_work(self) -> None:
        """The plan first: without the records it would mean that all shards are missing."""
        for name in sorted(self._names(self._work), key=lambda name: name != PLAN_NAME):
            self._remove(join(self._work, name))
        with suppress(OSError):  # gone already, or a store without folders
            self._fs.rmdir(self._work)
