"""Packs clips into WebDataset tar shards with a manifest, in any number of processes and tasks.

The same clips and settings give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice

from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.manifest import Layout, Manifest, concat_samples, read_manifest
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.pack_clip import RefusedClip
from tvr.data_prep.packing.plan import PackPlan, PackSettings, make_plan
from tvr.data_prep.packing.shard_record import ShardRecord
from tvr.data_prep.packing.words import WordTagger, tagger_name
from tvr.data_prep.packing.worker_pool import PackedClip, pack_clips
from tvr.data_prep.records import Clip


@dataclass(frozen=True, slots=True, kw_only=True)
class PackProgress:
    """Progress of one packing task."""

    num_done: int
    """Clips in shards that were already complete, plus clips packed or refused by this call."""
    num_clips: int
    """Clips of the task."""
    num_bytes: int
    """Sample bytes packed by this call."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Clips refused by this call, by reason."""
    adjusted: Mapping[str, int] = field(default_factory=dict)
    """Clips packed by this call whose pictures are shown otherwise than stored, by ADJUSTMENTS."""


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
    """Packs clips into a data set.

    Writes `shard-NNNNNN.tar`, `samples.npz`, `bad.jsonl` and, last, `manifest.json`. The data set
    exists once `manifest.json` does; a data set that is overwritten stays readable until then.

    An interrupted packing resumes if the call is repeated with the same clips and settings. With
    several tasks, each task packs its share of the shards, and the task that completes the last
    shard publishes the data set.

    Args:
        url: Output folder, a path or fsspec URL.
        layout: "frames" stores `num_frames` JPEGs a clip. "video" stores the source MP4 after
            decoding it once, or with `reencode` an H.264 copy with a keyframe every
            `keyframe_interval` frames.
        short_side: Pixels of the shorter side; None keeps the source's size.
        samples_per_shard: Clips per shard; a shard with bad clips holds fewer samples.
        max_bad: Clips, over all tasks, that may be refused.
        words: Tag the words of captions, as `data.word_drop` and `data.content_words` need.
        overwrite: Replace a complete data set, or an unfinished packing with another plan.
        task: Number of this task, from 0 to `num_tasks` - 1.

    Returns:
        The manifest of the published data set; None if other tasks have shards left.

    Raises:
        TooManyBadSamples: more than `max_bad` clips were refused. Nothing is published; complete
            shards stay, so that a larger `max_bad` resumes.
        FileExistsError: `url` holds another complete data set and `overwrite` is false.
        ValueError: a setting is out of range, a key is invalid or not unique, `url` holds an
            unfinished packing with another plan, or no clip is usable.
        ChildProcessError: a clip's packing process was killed twice.
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
    _check_arguments(plan, url, processes, task, num_tasks)
    output = OutputDir(url, plan)
    if output.claim(overwrite=overwrite):
        return read_manifest(url)
    packing = _PackTask(plan, output, budget, on_progress)
    try:
        with output.ignore_files_removed_by_publisher():
            if packing.pack_missing(plan.task_shards(task, num_tasks), processes):
                return packing.publish_if_complete()
        return read_manifest(url)
    except BaseException:
        if num_tasks == 1:
            output.discard_if_empty()
        raise


def _check_arguments(plan: PackPlan, url: str, processes: int, task: int, num_tasks: int) -> None:
    if not plan.clips:
        raise ValueError(f"no usable clip to pack to {url}: no clip at all")
    if not 0 <= task < num_tasks:
        raise ValueError(f"task={task} must be from 0 to {num_tasks - 1}, num_tasks={num_tasks}")
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    urls = (url, *(clip.video for clip in plan.clips))
    in_memory = next((each for each in urls if "memory://" in each), "")
    if in_memory and processes > 1:
        raise ValueError(
            f"processes={processes} must be 1 (--processes 1) with {in_memory}: processes do not"
            " share memory:// files"
        )


class _PackTask:
    """Packs the shards of one task and publishes the data set when all shards are complete."""

    def __init__(
        self,
        plan: PackPlan,
        output: OutputDir,
        budget: BadSampleBudget,
        on_progress: Callable[[PackProgress], object],
    ) -> None:
        self._plan = plan
        self._output = output
        self._budget = budget
        self._on_progress = on_progress
        self._counted_shards: set[int] = set()
        self._num_done = self._num_clips = self._num_bytes = 0
        self._refused: Counter[str] = Counter()
        self._adjusted: Counter[str] = Counter()

    def pack_missing(self, shards: range, processes: int) -> bool:
        """Packs the incomplete ones of `shards`.

        Returns False if another process has completed the data set meanwhile.
        """
        complete = self._complete_shards()
        sizes = {number: len(self._plan.shard_clips(number)) for number in shards}
        missing = [number for number in shards if number not in complete]
        num_missing = sum(sizes[number] for number in missing)
        self._num_clips = sum(sizes.values())
        self._num_done = self._num_clips - num_missing
        self._report_progress()
        clips = chain.from_iterable(self._plan.shard_clips(number) for number in missing)
        processes = min(processes, max(1, num_missing))
        settings = self._plan.settings
        # Built from all clips, so that every task computes the same word weights.
        tagger = WordTagger(self._plan.clips) if settings.words and missing else None
        with closing(pack_clips(clips, settings, processes, tagger)) as packed:
            for number in missing:
                with self._output.open_shard(number) as shard:
                    for outcome in islice(packed, sizes[number]):
                        self._count(outcome)
                        shard.append(outcome)
                    if not shard.commit():
                        return False
                self._count_bad(self._output.recorded_shards())
        return True

    def publish_if_complete(self) -> Manifest | None:
        """Publishes the data set if all shards are complete; None if some are missing."""
        records = list(self._complete_shards().values())
        if len(records) < self._plan.num_shards:
            return None if self._output.is_active() else read_manifest(self._output.url)
        bad = [entry for record in records for entry in record.bad]
        manifest = self._manifest([record for record in records if record.samples], bad)
        self._output.publish(manifest, bad)
        return manifest

    def _manifest(self, records: list[ShardRecord], bad: list[RefusedClip]) -> Manifest:
        refused = dict(sorted(Counter(entry.reason for entry in bad).items()))
        if not records:
            raise ValueError(f"no usable clip to pack to {self._output.url}; refused: {refused}")
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
            generation=self._output.generation,
        )

    def _complete_shards(self) -> dict[int, ShardRecord]:
        records = self._output.complete_shards()
        self._count_bad(records)
        return records

    def _count_bad(self, records: dict[int, ShardRecord]) -> None:
        """Charges the bad clips of complete shards, of any task, to the budget."""
        for number in sorted(records.keys() - self._counted_shards):
            self._counted_shards.add(number)
            for entry in records[number].bad:
                self._budget.record_bad(entry.key, entry.reason, entry.detail)

    def _count(self, outcome: PackedClip) -> None:
        """Counts one clip and reports the progress."""
        self._num_done += 1
        if isinstance(outcome, RefusedClip):
            self._refused[outcome.reason] += 1
            self._budget.record_bad(outcome.key, outcome.reason, outcome.detail)
        else:
            self._num_bytes += len(outcome.stored)
            self._adjusted.update(outcome.adjusted)
        self._report_progress()

    def _report_progress(self) -> None:
        self._on_progress(
            PackProgress(
                num_done=self._num_done,
                num_clips=self._num_clips,
                num_bytes=self._num_bytes,
                refused=dict(self._refused),
                adjusted=dict(self._adjusted),
            )
        )
