"""Writes one rank's files of a checkpoint and hashes them, on a thread of low priority."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, cast

import torch

from tvr.data_prep.storage.storage_folder import StorageFolder
from tvr.trainer.checkpoint.manifest import FileRecord

# Where training uses all cores, a thread of this niceness gets a tenth of one, and steps do not
# wait for it. At niceness 0 the steps lost more time than a synchronous save takes.
NICENESS = 10


def writer_thread(*, low_priority: bool) -> ThreadPoolExecutor:
    """An executor with one thread, which may run at low priority."""
    return ThreadPoolExecutor(
        max_workers=1,
        thread_name_prefix="checkpoint",
        initializer=_lower_priority if low_priority else None,
    )


def write_files(
    storage: StorageFolder, folder: str, staged: Mapping[str, Any]
) -> dict[str, FileRecord]:
    """Writes each value to `folder` by `torch.save`; returns the files' records by name.

    A file whose upload fails for the moment is written again, whole.
    """
    return {
        name: storage.write(f"{folder}/{name}", lambda file, value=value: _save(value, file))
        for name, value in staged.items()
    }


def write_result(
    written: Future[dict[str, FileRecord]],
) -> tuple[dict[str, FileRecord], str | None]:
    """The records of a finished `write_files`, and its error if it failed."""
    error = written.exception()
    if error is not None:
        return {}, f"{type(error).__name__}: {error}"
    return written.result(), None


def _save(value: Any, file: Any) -> FileRecord:
    hashing = _HashingFile(file)
    torch.save(value, cast(IO[bytes], hashing))
    return FileRecord(num_bytes=hashing.num_bytes, sha256=hashing.hexdigest())


def _lower_priority() -> None:
    # On Linux each thread has its own niceness, and only the superuser can lower it again.
    thread = threading.get_native_id()
    niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


class _HashingFile:
    """A binary file that hashes what is written; `torch.save` writes from front to back."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: Any) -> int:
        self._digest.update(content)
        written = self._file.write(content)
        self.num_bytes += memoryview(content).nbytes
        return written

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
