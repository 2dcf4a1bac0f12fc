"""Clips -> WebDataset tar shards with a manifest, by any number of processes and tasks. The same
clips and settings give the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.manifest import Layout, Manifest, concat_samples, read_manifest
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.packing.plan import PackSettings, Plan, make_plan
from tvr.data_prep.packing.shard_record import ShardRecord
from tvr.data_prep.packing.words import WordTagger, tagger_name
from tvr.data_prep.packing.worker_pool import Outcome, packed_clips
from tvr.data_prep.records import Clip


@dataclass(frozen=True, slots=True, kw_only=True)
class PackProgress:
    """How far a packing is."""

    num_done: int
    """Clips of this task in shards that were complete already, and those packed now."""
    num_clips: int
    """Of this task."""
    num_bytes: int
    """Packed now."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Clips refused now, by reason."""


def pack_shards(
    clips: Iterable[Clip],
    url: str,
    *,
    layout: Layout,
    num_frames: int = 12,
    short_side: int | None = None,
    jpeg_quality: int = 90,
    samples_per_shard: int = 1000,
    max_bad: int = 0,
    reencode: bool = False,
    keyframe_interval: int = 16,
    words: bool = False,
    overwrite: bool = False,
    processes: int = 1,
    task: int = 0,
    num_tasks: int = 1,
    on_progress: Callable[[PackProgress], object] = lambda progress: None,
) -> Manifest | None:
    """Writes `shard-NNNNNN.tar`, `samples.npz`, `bad.jsonl` and, last, `manifest.json` to a folder
    or fsspec URL. There is no data set before that; one that is overwritten stays until then.

    frames layout: `num_frames` JPEGs a clip. video layout: the source MP4's bytes after decoding
    them once, or with `reencode` an H.264 copy with a keyframe every `keyframe_interval` frames.
    `short_side` in pixels. `words` finds the words of captions, for `data.word_drop` and
    `data.content_words`. A shard holds the good ones of `samples_per_shard` clips.

    A packing that was ended goes on where it stopped if the same clips and settings come again. Of
    several tasks, each makes its share of the shards; the one that finds all complete publishes the
    data set, the others return None. With one task that is this call, whoever made the shards.

    Raises:
        TooManyBadSamples: more than `max_bad` clips of all tasks were refused; no data set comes
            of it, though complete shards wait for a larger `max_bad`.
        FileExistsError: another complete data set is there and `overwrite` is false.
        ValueError: a setting out of range, a bad or duplicate key, an unfinished packing of
            something else in the folder, or no usable clip.
        ChildProcessError: a clip's process was killed twice.
    """
    settings = PackSettings(
        layout=layout,
        num_frames=num_frames,
        short_side=short_side,
        jpeg_quality=jpeg_quality,
        samples_per_shard=samples_per_shard,
        reencode=reencode,
        keyframe_interval=keyframe_interval,
        words=words,
    )
    budget = BadSampleBudget(max_bad, f"while packing {url}")
    plan = make_plan(clips, settings)
    _check(plan, url, processes, task, num_tasks)
    folder = OutputDir(url, plan)
    if folder.claim(overwrite=overwrite):
        return read_manifest(url)
    run = _Run(plan, folder, budget, on_progress)
    try:
        with folder.completed_by_others():
            if run.make(plan.share(task, num_tasks), processes):
                return run.published()
        return read_manifest(url)
    except BaseException:
        if num_tasks == 1:
            folder.abandon()
        raise


def _check(plan: Plan, url: str, processes: int, task: int, num_tasks: int) -> None:
    if not plan.clips:
        raise ValueError(f"no usable clip to pack to {url}: no clip at all")
    if not 0 <= task < num_tasks:
        raise ValueError(f"task={task} must be from 0 to {num_tasks - 1}, num_tasks={num_tasks}")
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    here = next(
        (place for place in (url, *(c.video for c in plan.clips)) if "memory://" in place), ""
    )
    if here and processes > 1:
        raise ValueError(
            f"processes={processes} must be 1 (--processes 1) with {here}: other processes have"
            " other memories"
        )


