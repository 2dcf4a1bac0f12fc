"""Damaged annotations, benchmark files, checkpoint manifests and files of a packing."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from builders.fuzz.mutations import (
    mutate_bytes,
    mutate_json_file,
    mutate_text,
)
from builders.fuzz.target import READ, SEEDS, Target, documented, require

from tvr.data_prep.annotations.benchmarks import Dataset, read_benchmark
from tvr.data_prep.annotations.clip_keys import KEY_PATTERN
from tvr.data_prep.annotations.clip_source import AnnotationFile
from tvr.data_prep.annotations.read import read_annotations
from tvr.data_prep.packing.pack import pack_shards
from tvr.data_prep.records import Clip, TooManyBadSamples

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = None

CAPTIONS = (
    "A man plays the guitar, slowly",
    'she says "no; never"',
    "un café à Paris",
    "\u732b\u304c\u8d70\u308b \U0001f600",
    "a dog (small)",
)
ROWS: tuple[dict[str, Any], ...] = (
    {"video": "v/a.mp4", "caption": CAPTIONS[0], "key": "a1", "video_id": "va", "start": 0.5},
    {"video": "v/a.mp4", "caption": CAPTIONS[1], "key": "a2", "video_id": "va", "end": 4},
    {"video": "b.mp4", "caption": CAPTIONS[2]},
    {"video": "s3://bucket/c d.webm", "caption": CAPTIONS[3]},
    {"video": "\u732b.mkv", "caption": CAPTIONS[4], "key": "k5"},
)


COMPRESSED = ("rows.jsonl", "rows.csv", "list.json")


class Annotations(Target):
    """Annotation files of every format."""

    name = "annotations"
    share = 0.18

    @classmethod
    def make(cls, folder: Path) -> None:
        lists = [{**row, "captions": [row["caption"], ""]} for row in ROWS]
        for row in lists:
            del row["caption"]
        named = [
            {"clip_name": f"clip{n % 2}", "caption": text, "sen_id": n, "label": 0}
            for n, text in enumerate(CAPTIONS)
        ]
        texts = {
            "rows.jsonl": _lines([*ROWS[:3], *lists[3:]]),
            "named.jsonl": _lines(named),
            "rows.csv": _csv(ROWS),
            "rows.tsv": _csv(ROWS, "\t"),
            "semicolons.csv": _csv(ROWS, ";"),
            "list.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
            "names.json": json.dumps({f"v{n}": [text] for n, text in enumerate(CAPTIONS)}),
            "field.json": json.dumps({"info": {"year": 2020}, "annotations": lists}),
        }
        for name, text in texts.items():
            (folder / SEEDS / name).write_text(text)
            if name in COMPRESSED:
                (folder / SEEDS / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        if pyarrow is not None:
            columns = {name: [row.get(name) for row in lists] for name in (*ROWS[0], "captions")}
            del columns["caption"]
            parquet.write_table(pyarrow.table(columns), folder / SEEDS / "rows.parquet")

    def mutate(self, seed: str, chance: Random) -> bytes:
        content = self.seeds[seed]
        if seed.endswith(".parquet"):
            return mutate_bytes(content, chance, self.donors)
        if seed.endswith(".json"):
            return mutate_json_file(content, chance, self.donors)
        if not seed.endswith(".gz"):
            return mutate_text(content, chance, self.donors)
        if chance.random() < 0.5:
            return mutate_bytes(content, chance, self.donors)
        return gzip.compress(mutate_text(gzip.decompress(content), chance, self.donors), mtime=0)

    def check(self, seed: str, content: bytes) -> str:
        path = self.scratch / seed
        path.write_bytes(content)
        try:
            clips = read_annotations(str(path))
        except ValueError as error:
            return documented(error, str(path))
        finally:
            if zlib.crc32(content) % 8 == 0:
                self._check_plan(path)
        require(bool(clips), "no clip and no error")
        check_clips(clips)
        read = Counter(text for clip in clips for text in clip.captions)
        require(_has_captions(seed, content, read), "a caption that the file does not have")
        return READ

    def _check_plan(self, path: Path) -> None:
        """Packing plans the clips of the file, or names it."""
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        source = AnnotationFile(str(path))
        try:
            pack_shards(source, str(out), layout="frames", max_bad=1000, plan_only=True)
        except (ValueError, TooManyBadSamples) as error:
            # The error that no clip is left names the data set.
            require(str(self.scratch) in str(error), f"the error names no file: {error!r:.300}")


def check_clips(clips: Iterable[Clip]) -> None:
    """Checks that packing can use these clips."""
    keys = [clip.key for clip in clips]
    require(len(set(keys)) == len(keys), f"keys {keys} are not unique")
    for clip in clips:
        require(KEY_PATTERN.fullmatch(clip.key) is not None, f"key {clip.key!r}")
        require(bool(clip.video), f"video {clip.video!r}")
        end_s = clip.end_s
        in_order = clip.start_s >= 0 and (end_s is None or clip.start_s < end_s < 1e308)
        require(in_order, f"{clip.start_s} to {end_s} s")
        for text in (*clip.captions, clip.video_id):
            require(isinstance(text, str), f"text {text!r}")
            text.encode()  # the plan of a packing is UTF-8


def _has_captions(seed: str, content: bytes, captions: Counter[str]) -> bool:
    """True if a plain reading of the file finds each caption, as often as it was read."""
    if seed.endswith(".parquet"):
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        return captions <= Counter(_strings(rows))
    raw = gzip.decompress(content) if seed.endswith(".gz") else content
    marks = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"))
    marks += ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    encoding = next((name for mark, name in marks if raw.startswith(mark)), "utf-8-sig")
    text = raw.decode(encoding)
    if ".json" in seed:
        return captions <= Counter(_strings(list(_values(text))))
    # A cell may be quoted, or a list of texts.
    forms = (str, lambda caption: caption.replace('"', '""'), lambda caption: repr(caption)[1:-1])
    escaped = (lambda caption: json.dumps(caption)[1:-1].replace('"', '""'),)
    return all(any(form(each) in text for form in (*forms, *escaped)) for each in captions)


def _values(text: str) -> Iterable[Any]:
    """Yields the JSON values of a text; objects as lists of pairs, in which names may recur."""
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: [list(pair) for pair in pairs])
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        else:
            value, at = decoder.raw_decode(text, at)
            yield value


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Iterable[dict[str, Any]], delimiter: str = ",") -> str:
    file = io.StringIO()
    names = ["video", "caption", "key", "video_id", "start", "end"]
    writer = csv.DictWriter(file, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


SPLITS: tuple[tuple[Dataset, str], ...] = (
    ("msrvtt", "train-9k"),
    ("msrvtt", "test-1ka"),
    ("msvd", "train"),
    ("didemo", "train"),
    ("activitynet", "train"),
)


class Benchmarks(Target):
    """The published files of benchmarks, among them a pickle."""

    name = "benchmarks"
    share = 0.06

    @classmethod
    def make(cls, folder: Path) -> None:
        ids = [f"video{number}" for number in range(4)]
        sentences = [{"caption": text, "video_id": ids[n % 4]} for n, text in enumerate(CAPTIONS)]
        words = {name: [text.split() for text in CAPTIONS] for name in ids}
        described = [{"video": name, "description": text} for name in ids for text in CAPTIONS[:2]]
        told = {name: {"duration": 5.0, "sentences": list(CAPTIONS)} for name in ids}
        key = "key,vid_key,video_id,sentence\n"
        files: dict[str, str | bytes] = {
            "msrvtt+MSRVTT_data.json": json.dumps({"sentences": sentences}),
            "msrvtt+MSRVTT_train.9k.csv": "video_id\n" + "\n".join(ids) + "\n",
            "msrvtt+MSRVTT_JSFUSION_test.csv": key
            + "".join(f'ret{n},msr{n},{name},"{CAPTIONS[0]}"\n' for n, name in enumerate(ids)),
            "msvd+train_list.txt": "\n".join(ids),
            "msvd+raw-captions.pkl": pickle.dumps(words, protocol=4),
            "msvd+raw-captions.2.pkl": pickle.dumps(words, protocol=0),
            "didemo+train_list.txt": "\n".join(ids),
            "didemo+train_data.json": json.dumps(described),
            "activitynet+train_ids.json": json.dumps(ids),
            "activitynet+train.json": json.dumps(told),
        }
        for name, content in files.items():
            raw = content.encode() if isinstance(content, str) else content
            (folder / SEEDS / name).write_bytes(raw)

    def prepare(self) -> None:
        for seed, content in self.seeds.items():
            path = self._path(seed)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    def _path(self, seed: str) -> Path:
        return self.scratch.joinpath(*seed.replace(".2.pkl", ".pkl").split("+"))

    def mutate(self, seed: str, chance: Random) -> bytes:
        content = self.seeds[seed]
        if seed.endswith(".pkl"):
            return mutate_bytes(content, chance, self.donors)
        change = mutate_json_file if seed.endswith(".json") else mutate_text
        return change(content, chance, self.donors)

    def check(self, seed: str, content: bytes) -> str:
        path = self._path(seed)
        path.write_bytes(content)
        outcomes = []
        try:
            for dataset, split in SPLITS:
                if dataset == seed.partition("+")[0]:
                    outcomes.append(_read_split(dataset, split, path.parent))
        finally:
            path.write_bytes(self.seeds[seed])
        return max(outcomes)  # READ is the first by the alphabet


def _read_split(dataset: Dataset, split: str, folder: Path) -> str:
    try:
        selection = read_benchmark(dataset, split, annotations=str(folder), videos=str(folder))
    except ValueError as error:
        return documented(error, str(folder))
    check_clips(selection.clips)
    selection.summary()
    return READ
