"""Data sets of format 2, and hostile rows of this format, made from packed data sets."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tvr.data_prep.dataset.manifest import read_manifest
from tvr.data_prep.dataset.sample_table import SampleTable, text_array


def edit_manifest(folder: Path, path: Sequence[str | int], value: object) -> None:
    """Sets a value in manifest.json."""
    values = json.loads((folder / "manifest.json").read_text())
    place = values
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(values))


def columns_of(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a data set, texts as format 2 stored them."""
    samples = read_manifest(str(folder)).samples
    columns = {each.name: np.asarray(getattr(samples, each.name)) for each in fields(SampleTable)}
    return columns | {name: columns[name].astype(np.str_) for name in ("key", "video_id")}


def npz(columns: Mapping[str, Any]) -> bytes:
    """The content of an npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)
    return buffer.getvalue()


def replace_columns(folder: Path, content: bytes) -> None:
    """Replaces samples.npz, with the right sha256 in manifest.json."""
    (folder / "samples.npz").write_bytes(content)
    entry = {"name": "samples.npz", "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, ("samples",), entry)


def make_old(folder: Path) -> None:
    """Turns a data set into one of format 2, as its release wrote it."""
    content = npz(columns_of(folder))
    (folder / "samples.rows").unlink()
    replace_columns(folder, content)
    edit_manifest(folder, ("format_version",), 2)


def table_of(columns: Mapping[str, Any]) -> SampleTable:
    """A table of these columns."""
    texts = {name: text_array([str(t) for t in columns[name]]) for name in ("key", "video_id")}
    return SampleTable(**{**columns, **texts})