class _Run:
    """What one task does."""

    def __init__(
        self,
        plan: Plan,
        folder: OutputDir,
        budget: BadSampleBudget,
        on_progress: Callable[[PackProgress], object],
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._budget = budget
        self._on_progress = on_progress
        self._counted: set[int] = set()
        self._num_done = self._num_clips = self._num_bytes = 0
        self._refused: Counter[str] = Counter()

    def make(self, share: range, processes: int) -> bool:
        """Makes those shards of a share that are missing; False where the data set was completed
        meanwhile."""
        complete = self._complete()
        sizes = {number: len(self._plan.shard_clips(number)) for number in share}
        missing = [number for number in share if number not in complete]
        to_do = sum(sizes[number] for number in missing)
        self._num_clips = sum(sizes.values())
        self._num_done = self._num_clips - to_do
        self._tell()
        clips = chain.from_iterable(self._plan.shard_clips(number) for number in missing)
        processes = min(processes, max(1, to_do))
        settings = self._plan.settings
        # Of all clips, so that each task weighs words alike.
        tagger = WordTagger(self._plan.clips) if settings.words and missing else None
        with closing(packed_clips(clips, settings, processes, tagger)) as outcomes:
            for number in missing:
                if not self._folder.write_shard(
                    number, self._told(islice(outcomes, sizes[number]))
                ):
                    return False
                self._spend(self._folder.known_records())
        return True

    def published(self) -> Manifest | None:
        """The data set, published now if all its shards are there."""
        records = list(self._complete().values())
        if len(records) < self._plan.num_shards:
            return None if self._folder.goes_on() else read_manifest(self._folder.url)
        bad = [entry for record in records for entry in record.bad]
        manifest = self._manifest([record for record in records if record.samples], bad)
        self._folder.publish(manifest, bad)
        return manifest

    def _manifest(self, records: list[ShardRecord], bad: list[RefusedClip]) -> Manifest:
        refused = dict(sorted(Counter(entry.reason for entry in bad).items()))
        if not records:
            raise ValueError(f"no usable clip to pack to {self._folder.url}; refused: {refused}")
        settings = self._plan.settings
        samples = concat_samples([record.samples for record in records])
        return Manifest(
            layout=settings.layout,
            num_frames=settings.num_frames if settings.layout == "frames" else 0,
            short_side=settings.short_side,
            num_captions=int(samples.num_captions.sum()),
            num_empty_captions=sum(record.num_empty_captions for record in records),
            bad=refused,
            shards=tuple(record.shard for record in records),
            samples=samples,
            tagger=tagger_name() if settings.words else None,
            fingerprint=self._plan.fingerprint,
            generation=self._folder.generation,
        )

    def _complete(self) -> dict[int, ShardRecord]:
        records = self._folder.records()
        self._spend(records)
        return records

    def _spend(self, records: dict[int, ShardRecord]) -> None:
        """Counts the bad clips of complete shards, whoever made them, against the budget."""
        for number in sorted(records.keys() - self._counted):
            self._counted.add(number)
            for entry in records[number].bad:
                self._budget.record_bad(entry.key, entry.reason, entry.detail)

    def _told(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """The outcomes, counted."""
        for outcome in outcomes:
            self._num_done += 1
            if isinstance(outcome, RefusedClip):
                self._refused[outcome.reason] += 1
                self._budget.record_bad(outcome.key, outcome.reason, outcome.detail)
            else:
                self._num_bytes += len(outcome.stored)
            self._tell()
            yield outcome

    def _tell(self) -> None:
        self._on_progress(
            PackProgress(
                num_done=self._num_done,
                num_clips=self._num_clips,
                num_bytes=self._num_bytes,
                refused=dict(self._refused),
            )
        )
