"""A kind of files that are damaged at random, and what may come of reading them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import ClassVar

from builders.fuzz.mutations import mutate_bytes

SEEDS = "seeds"


class WrongResult(Exception):
    """Neither a documented error nor a right result."""


class Target(ABC):
    """Whole files of one kind, ways to damage them, and the check of what reading one gives.

    Args:
        folder: Folder that `make` filled; read only.
        scratch: Folder of this process.
    """

    name: ClassVar[str]
    share: ClassVar[float]
    """Part of all inputs."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        self.seeds = {path.name: path.read_bytes() for path in sorted((folder / SEEDS).iterdir())}
        self.prepare()

    @classmethod
    @abstractmethod
    def make(cls, folder: Path) -> None:
        """Writes the whole files to `folder`/seeds, and what the check needs beside them."""

    def prepare(self) -> None:  # noqa: B027 (few kinds need it)
        """Reads what `make` wrote beside the whole files."""

    def mutate(self, seed: str, chance: Random) -> bytes:
        """Returns a damaged file. The default is for binary files."""
        return mutate_bytes(self.seeds[seed], chance, self.donors)

    @abstractmethod
    def check(self, seed: str, content: bytes) -> str:
        """Reads a file that was made from a whole one.

        Returns:
            The outcome in a few words: a documented error, or READ.

        Raises:
            WrongResult: the result is not right.
            Exception: an error that is not documented.
        """

    @property
    def donors(self) -> Sequence[bytes]:
        return list(self.seeds.values())


READ = "read"


def require(condition: bool, what: str) -> None:
    """Raises WrongResult if a condition does not hold."""
    if not condition:
        raise WrongResult(what)


def documented(error: Exception, location: str) -> str:
    """Returns the outcome of a documented error, which must name the file.

    An error that only hides exhausted memory is none.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            raise WrongResult(f"a few bytes made it ask for too much memory: {error!r:.300}")
        cause = cause.__cause__ or cause.__context__
    require(location in str(error), f"the error does not name {location}: {error!r:.300}")
    return type(error).__name__
