"""Packs clips into WebDataset tar shards with a manifest, in any number of processes and tasks.

The same clips and settings give the same bytes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from tvr.data_prep.annotations.clip_source import AnnotationFile, ClipList
from tvr.data_prep.budget import BadSampleBudget
from tvr.data_prep.dataset.manifest import Layout, Manifest, concat_samples, read_manifest
from tvr.data_prep.limited_process import ProcessLimits
from tvr.data_prep.packing.open_shard import OpenShard
from tvr.data_prep.packing.output_dir import OutputDir
from tvr.data_prep.packing.pack_clip import RefusedClip, refusals_text
from tvr.data_prep.packing.plan import PackPlan, PackSettings
from tvr.data_prep.packing.plan_build import OnPlan, check_packable
from tvr.data_prep.packing.planning import claim_plan
from tvr.data_prep.packing.shard_record import ShardRecord
from tvr.data_prep.packing.words import WordTagger, tagger_name
from tvr.data_prep.packing.worker_pool import PackedClip, pack_clips
from tvr.data_prep.records import Clip, RefusedRow
from tvr.data_prep.video.frame_sampling import FrameSpacing

__all__ = ["AnnotationFile", "PackProgress", "pack_shards"]

# Looking at the shards of other tasks may take this share of the time.
LOOK_SHARE = 0.1
# Where SLURM names the array, also for a task that it starts again.
LAUNCH_VARIABLE = "SLURM_ARRAY_JOB_ID"


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
    clips: Iterable[Clip | RefusedRow] | AnnotationFile,
    url: str,
    *,
    layout: Layout,
    num_frames: int = 12,
    frame_spacing: FrameSpacing = "time",
    short_side: int | None = None,
    jpeg_quality: int = 90,
    samples_per_shard: int = 1000,
    shard_bytes: int = 1 << 30,
    shuffle_seed: int | None = None,
    max_bad: int = 0,
    reencode: bool = False,
    keyframe_interval: int = 16,
    words: bool = False,
    overwrite: bool = False,
    processes: int = 1,
    limits: ProcessLimits | None = None,
    task: int = 0,
    num_tasks: int = 1,
    packing_id: str | None = None,
    plan_only: bool = False,
    on_plan: OnPlan = lambda step, done: None,
    on_progress: Callable[[PackProgress], object] = lambda progress: None,
) -> Manifest | None:
    """Packs clips into a data set.

    Writes `shard-NNNNNN.tar`, `samples.rows`, `bad.jsonl` and, last, `manifest.json`. The data set
    exists once `manifest.json` does; a data set that is overwritten stays readable until then.

    The first task reads the clips and stores the plan of all shards. Other tasks read of it the
    clips of their own shards; of an `AnnotationFile` they hold no others.

    An interrupted packing resumes if the call is repeated with the same clips and settings. With
    several tasks, each task packs its share of the shards, and the task that completes the last
    shard publishes the data set.

    Args:
        clips: Clips in memory and rows that are none, or an annotation file.
        url: Output folder, a path or fsspec URL.
        layout: "frames" stores `num_frames` JPEGs a clip. "video" stores the source MP4 after
            decoding it once, or with `reencode` an H.264 copy with a keyframe every
            `keyframe_interval` frames.
        frame_spacing: How the frames of the layout frames are chosen, see `sample_frames`.
        short_side: Pixels of the shorter side; None keeps the source's size.
        samples_per_shard: Clips per shard; a shard with bad clips holds fewer samples.
        shard_bytes: A shard is split into files of at most this size.
        shuffle_seed: Seed of the order, in which cuts of one video stay together; None keeps it.
        max_bad: Clips and rows of the annotations, over all tasks, that may be refused.
        words: Tag the words of captions, as `data.word_drop` and `data.content_words` need.
        overwrite: Replace a complete data set, or an unfinished packing with another plan.
        processes: Processes that pack; 0, and always in memory://: the caller, without limits.
        limits: Memory and time that a clip may take, or it is refused; see `ProcessLimits`.
        task: Number of this task, from 0 to `num_tasks` - 1.
        packing_id: With `overwrite`, the name that all tasks of one launch have in common. A task
            that starts again after their data set was published does not replace it. Default: the
            job id of the SLURM array.
        plan_only: Store the plan and pack nothing.
        on_plan: Receives the progress of planning.

    Returns:
        The manifest of the published data set; None if shards are left.

    Raises:
        TooManyBadSamples: more than `max_bad` clips and rows were refused. Nothing is published;
            complete shards stay, so that a larger `max_bad` resumes.
        FileExistsError: `url` holds another complete data set and `overwrite` is false.
        ValueError: a setting is out of range, a given clip's key is invalid, `url` holds an
            unfinished packing with another plan, no clip is usable, or several tasks are to
            overwrite without a `packing_id`.
        ChildProcessError: packing processes end before they begin.
    """
    settings = PackSettings(
        layout=layout,
        num_frames=num_frames,
        frame_spacing=frame_spacing,
        short_side=short_side,
        jpeg_quality=jpeg_quality,
        samples_per_shard=samples_per_shard,
        shard_bytes=shard_bytes,
        shuffle_seed=shuffle_seed,
        reencode=reencode,
        keyframe_interval=keyframe_interval,
        words=words,
    )
    budget = BadSampleBudget(max_bad, f"while packing {url}")
    _check_task(processes, task, num_tasks)
    launch = _launch(packing_id, num_tasks, overwrite=overwrite, plan_only=plan_only)
    output = OutputDir(url, overwrite=overwrite, launch=launch)
    with tempfile.TemporaryDirectory(prefix="tvr-pack-") as folder:
        try:
            with output.ignore_files_removed_by_publisher():
                if claim_plan(
                    clips if isinstance(clips, AnnotationFile) else ClipList(clips),
                    settings,
                    output,
                    Path(folder),
                    is_shared=num_tasks > 1 or plan_only,
                    on_plan=on_plan,
                    check=lambda built: check_packable(built.header, url, processes, built.refused),
                    max_bad=max_bad,
                ):
                    return read_manifest(url)
                if plan_only:
                    return None
                plan = output.open_plan(settings, Path(folder))
                processes = check_packable(plan.header, url, processes)
                packing = _PackTask(plan, output, budget, on_progress)
                packing.count_refused_rows(is_reported=task == 0)
                packing.pack_missing(plan.task_shards(task, num_tasks), processes, limits)
                return packing.publish_if_complete()
        except BaseException:
            if num_tasks == 1 and not plan_only:
                output.discard_if_empty()
            raise
    return read_manifest(url)  # another process has published it


def _check_task(processes: int, task: int, num_tasks: int) -> None:
    if not 0 <= task < num_tasks:
        raise ValueError(f"task={task} must be from 0 to {num_tasks - 1}, num_tasks={num_tasks}")
    if processes < 0:
        raise ValueError(f"processes={processes} must be at least 0")


def _launch(
    packing_id: str | None, num_tasks: int, *, overwrite: bool, plan_only: bool
) -> str | None:
    """Returns the name of the launch, by which a task knows what its launch decided."""
    if packing_id is not None:
        return packing_id
    if num_tasks == 1:
        return None  # the same command again means: replace the data set again
    array = os.environ.get(LAUNCH_VARIABLE)
    if overwrite and array is None and not plan_only:
        raise ValueError(
            f"overwrite=True with num_tasks={num_tasks} needs a name that all tasks of this launch"
            " have in common (--packing-id, or a SLURM array): a task that starts again after the"
            " data set was published would replace it otherwise"
        )
    return None if array is None else f"SLURM array {array}"


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
        self._next_look_s = 0.0
        self._num_done = self._num_clips = self._num_bytes = 0
        self._refused: Counter[str] = Counter()
        self._adjusted: Counter[str] = Counter()
        self._bad_rows: list[RefusedClip] = []

    def count_refused_rows(self, *, is_reported: bool) -> None:
        """Charges the plan's refused rows to the budget; one task reports them in its progress."""
        for row in self._plan.refused_rows():
            entry = RefusedClip(key=row.origin, reason="bad_row", detail=row.detail)
            self._bad_rows.append(entry)
            self._budget.record_bad(entry.key, entry.reason, entry.detail)
            self._refused[entry.reason] += is_reported

    def pack_missing(self, shards: range, processes: int, limits: ProcessLimits | None) -> None:
        """Packs the incomplete ones of `shards`."""
        plan, settings = self._plan, self._plan.settings
        complete = self._complete_shards(shards)
        sizes = {number: plan.shard_size(number) for number in shards}
        missing = [number for number in shards if number not in complete]
        num_missing = sum(sizes[number] for number in missing)
        self._num_clips = sum(sizes.values())
        self._num_done = self._num_clips - num_missing
        self._report_progress()
        clips = chain.from_iterable(plan.shard_clips(number) for number in missing)
        processes = min(processes, num_missing)
        # Counts of all clips, so that every task computes the same word weights.
        tagger = WordTagger(plan.word_counts()) if settings.words and missing else None
        with closing(pack_clips(clips, settings, processes, tagger, limits)) as packed:
            for number in missing:
                with OpenShard(self._output, number, settings.shard_bytes) as shard:
                    for outcome in islice(packed, sizes[number]):
                        self._count(outcome)
                        shard.append(outcome)
                    shard.commit()
                self._counted_shards.add(number)
                self._look_at_other_tasks()

    def publish_if_complete(self) -> Manifest | None:
        """Publishes the data set if all shards are complete; None if some are missing."""
        names = self._output.records.names()
        if len(names) < self._plan.num_shards:
            self._output.check_active()
            return None
        whole = self._output.records.read_whole(list(names.values()))
        if len(whole) < self._plan.num_shards:
            return None  # the next start of their task, or of a lone one, packs them
        records = [whole[number] for number in sorted(whole)]
        for number, record in sorted(whole.items()):
            self._count_bad(number, record)
        bad = self._bad_rows + [entry for record in records for entry in record.bad]
        manifest = self._manifest(records, bad)
        rows = self._output.records.rows(names[number] for number in sorted(whole))
        self._output.publish(manifest, bad, rows)
        return read_manifest(self._output.url)

    def _manifest(self, records: list[ShardRecord], bad: list[RefusedClip]) -> Manifest:
        refused = dict(sorted(Counter(entry.reason for entry in bad).items()))
        files = [file for record in records for file in record.files]
        if not files:
            found = refusals_text(bad)
            raise ValueError(f"no usable clip to pack to {self._output.url} {found}")
        settings = self._plan.settings
        return Manifest(
            layout=settings.layout,
            num_frames=settings.num_frames if settings.layout == "frames" else 0,
            short_side=settings.short_side,
            num_captions=sum(file.num_captions for file in files),
            num_empty_captions=sum(record.num_empty_captions for record in records),
            bad=refused,
            shards=tuple(file.shard for file in files),
            samples=concat_samples([]),  # `publish` gets the rows shard by shard
            tagger=tagger_name() if settings.words else None,
            fingerprint=self._plan.fingerprint,
            generation=self._output.generation,
        )

    def _complete_shards(self, shards: range) -> set[int]:
        """Returns those of `shards` that are complete."""
        names = self._output.records.names()
        own = [names[number] for number in shards if number in names]
        whole = self._output.records.read_whole(own)
        for number, record in whole.items():
            self._count_bad(number, record)
        self._count_other_tasks(set(shards))
        return set(whole)

    def _look_at_other_tasks(self) -> None:
        """Charges the bad clips of other tasks, as often as listing them is cheap."""
        start_s = time.monotonic()
        if start_s >= self._next_look_s:
            self._count_other_tasks(set())
            end_s = time.monotonic()
            self._next_look_s = end_s + (end_s - start_s) / LOOK_SHARE

    def _count_other_tasks(self, counted: set[int]) -> None:
        """Charges the bad clips of complete shards, but of those in `counted`, to the budget.

        Only the records whose names tell of bad clips are read.
        """
        for number, name in self._output.records.names().items():
            if name.num_bad and number not in self._counted_shards | counted:
                record = self._output.records.read(name)
                if record is not None:
                    self._count_bad(number, record)

    def _count_bad(self, number: int, record: ShardRecord) -> None:
        if number not in self._counted_shards:
            self._counted_shards.add(number)
            for entry in record.bad:
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
