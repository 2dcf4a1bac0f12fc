"""The command line of `tvr explain`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from tvr.launchers.atomic_write import write_atomically
from tvr.launchers.exit_codes import EXIT_DONE
from tvr.trainer.exit_reporting import run_training_command

DEFAULT_PAGE = Path("explanation.html")

Source: TypeAlias = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Text: TypeAlias = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION")]


def explain(argv: Sequence[str]) -> int:
    """`tvr explain`."""

    def arguments(
        source: Source,
        caption: Text = None,
        *,
        video: Path | None = None,
        data: str | None = None,
        key: str | None = None,
        checkpoint: str = "newest",
        num_frames: int | None = None,
        hardest: int | None = None,
        between: tuple[int, int] | None = None,
        out: Path = DEFAULT_PAGE,
        json: Path | None = None,
    ) -> int:
        """Writes a page that explains why a video has its similarity to a caption.

        The video is a file (--video) or a sample of a packed data set (--data and --key). With
        --hardest the page shows the captions of a test set that a wrong video beats by most.

        Args:
            source: Folder of a run, of `tvr export`, or of towers as model.pretrained takes them.
            caption: The text. None: the first caption of the sample.
            video: Video file.
            data: Data set that `tvr pack` or `tvr adopt` wrote. None: the test set of the run.
            key: Key of the sample in the data set.
            checkpoint: Of a run: newest, best, or the number of a step.
            num_frames: Frames per video. None: as the model was trained; 12 for a plain folder.
            hardest: Number of hard captions to show, instead of one pair.
            between: With --hardest: two steps of the run; the page shows how each caption's
                similarities moved from the first to the second.
            out: The page to write.
            json: Also writes all numbers to this file.
        """
        if hardest is not None:
            given = [name for name, value in (("CAPTION", caption), ("--video", video)) if value]
            given += ["--key"] if key is not None else []
            if given:
                raise ValueError(f"--hardest {hardest} takes no {' and no '.join(given)}")
            content = _hardest(source, data, checkpoint, num_frames, hardest, between, out)
        else:
            if between is not None:
                raise ValueError(f"--between {between[0]} {between[1]} needs --hardest")
            content = _explain(source, caption, video, data, key, checkpoint, num_frames, out)
        if json is not None:
            _write_json(json, content)
        print(out)
        return EXIT_DONE

    return run_training_command(
        "explain", lambda: tyro.cli(arguments, prog="tvr explain", args=list(argv))
    )


def _explain(
    folder: Path,
    caption: str | None,
    video: Path | None,
    data: str | None,
    key: str | None,
    checkpoint: str,
    num_frames: int | None,
    out: Path,
) -> dict[str, Any]:
    if (video is None) == (key is None):
        raise ValueError("give --video FILE, or --key KEY with --data SET")
    if video is not None and (data is not None or caption is None):
        raise ValueError(f"--video {video} needs a CAPTION, and takes no --data")
    from tvr.trainer.checkpoint.choice import parse_choice
    from tvr.trainer.evaluation.model_source import load_source
    from tvr.trainer.explanation.explanation import explain as explained
    from tvr.trainer.explanation.explanation import explanation_page
    from tvr.trainer.explanation.videos import frames_of_file, sample_of, test_set_of

    source = load_source(folder, parse_choice(checkpoint), num_frames=num_frames)
    if video is not None:
        title, text = video.name, caption or ""
        frames, times = frames_of_file(source, video)
    else:
        sample = sample_of(source, test_set_of(source, data), key or "")
        # A caption of the sample itself brings its words, which a model may need.
        own = [each for each in sample.captions if caption in (None, each.text)]
        text = own[0] if own else caption or ""
        title, frames, times = sample.key, sample.frames, sample.frame_times_s
    found = explained(source, text, frames, frame_times=times)
    write_atomically(out, explanation_page(found, frames, title=title))
    for part, value in {"similarity": found.score, **found.parts}.items():
        print(f"{part.replace('_', ' '):<20}{value:8.4f}")
    return found.to_json()


def _hardest(
    folder: Path,
    data: str | None,
    checkpoint: str,
    num_frames: int | None,
    count: int,
    between: tuple[int, int] | None,
    out: Path,
) -> dict[str, Any]:
    if count < 1:
        raise ValueError(f"--hardest {count} must be at least 1")
    if between is not None and checkpoint != "newest":
        raise ValueError(f"--between names the checkpoints: leave out --checkpoint {checkpoint}")
    from tvr.trainer.checkpoint.choice import parse_choice
    from tvr.trainer.evaluation.cli import ProgressLines
    from tvr.trainer.evaluation.model_source import load_source
    from tvr.trainer.explanation import hardest as hard
    from tvr.trainer.explanation.videos import strips_of, test_set_of

    choice = between[1] if between else parse_choice(checkpoint)
    source = load_source(folder, choice, num_frames=num_frames)
    # Loaded before anything is encoded, which takes long: the step may not be there.
    earlier = load_source(folder, between[0], num_frames=num_frames) if between else None
    url = test_set_of(source, data)
    lines = ProgressLines()

    def report(done: int, total: int, bad: int) -> None:
        if lines.is_due():
            lines.write(f"encoded {done:,} of {total:,} videos", done, f", {bad} left out")

    found = hard.hard_negatives(source, url, report=report)
    moved = None
    if earlier is not None:
        lines = ProgressLines()
        moved = hard.movements(hard.hard_negatives(earlier, url, report=report), found)
    page = hard.hardest_page(
        found, count, title=source.name, strips=strips_of(source, url), moved=moved, steps=between
    )
    write_atomically(out, page)
    print(hard.hardest_table(found, count, moved))
    content = hard.hardest_json(found, count, moved)
    return {"model": source.name, "data": url, "steps": between, **content}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
