"""Reads stored evaluations, and brings those of one test set into one order of queries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvr.trainer.checkpoint.resume_rules import rule_of
from tvr.trainer.run_files import CONFIG, EVALUATION, named_settings

DIRECTIONS = ("text_to_video", "video_to_text")
SEED = "train.seed"
_LABEL_LENGTH = 80


@dataclass(frozen=True, slots=True)
class RankedQueries:
    """The queries of one direction, in an order that does not depend on the number of ranks."""

    names: tuple[tuple[str, str], ...]
    """Key of the video and caption; the caption is empty from video to text."""
    ranks: NDArray[np.int64]

    @property
    def videos(self) -> list[str]:
        """Video of each query: queries of one video are not independent."""
        return [key for key, _ in self.names]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvaluation:
    """An evaluation as evaluation.json and `tvr evaluate --json` store it."""

    name: str
    """The path as it was given."""
    step: int | None
    videos: int
    """Size of the gallery."""
    protocol: Mapping[str, Any]
    """What decides about ranks: the name, and the rule for equal captions; may be empty."""
    directions: Mapping[str, RankedQueries]
    """text_to_video, and video_to_text if the file has the ranks of that direction."""
    settings: Mapping[str, Any] | None
    """All settings of its run by full name; None if there is no config.json beside the file."""


def read_evaluation(path: Path) -> StoredEvaluation:
    """Reads the results of a run, or of a file.

    Args:
        path: Folder of a run, whose evaluation.json is read, or a JSON file of `tvr evaluate`.

    Raises:
        ValueError: there are no results, or the file has no ranks of queries; names the file.
    """
    file = path / EVALUATION if path.is_dir() else path
    if not file.is_file():
        advice = f"run `tvr evaluate --run-dir {path}` first" if path.is_dir() else "no such file"
        raise ValueError(f"{file}: {advice}")
    content = _json(file)
    if not isinstance(content, dict) or not content.get("queries"):
        raise ValueError(
            f"{file} holds no ranks of queries: give an evaluation.json, or a file of"
            " `tvr evaluate --json`"
        )
    videos, step = content.get("videos"), content.get("step")
    if type(videos) is not int or videos < 1:
        raise ValueError(f"{file}: videos is {videos!r}, must be the number of videos, from 1")
    if step is not None and type(step) is not int:
        raise ValueError(f"{file}: step is {step!r}, must be an integer or null")
    texts = _ranked(content["queries"], "caption", f"{file}: queries", videos)
    directions = {"text_to_video": texts}
    if content.get("video_queries"):
        found = _ranked(content["video_queries"], None, f"{file}: video_queries", len(texts.names))
        directions["video_to_text"] = found
    return StoredEvaluation(
        name=str(path),
        step=step,
        videos=videos,
        protocol=_protocol(content.get("protocol"), file),
        directions=directions,
        settings=_settings(file.parent / CONFIG),
    )


def check_same_queries(runs: Sequence[StoredEvaluation]) -> None:
    """Checks that all runs were evaluated on the same queries and as many videos.

    Raises:
        ValueError: they were not; names the first difference.
    """
    first = runs[0]
    for run in runs[1:]:
        both = f"{first.name} and {run.name} are not of one test set"
        if run.videos != first.videos:
            raise ValueError(f"{both}: {first.videos:,} and {run.videos:,} videos")
        # Files of earlier releases name no protocol; theirs is told by the captions.
        if first.protocol and run.protocol and first.protocol != run.protocol:
            raise ValueError(f"{both}: protocols {first.protocol!r} and {run.protocol!r}")
        for direction in DIRECTIONS:
            if direction in first.directions and direction in run.directions:
                _check_names(first.directions[direction], run.directions[direction], both)


def seed_groups(runs: Sequence[StoredEvaluation]) -> tuple[str, ...]:
    """Names a group for each run: runs have the same one if only their seed differs.

    The settings in config.json must be equal, except `train.seed` and those on which no result
    depends (rules of the kind "free", and the place of the checkpoints). The name of a group is
    that of its first run.

    Raises:
        ValueError: a run has no config.json, or two runs of a group have the same seed.
    """
    names: list[str] = []
    for place, run in enumerate(runs):
        if run.settings is None:
            raise ValueError(
                f"{run.name} has no {CONFIG} beside it, so its seed is not known; name the groups"
                " with --group"
            )
        same = [one for one in range(place) if _without_seed(runs[one]) == _without_seed(run)]
        for one in same:
            if _seed(runs[one]) == _seed(run):
                raise ValueError(
                    f"{runs[one].name} and {run.name} have the same settings and the same"
                    f" {SEED}={_seed(run)}: leave one of them out"
                )
        names.append(names[same[0]] if same else run.name)
    return tuple(names)


def _seed(run: StoredEvaluation) -> Any:
    return (run.settings or {}).get(SEED)


def _without_seed(run: StoredEvaluation) -> dict[str, Any]:
    settings = run.settings or {}
    return {name: value for name, value in settings.items() if _decides(name)}


def _decides(setting: str) -> bool:
    """True if results may depend on a setting other than the seed."""
    if setting in (SEED, "checkpoint.url"):
        return False
    try:
        return rule_of(setting).kind != "free"
    except KeyError:
        return True  # of another release


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{file} is no JSON: {error}") from error


def _protocol(stored: Any, file: Path) -> dict[str, Any]:
    if stored is not None and not isinstance(stored, dict):
        raise ValueError(f"{file}: protocol is {type(stored).__name__}, must be an object or null")
    names = ("name", "equal_captions")
    return {name: stored[name] for name in names if name in stored} if stored else {}


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        content = _json(path)
    except FileNotFoundError:
        return None
    return dict(named_settings(content)) if isinstance(content, dict) else None


def _ranked(rows: Any, caption: str | None, where: str, last: int) -> RankedQueries:
    found = sorted(_rows(rows, caption, where, last))
    return RankedQueries(
        tuple((key, text) for key, text, _ in found),
        np.array([rank for _, _, rank in found], dtype=np.int64),
    )


def _rows(rows: Any, caption: str | None, where: str, last: int) -> Iterator[tuple[str, str, int]]:
    """Key, caption and rank of each query; `last` is the largest rank."""
    if not isinstance(rows, list):
        raise ValueError(f"{where} must be a list, is {type(rows).__name__}")
    for number, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        key, rank = row.get("key"), row.get("rank")
        text = row.get(caption) if caption is not None else ""
        if not (isinstance(key, str) and isinstance(text, str)):
            raise ValueError(f"{where}[{number}] has no key or no caption")
        if type(rank) is not int or not 1 <= rank <= last:
            raise ValueError(
                f"{where}[{number}]: rank is {rank!r}, must be an integer from 1 to {last}"
            )
        yield key, text, rank


def _check_names(first: RankedQueries, other: RankedQueries, both: str) -> None:
    if len(first.names) != len(other.names):
        both += f": {len(first.names):,} and {len(other.names):,} queries"
    for one, two in zip(first.names, other.names, strict=False):
        if one != two:
            raise ValueError(f"{both}; the first difference is {_label(one)} and {_label(two)}")
    if len(first.names) != len(other.names):
        longer = first if len(first.names) > len(other.names) else other
        extra = longer.names[min(len(first.names), len(other.names))]
        raise ValueError(f"{both}; the first that one of them lacks is {_label(extra)}")


def _label(name: tuple[str, str]) -> str:
    key, caption = name
    return repr(f"{key}: {caption}"[:_LABEL_LENGTH]) if caption else repr(key[:_LABEL_LENGTH])
