"""The command lines of `tvr verify` and `tvr stats`.

Exit codes: 0 done; 2 bad usage or no data set to read; 3 verify found problems.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from tvr.data_prep.check.captions import LONG_WORDS, CaptionStatistics
from tvr.data_prep.check.distribution import readable
from tvr.data_prep.check.sequential_reads import JOBS, OnBytes
from tvr.data_prep.check.stats import (
    BATCH,
    DatasetStatistics,
    dataset_statistics,
    read_facts,
    shared_captions,
)
from tvr.data_prep.check.verify import VerifyReport, leak_problems, verify_dataset
from tvr.data_prep.cli_errors import STRICT, run_command
from tvr.data_prep.dataset.manifest import read_manifest
from tvr.launchers.atomic_write import write_atomically

Against = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class VerifyArguments:
    """Verifies a packed data set against its manifest, every byte and every sample. Can also check
    that it shares no sample with other data sets. Exit code 3 if there are problems."""

    url: Annotated[str, tyro.conf.Positional]
    """Folder or fsspec URL of the data set."""
    against: Against = ()
    """Data set that must share no sample with this one, such as the training set of a test set.
    Samples are compared by key, video_id and content. May be given several times."""
    compare_captions: bool = True
    """Read the samples of those data sets as well, to count captions in common (not a problem)."""
    decode: int = 32
    """Samples, evenly spaced, whose frames are decoded as well; 0 = none."""
    jobs: int = JOBS
    """Shards to read in parallel."""
    max_shown: int = 50
    """Problems to print."""
    json: str | None = None
    """File for the whole report as JSON; - = standard output, instead of text."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class StatsArguments:
    """Writes one HTML page about a packed data set: sample frames, histograms, totals, and captions
    that several videos have."""

    url: Annotated[str, tyro.conf.Positional]
    """Folder or fsspec URL of the data set."""
    out: str = "stats.html"
    """File to write."""
    against: Against = ()
    """Data set that must share no sample with this one. May be given several times."""
    samples: int | None = None
    """Samples to read, evenly spaced; default: all."""
    pictures: int = 12
    """Samples to show, evenly spaced; 0 = none."""
    jobs: int = JOBS
    """Shards to read in parallel."""
    json: str | None = None
    """File for the statistics as JSON; - = standard output, instead of text."""


def verify(argv: Sequence[str]) -> int:
    """Runs `tvr verify`; returns the exit code."""
    return run_command(
        "tvr verify", lambda: _verify(tyro.cli(VerifyArguments, prog="tvr verify", args=argv))
    )


def stats(argv: Sequence[str]) -> int:
    """Runs `tvr stats`; returns the exit code."""
    return run_command(
        "tvr stats", lambda: _stats(tyro.cli(StatsArguments, prog="tvr stats", args=argv))
    )


def _verify(arguments: VerifyArguments) -> int:
    with _progress_bar() as on_bytes:
        report = verify_dataset(
            arguments.url,
            decode=arguments.decode,
            against=arguments.against,
            compare_captions=arguments.compare_captions,
            jobs=arguments.jobs,
            on_bytes=on_bytes,
        )
    text = json.dumps(asdict(report), indent=1)
    if arguments.json == "-":
        print(text)
    else:
        if arguments.json is not None:
            write_atomically(Path(arguments.json), text + "\n")
        _print_report(report, arguments.max_shown)
    return 3 if report.problems else 0


def _print_report(report: VerifyReport, max_shown: int) -> None:
    print(
        f"{report.url}: {report.num_samples} samples in {report.num_shards} shards,"
        f" {report.num_bytes / 1e6:.1f} MB hashed, {report.num_decoded} samples decoded:"
        f" {len(report.problems) or 'no'} problems"
    )
    print("\n".join(_caption_lines(report.captions)))
    for common in report.common_captions:
        unread = (
            f" ({common.num_unread} of its samples could not be read)" if common.num_unread else ""
        )
        print(f"captions in common with {common.url}: {common.num_captions:,}{unread}")
    if not report.problems:
        return
    table = Table("where", "problem")
    for problem in report.problems[:max_shown]:
        table.add_row(Text(problem.where), Text(problem.what))
    Console().print(table)
    if len(report.problems) > max_shown:
        print(f"and {len(report.problems) - max_shown} more")


def _caption_lines(captions: CaptionStatistics) -> Iterator[str]:
    words = captions.words
    if words is None:
        return
    yield (
        f"captions: {captions.num_captions:,}, {words.least:.0f} to {words.most:.0f} words,"
        f" median {words.median:g}, 95th percentile {words.p95:g};"
        f" {100 * captions.num_long / captions.num_captions:.1f} % longer than {LONG_WORDS} words"
    )
    yield (
        f"empty captions: {captions.num_empty:,}, repeated within a video:"
        f" {captions.num_repeated:,}, shared by several videos: {captions.num_shared:,}"
    )


def _stats(arguments: StatsArguments) -> int:
    # Importing matplotlib takes a second, and `tvr verify` does not need it.
    from tvr.data_prep.check.stats_page import shown_samples, stats_page

    if arguments.pictures < 0:
        raise ValueError(f"pictures={arguments.pictures} must be 0 or more")
    manifest = read_manifest(arguments.url)
    problems_by_url = {
        other: list(leak_problems(manifest, other, read_manifest(other)))
        for other in arguments.against
    }
    with _progress_bar() as on_bytes:
        facts = read_facts(
            arguments.url,
            manifest,
            samples=arguments.samples,
            jobs=arguments.jobs,
            on_bytes=on_bytes,
        )
    shared = shared_captions(arguments.url, manifest, facts)
    statistics = dataset_statistics(manifest, facts, shared)
    shown = shown_samples(arguments.url, manifest, arguments.pictures)
    write_atomically(
        Path(arguments.out), stats_page(arguments.url, statistics, shown, problems_by_url)
    )
    in_common = {other: len(problems) for other, problems in problems_by_url.items()}
    text = json.dumps(
        {"url": arguments.url, **asdict(statistics), "batch": BATCH, "in_common": in_common},
        indent=1,
    )
    if arguments.json == "-":
        print(text)
        return 0
    if arguments.json is not None:
        write_atomically(Path(arguments.json), text + "\n")
    print(
        f"{arguments.url}: {statistics.num_read:,} of {statistics.num_samples:,} samples read,"
        f" {statistics.num_captions:,} captions of {statistics.num_videos:,} videos;"
        f" see {arguments.out}"
    )
    print("\n".join(_findings(statistics)))
    for other, count in in_common.items():
        print(f"samples in common with {other}: {count:,} pairs")
    return 0


def _findings(statistics: DatasetStatistics) -> Iterator[str]:
    captions = statistics.captions
    if captions.num_captions:
        yield (
            f"captions that another video has as well: {captions.num_sharing:,}"
            f" ({100 * captions.num_sharing / captions.num_captions:.2f} %);"
            f" {readable(statistics.equal_pairs_in_batch)} pairs of them expected in a batch of"
            f" {BATCH:,}"
        )
    if statistics.adjusted:
        counts = ", ".join(f"{count:,} {what}" for what, count in statistics.adjusted.items())
        yield f"shown otherwise than stored: {counts}"
    if unread := sum(statistics.unread.values()):
        yield f"{unread:,} samples could not be read; `tvr verify` lists them"


@contextmanager
def _progress_bar() -> Iterator[OnBytes]:
    """Shows the bytes read on stderr, if it is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        yield lambda done, total: progress.update(task, completed=done, total=total)
