"""Downloads the file of rows of a remote data set once a node, for all its processes.

The file is named by its sha256, as the files of the shard cache are. A download goes to a temporary
file, which is renamed once all its blocks are verified. Processes that start together wait for one
file lock; the operating system releases it when a process dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tvr.data_prep.dataset.sample_blocks import HEADER, BlockRows, RowsFile, read_table
from tvr.data_prep.records import ShardCorrupt
from tvr.data_prep.storage.storage import Storage

# Size of one request; a failed request is repeated without downloading the file from the start.
CHUNK_BYTES = 1 << 25
# A download removes files that no process has opened for this long.
UNUSED_S = 30 * 86400.0
COPY_NAME = re.compile(r"[0-9a-f]{64}\.rows(\.partial)?")
LOCK_NAME = "rows.lock"
_used: dict[str, Path] = {}
"""Copies that this process has opened, by name; their folders may differ."""


def copy_to_node(
    store: Storage, name: str, entry: RowsFile, blocks: BlockRows, folder: str | None
) -> str:
    """Returns the path of a verified copy of a file of rows on this node.

    Args:
        store: Storage of the data set.
        name: Name of the file there.
        entry: Its size and hash by `manifest.json`.
        blocks: Blocks that the shards need.
        folder: Folder for the copy, such as the shard cache; created if missing. None = a folder
            of this user in the folder for temporary files.

    Raises:
        FileNotFoundError: the store has no such file.
        ShardCorrupt: the store's file is damaged or edited.
        PermissionError: the folder for temporary files belongs to someone else, or others may
            write to it.
        OSError: the store fails, or the folder has no space.
    """
    copy = f"{entry.sha256}.rows"
    path = (_temporary_folder() if folder is None else Path(folder)) / copy
    known = [path, _used.get(copy, path)]
    with suppress(OSError):  # of a process that was given no folder
        known.append(_own(_temporary_path()) / copy)
    for each in known:
        if _is_there(each, entry):
            _used[copy] = each
            return str(each)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / LOCK_NAME):
        if not _is_there(path, entry):  # another process may have downloaded it meanwhile
            _remove_unused(path.parent)
            _download(store, name, entry, blocks, path)
    _used[copy] = path
    return str(path)


def _is_there(path: Path, entry: RowsFile) -> bool:
    """True if there is a copy, which is marked as used."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != entry.num_bytes:
            path.unlink()  # a symbolic link is never followed
            return False
        with suppress(PermissionError):  # written by another user of the shard cache
            os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(store: Storage, name: str, entry: RowsFile, blocks: BlockRows, path: Path) -> None:
    where, table_bytes = store.path(name), blocks.table_bytes
    header = store.read_range(name, 0, HEADER.size)
    at = entry.num_bytes - table_bytes
    table = store.read_range(name, at, entry.num_bytes)
    if len(header) < HEADER.size or len(table) < table_bytes:
        raise ShardCorrupt(f"{where}: has fewer than the {entry.num_bytes} bytes in manifest.json")
    entries = read_table(header, table, entry, blocks, where)
    partial = path.with_suffix(".rows.partial")
    partial.unlink(missing_ok=True)  # of a killed process: this one holds the lock
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(partial, flags, 0o644), "w+b") as file:
            for start in range(0, entry.num_bytes, CHUNK_BYTES):
                end = min(start + CHUNK_BYTES, entry.num_bytes)
                file.write(store.read_range(name, start, end))
            file.seek(HEADER.size)
            for block in entries:
                content = file.read(int(block["num_bytes"]))
                if hashlib.sha256(content).digest() != block["sha256"].tobytes():
                    raise ShardCorrupt(
                        f"{where}: damaged: the sha256 of a block differs from the one in the"
                        " file's table; copy the data set again, or pack it again"
                    )
            if file.read() != table:
                raise ShardCorrupt(f"{where}: changed while it was downloaded")
            file.flush()
            os.fsync(file.fileno())  # in a crash, a published name must not outlive its content
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_unused(folder: Path) -> None:
    """Removes copies that were not opened for a long time. A process that maps one keeps it."""
    for path in folder.glob("*.rows*"):
        with suppress(OSError):
            unused_s = time.time() - path.lstat().st_mtime
            if COPY_NAME.fullmatch(path.name) and unused_s > UNUSED_S:
                path.unlink()


def _temporary_folder() -> Path:
    """A folder that only this user can write to; others might replace its files otherwise."""
    path = _temporary_path()
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    return _own(path)


def _temporary_path() -> Path:
    return Path(tempfile.gettempdir()) / f"tvr-{os.getuid()}"


def _own(path: Path) -> Path:
    """Returns a folder that only this user can write to. Raises PermissionError for another one."""
    status = path.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.getuid()
        or stat.S_IMODE(status.st_mode) & 0o077
    ):
        raise PermissionError(
            f"{path} must be a folder of this user with the mode 0700, for the index of a remote"
            " data set; remove it, or set another folder by data.shard_cache or TMPDIR"
        )
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing is not enough if a forked process holds a copy of the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
