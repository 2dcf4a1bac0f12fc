"""Writes the files of one shard of the plan."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from fsspec.implementations.local import LocalFileSystem

from tvr.data_prep.dataset.shard_writer import END_OF_TAR, ShardWriter, TarSample
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.output_files import WORK_FOLDER
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.packing.shard_record import ShardFile, ShardRecord, file_name


class OpenShard:
    """A shard while it is written; a context manager that removes what was not completed.

    A sample that would make a file larger than `shard_bytes` begins the next file. The files depend
    on the samples' bytes only. Each of them gets its name as soon as it is full, so that one file
    at a time lies on the local disk.
    """

    def __init__(self, output: OutputDir, number: int, shard_bytes: int) -> None:
        self._output = output
        self._number = number
        self._shard_bytes = shard_bytes
        self._scratch = ExitStack()
        self._writer: ShardWriter | None = None
        self._path = ""
        self._num_bytes = 0
        self._files: list[ShardFile] = []
        self._bad: list[RefusedClip] = []
        self._num_empty_captions = 0
        self._is_complete_elsewhere = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            with suppress(OSError):  # a full disk fails here a second time
                self._writer.close()
        self._scratch.close()

    def append(self, outcome: TarSample | RefusedClip) -> None:
        """Writes a packed clip, or notes a refused one for the shard's record.

        Raises as `OutputDir.check_active`.
        """
        if isinstance(outcome, RefusedClip):
            self._bad.append(outcome)
            return
        size = len(outcome.stored)
        if self._num_bytes and self._num_bytes + size + len(END_OF_TAR) > self._shard_bytes:
            self._finish_file()
        if self._writer is None:
            name = file_name(self._number, self._output.generation, len(self._files))
            scratch = self._output.files.scratch(WORK_FOLDER, name)
            self._path = self._scratch.enter_context(scratch)
            self._writer = ShardWriter(LocalFileSystem(), self._path)
        self._writer.append(outcome)
        self._num_bytes += size
        self._num_empty_captions += outcome.num_empty_captions

    def commit(self) -> None:
        """Gives the last file its name and writes the shard's record.

        Raises as `OutputDir.check_active`.
        """
        if self._writer is not None:
            self._finish_file()
        else:
            self._output.check_active()
        if self._is_complete_elsewhere:
            return
        record = ShardRecord(
            files=tuple(self._files),
            num_empty_captions=self._num_empty_captions,
            bad=tuple(self._bad),
        )
        self._output.records.write(self._number, record)

    def _finish_file(self) -> None:
        assert self._writer is not None
        name = file_name(self._number, self._output.generation, len(self._files))
        shard, samples = self._writer.finish(name)
        self._output.check_active()
        try:
            self._output.files.move(self._path, name)
        except FileNotFoundError:
            # Another process completed this shard meanwhile and removed this partial file.
            if self._number not in self._output.records.names():
                raise
            self._is_complete_elsewhere = True
        self._files.append(
            ShardFile(shard=shard, num_captions=int(samples.num_captions.sum()), samples=samples)
        )
        self._scratch.close()
        self._writer, self._num_bytes = None, 0
