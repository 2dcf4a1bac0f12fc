"""Finds the row of a key."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tvr.trainer.features.feature_set import FeatureSet


class KeyTable:
    """The keys of some rows of a feature set, read when one is first asked for."""

    def __init__(self, features: FeatureSet, rows: Sequence[range]) -> None:
        self._features, self._rows = features, rows
        self._found: dict[str, tuple[int, ...]] | None = None
        self._lock = threading.Lock()

    def row(self, key: str, data: str | None = None) -> int:
        """Row of a key; errors as `Index.row`."""
        with self._lock:
            if self._found is None:
                self._found = self._read()
        source = self._features.source
        found = [row for row in self._found.get(key, ()) if data in (None, source(row)[0].url)]
        if not found:
            folder = self._features.folder
            where = folder if data is None else f"{data} of {folder}"
            raise KeyError(f"{where} has no video with the key {key!r:.100}")
        if len(found) > 1:
            names = ", ".join(source(row)[0].url for row in found)
            raise ValueError(f"the key {key} is in several data sets, {names}: name one of them")
        return found[0]

    def _read(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for rows in self._rows:
            for row in rows:
                key = self._features.keys[row]
                found[key] = (*found.get(key, ()), row)
        return found
