"""Writes a feature set part by part; a writer that was killed goes on where it stopped."""

from __future__ import annotations

import errno
import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tvr.data_prep.records import REFUSED_TEXT, Replacement, ShardCorrupt
from tvr.launchers.atomic_write import write_atomically
from tvr.trainer.features.layout import (
    EMBED_AGAIN,
    MANIFEST,
    MAX_TEXT,
    PART,
    DataSource,
    FeatureHeader,
    FeatureManifest,
    Part,
    columns,
    part_json,
    read_manifest,
    to_json,
)
from tvr.trainer.features.stored_file import check_file, write_array
from tvr.trainer.model.model import Features

INT8_LEVELS = 127
# A part takes seconds to write, once it is encoded.
ABANDONED_S = 3600.0
LOCK = ".publish.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSource:
    """Where a video of a feature set comes from."""

    row: int = -1
    """Row in the packed data set; -1 for a file."""
    file: str = ""
    """Path of the video file below the folder; empty for a packed data set."""
    start_s: float = 0.0
    end_s: float = float("nan")
    """End of the span in the file; not a number: the end of the file."""


class FeatureWriter:
    """Writes the parts of one data set into a feature set, which may hold others already.

    Several processes may write different blocks of the same data set. A part appears under its name
    once it is whole, and the data set belongs to the feature set once `publish` finds all parts.

    Args:
        folder: Folder of the feature set.
        header: Model, types and sizes.
        source: The data set.

    Raises:
        ValueError: the folder holds features of another model or other settings, or the name of
            the model or the data set cannot be stored; names them.
        ShardCorrupt: its manifest is damaged.
    """

    def __init__(self, folder: Path | str, header: FeatureHeader, source: DataSource) -> None:
        self.folder, self.header, self.source = Path(folder), header, source
        for name, text in (("model", header.model), ("data set", source.url)):
            if len(text) > MAX_TEXT or REFUSED_TEXT.search(text):
                raise ValueError(
                    f"{name} {text!r:.200}: its name must have at most {MAX_TEXT} characters, none"
                    " for control; move it to another folder"
                )
        manifest = self.folder / MANIFEST
        if manifest.exists():
            published = read_manifest(manifest)
            published.header.check_same(header, str(self.folder))
            for other, _ in published.sets:
                if other.url == source.url and other.name != source.name:
                    raise ValueError(
                        f"{self.folder} holds features of {source.url} as it was before; its"
                        " content, or the size of the parts, differs now: give another folder"
                    )
        elif self.folder.is_dir():
            for record in sorted(self.folder.glob(f"set-*/block-*/{PART}"))[:1]:
                read_manifest(record).header.check_same(header, str(self.folder))
        self._own = self.folder / source.name

    def has(self, block: int) -> bool:
        """True if a block's part is whole, which reads it; a damaged part is removed."""
        folder = self._own / block_name(block)
        if not folder.exists():
            return False
        try:
            part = self._record(folder)
            check_files(folder, part, hashes=True)
        except (ShardCorrupt, OSError):
            shutil.rmtree(folder)
            return False
        return True

    def write(
        self,
        block: int,
        features: Features | None,
        *,
        keys: Sequence[str] = (),
        captions: Sequence[str] = (),
        caption_video: Tensor | None = None,
        sources: Sequence[VideoSource] = (),
        frame_times: np.ndarray | None = None,
        left_out: Sequence[Replacement] = (),
    ) -> None:
        """Writes one part; one that another process has just written stays.

        Args:
            features: Of C videos and A captions; None if the block has no readable video.
            keys: (C,) keys of the videos.
            captions: (A,) texts.
            caption_video: (A,) row in `keys` of each caption's video, ascending.
            sources: (C,) origin of each video.
            frame_times: (C, F) seconds; None = unknown, which is stored as not a number.
        """
        part = Part(
            name=block_name(block), videos=len(keys), captions=len(captions), files={}, left_out=()
        )
        arrays = self._arrays(features, part, captions, caption_video, keys, sources, frame_times)
        folder = self._own / part.name
        # Ranks of other machines, and of other jobs, may have this process's number.
        partial = folder.with_name(f".{part.name}.{secrets.token_hex(8)}.partial")
        self._remove_partial(part.name, older_than_s=ABANDONED_S)
        try:
            partial.mkdir(parents=True)
            files = {
                name: write_array(partial / f"{name}.bin", array) for name, array in arrays.items()
            }
            part = Part(
                name=part.name,
                videos=part.videos,
                captions=part.captions,
                files=files,
                left_out=tuple(_shortened(each) for each in left_out),
            )
            text = part_json(self.header, self.source, part)
            write_array(partial / PART, np.frombuffer(text.encode(), np.uint8))
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not self.has(block):  # another job has not written it meanwhile
                raise

    def _remove_partial(self, block: str, *, older_than_s: float) -> None:
        """Removes what killed writers left; another job may be writing just now."""
        for left in self._own.glob(f".{block}.*.partial"):
            try:
                is_old = time.time() - left.stat().st_mtime >= older_than_s
            except FileNotFoundError:  # just renamed
                continue
            if is_old:
                shutil.rmtree(left, ignore_errors=True)

    def publish(self) -> bool:
        """Adds the data set to manifest.json if all its parts are there; keeps the others.

        Returns:
            False if other processes still write parts.

        Raises:
            ShardCorrupt: a part's record is damaged.
        """
        folders = [self._own / block_name(block) for block in range(self.source.num_blocks)]
        if not all((folder / PART).is_file() for folder in folders):
            return False
        own = (self.source, tuple(self._record(folder) for folder in folders))
        path = self.folder / MANIFEST
        with _locked(self.folder / LOCK):
            sets = read_manifest(path).sets if path.exists() else ()
            names = [source.name for source, _ in sets]
            if self.source.name in names:
                sets = tuple(own if each[0].name == self.source.name else each for each in sets)
            else:
                sets = (*sets, own)
            write_atomically(path, to_json(FeatureManifest(header=self.header, sets=sets)))
        # A job that still writes one of these parts finds it written.
        self._remove_partial("block-*", older_than_s=0.0)
        return True

    def _record(self, folder: Path) -> Part:
        manifest = read_manifest(folder / PART)
        self.header.check_same(manifest.header, str(folder))
        if len(manifest.sets) != 1 or manifest.sets[0][0].name != self.source.name:
            raise ShardCorrupt(f"{folder / PART}: belongs to another data set")
        parts = manifest.sets[0][1]
        if len(parts) != 1 or parts[0].name != folder.name:
            raise ShardCorrupt(f"{folder / PART}: belongs to another part")
        return parts[0]

    def _arrays(
        self,
        features: Features | None,
        part: Part,
        captions: Sequence[str],
        caption_video: Tensor | None,
        keys: Sequence[str],
        sources: Sequence[VideoSource],
        frame_times: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        shapes = columns(self.header, part.videos, part.captions)
        found: dict[str, np.ndarray] = {}
        if features is not None:
            for name in ("frames", "sentence", "words"):
                values = getattr(features, name).detach().float().cpu().numpy()
                found |= _stored(name, values, self.header.stored)
            for name in ("frame_mask", "word_mask", "frame_logits", "word_logits"):
                values = getattr(features, name)
                if name in shapes and values is not None:
                    found[name] = values.detach().cpu().numpy()
        if caption_video is not None:
            found["caption_video"] = caption_video.cpu().numpy()
        found["rows"] = np.array([each.row for each in sources])
        found["spans"] = np.array([(each.start_s, each.end_s) for each in sources])
        found["frame_times"] = (
            np.full(shapes["frame_times"][1], np.nan) if frame_times is None else frame_times
        )
        texts = {"keys": keys, "files": [each.file for each in sources], "captions": captions}
        result = {}
        for name, values in texts.items():
            encoded = [value.encode() for value in values]
            result[name] = np.frombuffer(b"".join(encoded), np.uint8)
            found[f"{name}_ends"] = np.cumsum([len(value) for value in encoded])
        for name, (kind, shape) in shapes.items():
            values = found.get(name, np.empty(0))
            if not values.size and 0 in shape:
                values = np.empty(shape)
            if values.shape != shape:
                raise ValueError(f"{name} of a part has shape {values.shape}; needed is {shape}")
            with np.errstate(over="ignore"):  # refused below
                result[name] = values.astype(kind)
            if kind == np.float16 and not np.isfinite(result[name]).all():
                raise ValueError(
                    f"{self.folder}: {name} of {part.name} holds numbers that are not finite in"
                    " fp16, whose largest is 65,504; store fp32 (data.features_type, or --stored)"
                )
        return result


def check_files(folder: Path, part: Part, *, hashes: bool, names: Sequence[str] = ()) -> None:
    """Compares the files of a part with its record.

    Args:
        hashes: Also reads them all; otherwise only `names` are read.

    Raises:
        ShardCorrupt: a file is missing, cut short or differs; names it.
    """
    for name, stored in part.files.items():
        hashed = hashes or name in names
        check_file(folder / f"{name}.bin", stored, hashed=hashed, remedy=EMBED_AGAIN)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time publish: two at once would lose the data set of one of them."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
        except OSError as error:
            # Some shared disks have no locks; one job at a time is safe there, too.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield


def block_name(block: int) -> str:
    """Name of a block's folder."""
    return f"block-{block:08d}"


def _stored(name: str, values: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Vectors in the stored type.

    int8 has one scale per vector, its largest absolute entry / 127: an entry is off by at most half
    the scale, 0.4 % of that largest entry.
    """
    if kind != "int8":
        return {name: values}
    scale = (np.abs(values).max(axis=-1) / INT8_LEVELS).astype("<f4")
    safe = np.where(scale > 0, scale, 1)[..., None]
    levels = np.rint(values / safe).clip(-INT8_LEVELS, INT8_LEVELS)
    return {name: levels, f"{name}_scale": scale}


def _shortened(left_out: Replacement) -> Replacement:
    return Replacement(
        position=left_out.position,
        key=REFUSED_TEXT.sub(" ", left_out.key)[:MAX_TEXT],
        reason=left_out.reason,
        detail=REFUSED_TEXT.sub(" ", left_out.detail)[:MAX_TEXT],
    )
