"""A folder of whole shards on the node's disk, which any number of processes share.

Files are named by the sha256 of their content. A download goes to a temporary file, which is locked
while it lives. Each process that reads pins the shards that it needs now and next: it lists them in
a file of its own, which it locks. Nothing that a live process has pinned is evicted. Locks are file
locks (flock): the operating system releases them when a process dies, and the next process that
needs space deletes the files that it left.

Only files of the folder with such names are touched. No symbolic link there is followed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tvr.data_prep.dataset.index_rules import SHA256

Name = TypeVar("Name")


class ShardFolder:
    """The files of a cache folder: names, pins and eviction.

    Args:
        path: The folder; created if missing.
        max_bytes: Limit for the shards of the folder and the downloads together.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        path.mkdir(parents=True, exist_ok=True)
        self._pins: int | None = None
        self._pinned: frozenset[str] = frozenset()
        self._pid = os.getpid()

    def shard(self, sha256: str) -> Path:
        """The path of a shard."""
        return self.path / f"{sha256}.tar"

    def pin(self, shards: Collection[str]) -> None:
        """Keeps these shards from eviction, also those that are downloaded later.

        They replace what this process pinned before. A process that ends pins nothing.

        Args:
            shards: sha256 of each shard.

        Raises:
            OSError: the list cannot be written.
        """
        self._forget_parents_pins()
        wanted = frozenset(shards)
        if wanted == self._pinned:
            return
        content = "".join(f"{name}\n" for name in sorted(wanted)).encode()
        with self._lock():  # a process that evicts reads the lists under this lock
            if self._pins is None:
                name = self.path / f"{secrets.token_hex(32)}.pins"
                self._pins = locked(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, wait=True)
                assert self._pins is not None, "a new name was not new"
            os.ftruncate(self._pins, 0)
            write(self._pins, content, 0)
        self._pinned = wanted

    def unpin(self) -> None:
        """Gives up what this process has pinned; the next process that evicts deletes its list."""
        self._forget_parents_pins()
        if self._pins is not None:
            release(self._pins)
        self._pins, self._pinned = None, frozenset()

    def reserve(self, descriptor: int, num_bytes: int) -> bool:
        """Reserves space by extending a locked temporary file.

        The least recently used shards that no process has pinned are evicted for it.

        Returns:
            False if the pinned shards and other downloads leave no room; nothing is evicted then.
        """
        with self._lock():
            room = self.max_bytes - self._delete_stale_partials() - num_bytes
            pinned = self._all_pinned()
            paths = sorted(self._files(".tar"), key=_last_use)
            sizes = {path: _size(path) for path in paths}
            to_evict = evicted(sizes, lambda path: path.stem in pinned, room)
            if to_evict is None:
                return False
            for path in to_evict:
                path.unlink(missing_ok=True)
            os.ftruncate(descriptor, num_bytes)
        return True

    def _forget_parents_pins(self) -> None:
        """After a fork the list and its lock belong to the parent, which goes on to use them."""
        if self._pid != os.getpid():
            if self._pins is not None:
                os.close(self._pins)
            self._pins, self._pinned, self._pid = None, frozenset(), os.getpid()

    def _files(self, suffix: str) -> list[Path]:
        """Files of the cache; others, even if they are tar archives, belong to the user."""
        found = self.path.glob(f"*{suffix}")
        return [path for path in found if SHA256.fullmatch(path.stem) is not None]

    def _delete_stale_partials(self) -> int:
        """Deletes temporary files of dead processes; returns the bytes that live ones reserved."""
        return sum(_size(path) for path in self._live(".partial"))

    def _all_pinned(self) -> set[str]:
        """The shards that live processes have pinned; deletes the lists of dead ones."""
        pinned = set[str]()
        for path in self._live(".pins"):
            try:
                descriptor = open_file(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # its process has just ended, and another one deleted it
            with open(descriptor, "rb") as file:
                pinned.update(file.read().decode("ascii", "replace").split())
        return pinned

    def _live(self, suffix: str) -> list[Path]:
        """Files that a live process has locked; the others are deleted."""
        live = []
        for path in self._files(suffix):
            stale = locked(path, os.O_RDWR, wait=False)
            if stale is None:
                live.append(path)
            else:
                path.unlink(missing_ok=True)
                release(stale)
        return live

    @contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = locked(self.path / "lock", os.O_RDWR | os.O_CREAT, wait=True)
        assert descriptor is not None, "the lock file is never deleted"
        try:
            yield
        finally:
            release(descriptor)


def evicted(
    sizes: Mapping[Name, int], is_pinned: Callable[[Name], bool], room: int
) -> list[Name] | None:
    """Returns which shards to evict so that the others take at most `room` bytes.

    Args:
        sizes: Bytes of the shards, the least recently used first.
        is_pinned: Whether a process needs a shard.
        room: Bytes for the shards that stay.

    Returns:
        The fewest of the least recently used that suffice; None if the pinned ones take more.
    """
    evictable = [name for name in sizes if not is_pinned(name)]
    used = sum(sizes.values())
    if used - sum(sizes[name] for name in evictable) > room:
        return None
    taken: list[Name] = []
    for name in evictable:
        if used <= room:
            break
        used -= sizes[name]
        taken.append(name)
    return taken


def open_file(path: Path, flags: int) -> int:
    """Opens a file of the cache. A symbolic link in its place is removed, never followed.

    Raises:
        FileNotFoundError: there is no such file.
    """
    while True:
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP or not path.is_symlink():
                raise
        path.unlink(missing_ok=True)


def locked(path: Path, flags: int, wait: bool) -> int | None:
    """Opens and locks a file exclusively; None if it is locked, or is not the file at `path`."""
    try:
        descriptor = open_file(path, flags)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)  # locked by another process, or renamed or deleted while waiting
    return None


def release(descriptor: int) -> None:
    """Unlocks and closes a file."""
    # Unlock explicitly: closing is not enough if a forked process holds a copy of the descriptor.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def write(descriptor: int, content: bytes, at: int) -> None:
    """Writes all bytes at a position of a file."""
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> tuple[int, str]:
    try:
        return path.lstat().st_mtime_ns, path.name
    except FileNotFoundError:
        return 0, path.name
