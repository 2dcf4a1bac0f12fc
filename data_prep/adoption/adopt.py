"""Makes a data set of shards that other tools wrote, where they lie.

The archives are read, not changed: `samples.rows`, `bad.jsonl` and, last, `manifest.json` are
written beside them, or into another folder. What an archive holds is kept in the folder
`.adopting` until then, so that an interrupted adoption resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from tvr.data_prep.adoption.index_tar import ForeignTar, always_prefix
from tvr.data_prep.adoption.tar_pool import index_tars
from tvr.data_prep.annotations.clip_source import VERSION_FIELDS
from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.foreign_samples import CAPTION_SOURCES, ForeignRules
from tvr.data_prep.dataset.index_rules import FILE_NAME, MAX_FILE_BYTES, generation_of
from tvr.data_prep.dataset.manifest import (
    BAD_NAME,
    FORMAT_VERSION,
    Manifest,
    concat_samples,
    join_url,
    read_manifest,
    read_manifest_json,
    samples_name,
    write_manifest,
)
from tvr.data_prep.dataset.sample_table import SampleTable, hash_texts
from tvr.data_prep.limited_process import ProcessLimits
from tvr.data_prep.packing.output_files import OutputFiles
from tvr.data_prep.packing.pack_clip import refusals_text
from tvr.data_prep.packing.shard_record import (
    ShardFile,
    ShardRecord,
    decode_record,
    encode_record,
)
from tvr.data_prep.storage.retries import Retries
from tvr.data_prep.storage.storage import Storage

ADOPTING_FOLDER = ".adopting"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptProgress:
    """Progress of an adoption."""

    num_done: int
    """Archives that are indexed, also by an earlier start."""
    num_tars: int
    num_samples: int
    num_bad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adopted:
    """What stays in memory of an indexed archive."""

    tar: ForeignTar
    file: ShardFile | None
    """Without its rows; None = the archive has no good sample."""
    keys: np.ndarray
    """Hash of each key."""


def adopt_shards(
    url: str,
    *,
    out: str | None = None,
    captions: Sequence[str] = CAPTION_SOURCES,
    max_bad: int = 0,
    processes: int = 1,
    limits: ProcessLimits | None = None,
    overwrite: bool = False,
    on_progress: Callable[[AdoptProgress], object] = lambda progress: None,
) -> Manifest:
    """Indexes the tar archives in a folder as a data set of the layout "video".

    Each archive is read once, and each video is decoded once. Samples that cannot be used are left
    out of the index, and listed in bad.jsonl with their archive and name.

    Args:
        url: Folder path or fsspec URL of the archives.
        out: Folder or URL for the index; None = that of the archives.
        captions: Where captions come from, see `ForeignRules`.
        max_bad: Samples that may be left out.
        processes: Archives to read at a time, each in a process with limits; 0 means the calling
            process, which has none.
        limits: What one video may take.
        overwrite: Adopt a folder again, for archives that came, went or changed.

    Raises:
        TooManyBadSamples: more than `max_bad` samples are bad. Nothing is published; a larger
            `max_bad` resumes.
        FileExistsError: the folder holds a data set that is not to be replaced, or that `tvr pack`
            wrote.
        FileNotFoundError: the folder has no archive.
        ValueError: a setting is out of range, an archive's name is not allowed, two samples have
            one key, no sample is good, or an archive changes meanwhile.
        ChildProcessError: see `index_tars`.
    """
    if processes < 0:
        raise ValueError(f"processes={processes} must be 0 or more")
    if processes and Storage(url).is_in_memory:
        raise ValueError(
            f"processes={processes} must be 0 (--processes 0) with {url}: processes do not share"
            " memory:// files"
        )
    tars = "" if out is None else url if "://" in url else os.path.abspath(url)
    rules = ForeignRules(captions=tuple(captions), tars=tars)
    adoption = _Adoption(out or url, rules, max_bad, on_progress)
    adoption.check_folder(overwrite=overwrite)
    adoption.index(find_tars(url), processes, limits)
    return adoption.publish()


def _is_archive(name: str, entry: dict[str, Any]) -> bool:
    return name.endswith(".tar") and entry.get("type") != "directory"


def find_tars(url: str) -> list[ForeignTar]:
    """Returns the archives in a folder by name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a name is not allowed in an index.
    """
    fs, root = url_to_fs(url)
    entries: list[dict[str, Any]] = Retries().call(lambda: fs.ls(root, detail=True), root)
    found = {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry for entry in entries}
    tars = {name: entry for name, entry in sorted(found.items()) if _is_archive(name, entry)}
    if not tars:
        packed = [name for name in sorted(found) if name.endswith(COMPRESSED)]
        hint = f"; decompress {packed[0]} and the others first" if packed else ""
        raise FileNotFoundError(f"{url}: no file *.tar in this folder{hint}")
    for name, entry in tars.items():
        if not FILE_NAME.fullmatch(name) or ".." in name or len(name) > 200:
            raise ValueError(
                f"{join_url(url, name)}: rename the file: an index names files of letters, digits,"
                ' "_", "-" and ".", up to 200 characters, not beginning with "-" or "."'
            )
        if not 0 <= int(entry["size"] or 0) <= MAX_FILE_BYTES:
            raise ValueError(
                f"{join_url(url, name)}: {entry['size']} bytes, an archive has at most"
                f" {MAX_FILE_BYTES}"
            )
    prefix = always_prefix(set(tars))
    return [
        ForeignTar(
            name=name,
            num_bytes=int(entry["size"] or 0),
            version=next((f"{v} {entry[v]}" for v in VERSION_FIELDS if entry.get(v)), ""),
            always_prefix=prefix,
        )
        for name, entry in tars.items()
    ]


class _Adoption:
    def __init__(
        self,
        url: str,
        rules: ForeignRules,
        max_bad: int,
        on_progress: Callable[[AdoptProgress], object],
    ) -> None:
        self._url = url
        self._rules = rules
        self._files = OutputFiles(url)
        self._budget = BadSampleBudget(max_bad, f"while adopting {url}")
        self._on_progress = on_progress
        self._generation = 0
        self._adopted: list[_Adopted] = []
        self._num_samples = self._num_bad = 0

    def check_folder(self, *, overwrite: bool) -> None:
        """Refuses a folder with another data set; sets the generation."""
        try:
            published = read_manifest_json(self._url)
        except FileNotFoundError:
            return
        if not published.get("foreign"):
            raise FileExistsError(f"{self._url} holds a data set of tvr pack; nothing to adopt")
        if not overwrite:
            raise FileExistsError(f"{self._url} is adopted already; --overwrite adopts it again")
        self._generation = generation_of(published, self._url) + 1

    def index(
        self, tars: Sequence[ForeignTar], processes: int, limits: ProcessLimits | None
    ) -> None:
        """Indexes the archives, but for those of an earlier start."""
        missing = []
        for tar in tars:
            record = self._read_record(tar)
            if record is None:
                missing.append(tar)
            else:
                self._count(tar, record, len(tars))
        url = self._rules.tars or self._url
        for tar, record in index_tars(url, missing, self._rules, processes, limits):
            content = encode_record(record, self._identity(tar))
            self._files.write(_record_name(tar), content)
            self._count(tar, record, len(tars))
        self._adopted.sort(key=lambda adopted: adopted.tar.name)

    def publish(self) -> Manifest:
        """Writes the index."""
        files = [adopted.file for adopted in self._adopted if adopted.file is not None]
        bad = [entry for adopted in self._adopted for entry in self._record(adopted.tar).bad]
        refused = dict(sorted(Counter(entry.reason for entry in bad).items()))
        if not files:
            found = refusals_text(bad)
            raise ValueError(f"no usable sample in the archives of {self._url} {found}")
        self._check_keys()
        lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in bad)
        self._files.write(BAD_NAME, lines.encode("utf-8", "backslashreplace"))
        shards = tuple(file.shard for file in files)
        manifest = Manifest(
            layout="video",
            num_frames=0,
            short_side=None,
            num_captions=sum(file.num_captions for file in files),
            num_empty_captions=0,
            bad=refused,
            shards=shards,
            samples=concat_samples([]),
            fingerprint=_fingerprint([self._rules, *shards]),
            generation=self._generation,
            foreign=self._rules,
        )
        write_manifest(self._url, manifest, self._rows())
        replaced = [] if not self._generation else [samples_name(self._generation - 1)]
        self._files.remove([*replaced, *(_record_name(adopted.tar) for adopted in self._adopted)])
        self._files.remove_folder(ADOPTING_FOLDER)
        return read_manifest(self._url)

    def _count(self, tar: ForeignTar, record: ShardRecord, num_tars: int) -> None:
        """Notes an indexed archive, without its rows, and charges its bad samples."""
        keys, file = np.empty(0, dtype=np.uint64), None
        for each in record.files:
            assert each.samples is not None, "a record that was just made or decoded has rows"
            keys = hash_texts(each.samples.key)
            file = ShardFile(shard=each.shard, num_captions=each.num_captions, samples=None)
        self._adopted.append(_Adopted(tar=tar, file=file, keys=keys))
        self._num_bad += len(record.bad)
        self._num_samples += len(keys)
        for number, entry in enumerate(record.bad):
            self._budget.record_bad(f"{entry.key} {tar.name} {number}", entry.reason, entry.detail)
        self._on_progress(
            AdoptProgress(
                num_done=len(self._adopted),
                num_tars=num_tars,
                num_samples=self._num_samples,
                num_bad=self._num_bad,
            )
        )

    def _identity(self, tar: ForeignTar) -> str:
        """Names a version of an archive, and the rules by which it was read."""
        return _fingerprint([tar, self._rules])

    def _read_record(self, tar: ForeignTar) -> ShardRecord | None:
        content = self._files.read(_record_name(tar))
        return None if content is None else decode_record(content, self._identity(tar))

    def _record(self, tar: ForeignTar) -> ShardRecord:
        record = self._read_record(tar)
        if record is None:
            raise ValueError(
                f"{join_url(self._url, _record_name(tar))} is gone or changed; repeat the command"
            )
        return record

    def _rows(self) -> Iterator[SampleTable]:
        for adopted in self._adopted:
            for file in self._record(adopted.tar).files:
                assert file.samples is not None, "a record that was just decoded has rows"
                yield file.samples

    def _check_keys(self) -> None:
        """Refuses samples of two archives with the same key."""
        keys = np.concatenate([adopted.keys for adopted in self._adopted])
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        if not len(same):
            return
        ends = np.cumsum([len(adopted.keys) for adopted in self._adopted])
        rows = sorted(order[same[0] : same[0] + 2].tolist())
        first, second = (
            self._adopted[int(np.searchsorted(ends, row, side="right"))].tar.name for row in rows
        )
        raise ValueError(
            f"{self._url}: {first} and {second} have samples of the same key; rename one archive"
        )


def _record_name(tar: ForeignTar) -> str:
    return f"{ADOPTING_FOLDER}/{tar.name}.json"


def _fingerprint(values: Sequence[Any]) -> str:
    fields = [FORMAT_VERSION, *(asdict(value) for value in values)]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
