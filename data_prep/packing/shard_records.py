"""The records of complete shards in the work folder of a packing, of all its tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tvr.data_prep.dataset.sample_table import SampleTable
from tvr.data_prep.packing.output_files import WORK_FOLDER, OutputFiles
from tvr.data_prep.packing.shard_record import (
    RecordName,
    ShardFile,
    ShardRecord,
    decode_record,
    encode_record,
    file_name,
    packing_id,
    parse_record_name,
)
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.storage import PARTIAL_SUFFIX

# Rows that stay in memory, about 200 bytes each. Those of other records are read again.
KEPT_ROWS = 1 << 20


class ShardRecords:
    """Reads records once, but for the rows of large data sets; counts others' by a listing."""

    def __init__(self, files: OutputFiles, fingerprint: str, generation: int) -> None:
        self._files = files
        self._generation = generation
        self._packing_id = packing_id(fingerprint, generation)
        self._records: dict[int, ShardRecord] = {}
        self._num_kept_rows = 0
        self._written: dict[int, RecordName] = {}
        self._conflicts: dict[int, set[str]] = {}

    def names(self) -> dict[int, RecordName]:
        """Returns the names of the records of complete shards, of all tasks, by shard number."""
        found = dict(self._written)  # a listing may be late
        for name in self._files.sizes(WORK_FOLDER):
            record = parse_record_name(name)
            if record is None or record.generation != self._generation:
                continue
            first = found.setdefault(record.number, record)
            if first != record:  # its source changed between two writers
                self._conflicts.setdefault(record.number, {first.text}).add(name)
        return {number: found[number] for number in sorted(found.keys() - self._conflicts.keys())}

    def read(self, name: RecordName) -> ShardRecord | None:
        """Reads the record of a complete shard, once; None if it is damaged or gone."""
        record = self._records.get(name.number)
        if record is None:
            record = self._decode(name)
            if record is not None:
                self._keep(name.number, record)
        return record

    def rows(self, names: Iterable[RecordName]) -> Iterator[SampleTable]:
        """Yields the rows of each file of complete shards that were read before.

        Raises:
            ShardCorrupt: a record is damaged, gone or changed since it was read.
        """
        for name in names:
            kept = self._records[name.number]
            whole = all(file.samples is not None for file in kept.files)
            record = kept if whole else self._decode(name)
            if record is None or [file.shard for file in record.files] != [
                file.shard for file in kept.files
            ]:
                raise ShardCorrupt(
                    f"{WORK_FOLDER}/{name.text}: changed while the data set was published; repeat"
                    " the command"
                )
            for file in record.files:
                assert file.samples is not None, "a record that was just decoded has rows"
                yield file.samples

    def _decode(self, name: RecordName) -> ShardRecord | None:
        content = self._files.read(f"{WORK_FOLDER}/{name.text}")
        return None if content is None else decode_record(content, self._packing_id)

    def _keep(self, number: int, record: ShardRecord) -> None:
        num_rows = sum(file.shard.num_samples for file in record.files)
        if self._num_kept_rows + num_rows > KEPT_ROWS:
            files = tuple(replace(file, samples=None) for file in record.files)
            record = replace(record, files=files)
        else:
            self._num_kept_rows += num_rows
        self._records[number] = record

    def read_whole(self, names: Sequence[RecordName]) -> dict[int, ShardRecord]:
        """Reads records and compares the sizes of their files with the folder.

        The record of a shard that is not whole is removed, so that the shard is packed again.
        """
        if not names:
            return {}
        sizes = self._files.sizes()
        whole: dict[int, ShardRecord] = {}
        for name in names:
            record = self.read(name)
            if record is not None and all(self._is_whole(file, sizes) for file in record.files):
                whole[name.number] = record
                continue
            self._records.pop(name.number, None)
            self._written.pop(name.number, None)
            self._files.remove([f"{WORK_FOLDER}/{name.text}"])
        return whole

    def _is_whole(self, file: ShardFile, sizes: dict[str, int]) -> bool:
        name, expected = file.shard.name, file.shard.shard_bytes
        # A listing may be late: it does not decide that a file is missing.
        return sizes.get(name) == expected or self._files.size(name) == expected

    def write(self, number: int, record: ShardRecord) -> None:
        """Writes the record of a shard whose files are complete."""
        name = RecordName(
            generation=self._generation,
            number=number,
            num_files=len(record.files),
            num_bad=len(record.bad),
        )
        content = encode_record(record, self._packing_id)
        self._files.write(f"{WORK_FOLDER}/{name.text}", content)
        self._keep(number, record)
        self._written[number] = name
        others = self._conflicts.pop(number, set()) - {name.text}
        self._files.remove(f"{WORK_FOLDER}/{other}" for other in others)
        if self._files.is_local:
            self._remove_partial_files(number)

    def _remove_partial_files(self, number: int) -> None:
        """Removes files of a shard whose writers were killed, or will find the record."""
        stem = file_name(number, self._generation, 0).removesuffix(".tar")
        self._files.remove(
            f"{WORK_FOLDER}/{name}"
            for name in self._files.sizes(WORK_FOLDER)
            if name.startswith((f"{stem}.", f"{stem}-")) and name.endswith(PARTIAL_SUFFIX)
        )
